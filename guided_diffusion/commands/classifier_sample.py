"""Sample images with classifier guidance, self-attention guidance, classifier-free guidance, and any of them together.

Like image_sample.py, with a noisy-image classifier: it pulls every sample to its class. For example, ADM 128²:

  python scripts/classifier_sample.py --config adm_imagenet128_cond --config adm_classifier128
"""

from ..runs.prepare import CLASSIFIER_GROUPS, Configs, image_run
from ..runs.ranks import command, start
from ..runs.run import run
from ..settings.options import exit_on_bad_input, parse_args


@command
def main() -> None:
    configs = Configs.of(parse_args(__doc__, CLASSIFIER_GROUPS))
    job = start()
    with exit_on_bad_input():
        prepared = image_run(configs, job.device)
    run(prepared.pipeline, prepared.settings, prepared.guidance_line, job)
