"""The settings of training: what every training is told, and those of diffusion networks and classifiers."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from .options import MOST_AT_A_TIME, MOST_SEED, check_seed, option, parse_value


@dataclass(frozen=True)
class TrainerConfig(ABC):
    """what every training is told"""

    kind: ClassVar[str] = "train"
    """How the name of a folder begins, where none is given."""

    data_dir: str = option("", "folder of images (any depth); label_name.png gives the class, where there are classes")
    out_dir: str = option(
        "",
        "folder for checkpoints and the log, where the same command goes on; empty: $OPENAI_LOGDIR, else one in runs/ "
        "for these settings",
    )
    batch_size: int = option(64, "images per step, of all ranks together", most=MOST_AT_A_TIME)
    microbatch: int = option(-1, "images per forward pass of a rank; -1: all its images")
    lr: float = option(1e-4, "learning rate of AdamW")
    weight_decay: float = option(0.0, "weight decay of AdamW")
    schedule_sampler: str = option("uniform", "timesteps to train on: uniform or loss-second-moment")
    random_crop: bool = option(False, "crop at a random place and scale")
    random_flip: bool = option(True, "mirror half of the images")
    num_workers: int = option(0, "threads that read images ahead; no image depends on it", most=1024)
    bf16: bool = option(False, "bfloat16 autocast (CPU or GPU); the network's fp16 flag: float16, on a GPU only")
    fp16_scale_growth: float = option(1e-3, "with float16: log2 of the loss scale's growth per step")
    log_interval: int = option(50, "steps between lines of the log")
    save_interval: int = option(1000, "steps between checkpoints")
    keep: int = option(3, "newest weight files that are kept of each kind; 0: all")
    resume: str = option("auto", "auto: go on from out_dir if it holds a run; never: refuse such a folder")
    resume_checkpoint: str = option(
        "",
        "weights to begin with (.pt or .safetensors); with upstream's modelSTEP.pt also its step and, from beside it, "
        "ema_RATE_STEP.pt and optSTEP.pt; not read again once out_dir has a checkpoint",
    )
    seed: int = option(
        0, "seed of weights, data order, timesteps and noise, the same for any number of ranks", most=MOST_SEED
    )

    def __post_init__(self):
        check_seed(self.seed)
        for name in ("batch_size", "lr", "log_interval", "save_interval"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: wanted more than 0, got {getattr(self, name)}")
        if not 0 < self.fp16_scale_growth <= 1:
            raise ValueError(f"fp16_scale_growth: wanted more than 0 and at most 1, got {self.fp16_scale_growth}")
        if self.keep < 0:
            raise ValueError(f"keep: wanted 0 or more, got {self.keep}")
        if self.resume not in ("auto", "never"):
            raise ValueError(f"resume: wanted auto or never, got {self.resume!r}")

    @property
    @abstractmethod
    def steps(self) -> int | None:
        """How many steps to train; None: until interrupted."""

    @property
    def ema_rates(self) -> list[float]:
        """Rates of the moving averages of the weights that are kept."""
        return []

    @abstractmethod
    def learning_rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""


@dataclass(frozen=True)
class TrainingConfig(TrainerConfig):
    """training"""

    lr_warmup_steps: int = option(0, "steps over which the learning rate rises from 0")
    lr_anneal_steps: int = option(0, "train so many steps, the learning rate falling to 0; 0: no end, no fall")
    ema_rate: str = option("0.9999", "rate of the moving average of the weights; several: 0.999,0.9999")
    snr_gamma: float = option(
        0.0,
        "weigh the squared error of x̂_0 by min(SNR, γ) (Hang et al. 2023), and by at least 1 where the network "
        "predicts x_0 (Salimans & Ho 2022); 0: by SNR for ε, by 1 for x_0",
    )
    noise_jitter: float = option(
        0.0,
        "in half of the images multiply the noise by exp(U(−J, J)) at the same timestep, so that the network learns to "
        "read the noise from the picture; 0: never",
    )
    label_dropout: float = option(0.0, "share of images trained without their label (needs null_label)")
    sample_interval: int = option(
        0, "steps between samples_STEP.png: 16 images of the first moving average, always of the same noise; 0: never"
    )

    def __post_init__(self):
        super().__post_init__()
        if self.sample_interval < 0:
            raise ValueError(f"sample_interval: wanted 0 or more, got {self.sample_interval}")
        if not 0 <= self.noise_jitter <= 1:
            raise ValueError(f"noise_jitter: wanted 0 to 1, got {self.noise_jitter}")
        if self.snr_gamma and not self.snr_gamma >= 1:
            raise ValueError(f"snr_gamma: wanted 1 or more, or 0 for none, got {self.snr_gamma}")
        for name, share in [("label_dropout", self.label_dropout), *(("ema_rate", rate) for rate in self.ema_rates)]:
            if not 0 <= share < 1:
                raise ValueError(f"{name}: wanted at least 0 and below 1, got {share}")

    @property
    def steps(self) -> int | None:
        return self.lr_anneal_steps or None

    @property
    def ema_rates(self) -> list[float]:
        return [parse_value(rate, float, "ema_rate") for rate in self.ema_rate.split(",")]

    def learning_rate(self, step: int) -> float:
        rate = self.lr
        if self.lr_warmup_steps:
            rate *= min(1.0, (step + 1) / self.lr_warmup_steps)
        if self.lr_anneal_steps:
            rate *= 1 - step / self.lr_anneal_steps
        return rate


@dataclass(frozen=True)
class ClassifierTrainingConfig(TrainerConfig):
    """training"""

    kind: ClassVar[str] = "classifier"

    val_data_dir: str = option("", "folder of other images to validate on; empty: none")
    noised: bool = option(True, "train on noised images, as guidance needs")
    iterations: int = option(150000, "steps to train")
    lr: float = option(3e-4, "learning rate of AdamW")
    anneal_lr: bool = option(False, "let the learning rate fall to 0")
    batch_size: int = option(4, "images per step, of all ranks together", most=MOST_AT_A_TIME)
    random_crop: bool = option(True, "crop at a random place and scale")
    log_interval: int = option(10, "steps between lines of the log")
    eval_interval: int = option(5, "steps between validations, each on one batch")
    save_interval: int = option(10000, "steps between checkpoints")

    def __post_init__(self):
        super().__post_init__()
        for name in ("iterations", "eval_interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: wanted 1 or more, got {getattr(self, name)}")

    @property
    def steps(self) -> int:
        return self.iterations

    def learning_rate(self, step: int) -> float:
        return self.lr * (1 - step / self.iterations) if self.anneal_lr else self.lr
