"""The parts of the evaluator."""

import numpy as np
import scipy.linalg

from evaluations.inception import ConvNorm, Inception
from evaluations.moments import Moments, frechet_distance
from evaluations.neighbours import BLOCK, Distances, neighbours

from ...runs.timing import medians, peak_bytes
from .rows import Row

import torch  # isort: skip (after evaluations, which sets how its threads wait)


def frechet(repeats: int) -> list[Row]:
    rng = np.random.default_rng(0)
    d = 2048
    # Variances that fall by a factor of 160,000, as those of image features do.
    scale = np.exp(-np.linspace(0, 6, d))
    turn, _ = np.linalg.qr(rng.standard_normal((d, d)))
    first, second = (Moments.of((rng.standard_normal((2 * d, d)) * scale) @ turn).gaussian() for _ in range(2))
    product = first.covariance @ second.covariance
    times = medians(
        {"ours": lambda: frechet_distance(first, second), "sqrtm": lambda: scipy.linalg.sqrtm(product)}, repeats
    )
    return [
        Row(
            "frechet", "Fréchet distance / scipy.linalg.sqrtm, d = 2048", times["ours"] / times["sqrtm"], goal="≤ 0.125"
        )
    ]


def features(n: int, seed: int, d: int = 2048) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def precision_recall(repeats: int) -> list[Row]:
    n = 10_000
    a, b = features(n, 0), features(n, 1)

    def products():
        """The symmetric products of both sides with themselves, and the one across: two whole ones."""
        for left, right in ((a, b), (b, a)):
            for first in range(0, n, BLOCK):
                left[first : first + BLOCK] @ right.T

    before = peak_bytes()
    neighbours(a, b, Distances(centre=a.mean(dim=0)))
    extra = peak_bytes() - before
    times = medians({"ours": lambda: neighbours(a, b, Distances(centre=a.mean(dim=0))), "products": products}, repeats)
    return [
        Row("neighbours", "precision and recall, 10k × 10k × 2048 / its matrix products",
            times["ours"] / times["products"], goal="≤ 1.6"),
        Row("neighbours", "extra memory", extra / 1e6, "MB", "< 300"),
    ]  # fmt: skip


def inception(repeats: int) -> list[Row]:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (16, 3, 256, 256), dtype=torch.uint8)

    def network(fused: bool) -> Inception:
        made = Inception().eval().requires_grad_(False)
        for part in [part for part in made.modules() if isinstance(part, ConvNorm)] if fused else []:
            part.fuse()
        return made

    networks = {
        "as it is used": network(fused=True).to(memory_format=torch.channels_last),
        "weights not channels-last": network(fused=True),
        "batch norm not folded": network(fused=False).to(memory_format=torch.channels_last),
    }
    pool = features(len(images), 2).numpy()
    spatial = features(len(images), 3, 2023).numpy()
    with torch.inference_mode():
        works = {name: (lambda made=made: made(images)) for name, made in networks.items()}
        works["moments"] = lambda: (Moments.of(pool), Moments.of(spatial))
        times = medians(works, repeats)
    used, moments = times["as it is used"], times.pop("moments")
    rows = [Row("inception", "time / best layout", used / min(times.values()), goal="≤ 1.10")]
    rows += [
        Row("inception", f"{name} / as it is used", spent / used) for name, spent in times.items() if spent is not used
    ]
    rows.append(Row("inception", "images per second", len(images) / used, "1/s"))
    rows.append(Row("inception", "moments / features", moments / used, goal="< 0.02"))
    return rows
