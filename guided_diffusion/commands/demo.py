"""Self-attention guidance in five minutes: the embedded model, the same noise, without and with guidance.

Settings come from --config emoji, then flags. Writes to runs/demo: comparison.png (unguided | attention mask |
guided), the folders unguided and guided with all samples, and summary.txt with their distances to the training
pictures. All flags of image_sample.py work here too:

  python scripts/demo.py --num_samples 4 --sag_scale 2
"""

import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from evaluations.judge import Settings, judge

from ..runs.prepare import IMAGE_GROUPS, image_run
from ..runs.ranks import Job, command
from ..runs.run import run
from ..settings.guidance import OtherGuidanceConfig
from ..settings.options import exit_on_bad_input, parse_args
from ..settings.shipped import shipped
from ..storage import pictures
from ..storage.files import write_atomically
from ..tables.comparison import MaskCounter

MODELS = shipped("models")
REFERENCES = {"train": "training pictures", "held_out": "held-out pictures"}


def distances(unguided: str, guided: str, cache: Path) -> list[str]:
    """Lines about how far two runs are from the pictures of the data set, beside the distances of many samples.

    cache: a folder for the features.
    """
    lines = []
    for reference, title in REFERENCES.items():
        results = {}
        for name, folder in (("unguided", unguided), ("guided", guided)):
            pictures_of = str(MODELS / f"emoji32_{reference}.npz")
            results[name] = judge(Settings(pictures_of, folder, features="emoji", cache=cache))
            results[f"{name}, committed"] = json.loads((MODELS / "distances" / f"{name}_{reference}.json").read_text())
        lines.append(f"Against the {title} (emoji features, value ± standard error):")
        lines += [f"  {name:<20} N = {result['n']:<6}{described(result)}" for name, result in results.items()]
    return lines


def described(result: dict[str, Any]) -> str:
    """The metrics of an evaluation in one line."""
    parts = []
    for metric, title in (("frechet_distance", "Fréchet distance"), ("precision", "precision"), ("recall", "recall")):
        measured = result["metrics"].get(metric)
        if measured is None:
            parts.append(f"{title} –")
        else:
            error = "" if measured["error"] is None else f" ± {measured['error']:.2f}"
            parts.append(f"{title} {measured['value']:.2f}{error}")
    return ", ".join(parts)


@command
def main() -> None:
    configs = parse_args(__doc__, IMAGE_GROUPS, default_config="emoji")
    sampling, guidance_config, others, *about_model = configs
    job = Job()
    out_dir = Path(sampling.out_dir or "runs/demo")
    # The masks are seen while samples are made, so none are taken over from an earlier run.
    guided_config = replace(sampling, out_dir=str(out_dir / "guided"), overwrite=True)
    unguided_config = replace(guided_config, out_dir=str(out_dir / "unguided"))
    no_guidance = replace(guidance_config, guide_scale=1.0, sag_scale=None)
    with exit_on_bad_input():
        if guidance_config.scale == 0:
            raise ValueError("sag_scale: the demo compares with guidance, give a strength other than 0")
        with_guidance = image_run([guided_config, guidance_config, others, *about_model], job.device)
        without = image_run([unguided_config, no_guidance, OtherGuidanceConfig(), *about_model], job.device)
    side = with_guidance.pipeline.side
    masks = MaskCounter(with_guidance.pipeline.guidances[0], sampling.num_samples, side)
    store, unguided_run = run(without.pipeline, without.settings, without.guidance_line, job)
    unguided = store.first(sampling.num_samples)
    store, guided_run = run(with_guidance.pipeline, with_guidance.settings, with_guidance.guidance_line, job, masks)
    guided = store.first(sampling.num_samples)

    by_attention = guidance_config.sag_mask == "self-attention"
    mask = "attention" if by_attention else Path(guidance_config.sag_mask).stem
    chooser = guidance_config.block_name if by_attention else f"the {mask} mask"
    steps = with_guidance.pipeline.diffusion.num_timesteps
    pictures.save_png(pictures.comparison(unguided, masks.share, guided, mask), out_dir / "comparison.png")
    change = np.abs(unguided.astype(float) - guided).mean()
    compared = []
    if side == 32:
        with TemporaryDirectory() as cache:
            compared = distances(str(out_dir / "unguided"), str(out_dir / "guided"), Path(cache))
    lines = [
        f"{sampling.num_samples} samples of {Path(sampling.model_path).name}, {steps} steps, seed {sampling.seed}",
        f"  unguided: {unguided_run['network_evaluations_per_sample']:g} network evaluations each, "
        f"{unguided_run['seconds']:.1f} s",
        f"  guided:   {guided_run['network_evaluations_per_sample']:g} network evaluations each, "
        f"{guided_run['seconds']:.1f} s",
        f"  {chooser} selects {masks.share.mean():.0%} of the pixels; guidance "
        f"changes a pixel by {change:.1f} of 255 on average",
        f"  look at {out_dir / 'comparison.png'}",
        *compared,
        "This small model on few pictures checks the software; it is no evidence about self-attention guidance.",
    ]
    text = "\n".join(lines) + "\n"
    write_atomically(out_dir / "summary.txt", lambda file: file.write(text.encode()))
    print(text, end="")
