"""Count what a pass of every network with a configuration takes: writes docs/cost.json; then docs/results.py.

  python docs/cost.py

Multiply-adds of convolutions, linear layers and attention, for one image, counted on networks without memory.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from guided_diffusion.guidance.base import evaluations  # noqa: E402
from guided_diffusion.networks.building import build_classifier, build_upsampler, unfilled  # noqa: E402
from guided_diffusion.runs.prepare import CLASSIFIER_GROUPS, Configs, image_run  # noqa: E402
from guided_diffusion.settings.model import ClassifierConfig, NetworkConfig  # noqa: E402
from guided_diffusion.settings.options import configure  # noqa: E402
from guided_diffusion.settings.scripts import SCRIPTS  # noqa: E402

FILE = ROOT / "docs" / "cost.json"
NOWHERE = torch.device("meta")


def counted(network: nn.Module, *inputs: torch.Tensor, **condition: torch.Tensor) -> dict[str, Any]:
    """Parameters and multiply-adds of a call."""
    with FlopCounterMode(display=False) as counter:
        network(*inputs, **condition)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return {"parameters": parameters, "multiply_adds": counter.get_total_flops() // 2}


def cost(path: Path) -> dict[str, Any]:
    """Of a configuration; with what its run takes an image, where it has a run of its own."""
    text = path.read_text(encoding="utf-8")
    t = torch.zeros(1, device=NOWHERE)

    def image(side: int, channels: int = 3) -> torch.Tensor:
        return torch.zeros(1, channels, side, side, device=NOWHERE)

    if "large_size" in text:
        _, sizes, network, diffusion = configure(SCRIPTS["super_res_sample"].groups, [str(path)], ("cost", {}))
        with unfilled():
            upsampler = build_upsampler(sizes, network, diffusion.learn_sigma)
        y = torch.zeros(1, dtype=torch.int64, device=NOWHERE)
        condition = {"low_res": image(sizes.small_size)} | ({"y": y} if network.class_cond else {})
        return counted(upsampler, image(sizes.large_size), t, **condition)
    if "\nmodel_path" not in text:
        groups = (NetworkConfig, ClassifierConfig)
        network, classifier = configure(groups, [str(path)], ("cost", {}), unread=CLASSIFIER_GROUPS)
        with unfilled():
            built = build_classifier(network.image_size, classifier, network.num_classes)
        return counted(built, image(network.image_size), t)
    configs = Configs.of(configure(CLASSIFIER_GROUPS, [str(path)], ("cost", {"use_fp16": False})))
    pipeline = image_run(configs, NOWHERE, weights=False).pipeline
    network = pipeline.network
    condition = {key: value.to(NOWHERE) for key, value in pipeline.condition(range(1)).items()}
    found = counted(network, torch.zeros(1, *pipeline.x_shape, device=NOWHERE), t, **condition)
    return found | {"evaluations": evaluations(pipeline.guidances, pipeline.num_steps)}


def main() -> None:
    published = [path for path in sorted((ROOT / "configs").glob("*.yaml")) if not path.stem.startswith("emoji")]
    rows = {path.stem: cost(path) for path in published}
    FILE.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
