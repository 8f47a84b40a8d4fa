"""Two dimensions with a known score at every noise level: where guidances move the density."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..diffusion.denoiser import Condition, Prediction
from ..diffusion.noise import SampleNoise, Samples
from ..diffusion.process import ForwardProcess
from ..diffusion.samplers import ddim
from ..guidance.base import Guidance, GuidedDenoiser
from ..guidance.classifier_free import ClassifierFreeGuidance, null_class
from ..guidance.methods.autoguidance import Autoguidance
from ..guidance.methods.momentum import MomentumGuidance
from ..guidance.methods.transforms import ProjectedGuidance, optimised

CLASSES = 4
THICKNESS = 0.04
CELL = 4
"""Neighbouring components that are counted as one."""


@dataclass(frozen=True, eq=False)
class Mixture:
    """Isotropic Gaussians in the plane, each of a class: means [K, 2], weights [K], classes [K]; std of them all.

    The weights of each class sum to 1; classes are equally likely.
    """

    means: Tensor
    weights: Tensor
    classes: Tensor
    std: float

    def smoothed(self, by: float) -> "Mixture":
        """The density blurred by a Gaussian of std `by`."""
        return Mixture(self.means, self.weights, self.classes, (self.std**2 + by**2) ** 0.5)

    def logits(self, x: Tensor, y: Tensor, alpha: Tensor | float = 1.0, sigma: Tensor | float = 0.0) -> Tensor:
        """log of each component's density at points α x_0 + σ ε of classes y, [N, K]; y = CLASSES means of any class.

        x: [N, 2]. alpha, sigma: numbers, or [N, 1].
        """
        variance = torch.as_tensor(alpha**2 * self.std**2 + sigma**2)
        means = alpha**2 * self.means.square().sum(dim=1)
        squares = x.square().sum(dim=1, keepdim=True) - 2 * alpha * (x @ self.means.T) + means
        logits = self.weights.log() - (2 * torch.pi * variance).log() - squares / (2 * variance)
        of_any = (y == CLASSES)[:, None]
        logits = logits.where(of_any | (self.classes == y[:, None]), -torch.inf)
        return logits - of_any * torch.tensor(float(CLASSES)).log()

    def log_density(self, x: Tensor, y: Tensor) -> Tensor:
        """log p(x | y), [N]."""
        return self.logits(x, y).logsumexp(dim=1)

    def draw(self, y: Tensor, generator: torch.Generator) -> Tensor:
        """Points of classes y, [N, 2]."""
        shares = self.weights * (self.classes == y[:, None])
        chosen = torch.multinomial(shares, 1, generator=generator)[:, 0]
        return self.means[chosen] + self.std * torch.randn(len(y), 2, generator=generator)

    def shares(self, x: Tensor, y: Tensor) -> Tensor:
        """The share of points whose nearest component of their class is in each cell, [K / CELL]."""
        nearest = torch.cdist(x, self.means).where(self.classes == y[:, None], torch.inf).argmin(dim=1)
        return torch.bincount(nearest // CELL, minlength=len(self.means) // CELL) / len(y)


def branches() -> Mixture:
    """Four classes, each a bent branch with two twigs, which are rarer the further out they are."""
    means, weights, classes = [], [], []
    for label in range(CLASSES):
        turn = label * 2 * torch.pi / CLASSES

        def at(radius: Tensor, angle: Tensor) -> Tensor:
            return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)

        along = torch.linspace(0.2, 1, 6 * CELL)
        stem = at(1.5 * along, turn + 0.9 * along)
        short = torch.linspace(0.06, 0.6, 2 * CELL)
        twigs = [
            stem[start] + at(short, torch.full_like(short, turn + angle)) for start, angle in ((9, 1.7), (16, -0.3))
        ]
        parts = [(stem, 1.2 - along), *((twig, 0.5 * (1 - short)) for twig in twigs)]
        weight = torch.cat([share for _, share in parts])
        means.append(torch.cat([points for points, _ in parts]))
        weights.append(weight / weight.sum())
        classes.append(torch.full((len(weight),), label))
    return Mixture(torch.cat(means), torch.cat(weights), torch.cat(classes), THICKNESS)


@dataclass(frozen=True, eq=False)
class ExactDenoiser:
    """The denoiser of a mixture: ε = −σ ∇ log p_t(x_t | y) of x_t [N, 2, 1, 1]; y = CLASSES is the null label."""

    mixture: Mixture
    process: ForwardProcess

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Prediction:
        x, mixture = x_t[:, :, 0, 0], self.mixture
        alpha, sigma = (self.process.at(name, t, x) for name in ("alphas", "sigmas"))
        share = mixture.logits(x, condition["y"], alpha, sigma).softmax(dim=1)
        variance = alpha**2 * mixture.std**2 + sigma**2
        eps = (sigma * (x - alpha * (share @ mixture.means)) / variance)[:, :, None, None]
        return Prediction(self.process, x_t, t, condition, eps, self.process.x0_from_eps(x_t, t, eps))


def guidances(weak: ExactDenoiser) -> Mapping[str, Sequence[Guidance]]:
    """Guidances that need no attention, by what they are called.

    Independent condition guidance is none: the exact score of another class leads to that class, and is no estimate of
    the unconditional one. Time-step guidance is none: there is no embedding to disturb.
    """

    def by_class(scale: float, *transforms) -> Guidance:
        return ClassifierFreeGuidance(scale=scale, null=null_class(CLASSES), transforms=transforms)

    def by_weak(scale: float, *transforms) -> Guidance:
        return Autoguidance(scale=scale, weak=weak, transforms=transforms)

    return {
        "none": (),
        "autoguidance, s = 1": (by_weak(1),),
        "autoguidance, s = 3": (by_weak(3),),
        "autoguidance, s = 3, APG": (by_weak(3, ProjectedGuidance(momentum=-0.5)),),
        "momentum, s = 0.5": (MomentumGuidance(scale=0.5),),
        "SG-prev, s = 0.5": (MomentumGuidance(scale=0.5, decay=0),),
        "classifier-free, s = 1": (by_class(1),),
        "classifier-free, s = 3": (by_class(3),),
        "classifier-free, s = 3, APG": (by_class(3, ProjectedGuidance(momentum=-0.5)),),
        "classifier-free, s = 3, Zero*": (by_class(3, optimised),),
    }


def sampled(model: ExactDenoiser, guided_by: Sequence[Guidance], y: Tensor, seed: int) -> Tensor:
    """Points of classes y made with guidances by DDIM, [N, 2]; the first noise of point i is always the same."""
    indices = range(len(y))
    x_T = SampleNoise(seed, indices, (2, 1, 1)).x_T()
    guided = GuidedDenoiser(model, model.process, guided_by, Samples(seed, indices))
    *_, last = ddim(guided, model.process, x_T, {"y": y})
    return last.x[:, :, 0, 0]


@dataclass(frozen=True)
class Difference:
    """How points differ from a density.

    outside: the share that lies where the density is lower than at 99 % of its own points. moved: the share that would
    have to move to another part of the branches for every part to have its share. distance: the mean over classes of
    the energy distance to as many points drawn from the density.
    """

    outside: float
    moved: float
    distance: float


def compare(points: Tensor, y: Tensor, truth: Mixture, drawn: Tensor) -> Difference:
    """Points of classes y against a density; drawn: points of the same classes that were drawn from it."""
    least = truth.log_density(drawn, y).quantile(0.01)
    distances = []
    for label in range(CLASSES):
        one, other = points[y == label], drawn[y == label]
        within = sum(torch.cdist(part, part).sum() / (len(part) * (len(part) - 1)) for part in (one, other))
        distances.append(2 * torch.cdist(one, other).mean() - within)
    return Difference(
        outside=float((truth.log_density(points, y) < least).double().mean()),
        moved=float((truth.shares(points, y) - truth.shares(drawn, y)).abs().sum() / 2),
        distance=float(sum(distances) / CLASSES),
    )
