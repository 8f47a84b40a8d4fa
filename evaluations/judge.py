"""A whole evaluation: two sources and settings in, all numbers and where they came from out."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from evaluations.dinov2 import RESIZES, dinov2
from evaluations.emoji import WEIGHTS, emoji_features
from evaluations.evaluation import (
    OF_BOTH,
    Side,
    difference,
    evaluate,
    few,
    metric_names,
    not_comparable,
    warnings,
    why_not,
)
from evaluations.features import extract
from evaluations.inception import SHA256, inception, published_weights
from evaluations.networks import FeatureNetwork, use_whole_floats, versions
from evaluations.pairing import why_not_paired
from evaluations.ranks import Ranks
from evaluations.sources import INCEPTION, Source, open_source

FEATURES = ("inception", "dinov2", "emoji")
OF_A_RUN = ("guidance", "uint8", "network_evaluations_per_sample", "hash")
"""What is taken from a run's manifest into a result."""


def cache_folder() -> Path:
    """$SAG_CACHE, else self-attention-guidance in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SAG_CACHE") or Path(base, "self-attention-guidance"))


@dataclass(frozen=True)
class Settings:
    """What to compare and how; the evaluator's flags, by the same names.

    num_samples: judge the first so many samples only. metrics: names, None for all that the sources allow. inception:
    its weights, None for the well-known file. weights: those of dinov2 (a folder) or emoji (a file, None for the
    embedded one). resize: of dinov2, "edm2" (the default) or "dgm-eval". against: other samples that the metrics are
    also computed of, for the differences with their paired errors. paired: sample i of both is known to belong
    together, whatever their runs say of themselves.
    """

    reference: str
    samples: str
    against: str | None = None
    paired: bool = False
    features: str = "inception"
    inception: Path | None = None
    weights: Path | None = None
    resize: str | None = None
    metrics: tuple[str, ...] | None = None
    num_samples: int | None = None
    extended: bool = False
    pr_dtype: str = "fp32"
    batch_size: int = 64
    seed: int = 0
    cache: Path = field(default_factory=lambda: cache_folder() / "features")

    @property
    def distance(self) -> str:
        """What the Fréchet distance of these features is called: FID is Inception's alone."""
        return "fid" if self.features == "inception" else "frechet_distance"

    @property
    def network(self) -> str:
        """The name of the network that computes these features (`FeatureNetwork.name`)."""
        return f"dinov2-{self.resize or 'edm2'}" if self.features == "dinov2" else self.features


def feature_network(settings: Settings, ranks: Ranks) -> FeatureNetwork:
    """The network that the flags ask for, with its weights, on the device of this rank."""
    if settings.features == "dinov2":
        return ranks.agree(lambda: _dinov2(settings, ranks))
    if settings.features == "emoji":
        return ranks.agree(lambda: emoji_features(settings.weights or WEIGHTS, ranks.device))
    path = ranks.first(lambda: settings.inception or published_weights(cache_folder()))
    return ranks.agree(lambda: inception(path, ranks.device))


def _dinov2(settings: Settings, ranks: Ranks) -> FeatureNetwork:
    if settings.weights is None:
        raise ValueError("--features dinov2: give --weights, a folder with config.json and model.safetensors")
    return dinov2(settings.weights, ranks.device, settings.resize or "edm2")


def chosen_metrics(settings: Settings, reference: Source, samples: Source) -> list[str]:
    """The metrics to compute; a ValueError where one is asked for by name and cannot be."""
    names = metric_names(settings.distance, settings.extended or settings.metrics is not None)
    if settings.metrics is None:
        return names
    for name in settings.metrics:
        if name not in names:
            raise ValueError(f"--metrics: wanted some of {', '.join(names)}, got {name!r}")
        if reason := why_not(name, reference, samples):
            raise ValueError(f"--metrics {name}: {reason}")
    return list(settings.metrics)


def check(settings: Settings, reference: Source, samples: Source) -> None:
    """A ValueError where the flags do not go together, or two sources cannot be compared by the features asked for."""
    if settings.features not in FEATURES:
        raise ValueError(f"--features: wanted one of {', '.join(FEATURES)}, got {settings.features!r}")
    if settings.resize is not None and settings.features != "dinov2":
        raise ValueError("--resize: only --features dinov2 has several, those of other features are fixed")
    if settings.resize not in (None, *RESIZES):
        raise ValueError(f"--resize: wanted one of {', '.join(RESIZES)}, got {settings.resize!r}")
    if settings.features == "inception" and settings.weights is not None:
        raise ValueError("--weights: the weights of Inception are given by --inception")
    for source in (reference, samples):
        if source.images is not None and not source.statistics and len(source.images) < 2:
            raise ValueError(f"{source.path}: wanted 2 images or more, got {len(source.images)}")
        for feature, name, size in (("pool", "mu", INCEPTION), ("spatial", "mu_s", 2023)):
            if (
                settings.features == "inception"
                and (gaussian := source.statistics.get(feature))
                and len(gaussian.mean) != size
            ):
                raise ValueError(f"{source.path}: {name}: wanted {size} dimensions, got {len(gaussian.mean)}")


