"""The metrics of samples against a reference, from their features: what can be computed, and how sure it is."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from evaluations.features import FeatureRows, ImageFeatures
from evaluations.measured import Measured, of_influence, of_parts, of_share, wilson
from evaluations.moments import (
    FrechetDistance,
    Gaussian,
    Moments,
    frechet_distance,
    frechet_influence,
    frechet_jackknife,
)
from evaluations.neighbours import KEPT, Distances, Parts, neighbours
from evaluations.scores import (
    SPLIT,
    class_distance,
    frechet_infinity,
    inception_score,
    kernel_distance,
    sliced_distance,
)
from evaluations.sources import Source

MANIFOLD = ("precision", "recall")
WIDE = ("density", "coverage", "copies")
EXTENDED = ("kid", "mind", "fid_infinity", *WIDE, "class_distance", "inception_score_shuffled")
OF_INCEPTION = ("fid_infinity", "class_distance", "inception_score_shuffled")
OF_BOTH = {*MANIFOLD, *WIDE, "kid", "mind", "class_distance"}
"""Metrics that compare images with images: statistics alone do not do."""
UINT8 = "trunc(127.5x + 127.5)"
"""How guided-diffusion makes uint8 of x in [−1, 1], and so of every sample that its published numbers are of."""
JACKKNIFED = 128
"""Fewer samples than dimensions, and no more than these: their distance's error is found by leaving one out."""
NEIGHBOURS_K, EXTENDED_K = 3, 5
DISTANCES = {"fid": "pool", "frechet_distance": "pool", "sfid": "spatial"}
"""Fréchet distances, and the features that they are of."""
FEW = 100
"""Images: with fewer, the error of any mean is large."""


@dataclass(frozen=True, eq=False)
class Side:
    """One side of the comparison: the source, and its images' features if they were computed."""

    source: Source
    features: ImageFeatures | None

    def rows(self, name: str) -> FeatureRows | None:
        return self.features.rows.get(name) if self.features else None

    def gaussian(self, name: str) -> Gaussian:
        """Mean and covariance of a feature: the file's own statistics, else those of the images."""
        if name in self.source.statistics:
            return self.source.statistics[name]
        rows = self.rows(name)
        gaussian = Moments.sum(Moments.of(block.numpy()) for block in rows.blocks()).gaussian()
        few = len(rows) <= len(gaussian.mean)
        return gaussian.with_features(rows[:].numpy()) if few else gaussian


@dataclass
class Evaluation:
    """Metrics by name, the parts of each Fréchet distance, and why a metric is missing."""

    metrics: dict[str, Measured] = field(default_factory=dict)
    parts: dict[str, FrechetDistance] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def metric_names(distance: str, extended: bool) -> list[str]:
    """All metrics there are for a feature network whose Fréchet distance is called `distance`."""
    inception = distance == "fid"
    names = [distance, *(["sfid", "inception_score"] if inception else []), *MANIFOLD]
    more = [name for name in EXTENDED if inception or name not in OF_INCEPTION]
    return names + (more if extended else [])


def why_not(metric: str, reference: Source, samples: Source) -> str:
    """Why a metric cannot be computed from two sources; empty if it can."""
    n = len(samples.images) if samples.images else 0
    if metric in OF_BOTH | {"inception_score", "inception_score_shuffled", "fid_infinity"} and not samples.images:
        return f"{samples.path} holds statistics, but no images"
    if metric in OF_BOTH and not reference.images:
        return f"{reference.path} holds statistics, but no images"
    for source in (reference, samples):
        if metric == "sfid" and source.statistics and "spatial" not in source.statistics:
            return f"{source.path} holds no mu_s and sigma_s"
    smallest = min(n, len(reference.images)) if reference.images else n
    if metric in MANIFOLD and smallest <= NEIGHBOURS_K:
        return f"it needs {NEIGHBOURS_K + 1} images or more on both sides, got {smallest}"
    if metric in WIDE and smallest <= EXTENDED_K:
        return f"it needs {EXTENDED_K + 1} images or more on both sides, got {smallest}"
    return ""


def evaluate(
    reference: Side, samples: Side, metrics: Sequence[str], half: bool, device: torch.device, seed: int = 0
) -> Evaluation:
    """Compute `metrics` (names of `metric_names`); those that the sources do not allow are named in `missing`.

    half: precision and recall as upstream's half precision computes them. seed: of the metrics that draw subsets.
    """
    result = Evaluation()
    wanted = []
    for name in metrics:
        if reason := why_not(name, reference.source, samples.source):
            result.missing[name] = reason
        else:
            wanted.append(name)
    for name, feature in DISTANCES.items():
        if name in wanted:
            result.metrics[name], result.parts[name] = _frechet(reference, samples, feature)
    pool = samples.rows("pool")
    if "fid_infinity" in wanted:
        try:
            result.metrics["fid_infinity"] = frechet_infinity(pool, reference.gaussian("pool"), seed)
        except ValueError as error:
            result.missing["fid_infinity"] = str(error)
    if "inception_score" in wanted:
        result.metrics["inception_score"] = inception_score(samples.rows("logits"))
    if "inception_score_shuffled" in wanted:
        order = np.random.default_rng(seed).permutation(len(pool))
        result.metrics["inception_score_shuffled"] = inception_score(samples.rows("logits"), order)
    if "class_distance" in wanted:
        result.metrics["class_distance"] = class_distance(samples.rows("logits"), reference.rows("logits"))
    if "kid" in wanted:
        result.metrics["kid"] = kernel_distance(pool, reference.rows("pool"), device)
    if "mind" in wanted:
        result.metrics["mind"] = sliced_distance(pool, reference.rows("pool"), device, seed)
    if set(wanted) & {*MANIFOLD, *WIDE}:
        result.metrics |= _manifold(reference.rows("pool"), pool, bool(set(wanted) & set(WIDE)), half, device)
    return result


