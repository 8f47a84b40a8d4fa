"""Evaluate samples against a reference: FID, sFID, Inception score, precision and recall.

REF and SAMPLES are an npz (arr_0: uint8 [N, H, W, 3]), the folder of a sampling run, a folder of pictures, or
statistics (mu, sigma, mu_s, sigma_s), as in the published VIRTUAL_….npz. A stopped evaluation goes on where it was.

  python evaluations/evaluator.py VIRTUAL_imagenet256_labeled.npz samples_50000x256x256x3.npz --pr_dtype fp16
  mpiexec -n 8 python evaluations/evaluator.py REF runs/mine --json result.json
  python evaluations/evaluator.py configs/models/emoji32_train.npz runs/demo/guided --features emoji
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from evaluations.dinov2 import dinov2
from evaluations.emoji import WEIGHTS, emoji_features
from evaluations.evaluation import OF_BOTH, Side, evaluate, metric_names, not_comparable, warnings, why_not
from evaluations.features import extract
from evaluations.inception import SHA256, inception, published_weights
from evaluations.networks import FeatureNetwork, use_whole_floats, versions
from evaluations.ranks import Ranks, run
from evaluations.sources import Source, open_source

TITLES = {
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "Inception score",
    "frechet_distance": "Fréchet distance",
    "precision": "precision",
    "recall": "recall",
    "kid": "KID × 1000",
    "fid_infinity": "FID∞",
    "density": "density",
    "coverage": "coverage",
    "copies": "copies",
    "inception_score_shuffled": "Inception score, shuffled",
}


def cache_folder() -> Path:
    """$SAG_CACHE, else self-attention-guidance in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SAG_CACHE") or Path(base, "self-attention-guidance"))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", metavar="REF", help="what the samples are compared with")
    parser.add_argument("samples", metavar="SAMPLES", help="what is judged")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write everything to this file as well")
    parser.add_argument(
        "--features", choices=("inception", "dinov2", "emoji"), default="inception",
        help="network whose features are compared (default %(default)s, the one that FID is defined by)",
    )  # fmt: skip
    parser.add_argument(
        "--inception", metavar="FILE", type=Path,
        help="weights of Inception (default: the well-known file, fetched on first use, 96 MB)",
    )  # fmt: skip
    parser.add_argument("--weights", metavar="PATH", type=Path, help="weights of dinov2 (a folder) or emoji (a file)")
    parser.add_argument("--metrics", metavar="NAMES", help="only these, comma-separated, like fid,precision")
    parser.add_argument(
        "--extended", action="store_true",
        help="also KID, FID∞, density, coverage, copies (the share of samples nearer to a reference image than any "
        "other reference image is) and the Inception score in shuffled order",
    )  # fmt: skip
    parser.add_argument(
        "--pr_dtype", choices=("fp32", "fp16"), default="fp32",
        help="precision and recall: fp16 is how the published numbers were computed (default %(default)s)",
    )  # fmt: skip
    parser.add_argument("--batch_size", type=int, default=64, help="images at a time (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of FID∞'s subsets and the shuffled order (default 0)")
    parser.add_argument(
        "--cache", metavar="DIR", type=Path, default=cache_folder() / "features",
        help="keeps features, 20 kB an image; all ranks must see it (default %(default)s)",
    )  # fmt: skip
    args = parser.parse_args()
    if args.batch_size < 1:
        parser.error(f"--batch_size: wanted 1 or more, got {args.batch_size}")
    return args


def feature_network(args: argparse.Namespace, ranks: Ranks) -> FeatureNetwork:
    """The network that the flags ask for, with its weights, on the device of this rank."""
    if args.features != "inception":
        return ranks.agree(lambda: dinov2(args.weights, ranks.device) if args.features == "dinov2"
                           else emoji_features(args.weights or WEIGHTS, ranks.device))  # fmt: skip
    path = ranks.first(lambda: args.inception or published_weights(cache_folder()))
    return ranks.agree(lambda: inception(path, ranks.device))


def chosen_metrics(args: argparse.Namespace, distance: str, reference: Source, samples: Source) -> list[str]:
    """The metrics to compute; a ValueError where one is asked for by name and cannot be."""
    names = metric_names(distance, args.extended or args.metrics is not None)
    if args.metrics is None:
        return names
    asked = args.metrics.split(",")
    for name in asked:
        if name not in names:
            raise ValueError(f"--metrics: wanted some of {', '.join(names)}, got {name!r}")
        if reason := why_not(name, reference, samples):
            raise ValueError(f"--metrics {name}: {reason}")
    return asked


