"""diffusers' schedulers: which there are, their noise levels as a process, and sampling with them."""

import copy
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..diffusion.denoiser import Condition, Denoiser, ModelMeanType
from ..diffusion.process import NoiseLevels
from ..diffusion.samplers import State
from ..diffusion.times import every_row
from ..settings.stable_diffusion import SCHEDULERS, SPACINGS, check_names

SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")

PREDICTIONS = {
    "epsilon": ModelMeanType.EPSILON,
    "sample": ModelMeanType.START_X,
    "v_prediction": ModelMeanType.VELOCITY,
}

STRIDES = ("DDIMScheduler", "DDIMParallelScheduler", "CogVideoXDDIMScheduler", "PNDMScheduler")
"""Classes whose steps are all T // steps long, whatever the distance of their timesteps."""

REFUSED = {
    "KDPM2AncestralDiscreteScheduler": "scales the network's input by another noise level than it steps by",
    "DPMSolverMultistepInverseScheduler": "makes noise of images, not images of noise",
}
"""Classes that cannot sample, and why."""


def mean_type(scheduler: Any) -> ModelMeanType:
    """What the network of this scheduler predicts; a ValueError for kinds that are not diffusion of ε, x_0 or v."""
    name, kind = type(scheduler).__name__, type(scheduler)
    if hasattr(kind, "precondition_outputs"):
        raise ValueError(f"scheduler: {name} preconditions (EDM): what its network puts out is none of ε, x_0 and v")
    if not hasattr(kind, "add_noise") or "prediction_type" not in inspect.signature(kind).parameters:
        raise ValueError(f"scheduler: {name} is none of diffusion of ε, x_0 or v (flow matching, for one, is not)")
    predicts = scheduler.config.prediction_type
    if predicts not in PREDICTIONS:
        raise ValueError(f"scheduler: {name}: prediction_type: wanted {', '.join(PREDICTIONS)}, got {predicts!r}")
    return PREDICTIONS[predicts]


def choose_scheduler(own: Any, name: str = "", spacing: str = "") -> Any:
    """A scheduler of diffusers for the network that came with the scheduler `own`.

    name: of `SCHEDULERS`, empty for `own`'s class. spacing: of `SPACINGS`, empty for its class's and configuration's.
    """
    import diffusers

    check_names(name, spacing)
    mean_type(own)  # another class would read the same network in another way
    kind, settings = type(own), {}
    if name:
        class_name, settings = SCHEDULERS[name]
        kind = getattr(diffusers, class_name)
    known = inspect.signature(kind).parameters
    if kind.__name__ in REFUSED:
        raise ValueError(f"scheduler: {kind.__name__} {REFUSED[kind.__name__]}")
    if spacing and not SPACINGS[spacing].keys() <= known.keys():
        can = ", ".join(name for name, needs in SPACINGS.items() if needs.keys() <= known.keys())
        raise ValueError(f"spacing: {kind.__name__} has no {spacing}; it has {can}")
    if spacing:
        # A spacing of the model's own configuration would win, or be refused beside this one.
        settings = settings | {flag: False for flag in SIGMAS if flag in known} | SPACINGS[spacing]
    # Latents are not in [−1, 1]; some classes clip unless told.
    if "clip_sample" in known:
        settings = settings | {"clip_sample": False}
    chosen = kind.from_config(own.config, **settings)
    if kind.__name__ in STRIDES and chosen.config.timestep_spacing == "linspace":
        raise ValueError(
            f"spacing: {kind.__name__} makes steps of another length than linspace has; give --spacing leading or "
            "trailing"
        )
    return chosen


