"""The settings of runs: of any kind of model, of sampling, of super-resolution and of likelihoods."""

from dataclasses import dataclass

from .model import SuperResolutionConfig
from .options import MOST_AT_A_TIME, MOST_SEED, check_seed, option


@dataclass(frozen=True)
class RunConfig:
    """Settings of a run of any kind of model, for groups of flags to extend."""

    batch_size: int | None = option(
        16,
        "images at a time; auto: what is fastest and fits, found before the first shard and kept when resumed",
        words={"auto": None},
        most=MOST_AT_A_TIME,
    )
    shard_size: int = option(
        0, "images per file of the run, the unit of resuming and of the ranks' work; 0: batch_size"
    )
    seed: int = option(0, "sample i depends on the seed and on i alone, not on batch size", most=MOST_SEED)
    init_image: str = option(
        "",
        "images to begin with instead of noise, image i for sample i, round and round: a folder of pictures, one "
        "picture, or an npz with arr_0, uint8 [N, H, W, 3]",
        path=True,
        later=True,
    )
    strength: float = option(
        0.5, "share of the steps that are made of an init_image: near 0 it comes back, 1 is all steps", later=True
    )
    tf32: bool = option(
        False, "on a GPU, let float32 have TF32's ten bits in products: faster, and images differ a little", later=True
    )
    out_dir: str = option("", "folder to write to; empty: $OPENAI_LOGDIR, else runs/ and a name made of the settings")
    overwrite: bool = option(
        False,
        "delete what an earlier run left in the folder; a job that Slurm, LSF or torchrun starts again keeps what its "
        "earlier start made with the same settings",
    )
    png: bool = option(False, "write the samples as PNGs too: images/000000.png and so on")
    grace: float = option(0.0, "seconds that SIGTERM and Ctrl-C leave the shard in hand; a second Ctrl-C ends at once")
    patience: float | None = option(
        None,
        "seconds without a sign of life after which another rank does what a rank had taken; empty: 60, or 20 of its "
        "longest steps",
    )
    log_json: bool = option(False, "progress as JSON lines on stderr, for schedulers")

    def __post_init__(self):
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size: wanted 1 or more, got {self.batch_size}")
        if self.shard_size < 0 or not self.grace >= 0:
            raise ValueError(f"shard_size, grace: wanted 0 or more, got {self.shard_size}, {self.grace}")
        if self.patience is not None and not self.patience >= 1:
            raise ValueError(f"patience: wanted 1 or more, got {self.patience}")
        check_seed(self.seed)
        if not 0 <= self.strength <= 1:
            raise ValueError(f"strength: wanted 0 to 1, got {self.strength}")
        if self.strength != RunConfig.strength and not self.init_image:
            raise ValueError("strength: goes with images to begin with; give --init_image")

    def steps_made(self, steps: int) -> int:
        """How many of so many steps are made, the last ones: all, or with `init_image` a share, but at least one."""
        return max(1, round(self.strength * steps)) if self.init_image else steps


FLOW_SAMPLERS = ("euler", "heun")
"""Of networks whose noise_schedule is linear_path; no other sampler is."""

SAMPLERS = ("ddpm", "ddim", "dpm++2m", "dpm++2m-sde", "unipc", *FLOW_SAMPLERS)
"""What --sampler may be."""

NUM_SAMPLES = 10000
"""What --num_samples is where it is not given and no images are."""


@dataclass(frozen=True)
class SamplingConfig(RunConfig):
    """sampling"""

    model_path: str = option("", "weights of the network: .pt or .safetensors, local or what blobfile opens", path=True)
    num_samples: int | None = option(
        None, f"images to make; empty: {NUM_SAMPLES}, or with base_samples or init_image as many as there are"
    )
    labels: str = option("random", "classes: random, none (where the network has a null label), or a list like 0,7,7")
    balanced_labels: bool = option(False, "equal numbers of every class: sample i has class i modulo num_classes")
    sampler: str = option(
        "",
        f"{', '.join(SAMPLERS)}; empty: ddpm, or ddim with use_ddim. dpm++2m and unipc (no noise) and dpm++2m-sde want "
        "10 to 25 steps with --timestep_respacing logsnr20 and the like; euler and heun are for linear_path",
        later=True,
    )
    use_ddim: bool = option(False, "--sampler ddim; goes with a respacing like ddim25")
    ddim_eta: float = option(0.0, "η of DDIM: 0 deterministic, 1 as random as DDPM")
    clip_denoised: bool = option(True, "clamp the predicted x̂_0 to [-1, 1] at every step")
    compile: bool = option(
        False, "compile the residual blocks: minutes at the start; meant for GPUs, no faster on a CPU", later=True
    )

    def __post_init__(self):
        super().__post_init__()
        if self.num_samples is not None and self.num_samples < 1:
            raise ValueError(f"num_samples: wanted 1 or more, got {self.num_samples}")
        if self.balanced_labels and self.labels != "random":
            raise ValueError("balanced_labels, labels: two ways to choose the classes; give one")
        if self.sampler and self.sampler not in SAMPLERS:
            raise ValueError(f"sampler: wanted {', '.join(SAMPLERS)}, got {self.sampler!r}")
        if self.use_ddim and self.sampler not in ("", "ddim"):
            raise ValueError(f"sampler, use_ddim: {self.sampler} is not ddim; give one of the two")
        if not 0 <= self.ddim_eta <= 1:
            raise ValueError(f"ddim_eta: wanted 0 to 1, got {self.ddim_eta}")
        if not self.model_path:
            raise ValueError("model_path: give the weights of the network, or --config emoji to try")

    @property
    def sampler_name(self) -> str:
        """The chosen one of `SAMPLERS`."""
        return self.sampler or ("ddim" if self.use_ddim else "ddpm")


@dataclass(frozen=True)
class UpsamplingConfig(SuperResolutionConfig):
    """super-resolution"""

    base_samples: str = option(
        "",
        "images to enlarge: a folder of pictures (label_name.png gives the class), one picture, or an npz with arr_0, "
        "uint8 [N, H, W, 3], and arr_1, labels",
        path=True,
    )


@dataclass(frozen=True)
class LikelihoodConfig:
    """likelihood"""

    data_dir: str = option("", "folder of images (any depth); label_name.png gives the class, where there are classes")
    model_path: str = option("", "weights of the network: .pt or .safetensors, local or what blobfile opens", path=True)
    num_samples: int = option(1000, "images to measure, or all if there are fewer")
    draw: bool = option(
        True, "which images: a random draw by the seed, of which fewer are the beginning; False: the first by name"
    )
    batch_size: int = option(1, "images at a time", most=MOST_AT_A_TIME)
    clip_denoised: bool = option(True, "clamp the predicted x̂_0 to [-1, 1] at every step")
    seed: int = option(
        0, "of the draw, and of the noise of image i by name, which depends on seed and i alone", most=MOST_SEED
    )
    out_dir: str = option("runs/nll", "folder to write to; the same command goes on from there")
    json: bool = option(False, "print the result as JSON")

    def __post_init__(self):
        for name in ("num_samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: wanted 1 or more, got {getattr(self, name)}")
        if not self.model_path:
            raise ValueError("model_path: give the weights of the network")
        check_seed(self.seed)
