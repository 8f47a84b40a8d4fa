"""What a Fréchet distance sees: pictures against themselves, disturbed by known amounts (Heusel et al. 2017, Fig. 3).

Noise, blur, salt, erased cells, brightness, saturation, missing classes and pictures of noise, each in steps: by how
much the distance of the pictures to the reference rises. A metric that does not see what a method changes cannot judge
it. With samples, their distance stands below, for scale.

  python scripts/disturbances.py configs/models/emoji32_train.npz --features emoji
  python scripts/disturbances.py data/imagenet_val --features inception --samples runs/guided --json seen.json
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from evaluations.disturbances import DISTURBANCES
from evaluations.judge import Settings, feature_network
from evaluations.measured import Measured, of_influence
from evaluations.moments import Gaussian, Moments, frechet_distance, frechet_influence
from evaluations.networks import FeatureNetwork, versions
from evaluations.ranks import BadInputError, Ranks
from evaluations.sources import Source, open_source

from ..runs.ranks import command
from ..settings.options import BadInput
from ..storage.files import json_text, write_atomically


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", metavar="REF", help="pictures: an npz or a folder")
    parser.add_argument("--samples", metavar="SAMPLES", nargs="*", default=[], help="samples to set beside them")
    parser.add_argument(
        "--features", choices=("inception", "dinov2", "emoji"), default="inception",
        help="network whose features are compared (default %(default)s)",
    )  # fmt: skip
    parser.add_argument("--inception", metavar="FILE", type=Path, help="weights of Inception, as the evaluator's flag")
    parser.add_argument(
        "--weights", metavar="PATH", type=Path, help="weights of dinov2 or emoji, as the evaluator's flag"
    )
    parser.add_argument(
        "--num_samples", metavar="N", type=int, default=500, help="pictures disturbed (default %(default)s)"
    )
    parser.add_argument("--batch_size", type=int, default=64, help="pictures at a time (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which pictures, and their noise (default %(default)s)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the table to this file as well")
    return parser.parse_args()


def pool(network: FeatureNetwork, pictures: NDArray[np.uint8], batch_size: int) -> NDArray[np.float64]:
    """Features [N, D] of pictures [N, H, W, 3]."""
    batches = torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).split(batch_size)
    return np.concatenate([network(batch).pool.double().cpu().numpy() for batch in batches])


def distance(features: NDArray[np.float64], reference: Gaussian) -> Measured:
    """The Fréchet distance of features [N, D] to a reference."""
    gaussian = Moments.of(features).gaussian()
    if len(features) <= features.shape[1]:
        gaussian = gaussian.with_features(features)
    influence = frechet_influence(gaussian, reference)
    return Measured(frechet_distance(gaussian, reference).value, influence and of_influence(influence(features)))


def table(
    source: Source, samples: list[Source], network: FeatureNetwork, count: int, batch_size: int, seed: int
) -> dict[str, Any]:
    """Rises of the distance by disturbance and level, and the distances of samples.

    rise: over the same pictures undisturbed, ± the paired error; errors: the rise over the error of the undisturbed
    distance, which is what two unpaired sets differ by.
    """
    pictures = source.images.read(0, len(source.images))
    reference = Moments.of(pool(network, pictures, batch_size)).gaussian()
    if len(pictures) <= len(reference.mean):
        raise BadInput(
            f"{source.path}: wanted more pictures than the {len(reference.mean)} dimensions, got {len(pictures)}"
        )
    drawn = np.random.default_rng(seed).permutation(len(pictures))[:count]
    drawn = drawn[np.argsort(drawn if source.images.labels is None else source.images.labels[drawn])]
    undisturbed = distance(pool(network, pictures[drawn], batch_size), reference)
    rows: dict[str, list[dict[str, Any]]] = {}
    steps = [(name, level) for name, each in DISTURBANCES.items() for level in each.levels]
    for name, level in tqdm(steps, disable=None, unit="level"):
        rng = np.random.default_rng([seed, 1])
        disturbed = DISTURBANCES[name].apply(pictures[drawn], level, rng)
        rise = distance(pool(network, disturbed, batch_size), reference).minus(undisturbed)
        errors = rise.value / undisturbed.error if undisturbed.error else None
        rows.setdefault(name, []).append({"level": level, "rise": rise.value, "error": rise.error, "errors": errors})
    return {
        "n": len(drawn),
        "undisturbed": undisturbed.described(),
        "disturbances": rows,
        "samples": {
            each.path: distance(
                pool(network, each.images.read(0, len(each.images)), batch_size), reference
            ).described() | {"n": len(each.images)}
            for each in samples
        },
    }  # fmt: skip


def shown(found: dict[str, Any]) -> str:
    """The table for people, in Markdown."""
    base = found["undisturbed"]
    lines = [
        f"{found['n']} pictures, undisturbed: {base['value']:.3f} ± {base['error']:.3f}", "",
        "| disturbance | level | distance rises by | errors |", "|---|---|---|---|",
    ]  # fmt: skip
    for name, rows in found["disturbances"].items():
        for number, row in enumerate(rows):
            title = DISTURBANCES[name].title if number == 0 else ""
            error = "" if row["error"] is None else f" ± {row['error']:.2g}"
            lines.append(f"| {title} | {row['level']:.3g} | {row['rise']:.3g}{error} | {row['errors']:.1f} |")
    for path, row in found["samples"].items():
        lines.append(f"| {path} | {row['n']} | {row['value']:.4g} ± {row['error']:.2g} | |")
    return "\n".join(lines)


@command
def main() -> None:
    args = parsed()
    try:
        source, *samples = (open_source(path) for path in (args.reference, *args.samples))
        for each in (source, *samples):
            if each.images is None:
                raise BadInput(f"{each.path}: wanted pictures, got statistics alone")
        settings = Settings(args.reference, "", features=args.features, inception=args.inception, weights=args.weights)
        network = feature_network(settings, Ranks())
        found = table(source, samples, network, args.num_samples, args.batch_size, args.seed)
    except (ValueError, BadInputError) as refusal:
        raise BadInput(str(refusal)) from None
    found |= {"features": network.name, "weights_sha256": network.weights, "reference": args.reference,
              "seed": args.seed, "versions": versions()}  # fmt: skip
    print(shown(found))
    if args.json:
        write_atomically(args.json, lambda file: file.write((json_text(found, indent=1) + "\n").encode()))
        sys.stderr.write(f"written to {args.json}\n")
