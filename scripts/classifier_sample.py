"""Sample images with classifier guidance, self-attention guidance, classifier-free guidance, and any of them together.

Like image_sample.py, with a noisy-image classifier: it pulls every sample to its class. For example, ADM 128²:

  python scripts/classifier_sample.py --config configs/adm_imagenet128_cond.yaml --config configs/adm_classifier128.yaml
"""

from dataclasses import dataclass
from functools import partial

from guided_diffusion.checkpoints import load_into
from guided_diffusion.config import (
    ClassifierConfig,
    DiffusionConfig,
    GuidanceConfig,
    NetworkConfig,
    OtherGuidanceConfig,
    exit_on_bad_input,
    option,
    parse_args,
)
from guided_diffusion.guidance.classifier import classifier_gradient
from guided_diffusion.inspection import wrong_flags
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
from guided_diffusion.script_util import build_classifier, build_diffusion, build_network


@dataclass(frozen=True)
class ClassifierGuidanceConfig:
    """classifier guidance: scale · ∇ log p(y | x_t) moves every step"""

    classifier_path: str = option("", "weights of the classifier: .pt or .safetensors", path=True)
    classifier_scale: float = option(1.0, "strength of the classifier's gradient")
    classifier_guidance: bool | None = option(None, "on or off; default: on with a classifier_path and a scale not 0")

    @property
    def on(self) -> bool:
        if self.classifier_guidance is None:
            return bool(self.classifier_path) and self.classifier_scale != 0
        if self.classifier_guidance and not self.classifier_path:
            raise ValueError("classifier_path: classifier_guidance needs the weights of a classifier")
        return self.classifier_guidance


def main() -> None:
    groups = (
        SamplingConfig,
        GuidanceConfig,
        OtherGuidanceConfig,
        ClassifierGuidanceConfig,
        NetworkConfig,
        DiffusionConfig,
        ClassifierConfig,
    )
    configs = parse_args(__doc__, groups)
    job = start()
    sampling, guidance, others, by_classifier, network_config, diffusion_config, classifier_config = configs
    image_size = network_config.image_size
    with exit_on_bad_input():
        device = job.device
        diffusion = build_diffusion(diffusion_config)
        with unfilled():
            network = build_network(network_config, diffusion_config.learn_sigma)
        guidances = guidances_of(guidance, others, network, network_config, sampling.labels)
        condition_of, cond_fn = unconditional, None
        if by_classifier.on:
            with unfilled():
                classifier = build_classifier(image_size, classifier_config, network_config.num_classes)
            explain = partial(wrong_flags, network=classifier_config, image_size=image_size)
            load_into(classifier, by_classifier.classifier_path, device, explain)
            classifier.eval().requires_grad_(False)
            if classifier_config.classifier_use_fp16:
                classifier.convert_to_fp16()
            cond_fn = classifier_gradient(classifier, by_classifier.classifier_scale)
        if network_config.class_cond or cond_fn:
            has_null = network_config.class_cond and network_config.null_label and not cond_fn
            condition_of = class_condition(sampling, network_config, has_null)
        ready(network, sampling.model_path, network_config, diffusion_config.learn_sigma, device)
    # The classifier needs labels also where the network takes none.
    network_fn = network if network_config.class_cond else lambda x, t, y=None: network(x, t)
    sampler = Sampler(sampling, image_size, network_fn, diffusion, device, condition_of, guidances, cond_fn)
    line = describe_guidance(guidance, others, guidances, diffusion.num_timesteps)
    line += f"\nclassifier guidance: {f'scale {by_classifier.classifier_scale:g}' if cond_fn else 'off'}"
    run(sampler, resolved(*configs), line, job)


if __name__ == "__main__":
    launch(main)
