"""Self-attention guidance in five minutes: the embedded model, the same noise, without and with guidance.

Settings come from configs/emoji.yaml, then flags. Writes to runs/demo: comparison.png (unguided | attention mask |
guided), the folders unguided and guided with all samples, and summary.txt. All flags of image_sample.py work here too:

  python scripts/demo.py --num_samples 4 --sag_scale 2
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from guided_diffusion import pictures
from guided_diffusion.config import (
    DiffusionConfig,
    GuidanceConfig,
    NetworkConfig,
    OtherGuidanceConfig,
    exit_on_bad_input,
    parse_args,
)
from guided_diffusion.files import write_atomically
from guided_diffusion.parallel import Job, launch
from guided_diffusion.run import run
from guided_diffusion.sampling import (
    Sampler,
    SamplingConfig,
    class_condition,
    describe_guidance,
    guidances_of,
    ready,
    resolved,
    unconditional,
    unfilled,
)
from guided_diffusion.script_util import build_diffusion, build_network

CONFIG = Path(__file__).parent.parent / "configs" / "emoji.yaml"


def main() -> None:
    groups = (SamplingConfig, GuidanceConfig, OtherGuidanceConfig, NetworkConfig, DiffusionConfig)
    configs = parse_args(__doc__, groups, default_config=str(CONFIG))
    sampling, guidance_config, others, network_config, diffusion_config = configs
    job = Job()
    out_dir = Path(sampling.out_dir or "runs/demo")
    with exit_on_bad_input():
        if guidance_config.scale == 0:
            raise ValueError("sag_scale: the demo compares with guidance, give a strength other than 0")
        device = job.device
        diffusion = build_diffusion(diffusion_config)
        with unfilled():
            network = build_network(network_config, diffusion_config.learn_sigma)
        guidances = guidances_of(guidance_config, others, network, network_config, sampling.labels)
        guidance = guidances[0]
        condition_of = unconditional
        if network_config.class_cond:
            condition_of = class_condition(sampling, network_config, network_config.null_label)
        ready(network, sampling.model_path, network_config, diffusion_config.learn_sigma, device)
    # The masks are seen while samples are made, so none are taken over from an earlier run.
    guided_config = replace(sampling, out_dir=str(out_dir / "guided"), overwrite=True)
    sampler = Sampler(guided_config, network_config.image_size, network, diffusion, device, condition_of)

    side, steps = network_config.image_size, diffusion.num_timesteps
    selected = np.zeros((sampling.num_samples, side, side))
    guided_steps = 0

    def count_masks(indices, _state, guided):
        nonlocal guided_steps
        if guidance in guided.last_step.recorded:
            selected[list(indices)] += guidance.mask(guided.last_step)[:, 0].cpu().numpy()
            guided_steps += len(indices)

    unguided_config = replace(guided_config, out_dir=str(out_dir / "unguided"))
    unguided_guidance, no_others = replace(guidance_config, guide_scale=1.0, sag_scale=None), OtherGuidanceConfig()
    store, unguided_run = run(
        replace(sampler, config=unguided_config),
        resolved(unguided_config, unguided_guidance, no_others, network_config, diffusion_config),
        describe_guidance(unguided_guidance, no_others, [], steps),
        job,
    )
    unguided = store.first(sampling.num_samples)
    store, guided_run = run(
        replace(sampler, guidances=guidances),
        resolved(guided_config, guidance_config, others, network_config, diffusion_config),
        describe_guidance(guidance_config, others, guidances, steps),
        job,
        count_masks,
    )
    guided = store.first(sampling.num_samples)

    steps_per_sample = max(1.0, guided_steps / sampling.num_samples)
    by_attention = guidance_config.sag_mask == "self-attention"
    mask = "attention" if by_attention else Path(guidance_config.sag_mask).stem
    chooser = guidance_config.block_name if by_attention else f"the {mask} mask"
    panels = pictures.comparison(unguided, selected / steps_per_sample, guided, mask)
    pictures.save_png(panels, out_dir / "comparison.png")
    change = np.abs(unguided.astype(float) - guided).mean()
    lines = [
        f"{sampling.num_samples} samples of {Path(sampling.model_path).name}, {steps} steps, seed {sampling.seed}",
        f"  unguided: {unguided_run['network_evaluations_per_sample']:g} network evaluations each, "
        f"{unguided_run['seconds']:.1f} s",
        f"  guided:   {guided_run['network_evaluations_per_sample']:g} network evaluations each, "
        f"{guided_run['seconds']:.1f} s",
        f"  {chooser} selects {selected.mean() / steps_per_sample:.0%} of the pixels; guidance "
        f"changes a pixel by {change:.1f} of 255 on average",
        f"  look at {out_dir / 'comparison.png'}",
        "This small model on few pictures checks the software; it is no evidence about self-attention guidance.",
    ]
    text = "\n".join(lines) + "\n"
    write_atomically(out_dir / "summary.txt", lambda file: file.write(text.encode()))
    print(text, end="")


if __name__ == "__main__":
    launch(main)
