"""Metrics from nearest neighbours among features: precision and recall, density and coverage, copies.

Kynkäänniemi et al. 2019 with the definitions of guided-diffusion's evaluator; Naeem et al. 2020; Alaa et al. 2022.
Distances are squared; no more than a block of them exists at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

BLOCK = 2048
HALF_BLOCK = 10_000
"""Rows and columns of the blocks in which the original goes back to single precision."""


class Rows(Protocol):
    """Features [N, D] that need not be in memory: a tensor, or what reads them from disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice) -> Tensor: ...


class Distances:
    """Squared Euclidean distances of blocks of features, computed on a device.

    half: as guided-diffusion's evaluator computed the published numbers: features, norms, product and sums rounded to
    half precision, and a block of 10,000 × 10,000 in single precision where an entry of it is not finite. centre: [D],
    taken from all features else: distances stay, but their rounding, that of differences of squares, gets smaller.
    """

    def __init__(self, half: bool = False, centre: Tensor | None = None, device: torch.device | str = "cpu"):
        self.half = half
        self.block = HALF_BLOCK if half else BLOCK
        self.centre = None if centre is None or half else centre.to(device)
        self.device = device

    def between(self, rows: Tensor, columns: Tensor) -> Tensor:
        """[N, D] and [M, D] to [N, M] float32, at least 0."""
        if self.half:
            distances = self._half(rows, columns)
            if distances.isfinite().all():
                return distances
        squares = rows.square().sum(dim=1)[:, None], columns.square().sum(dim=1)
        return torch.addmm(squares[1], rows, columns.T, alpha=-2).add_(squares[0]).clamp_(min=0)

    @staticmethod
    def _half(rows: Tensor, columns: Tensor) -> Tensor:
        def rounded(x: Tensor) -> Tensor:
            return x.half().float()

        rows, columns = rounded(rows), rounded(columns)
        norms = [rounded(rounded(x.square()).sum(dim=1)) for x in (rows, columns)]
        # In place: each step is rounded, and a block is large.
        distances = (rows @ columns.T).mul_(-2)
        distances = distances.copy_(distances.half()).add_(norms[0][:, None])
        distances = distances.copy_(distances.half()).add_(norms[1])
        return distances.copy_(distances.half()).clamp_(min=0)

    def cut(self, features: Rows) -> Iterator[tuple[slice, Tensor]]:
        """The features in blocks, with the rows they are."""
        for start in range(0, len(features), self.block):
            rows = slice(start, start + self.block)
            block = features[rows].to(self.device)
            yield rows, block if self.centre is None else block - self.centre


def _smallest(values: Tensor, count: int) -> Tensor:
    """The `count` smallest entries of each row, ascending."""
    return values.topk(min(count, values.shape[1]), dim=1, largest=False, sorted=True).values


def radii(features: Rows, k: int, distances: Distances) -> Tensor:
    """Squared distance of each feature [N, D] to its k-th nearest other one: [N].

    As upstream counts: the entry k (from 0) of a row in ascending order, the distance 0 to itself being one of them.
    """
    if len(features) <= k:
        raise ValueError(f"nearest neighbours: wanted more than {k} samples, got {len(features)}")
    smallest = torch.full((len(features), k + 1), torch.inf, device=distances.device)
    for rows, left in distances.cut(features):
        for columns, right in distances.cut(features):
            if columns.start < rows.start and not distances.half:
                continue  # had by symmetry, which rounding to half precision breaks
            block = distances.between(left, right)
            if columns == rows and not distances.half:
                block.fill_diagonal_(0)
            elif not distances.half:
                merged = torch.cat([smallest[columns], _smallest(block.T.contiguous(), k + 1)], dim=1)
                smallest[columns] = _smallest(merged, k + 1)
            smallest[rows] = _smallest(torch.cat([smallest[rows], _smallest(block, k + 1)], dim=1), k + 1)
    return smallest[:, k]


def nearest_other(features: Rows, distances: Distances) -> Tensor:
    """Squared distance of each feature [N, D] to the nearest one that is not the same: [N], 0 where there is none."""
    same = 4e-6  # of the squared norms: the rounding of a distance that is 0, in single precision
    nearest = torch.full((len(features),), torch.inf, device=distances.device)
    for rows, left in distances.cut(features):
        for _, right in distances.cut(features):
            norms = left.square().sum(dim=1)[:, None] + right.square().sum(dim=1)
            block = distances.between(left, right)
            others = block.masked_fill_(block <= same * norms, torch.inf)
            nearest[rows] = torch.minimum(nearest[rows], others.amin(dim=1))
    return nearest.masked_fill_(nearest.isinf(), 0)


PARTS, KEPT = 50, 0.6
"""Random parts of the samples by which the errors of recall and coverage are found, and the share of samples in each.

Who is inside some ball is no smooth function of the samples: leaving out one at a time makes errors too large.
"""
NEAR = 12
"""Neighbours known of a sample: its k-th one in a part is among them but for a chance of 1 in 400."""