def difference(first: Evaluation, second: Evaluation) -> dict[str, Measured]:
    """Metrics of the first minus those of the second, whose samples are paired, with the errors of the differences."""
    both = [name for name in first.metrics if name in second.metrics]
    return {name: first.metrics[name].minus(second.metrics[name]) for name in both}


def _frechet(reference: Side, samples: Side, feature: str) -> tuple[Measured, FrechetDistance]:
    theirs, ours = reference.gaussian(feature), samples.gaussian(feature)
    distance, deviations = frechet_distance(ours, theirs), None
    rows = samples.rows(feature)
    if rows is not None and 2 < len(rows) <= JACKKNIFED and ours.factor is not None:
        deviations = frechet_jackknife(rows[:].numpy(), theirs)
    elif rows is not None and (influence := frechet_influence(ours, theirs)):
        deviations = of_influence(np.concatenate([influence(block.numpy()) for block in rows.blocks()]))
    return Measured(distance.value, deviations), distance


def _manifold(
    reference: FeatureRows, samples: FeatureRows, wide: bool, half: bool, device: torch.device
) -> dict[str, Measured]:
    """Shares by name; errors of sums over samples sample by sample, of recall and coverage by parts of the samples."""
    centre = sum(block.sum(dim=0) for block in reference.blocks()) / len(reference)
    whole = Distances(False, centre, device)
    parts = Parts.of(samples, NEIGHBOURS_K, whole)
    found = extended = neighbours(
        reference,
        samples,
        Distances(half, centre, device),
        NEIGHBOURS_K,
        EXTENDED_K if wide and not half else None,
        parts,
    )
    if wide and half:
        extended = neighbours(reference, samples, whole, NEIGHBOURS_K, EXTENDED_K, parts)

    def of_balls(hit: Tensor, in_parts: Tensor) -> Measured:
        return Measured(float(hit.double().mean()), of_parts(in_parts.cpu().numpy(), KEPT))

    measured = {
        "precision": of_share(found.precise.double().cpu().numpy()),
        "recall": of_balls(found.recalled, found.recalled_in_parts),
    }
    if wide:
        measured["density"] = of_share(extended.balls.cpu().numpy())
        measured["coverage"] = of_balls(extended.covered, extended.covered_in_parts)
        measured["copies"] = of_share(extended.copied.double().cpu().numpy())
    fewest = min(len(samples), len(reference))
    for name, count in {
        "precision": len(samples),
        "recall": fewest,
        "coverage": fewest,
        "copies": len(samples),
    }.items():
        if name in measured and measured[name].value in (0, 1):
            measured[name] = replace(measured[name], interval=wilson(measured[name].value, count))
    return measured


def not_comparable(
    features: str, published_weights: bool, reference: Source, samples: Source, metrics: Sequence[str], half: bool
) -> list[str]:
    """Why the numbers cannot stand beside published ones; empty if they can. features: the network's name."""
    reasons = []
    if features.startswith("dinov2"):
        reasons.append("the weights of DINOv2 are not known to be the published ViT-L/14")
    elif features != "inception":
        reasons.append(f"the features are {features}, not Inception's")
    elif not published_weights:
        reasons.append("the weights of Inception are not those of the well-known file")
    n = len(samples.images) if samples.images else "not known"
    if n != 50_000:
        reasons.append(f"N is {n}, not 50000")
    if not reference.statistics:
        reasons.append("the reference is not a published file with statistics")
    for source in (reference, samples):
        if source.statistics and source.statistics_of != features:
            said = f"are of {source.statistics_of}" if source.statistics_of else "may be of any features"
            reasons.append(f"the statistics of {source.path} {said}, not said to be of {features}")
    rule = samples.about.get("uint8", UINT8)
    if rule != UINT8:
        reasons.append(f"uint8 of {samples.path} are {rule!s:.60}, guided-diffusion's {UINT8}")
    if set(metrics) & set(MANIFOLD) and not half:
        reasons.append("published precision and recall are of half precision (--pr_dtype fp16)")
    return reasons


def few(word: str, side: Side, metrics: Sequence[str]) -> list[str]:
    """What to know of a side, called by a word, that has few images: fewer than dimensions, or else than FEW."""
    found, n = [], len(side.source.images or ())
    for metric, feature in DISTANCES.items():
        if metric in metrics and (rows := side.rows(feature)) is not None and feature not in side.source.statistics:
            dimensions = rows[:1].shape[1]
            if n < dimensions:
                found.append(f"{word}: {n} images are fewer than the {dimensions} dimensions of {metric}: it is biased")
    if 0 < n < FEW and not found:
        found.append(f"{word}: {n} images are few (below {FEW}): no metric of them says much")
    return found


def warnings(reference: Source, samples: Source, metrics: Sequence[str]) -> list[str]:
    """What a user should know before reading the numbers."""
    found = []
    if samples.images and "inception_score" in metrics:
        if samples.images.sorted_labels:
            found.append("samples: sorted by class, and the Inception score depends on the order; see the shuffled one")
        if len(samples.images) % SPLIT:
            found.append(
                f"samples: {len(samples.images)} is no multiple of {SPLIT}: the last split of the Inception score is "
                "smaller, and counts as much"
            )
    if reference.images and samples.images and reference.images.size != samples.images.size:
        sizes = ["×".join(map(str, source.images.size)) for source in (reference, samples)]
        found.append(f"the reference's images are {sizes[0]}, the samples {sizes[1]}")
    return found
