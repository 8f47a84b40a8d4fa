"""Self-attention guidance in a minute: the embedded model, the same noise, without and with guidance.

Settings come from --config emoji --config emoji_fast, then flags. Writes to runs/demo: index.html, a page that shows
every sample unguided, under its attention mask and guided; the same as comparison.png; the folders unguided and guided
with all samples; and summary.txt. All flags of image_sample.py work here too:

  python scripts/demo.py --num_samples 4 --sag_scale 2
"""

from dataclasses import replace
from pathlib import Path

from ..runs.prepare import IMAGE_GROUPS, Configs, image_run
from ..runs.ranks import Job, command
from ..settings.guidance import OtherGuidanceConfig
from ..settings.options import exit_on_bad_input, parse_args
from ..tables.comparison import compare


@command
def main() -> None:
    configs = Configs.of(parse_args(__doc__, IMAGE_GROUPS, default_configs=("emoji", "emoji_fast")))
    sampling, sag = configs.sampling, configs.sag
    job = Job()
    folder = Path(sampling.out_dir or "runs/demo")
    # The masks are seen while samples are made, so none are taken over from an earlier run.
    guided = replace(configs, sampling=replace(sampling, out_dir=str(folder / "guided"), overwrite=True))
    unguided = replace(
        configs,
        sampling=replace(guided.sampling, out_dir=str(folder / "unguided")),
        sag=replace(sag, guide_scale=1.0, sag_scale=None),
        others=OtherGuidanceConfig(),
        methods=(),
    )
    with exit_on_bad_input():
        if sag.scale == 0:
            raise ValueError("sag_scale: the demo compares with guidance, give a strength other than 0")
        with_guidance = image_run(guided, job.device)
        without = image_run(unguided, job.device)
    print(compare(without, with_guidance, sag, folder, job), end="")