@dataclass(frozen=True, eq=False)
class Parts:
    """PARTS random parts of the samples, the same ones for as many samples.

    squared: [N, PARTS] the squared radius of each sample in each part, −1 outside of it. whole: [N] in the whole.
    """

    squared: Tensor
    whole: Tensor

    @classmethod
    def of(cls, samples: Rows, k: int, distances: Distances, seed: int = 0) -> "Parts":
        """The radii to the k-th nearest other sample of the same part."""
        near, who = nearest(samples, min(NEAR, len(samples) - 1), distances)
        generator = torch.Generator().manual_seed(seed)
        order = torch.rand((len(samples), PARTS), generator=generator).argsort(dim=0).argsort(dim=0)
        kept = (order < round(KEPT * len(samples))).to(near.device)
        squared = torch.empty(len(samples), PARTS, device=near.device)
        for rows in torch.arange(len(samples), device=near.device).split(BLOCK):
            inside = kept[who[rows]].cumsum(dim=1)  # [rows, NEAR, PARTS]
            place = (inside < k).sum(dim=1).clamp(max=near.shape[1] - 1)
            squared[rows] = near[rows].gather(1, place).masked_fill(~kept[rows], -1)
        return cls(squared, near[:, k - 1])

    @property
    def reach(self) -> Tensor:
        """[N] the largest radius of each sample in any part."""
        return self.squared.amax(dim=1)


def nearest(features: Rows, count: int, distances: Distances) -> tuple[Tensor, Tensor]:
    """Squared distances [N, count] of each feature to its nearest other ones, ascending, and which they are."""
    found = torch.empty(len(features), count, device=distances.device)
    who = torch.empty(len(features), count, dtype=torch.int64, device=distances.device)
    for rows, left in distances.cut(features):
        best, place = None, None
        for columns, right in distances.cut(features):
            block = distances.between(left, right)
            if columns == rows:
                block.fill_diagonal_(torch.inf)
            here = torch.arange(columns.start, columns.start + len(right), device=block.device).expand_as(block)
            if best is not None:
                block, here = torch.cat([best, block], dim=1), torch.cat([place, here], dim=1)
            best, at = block.topk(min(count, block.shape[1]), dim=1, largest=False)
            place = here.gather(1, at)
        found[rows], who[rows] = best, place
    return found, who


@dataclass(frozen=True, eq=False)
class Neighbours:
    """Who is inside whose ball. N samples, M reference images; None where not asked for.

    precise: [N] bool, samples inside a reference ball; recalled: [M] bool, reference images inside a sample's ball;
    balls: [N] the reference balls a sample is in, over k; covered: [M] bool, balls with a sample; copied: [N] bool,
    copies. …_in_parts: [PARTS] the shares of recalled and covered images of parts of the samples.
    """

    precise: Tensor
    recalled: Tensor
    recalled_in_parts: Tensor | None = None
    balls: Tensor | None = None
    covered: Tensor | None = None
    covered_in_parts: Tensor | None = None
    copied: Tensor | None = None


def neighbours(
    reference: Rows,
    samples: Rows,
    distances: Distances,
    k: int = 3,
    extended_k: int | None = None,
    parts: Parts | None = None,
) -> Neighbours:
    """Precision and recall of samples [N, D] against reference features [M, D], and with `extended_k` the others.

    precision: share of samples inside a ball around a reference feature that reaches to its k-th nearest other one
    (`<=`); recall: the same with the sides exchanged. density and coverage: Naeem et al., with extended_k. copies:
    share of samples that are nearer to a reference image than any other reference image is, its own doubles aside.
    """
    reference_radii = radii(reference, k, distances)
    sample_radii = radii(samples, k, distances) if parts is None or distances.half else parts.whole
    precise = torch.zeros(len(samples), dtype=torch.bool, device=distances.device)
    recalled = torch.zeros(len(reference), dtype=torch.bool, device=distances.device)
    recalled_in, covered_in = (
        torch.zeros(len(reference) if parts is not None else 0, PARTS, dtype=torch.bool, device=distances.device)
        for _ in range(2)
    )
    if extended_k is not None:
        wide, away = radii(reference, extended_k, distances), nearest_other(reference, distances)
        balls = torch.zeros(len(samples), dtype=torch.float64, device=distances.device)
        covered, copied = torch.zeros_like(recalled), torch.zeros_like(precise)
    reach = parts.reach if parts is not None else None
    for rows, left in distances.cut(reference):
        for columns, right in distances.cut(samples):
            block = distances.between(left, right)
            precise[columns] |= (block <= reference_radii[rows, None]).any(dim=0)
            recalled[rows] |= (block <= sample_radii[columns]).any(dim=1)
            if parts is not None:
                near = (block <= reach[columns]).nonzero(as_tuple=True)
                inside = block[near][:, None] <= parts.squared[columns][near[1]]
                recalled_in[rows] |= _any(near[0], inside, len(left))
            if extended_k is not None:
                within = block <= wide[rows, None]
                balls[columns] += within.sum(dim=0)
                covered[rows] |= within.any(dim=1)
                copied[columns] |= (block < away[rows, None]).any(dim=0)
                if parts is not None:
                    near = within.nonzero(as_tuple=True)
                    covered_in[rows] |= _any(near[0], parts.squared[columns][near[1]] >= 0, len(left))
    shares = [each.double().mean(dim=0) if parts is not None else None for each in (recalled_in, covered_in)]
    if extended_k is None:
        return Neighbours(precise, recalled, shares[0])
    return Neighbours(precise, recalled, shares[0], balls / extended_k, covered, shares[1], copied)


def _any(rows: Tensor, hits: Tensor, count: int) -> Tensor:
    """Whether any of the hits [K, PARTS] at the rows [K] is one: [count, PARTS]."""
    return torch.zeros(count, hits.shape[1], device=hits.device).index_add_(0, rows, hits.float()).bool()
