"""Upsample images with a super-resolution diffusion model.

Sample i is made of image i of --base_samples (an npz of image_sample.py or classifier_sample.py: arr_0 images, arr_1
labels; or a folder of pictures), which are used round and round. Writes samples_NxHxWx3.npz, grid.png, config.yaml and
manifest.json:

  python scripts/super_res_sample.py --config adm_upsampler_64_256 --base_samples 64_samples.npz
"""

from ..diffusion.diffusion import build_diffusion
from ..networks.building import build_upsampler, fill, make_ready, unfilled
from ..runs.conditions import base_condition
from ..runs.pipeline import ImagePipeline
from ..runs.prepare import counted
from ..runs.ranks import command, start
from ..runs.run import run
from ..settings.options import exit_on_bad_input, parse_args, resolved
from ..settings.scripts import SCRIPTS
from ..storage.given_images import GivenImages


@command
def main() -> None:
    groups, without = SCRIPTS["super_res_sample"]
    sampling, sizes, network_config, diffusion_config = parse_args(__doc__, groups, without=without)
    job = start()
    with exit_on_bad_input():
        if not sizes.base_samples:
            raise ValueError("base_samples: give the images to enlarge, a folder or an npz")
        device = job.device
        with unfilled():
            network = build_upsampler(sizes, network_config, diffusion_config.learn_sigma)
        images = GivenImages(
            sizes.base_samples, sizes.small_size, sizes.small_size, "base_samples", network.num_classes
        )
        sampling = counted(sampling, images)
        fill(network, sampling.model_path, network_config, diffusion_config.learn_sigma, device)
        make_ready(network, network_config.use_fp16, sampling.compile)
        diffusion = build_diffusion(diffusion_config, sampling.sampler_name).called_by(sampling.sampler_name)
    pipeline = ImagePipeline(sampling, sizes.large_size, network, diffusion, device, base_condition(images))
    settings = resolved(sampling, sizes, network_config, diffusion_config)
    settings = {key: value for key, value in settings.items() if key not in without}
    line = f"super-resolution {sizes.small_size} → {sizes.large_size} of {len(images)} images"
    run(pipeline, settings, line, job)
