"""Evaluate samples against a reference: FID, sFID, Inception score, precision and recall.

REF and SAMPLES are an npz (arr_0: uint8 [N, H, W, 3]), the folder of a sampling run, a folder of pictures (at any
depth), or statistics: mu, sigma, mu_s and sigma_s of an npz, as in the published VIRTUAL_….npz (of other features than
Inception's where its text `features` says so, or the dimension fits), or a pickle (….pkl) of EDM2's, whose fid is taken
for inception and whose fd_dinov2 for dinov2; nothing in it is executed. A stopped evaluation goes on where it was.

  python evaluations/evaluator.py VIRTUAL_imagenet256_labeled.npz samples_50000x256x256x3.npz --pr_dtype fp16
  mpiexec -n 8 python evaluations/evaluator.py REF runs/mine --json result.json
  python evaluations/evaluator.py configs/models/emoji32_train.npz runs/demo/guided --features emoji
  python evaluations/evaluator.py REF runs/guided --against runs/unguided
  python evaluations/evaluator.py img512.pkl SAMPLES --features dinov2 --weights dinov2-large

With --against, every metric is also told as a difference to other samples of the same seed. Sample i of both began
from the same noise, so the difference is known far better than either number.
"""

import argparse
import contextlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from evaluations.dinov2 import RESIZES
from evaluations.judge import FEATURES, Settings, cache_folder, judge
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


class _Parser(argparse.ArgumentParser):
    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        words = sys.argv[1:] if args is None else list(args)
        for word in words:
            if word.startswith("--") and word.endswith("=--"):  # which argparse takes for no value at all
                self.error(f"argument {word[:-3]}: wanted a value, got --")
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        raise BadInputError(f"{message} (--help lists the flags)")


def arguments() -> argparse.Namespace:
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
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
        "--features", choices=FEATURES, default="inception",
        help="network whose features are compared (default %(default)s, the one that FID is defined by)",
    )  # fmt: skip
    parser.add_argument(
        "--inception", metavar="FILE", type=Path,
        help="weights of Inception (default: the well-known file, fetched on first use, 96 MB)",
    )  # fmt: skip
    parser.add_argument("--weights", metavar="PATH", type=Path, help="weights of dinov2 (a folder) or emoji (a file)")
    parser.add_argument(
        "--resize", choices=RESIZES,
        help="how images come to dinov2's 224 × 224: edm2, torch's bicubic, not rounded; or dgm-eval, Pillow's, "
        "rounded to uint8 (default edm2; a result says which, and numbers of the two do not compare)",
    )  # fmt: skip
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
    by = f", resize as {resize}" if (resize := result["provenance"]["resize"]) else ""
    lines = [f"{result['n'] or 'unknown number of'} samples against {against}, {result['features']} features{by}"]
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


@contextlib.contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """A new empty file in the folder of `path`, gone at the end; a ValueError where nothing can be written there."""
    temporary = None
    try:
        if path.exists() and not path.is_file():  # not even /dev/null, which would be replaced
            raise OSError("a folder" if path.is_dir() else "not a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name[:100]}.", dir=path.parent)
        os.close(descriptor)
        yield Path(temporary)
    except OSError as error:
        raise ValueError(f"--json {path}: cannot be written ({error.strerror or error})") from None
    finally:
        if temporary:
            Path(temporary).unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all; a ValueError where it cannot be."""
    with temporary_beside(path) as temporary:
        temporary.write_text(json.dumps(plain(value), indent=1, allow_nan=False), encoding="utf-8")
        temporary.chmod(0o644)
        temporary.replace(path)


def check_place(path: Path) -> None:
    """Find out before all the work whether its result can be written to `path`; a ValueError if not."""
    with temporary_beside(path):
        pass


@contextlib.contextmanager
def short_sentences() -> Iterator[None]:
    """Cut what is said of bad input, and may quote all of it, to some lines that control no terminal."""
    try:
        yield
    except BadInputError as error:
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(str(error).split()))
        raise BadInputError(text if len(text) <= 1000 else f"{text[:500]} … {text[-500:]}") from None


@short_sentences()
def judge_and_tell(ranks: Ranks) -> None:
    """Evaluate what the command line says; rank 0 prints the table."""
    args = vars(arguments())
    path = args.pop("json")
    metrics = args.pop("metrics")
    ranks.first(lambda: check_place(path) if path else None)
    result = judge(Settings(**args, metrics=tuple(metrics.split(",")) if metrics else None), ranks)
    if ranks.rank == 0:
        print(table(result), flush=True)
        if path:
            Ranks().agree(lambda: write_json(path, result))


def main() -> None:
    run(judge_and_tell)


if __name__ == "__main__":
    main()
