"""Evaluate samples against a reference: FID, sFID, Inception score, precision and recall.

REF and SAMPLES are an npz (arr_0: uint8 [N, H, W, 3]), the folder of a sampling run, a folder of pictures (at any
depth), or statistics (mu, sigma, mu_s, sigma_s), as in the published VIRTUAL_….npz. A stopped evaluation goes on where
it was.

  python evaluations/evaluator.py VIRTUAL_imagenet256_labeled.npz samples_50000x256x256x3.npz --pr_dtype fp16
  mpiexec -n 8 python evaluations/evaluator.py REF runs/mine --json result.json
  python evaluations/evaluator.py configs/models/emoji32_train.npz runs/demo/guided --features emoji
  python evaluations/evaluator.py REF runs/guided --against runs/unguided

With --against, every metric is also told as a difference to other samples of the same seed. Sample i of both began
from the same noise, so the difference is known far better than either number.
"""

import argparse
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from evaluations.judge import Settings, cache_folder, judge
from evaluations.ranks import BadInputError, Ranks, run

TITLES = {
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "Inception score",
    "frechet_distance": "Fréchet distance",
    "precision": "precision",
    "recall": "recall",
    "kid": "KID × 1000",
    "mind": "MIND",
    "fid_infinity": "FID∞",
    "density": "density",
    "coverage": "coverage",
    "copies": "copies",
    "class_distance": "class histogram distance",
    "inception_score_shuffled": "Inception score, shuffled",
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", metavar="REF", help="what the samples are compared with")
    parser.add_argument("samples", metavar="SAMPLES", help="what is judged")
    parser.add_argument(
        "--against", metavar="SAMPLES", help="other samples: also tell the differences to their metrics"
    )
    parser.add_argument(
        "--paired", action="store_true",
        help="sample i of --against began as sample i of SAMPLES did, though no manifest says so",
    )  # fmt: skip
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
    parser.add_argument("--num_samples", metavar="N", type=int, help="judge the first so many samples only")
    parser.add_argument("--metrics", metavar="NAMES", help="only these, comma-separated, like fid,precision")
    parser.add_argument(
        "--extended", action="store_true",
        help="also KID, MIND (sliced Wasserstein distance), FID∞, density, coverage, copies (the share of samples "
        "nearer to a reference image than any other reference image is), the distance of the class histograms, and the "
        "Inception score in shuffled order",
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


def shown(name: str, measured: dict[str, Any], sign: str = "") -> str:
    """A number with its error or interval, for people."""
    factor, error = 1000 if name == "kid" else 1, measured["error"]
    text = f"{measured['value'] * factor:>{sign}10.4f}"
    if "interval" in measured:
        return text + " (95 %: {:.4f} to {:.4f})".format(*measured["interval"])
    return text if error is None else f"{text} ± {error * factor:.4f}"


def table(result: dict[str, Any]) -> str:
    """A result for people."""
    images = result["provenance"]["reference"]["images"]
    against = f"{images} images" if images else "statistics"
    lines = [f"{result['n'] or 'unknown number of'} samples against {against}, {result['features']} features"]
    for name, measured in result["metrics"].items():
        lines.append(f"  {TITLES[name]:<26}{shown(name, measured)}")
        if parts := result["parts"].get(name):
            means, traces, cross = parts["means"], parts["traces"], parts["cross_trace"]
            lines.append(f"  {'':<26}  = {means:.4f} (means) + {traces[0]:.4f} + {traces[1]:.4f} − 2 · {cross:.4f}")
    lines += [f"  {TITLES[name]:<26}         – ({reason})" for name, reason in result["missing"].items()]
    if difference := result.get("difference"):
        lines.append(f"minus {difference['against']}, paired")
        for name, measured in difference["metrics"].items():
            error = measured["error"]
            errors = f", {abs(measured['value']) / error:.1f} errors" if error else ""
            lines.append(f"  {TITLES[name]:<26}{shown(name, measured, '+')}{errors}")
    comparable = result["comparable"]
    because = "" if comparable["answer"] else f", because {'; '.join(comparable['because'])}"
    lines.append(f"comparable to published numbers: {'yes' if comparable['answer'] else 'no'}{because}")
    return "\n".join(lines)


def plain(value: Any) -> Any:
    """A value as JSON can hold it: numbers that are not finite as the texts inf and -inf, and null for NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(float(value))
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(plain(value), file, indent=1, allow_nan=False)
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)


def judge_and_tell(ranks: Ranks) -> None:
    """Evaluate what the command line says; rank 0 prints the table."""
    args = vars(arguments())
    path = args.pop("json")
    metrics = args.pop("metrics")
    result = judge(Settings(**args, metrics=tuple(metrics.split(",")) if metrics else None), ranks)
    if ranks.rank == 0:
        print(table(result))
        if path:
            try:
                write_json(path, result)
            except OSError as error:
                raise BadInputError(f"--json: {error.filename}: {error.strerror}") from None


def main() -> None:
    run(judge_and_tell)


if __name__ == "__main__":
    main()
