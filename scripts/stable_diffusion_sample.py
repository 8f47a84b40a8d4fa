"""Sample images with Stable Diffusion 1.x, 2.x or SDXL, guided by prompts, by its own attention, or by both.

Needs the extra, pip install '.[stable-diffusion]', and a model in a local folder of diffusers' format: nothing is
fetched. Writes samples_NxHxWx3.npz, images/ (PNGs), comparison.png (unguided | attention mask | guided), config.yaml
and manifest.json:

  python scripts/stable_diffusion_sample.py --model models/sd-1.5 --prompt "a cat" --num_images 4 --sag_scale 0.75

Self-attention guidance alone, without any prompt:

  python scripts/stable_diffusion_sample.py --model models/sd-1.5 --guidance_scale 1 --num_images 16
"""

from guided_diffusion import pictures
from guided_diffusion.config import exit_on_bad_input, parse_args
from guided_diffusion.files import join
from guided_diffusion.parallel import launch, start
from guided_diffusion.run import run
from guided_diffusion.sampling import resolved
from guided_diffusion.stable_diffusion.model import load
from guided_diffusion.stable_diffusion.sampling import (
    DTYPES,
    LatentGuidanceConfig,
    StableDiffusionConfig,
    StableDiffusionSampler,
    build_latent_guidance,
    read_prompts,
)


def main() -> None:
    config, guidance_config = configs = parse_args(__doc__, (StableDiffusionConfig, LatentGuidanceConfig))
    job = start()
    with exit_on_bad_input():
        prompts = read_prompts(config)
        model = load(config.model, DTYPES[config.dtype], job.device, config.model_config)
        guidances = build_latent_guidance(model.unet, guidance_config)
        sampler = StableDiffusionSampler(config, model, prompts, guidances)
    store, _ = run(sampler, resolved(*configs), sampler.describe(), job)
    if job.rank == 0:
        for number in store.shards:
            for index, image in zip(store.indices(number), store.read(number).images, strict=True):
                pictures.save_png(image, join(store.folder, "images", f"{index:06d}.png"))
        if guidances and config.compare:
            picture = sampler.comparison(min(config.compare, sampler.num_samples))
            pictures.save_png(picture, join(store.folder, "comparison.png"))


if __name__ == "__main__":
    launch(main)