def start(scheduler: Any, steps: int, device: torch.device | str = "cpu", made: int | None = None) -> Any:
    """A copy of a scheduler, ready for the first of so many steps; a ValueError if it cannot make that many.

    device: of its timesteps; where that is a GPU, some schedulers wait for it several times a step. made: of these,
    make the last so many only.
    """
    fresh = type(scheduler).from_config(scheduler.config)
    name, trained = type(fresh).__name__, fresh.config.num_train_timesteps
    if steps > trained:
        raise ValueError(f"steps: {name} cannot make {steps} steps: its network was trained on {trained}")
    try:
        fresh.set_timesteps(steps, device=device)
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise ValueError(f"steps: {name} cannot make {steps} steps ({error})") from None
    first = float(fresh.timesteps.max())
    if not trained / 2 <= first <= trained - 1:
        raise ValueError(
            f"steps: {name} begins {steps} steps at timestep {first:g}, of 0 to {trained - 1}, the last of which is "
            "noise; give --spacing trailing"
        )
    skipped = 0 if made is None else steps - made
    if hasattr(fresh, "set_begin_index"):
        fresh.set_begin_index(skipped * fresh.order)
    elif skipped and hasattr(fresh, "plms_timesteps"):
        if not fresh.config.skip_prk_steps:
            raise ValueError("scheduler: PNDM can begin in the middle only with skip_prk_steps: give --scheduler pndm")
        # It calls the network twice at the second step that it makes.
        left = fresh.timesteps.unique().flip(0)[skipped:]
        fresh.timesteps = torch.cat([left[:2], left[1:]])
    else:
        fresh.timesteps = fresh.timesteps[skipped:]
    return fresh


def calls(scheduler: Any) -> Tensor:
    """The timesteps of the network calls that a scheduler makes from where it was started."""
    return scheduler.timesteps[getattr(scheduler, "begin_index", None) or 0 :]


def noise_levels(scheduler: Any) -> NoiseLevels:
    """α and σ at every network call of a scheduler whose timesteps are set: how it mixes image and noise itself.

    By index, not by timestep: some schedulers call the network twice at a timestep, or round it.
    """
    probe = copy.deepcopy(scheduler)
    probe._step_index = None  # which add_noise would prefer to the index that is asked for
    image, noise = torch.eye(2, dtype=torch.float64)[:, :, None, None, None]
    levels = []
    for index, timestep in enumerate(probe.timesteps):
        if hasattr(probe, "set_begin_index"):
            probe.set_begin_index(index)
        # KDPM2's second call lies between two levels, which its add_noise does not know.
        if hasattr(probe, "sigmas_interpol") and index % 2:
            between = probe.sigmas_interpol[index].cpu().double()
            levels.append(torch.stack([torch.ones_like(between), between]))
        else:
            levels.append(probe.add_noise(image, noise, timestep.expand(2)).flatten())
    alphas, sigmas = torch.stack(levels).flip(0).cpu().numpy().T
    return NoiseLevels(alphas, sigmas, scheduler.timesteps.flip(0))


def diffuse(
    scheduler: Any,
    denoiser: Denoiser,
    x_T: Tensor,
    condition: Condition,
    generators: Sequence[torch.Generator],
    image: Tensor | None = None,
) -> Iterator[State]:
    """Sample with a scheduler that was started: one State for every network call; the last one's x is the sample.

    x_T: standard normal noise [N, C, h, w]. generators: one for each sample, for schedulers that add noise. image: x_0
    to begin with, [N, C, h, w], under the noise of the first call (SDEdit, Meng et al. 2022).
    """
    takes = inspect.signature(scheduler.step).parameters
    random = {"generator": list(generators)} if "generator" in takes else {}
    timesteps = calls(scheduler)
    if image is None:
        x = x_T * scheduler.init_noise_sigma
    else:
        x = scheduler.add_noise(image, x_T, timesteps[:1].expand(len(x_T)))
    left = len(timesteps)
    for timestep in timesteps:
        left -= 1
        with torch.no_grad():
            prediction = denoiser(x, every_row(left, x), condition)
            x = scheduler.step(prediction.output, timestep, x, return_dict=False, **random)[0]
        yield State(left, x, prediction)
