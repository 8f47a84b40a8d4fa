"""Sample images with Stable Diffusion 1.x, 2.x or SDXL, guided by prompts, by its own attention, or by both.

Needs the extra `stable-diffusion` and a model in a local folder of diffusers' format: nothing is
fetched. Writes samples_NxHxWx3.npz, images/ (PNGs), comparison.png (unguided | attention mask | guided), config.yaml
and manifest.json:

  python scripts/stable_diffusion_sample.py --model models/sd-1.5 --prompt "a cat" --num_images 4 --sag_scale 0.75

Self-attention guidance alone, without any prompt:

  python scripts/stable_diffusion_sample.py --model models/sd-1.5 --guidance_scale 1 --num_images 16
"""

import torch

from ..runs.ranks import command, start
from ..runs.run import run
from ..settings.options import check_paths, exit_on_bad_input, parse_args, resolved
from ..settings.scripts import SCRIPTS
from ..stable_diffusion.model import load
from ..stable_diffusion.sampling import LatentPipeline, build_latent_guidance, read_prompts
from ..storage import pictures
from ..storage.files import join


@command
def main() -> None:
    config, guidance_config = configs = parse_args(__doc__, SCRIPTS["stable_diffusion_sample"].groups)
    job = start()
    with exit_on_bad_input():
        check_paths(*configs)  # before the slow imports
        prompts = read_prompts(config)
        model = load(config.model, getattr(torch, config.dtype), job.device, config.model_config)
        guidances = build_latent_guidance(model.unet, guidance_config)
        pipeline = LatentPipeline(config, model, prompts, guidances)
    store, _ = run(pipeline, resolved(*configs), pipeline.describe(), job)
    if job.rank == 0 and guidances and config.compare:
        picture = pipeline.comparison(min(config.compare, pipeline.num_samples))
        pictures.save_png(picture, join(store.folder, "comparison.png"))
