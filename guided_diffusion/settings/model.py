"""The settings of networks, diffusion and guidance: what upstream's, the authors' and our flags are called."""

from collections.abc import Container
from dataclasses import dataclass, replace

from .options import MOST_SIDE, option

NUM_CLASSES = 1000

MOST_WIDTH, MOST_DEPTH, MOST_CLASSES, MOST_STEPS = 2**14, 64, 2**20, 10**5
"""Of networks and diffusions: far beyond any that was trained, and still built within a second."""


def check_heads(flag: str, value: int) -> None:
    """Raise a ValueError for a number of heads, or of their channels, that is neither one nor −1, left to others."""
    if value < 1 and value != -1:
        raise ValueError(f"{flag}: wanted 1 or more, or -1, got {value}")


@dataclass(frozen=True)
class NetworkConfig:
    """network (as the checkpoint was trained)"""

    least_classes = 1  # no field

    image_size: int = option(64, "side of the images in pixels", most=MOST_SIDE)
    num_channels: int = option(128, "channels of the first level", most=MOST_WIDTH)
    num_res_blocks: int = option(2, "residual blocks per level", most=MOST_DEPTH)
    num_heads: int = option(4, "attention heads, where num_head_channels is -1", most=MOST_WIDTH)
    num_heads_upsample: int = option(-1, "attention heads of the upward path; -1: as num_heads", most=MOST_WIDTH)
    num_head_channels: int = option(-1, "channels per attention head; -1: use num_heads", most=MOST_WIDTH)
    attention_resolutions: str = option("16,8", "sides of the feature maps that get attention")
    channel_mult: str = option("", "widths of the levels in units of num_channels, like 1,2,2; empty: by image_size")
    dropout: float = option(0.0, "dropout of the residual blocks")
    class_cond: bool = option(False, "the network takes class labels")
    num_classes: int = option(NUM_CLASSES, "number of classes, where class_cond", most=MOST_CLASSES)
    null_label: bool = option(False, "the network has one more label, which stands for no class")
    use_checkpoint: bool = option(False, "recompute activations in training to save memory")
    use_scale_shift_norm: bool = option(True, "the timestep scales and shifts the normalised features")
    resblock_updown: bool = option(False, "residual blocks resample, not plain convolutions")
    use_fp16: bool = option(False, "half precision: float16 on a GPU, bfloat16 on a CPU that has it")
    use_new_attention_order: bool = option(False, "q, k, v are stored one after the other (no shape shows it)")

    def __post_init__(self):
        for name in ("image_size", "num_channels", "num_res_blocks", "num_heads", "num_classes"):
            least = self.least_classes if name == "num_classes" else 1
            if getattr(self, name) < least:
                raise ValueError(f"{name}: wanted {least} or more, got {getattr(self, name)}")
        for name in ("num_head_channels", "num_heads_upsample"):
            check_heads(name, getattr(self, name))
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: wanted a share from 0 to less than 1, got {self.dropout}")


@dataclass(frozen=True)
class TrainedNetworkConfig(NetworkConfig):
    """network"""

    least_classes = 0  # no field

    num_classes: int = option(0, "number of classes, where class_cond; 0: as many as data_dir has", most=MOST_CLASSES)

    def of(self, classes: int) -> "TrainedNetworkConfig":
        """The settings for a folder of so many classes; a ValueError if they are more than the network's."""
        if classes > self.num_classes > 0:
            raise ValueError(f"num_classes: {self.num_classes}, but data_dir has {classes} classes")
        return replace(self, num_classes=self.num_classes or classes or NUM_CLASSES)


@dataclass(frozen=True)
class DiffusionConfig:
    """diffusion (as the checkpoint was trained, but for the respacing)"""

    learn_sigma: bool = option(False, "the network also predicts the variance Σ")
    diffusion_steps: int = option(1000, "steps T of the training process", most=MOST_STEPS)
    noise_schedule: str = option(
        "linear",
        "linear or cosine; linear_path: of flow models (SiT), a straight line from noise to image, whose velocity the "
        "network predicts",
    )
    timestep_respacing: str = option(
        "",
        "steps to sample with: 250, 10,15,20 (by thirds), ddim25, or logsnr20 (even in log α/σ); empty: all. With "
        "linear_path a number alone",
    )
    use_kl: bool = option(False, "train the variational bound")
    predict_xstart: bool = option(False, "the network predicts x_0, not ε")
    rescale_timesteps: bool = option(False, "the network sees timesteps scaled to [0, 1000)")
    rescale_learned_sigmas: bool = option(False, "train the bound scaled by T/1000 beside the MSE")

    def remark(self, given: Container[str], _explicit: Container[str]) -> str:
        """A warning about flags that were not among the given ones, or nothing."""
        if self.diffusion_steps <= 1000 or "rescale_timesteps" in given:
            return ""
        return (
            "rescale_timesteps is False as in guided-diffusion; a model of improved-diffusion trained with that "
            "repository's default needs --rescale_timesteps True, or it samples noise"
        )


@dataclass(frozen=True)
class SuperResolutionConfig:
    """super-resolution"""

    large_size: int = option(256, "side of the images to make", most=MOST_SIDE)
    small_size: int = option(64, "side of the images to begin with", most=MOST_SIDE)


OF_OTHER_SIZES = ("image_size", "channel_mult")
"""Settings of networks that follow from large_size in super-resolution."""


@dataclass(frozen=True)
class ClassifierConfig:
    """noisy-image classifier (as its checkpoint was trained)"""

    classifier_use_fp16: bool = option(False, "half precision: float16 on a GPU, bfloat16 on a CPU that has it")
    classifier_width: int = option(128, "channels of the first level", most=MOST_WIDTH)
    classifier_depth: int = option(2, "residual blocks per level", most=MOST_DEPTH)
    classifier_channel_mult: str = option(
        "", "widths of the levels in units of classifier_width, like 1,2,2; empty: by image_size", later=True
    )
    classifier_attention_resolutions: str = option("32,16,8", "sides of the feature maps that get attention")
    classifier_use_scale_shift_norm: bool = option(True, "the timestep scales and shifts the normalised features")
    classifier_resblock_updown: bool = option(True, "residual blocks resample, not plain convolutions")
    classifier_pool: str = option("attention", "head: adaptive, attention, spatial or spatial_v2")

    def __post_init__(self):
        for name in ("classifier_width", "classifier_depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: wanted 1 or more, got {getattr(self, name)}")