def check_dimensions(network: FeatureNetwork | None, sources: Sequence[Source]) -> None:
    """A ValueError where statistics have not as many dimensions as the network's features, or as each other."""
    wanted = network and network.dimensions
    for source in sources:
        if gaussian := source.statistics.get("pool"):
            wanted = wanted or len(gaussian.mean)
            if len(gaussian.mean) != wanted:
                raise ValueError(f"{source.path}: mu: wanted {wanted} dimensions, got {len(gaussian.mean)}")


def open_samples(settings: Settings, path: str) -> Source:
    """Samples, or as many of them as are asked for."""
    source = open_source(path, settings.features)
    if settings.num_samples is None:
        return source
    if source.images is None:
        raise ValueError(f"--num_samples: {source.path} holds statistics, but no images")
    try:
        return replace(source, images=source.images.first(settings.num_samples))
    except ValueError as error:
        raise ValueError(f"--num_samples: {source.path}: {error}") from None


def open_all(settings: Settings) -> list[Source]:
    """The reference, the samples, and what these are compared with; a ValueError where samples are not paired."""
    sources = [open_source(settings.reference, settings.features), open_samples(settings, settings.samples)]
    if settings.against:
        sources.append(open_samples(settings, settings.against))
        known = replace(sources[1], about={"identity": {}}), replace(sources[2], about={"identity": {}})
        if reason := why_not_paired(*(known if settings.paired else sources[1:])):
            raise ValueError(f"--against: not paired: {reason}")
    return sources


def described(side: Side) -> dict[str, Any]:
    """Where one side came from: path, number of images, digest, and what its run said of itself."""
    images, about = side.source.images, side.source.about
    return {
        "path": side.source.path,
        "images": len(images) if images else None,
        "sha256_of_blocks": side.features.digest if side.features else None,
        "statistics": sorted(side.source.statistics),
        "statistics_of": side.source.statistics_of or None,
        "run": {
            key: about[key] for key in ("guidance", "uint8", "network_evaluations_per_sample", "hash") if key in about
        },
    }


def judge(settings: Settings, ranks: Ranks | None = None) -> dict[str, Any]:
    """Evaluate samples against a reference; the numbers on rank 0, an empty dict on the others.

    Bad input is a `BadInputError`. Returns what the evaluator writes as JSON: metrics with value and error, the parts
    of the Fréchet distances, what is missing and why, whether the numbers compare with published ones, provenance; with
    `against` also the differences.
    """
    ranks = ranks or Ranks()
    use_whole_floats()
    reference, *sets = ranks.first(lambda: open_all(settings))

    def choose() -> list[str]:
        for samples in sets:
            check(settings, reference, samples)
        return chosen_metrics(settings, reference, sets[0])

    metrics = ranks.first(choose)
    for warning in warnings(reference, sets[0], metrics) if ranks.rank == 0 else []:
        sys.stderr.write(f"warning: {warning}\n")

    sources = [reference, *sets]
    seen = [source.images is not None and (not source.statistics or bool(set(metrics) & OF_BOTH)) for source in sources]
    network = feature_network(settings, ranks) if any(seen) else None
    ranks.agree(lambda: check_dimensions(network, sources))
    sides = []
    for word, source, is_seen in zip(("reference", "samples", "against"), sources, seen, strict=False):
        features = None
        if is_seen:
            features = extract(source.images, network, settings.cache, ranks, settings.batch_size, word)
        sides.append(Side(source, features))
        for warning in few(word, sides[-1], metrics) if ranks.rank == 0 else []:
            sys.stderr.write(f"warning: {warning}\n")
    if ranks.rank:
        return {}
    half = settings.pr_dtype == "fp16"
    found, *others = (evaluate(sides[0], side, metrics, half, ranks.device, settings.seed) for side in sides[1:])
    weights = network.weights if network else None
    because = not_comparable(settings.network, weights in (SHA256, None), reference, sets[0], metrics, half)
    result = {
        "metrics": {name: measured.described() for name, measured in found.metrics.items()},
        "parts": {
            name: {"means": parts.mean_term, "traces": list(parts.traces), "cross_trace": parts.cross_trace}
            for name, parts in found.parts.items()
        },
        "missing": found.missing,
        "n": len(sets[0].images) if sets[0].images else None,
        "features": settings.features,
        "comparable": {"answer": not because, "because": because},
        "provenance": {
            "reference": described(sides[0]),
            "samples": described(sides[1]),
            "weights_sha256": weights,
            "resize": network.name.partition("-")[2] or None if network else None,
            "pr_dtype": settings.pr_dtype,
            "seed": settings.seed,
            "versions": versions(),
        },
    }
    for side, other in zip(sides[2:], others, strict=True):
        differences = {name: measured.described() for name, measured in difference(found, other).items()}
        result["difference"] = {"against": side.source.path, "metrics": differences}
        result["provenance"]["against"] = described(side)
    return result
