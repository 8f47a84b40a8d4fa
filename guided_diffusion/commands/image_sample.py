"""Sample images from a diffusion model, with or without self-attention guidance and others.

Settings come from defaults, then --config, then flags. Writes samples_NxHxWx3.npz, grid.png, config.yaml and
manifest.json. The embedded model, guided:

  python scripts/image_sample.py --config emoji --num_samples 16 --sag_scale 1.0
"""

from ..runs.prepare import IMAGE_GROUPS, Configs, image_run
from ..runs.ranks import command, start
from ..runs.run import run
from ..settings.options import exit_on_bad_input, parse_args


@command
def main() -> None:
    configs = Configs.of(parse_args(__doc__, IMAGE_GROUPS))
    job = start()
    with exit_on_bad_input():
        prepared = image_run(configs, job.device)
    run(prepared.pipeline, prepared.settings, prepared.guidance_line, job)
