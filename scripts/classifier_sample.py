"""Sample images with classifier guidance, self-attention guidance, or both.

Like image_sample.py, with a noisy-image classifier: it pulls every sample to its class. For example, ADM 128²:

  python scripts/classifier_sample.py --model_path 128x128_diffusion.pt --classifier_path 128x128_classifier.pt \\
      --classifier_scale 0.5 --guide_scale 1.1 --blur_sigma 3 --timestep_respacing 250 ...
"""

from dataclasses import dataclass

from guided_diffusion.config import (
    ClassifierConfig,
    DiffusionConfig,
    GuidanceConfig,
    NetworkConfig,
    exit_on_bad_input,
    option,
    parse_args,
)
from guided_diffusion.guidance.classifier import classifier_gradient
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
        ClassifierGuidanceConfig,
        NetworkConfig,
        DiffusionConfig,
        ClassifierConfig,
    )
    configs = parse_args(__doc__, groups)
    sampling, guidance, by_classifier, network_config, diffusion_config, classifier_config = configs
    with exit_on_bad_input():
        device = device_of_this_process()
        diffusion = build_diffusion(diffusion_config)
        network = build_network(network_config, diffusion_config.learn_sigma)
        guidances = guidances_of(guidance, network)
        cond_fn = None
        if by_classifier.on:
            classifier = build_classifier(network_config.image_size, classifier_config, network_config.num_classes)
            ready(classifier, by_classifier.classifier_path, classifier_config.classifier_use_fp16, device)
            cond_fn = classifier_gradient(classifier, by_classifier.classifier_scale)
        # The classifier needs labels also where the network takes none.
        network_fn = network if network_config.class_cond else lambda x, t, y=None: network(x, t)
        sampler = Sampler(sampling, network_config, network_fn, diffusion, device, guidances, cond_fn)
        sampler.labels([0])
        ready(network, sampling.model_path, network_config.use_fp16, device)
    line = describe_guidance(guidance, guidances, diffusion.num_timesteps)
    if cond_fn:
        line += f"; classifier guidance: scale {by_classifier.classifier_scale:g}"
    run(sampler, resolved(*configs), line)


if __name__ == "__main__":
    main()
