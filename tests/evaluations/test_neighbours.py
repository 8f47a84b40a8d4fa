"""Precision, recall and their relatives against brute force."""

import pytest
import torch

from evaluations import neighbours as module
from evaluations.neighbours import Distances, neighbours, radii


def features(seed, n, d=6, shift=0.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + shift


def brute_force(reference, samples, k=3, wide=5):
    own = [torch.cdist(x.double(), x.double()).square() for x in (reference, samples)]
    across = torch.cdist(reference.double(), samples.double()).square()
    reference_radii, sample_radii = (x.sort(dim=1).values[:, k] for x in own)
    wide_radii, nearest = (own[0].sort(dim=1).values[:, j] for j in (wide, 1))
    return (
        (across <= reference_radii[:, None]).any(dim=0).double().mean(),
        (across <= sample_radii).any(dim=1).double().mean(),
        (across <= wide_radii[:, None]).double().sum() / (wide * len(samples)),
        (across <= wide_radii[:, None]).any(dim=1).double().mean(),
        (across < nearest[:, None]).any(dim=0).double().mean(),
    )


@pytest.mark.parametrize("block", [16, 37, 500])
@pytest.mark.parametrize("sizes", [(150, 90), (40, 200)])
def test_brute_force(monkeypatch, block, sizes):
    monkeypatch.setattr(module, "BLOCK", block)
    reference, samples = features(0, sizes[0]), features(1, sizes[1], shift=0.5)
    found = neighbours(reference, samples, Distances(centre=reference.mean(dim=0)), 3, 5)
    ours = (found.precision, found.recall, found.density, found.coverage, found.copies)
    assert ours == pytest.approx(tuple(map(float, brute_force(reference, samples))), abs=1e-12)
    assert 0 < found.precision < 1
    assert 0 < found.recall < 1


@pytest.mark.parametrize("half", [False, True])
def test_identical_sets(half):
    x = features(2, 100)
    found = neighbours(x, x.clone(), Distances(half))
    assert (found.precision, found.recall) == (1, 1)


def test_swapped_arguments_swap_precision_and_recall():
    a, b = features(3, 120), features(4, 80, shift=0.4)
    one, other = neighbours(a, b, Distances()), neighbours(b, a, Distances())
    assert (one.precision, one.recall) == (other.recall, other.precision)


def test_collapsed_samples_have_no_recall():
    reference = features(5, 200)
    found = neighbours(reference, reference[:1].repeat(50, 1), Distances(), 3, 5)
    assert found.precision == 1
    assert found.recall == pytest.approx(1 / 200)  # the one image that is repeated
    found = neighbours(reference, (reference[:1] + 0.01).repeat(50, 1), Distances(), 3, 5)
    assert (found.precision, found.recall, found.copies) == (1, 0, 1)


@pytest.mark.parametrize("shift", [0.0, 30.0])
def test_copies_are_seen_where_every_reference_image_is_there_twice(shift):
    reference, others = features(6, 60, d=64, shift=shift), 4 * features(7, 40, d=64) + shift
    distances = Distances(centre=reference.mean(dim=0))
    doubled = torch.cat([reference, reference])
    for of in (reference, doubled):
        assert neighbours(of, reference[:20] + 0.0, distances, 3, 5).copies == 1
        half_copied = torch.cat([reference[:20], others[:20]])
        assert neighbours(of, half_copied, distances, 3, 5).copies == 0.5


def test_radius_counts_the_distance_to_itself():
    x = torch.tensor([[0.0], [1.0], [3.0], [7.0], [15.0]])
    assert radii(x, 3, Distances()).tolist() == [49, 36, 16, 49, 196]


def test_half_precision_rounds_each_step():
    x, y = features(6, 5, d=300) * 2, features(7, 4, d=300) * 2

    def half(value):
        return value.half().float()

    u, v = half(x), half(y)
    norm_u, norm_v = (half(half(w * w).sum(dim=1)) for w in (u, v))
    wanted = torch.zeros(5, 4)
    for i in range(5):
        for j in range(4):
            product = half((u[i] * v[j]).sum())
            wanted[i, j] = half(half(norm_u[i] - 2 * product) + norm_v[j])
    found = Distances(half=True).between(x, y)
    # The sum inside a product may be taken in another order: one unit of half precision at these sizes.
    assert (found - wanted).abs().max() <= 1.0
    assert torch.equal(found, found.half().float())
    assert not torch.equal(found, Distances().between(x, y))


def test_half_precision_falls_back_where_it_overflows():
    x, y = features(8, 6, d=10) * 200, features(9, 5, d=10) * 200
    assert torch.equal(Distances(half=True).between(x, y), Distances().between(x, y))


def test_half_precision_is_symmetric_in_what_it_decides_only():
    """Radii in half precision come from whole rows: rounding makes d(x, y) and d(y, x) differ."""
    x = features(10, 60, d=50) * 3
    whole = Distances(half=True).between(x, x)
    assert torch.equal(radii(x, 3, Distances(half=True)), whole.sort(dim=1).values[:, 3])


def test_too_few_samples():
    with pytest.raises(ValueError, match="wanted more than 3 samples, got 3"):
        radii(features(11, 3), 3, Distances())
