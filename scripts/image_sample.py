"""Sample images from a diffusion model, with or without self-attention guidance and others.

Settings come from defaults, then --config, then flags. Writes samples_NxHxWx3.npz, grid.png, config.yaml and
manifest.json. The embedded model, guided:

  python scripts/image_sample.py --config configs/emoji.yaml --num_samples 16 --sag_scale 1.0
"""

from guided_diffusion.config import (
    DiffusionConfig,
    GuidanceConfig,
    NetworkConfig,
    OtherGuidanceConfig,
    exit_on_bad_input,
    parse_args,
)
from guided_diffusion.parallel import launch, start
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


def main() -> None:
    groups = (SamplingConfig, GuidanceConfig, OtherGuidanceConfig, NetworkConfig, DiffusionConfig)
    sampling, guidance, others, network_config, diffusion_config = configs = parse_args(__doc__, groups)
    job = start()
    with exit_on_bad_input():
        device = job.device
        diffusion = build_diffusion(diffusion_config)
        with unfilled():
            network = build_network(network_config, diffusion_config.learn_sigma)
        guidances = guidances_of(guidance, others, network, network_config, sampling.labels)
        condition_of = unconditional
        if network_config.class_cond:
            condition_of = class_condition(sampling, network_config, network_config.null_label)
        ready(network, sampling.model_path, network_config, diffusion_config.learn_sigma, device)
    sampler = Sampler(sampling, network_config.image_size, network, diffusion, device, condition_of, guidances)
    run(sampler, resolved(*configs), describe_guidance(guidance, others, guidances, diffusion.num_timesteps), job)


if __name__ == "__main__":
    launch(main)
