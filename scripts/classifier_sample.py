"""Sample images with classifier guidance, self-attention guidance, classifier-free guidance, and any of them together.

Like image_sample.py, with a noisy-image classifier: it pulls every sample to its class. For example, ADM 128²:

  python scripts/classifier_sample.py --config configs/adm_imagenet128_cond.yaml --config configs/adm_classifier128.yaml
"""

from guided_diffusion.config import exit_on_bad_input, parse_args
from guided_diffusion.parallel import launch, start
from guided_diffusion.prepare import CLASSIFIER_GROUPS, classifier_run
from guided_diffusion.run import run


def main() -> None:
    configs = parse_args(__doc__, CLASSIFIER_GROUPS)
    job = start()
    with exit_on_bad_input():
        prepared = classifier_run(configs, job.device)
    run(prepared.sampler, prepared.settings, prepared.guidance_line, job)


if __name__ == "__main__":
    launch(main)