def check(args: argparse.Namespace, reference: Source, samples: Source) -> None:
    """A ValueError where the flags do not go together, or two sources cannot be compared by the features asked for."""
    if args.features == "dinov2" and args.weights is None:
        raise ValueError("--features dinov2: give --weights, a folder with config.json and model.safetensors")
    if args.features == "inception" and args.weights is not None:
        raise ValueError("--weights: the weights of Inception are given by --inception")
    for source in (reference, samples):
        if source.images is not None and not source.statistics and len(source.images) < 2:
            raise ValueError(f"{source.path}: wanted 2 images or more, got {len(source.images)}")
        if source.statistics and args.features != "inception":
            raise ValueError(
                f"{source.path}: holds statistics of Inception features; --features {args.features} needs images alone"
            )
        for feature, name, size in (("pool", "mu", 2048), ("spatial", "mu_s", 2023)):
            if (gaussian := source.statistics.get(feature)) and len(gaussian.mean) != size:
                raise ValueError(f"{source.path}: {name}: wanted {size} dimensions, got {len(gaussian.mean)}")


def table(result: dict[str, Any]) -> str:
    """A result for people."""
    lines = [f"{result['n'] or 'unknown number of'} samples, {result['features']} features"]
    for name, measured in result["metrics"].items():
        factor, error = 1000 if name == "kid" else 1, measured["error"]
        shown = "" if error is None else f" ± {error * factor:.4f}"
        lines.append(f"  {TITLES[name]:<26}{measured['value'] * factor:>10.4f}{shown}")
        if parts := result["parts"].get(name):
            means, traces, cross = parts["means"], parts["traces"], parts["cross_trace"]
            lines.append(f"  {'':<26}  = {means:.4f} (means) + {traces[0]:.4f} + {traces[1]:.4f} − 2 · {cross:.4f}")
    lines += [f"  {TITLES[name]:<26}         – ({reason})" for name, reason in result["missing"].items()]
    comparable = result["comparable"]
    because = "" if comparable["answer"] else f", because {'; '.join(comparable['because'])}"
    lines.append(f"comparable to published numbers: {'yes' if comparable['answer'] else 'no'}{because}")
    return "\n".join(lines)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)


def described(side: Side) -> dict[str, Any]:
    """Where one side came from: path, number of images, digest, and what its run said of itself."""
    images, about = side.source.images, side.source.about
    return {
        "path": os.path.abspath(side.source.path) if "://" not in side.source.path else side.source.path,
        "images": len(images) if images else None,
        "sha256_of_blocks": side.features.digest if side.features else None,
        "statistics": sorted(side.source.statistics),
        "run": {key: about[key] for key in ("guidance", "network_evaluations_per_sample", "hash") if key in about},
    }


def main(ranks: Ranks) -> None:
    args = arguments()
    use_whole_floats()
    reference, samples = ranks.first(lambda: (open_source(args.reference), open_source(args.samples)))
    distance = "fid" if args.features == "inception" else "frechet_distance"

    def choose() -> list[str]:
        check(args, reference, samples)
        return chosen_metrics(args, distance, reference, samples)

    metrics = ranks.first(choose)
    for warning in warnings(reference, samples, metrics) if ranks.rank == 0 else []:
        sys.stderr.write(f"warning: {warning}\n")

    sides, network = [], None
    for word, source in (("reference", reference), ("samples", samples)):
        features = None
        if source.images is not None and (not source.statistics or set(metrics) & OF_BOTH):
            network = network or feature_network(args, ranks)
            features = extract(source.images, network, args.cache, ranks, args.batch_size, word)
        sides.append(Side(source, features))
    if ranks.rank:
        return
    half = args.pr_dtype == "fp16"
    found = evaluate(*sides, metrics, half, ranks.device, args.seed)
    weights = network.weights if network else None
    because = not_comparable(args.features, weights in (SHA256, None), reference, samples, metrics, half)
    result = {
        "metrics": {
            name: {"value": measured.value, "error": measured.error} for name, measured in found.metrics.items()
        },
        "parts": {
            name: {"means": parts.mean_term, "traces": parts.traces, "cross_trace": parts.cross_trace}
            for name, parts in found.parts.items()
        },
        "missing": found.missing,
        "n": len(samples.images) if samples.images else None,
        "features": args.features,
        "comparable": {"answer": not because, "because": because},
        "provenance": {
            "reference": described(sides[0]),
            "samples": described(sides[1]),
            "weights_sha256": weights,
            "pr_dtype": args.pr_dtype,
            "seed": args.seed,
            "versions": versions(),
        },
    }
    if args.json:
        write_json(args.json, result)
    print(table(result))


if __name__ == "__main__":
    run(main)
