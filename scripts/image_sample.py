"""Sample images from a diffusion model, with or without self-attention guidance.

Settings come from defaults, then --config, then flags. Writes samples_NxHxWx3.npz, grid.png, config.yaml and
manifest.json. The embedded model, guided:

  python scripts/image_sample.py --config configs/emoji.yaml --num_samples 16 --sag_scale 1.0
"""

from guided_diffusion.config import DiffusionConfig, GuidanceConfig, NetworkConfig, exit_on_bad_input, parse_args
from guided_diffusion.sampling import (
    Sampler,
    SamplingConfig,
    describe_guidance,
    device_of_this_process,
    guidances_of,
    ready,
    resolved,
    run,
)
from guided_diffusion.script_util import build_diffusion, build_network


def main() -> None:
    groups = (SamplingConfig, GuidanceConfig, NetworkConfig, DiffusionConfig)
    sampling, guidance, network_config, diffusion_config = configs = parse_args(__doc__, groups)
    with exit_on_bad_input():
        device = device_of_this_process()
        diffusion = build_diffusion(diffusion_config)
        network = build_network(network_config, diffusion_config.learn_sigma)
        guidances = guidances_of(guidance, network)
        sampler = Sampler(sampling, network_config, network, diffusion, device, guidances)
        sampler.labels([0])
        ready(network, sampling.model_path, network_config.use_fp16, device)
    run(sampler, resolved(*configs), describe_guidance(guidance, guidances, diffusion.num_timesteps))


if __name__ == "__main__":
    main()
