"""Look inside a model: what its attention maps select, what is blurred there, and which block to guide with.

Makes --num_samples images and looks at every attention block on the way; then shows the network noised images of known
content (--data_dir) and measures which frequencies and, with --object_masks, which objects the masks select. Writes to
--out_dir (default runs/attention): report.html (one page to look through steps, blocks and ψ), report.md,
attention.json, and for each sample strips/NUMBER.png and animations/NUMBER.webp. The embedded model:

  python scripts/attention_report.py --config emoji --data_dir configs/models/emoji32_train.npz \\
      --object_masks configs/models/emoji32_masks.npz --known_images 371

A model of yours, to choose --sag_block and --blur_sigma by:

  python scripts/attention_report.py --config adm_imagenet128_cond --num_samples 8 --data_dir PICTURES

Without --data_dir the known images are the samples of the run. Stable Diffusion, whose flags --help then lists:

  python scripts/attention_report.py --model models/sd-1.5 --prompt "a cat" --num_images 4
"""

import sys
from functools import partial
from pathlib import Path

from ..analysis.run import build, run
from ..analysis.subjects import image_subject, latent_subject
from ..runs.prepare import IMAGE_GROUPS, Configs
from ..runs.ranks import command, start
from ..settings.analysis import ReportConfig
from ..settings.options import exit_on_bad_input, parse_args
from ..settings.scripts import SCRIPTS


@command
def main() -> None:
    latent = any(argument.partition("=")[0] == "--model" for argument in sys.argv[1:])
    groups = SCRIPTS["stable_diffusion_sample"].groups if latent else IMAGE_GROUPS
    config, *run_configs = parse_args(__doc__, (ReportConfig, *groups))
    device = start().device
    with exit_on_bad_input():
        subject = latent_subject(*run_configs, device) if latent else image_subject(Configs.of(run_configs), device)
        analysis = build(config, subject)
    folder = Path(subject.pipeline.config.out_dir or "runs/attention")
    with exit_on_bad_input("out_dir"):
        folder.mkdir(parents=True, exist_ok=True)
    run(analysis, folder, partial(print, flush=True))
    print(f"look at {folder / 'report.html'}")
