"""Precision, recall and their relatives against brute force."""

import pytest
import torch

from evaluations import neighbours as module
from evaluations.neighbours import KEPT, Distances, Parts, nearest, neighbours, radii


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


def shares(*args, **kwargs):
    """The five metrics, None where not asked for."""
    found = neighbours(*args, **kwargs)
    each = (found.precise, found.recalled, found.balls, found.covered, found.copied)
    return tuple(None if x is None else float(x.double().mean()) for x in each)


@pytest.mark.parametrize("block", [16, 37, 500])
@pytest.mark.parametrize("sizes", [(150, 90), (40, 200)])
def test_brute_force(monkeypatch, block, sizes):
    monkeypatch.setattr(module, "BLOCK", block)
    reference, samples = features(0, sizes[0]), features(1, sizes[1], shift=0.5)
    distances = Distances(centre=reference.mean(dim=0))
    for parts in (None, Parts.of(samples, 3, distances)):
        ours = shares(reference, samples, distances, 3, 5, parts)
        assert ours == pytest.approx(tuple(map(float, brute_force(reference, samples))), abs=1e-12)
        assert 0 < ours[0] < 1
        assert 0 < ours[1] < 1


@pytest.mark.parametrize("block", [16, 500])
def test_parts_are_as_if_the_other_samples_were_not_there(monkeypatch, block):
    monkeypatch.setattr(module, "BLOCK", block)
    monkeypatch.setattr(module, "NEAR", 60)
    reference, samples = features(0, 150), features(1, 90, shift=0.5)
    distances = Distances()
    parts = Parts.of(samples, 3, distances)
    found = neighbours(reference, samples, distances, 3, 5, parts)
    kept = parts.squared >= 0
    assert (kept.sum(dim=0) == round(KEPT * 90)).all()
    for number in range(0, module.PARTS, 10):
        _, recall, _, coverage, _ = map(float, brute_force(reference, samples[kept[:, number]]))
        assert float(found.recalled_in_parts[number]) == pytest.approx(recall, abs=1e-12)
        assert float(found.covered_in_parts[number]) == pytest.approx(coverage, abs=1e-12)
    assert torch.equal(Parts.of(samples, 3, distances).squared, parts.squared)


def test_nearest_neighbours_and_who_they_are(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 16)
    x = features(3, 70)
    squared, who = nearest(x, 5, Distances())
    assert torch.allclose((x[:, None] - x[who]).square().sum(dim=2), squared, atol=1e-4)
    assert torch.allclose(squared[:, 2], radii(x, 3, Distances()), atol=1e-4)


@pytest.mark.parametrize("half", [False, True])
def test_identical_sets(half):
    x = features(2, 100)
    assert shares(x, x.clone(), Distances(half))[:2] == (1, 1)


def test_swapped_arguments_swap_precision_and_recall():
    a, b = features(3, 120), features(4, 80, shift=0.4)
    one, other = shares(a, b, Distances()), shares(b, a, Distances())
    assert one[:2] == other[1::-1]


def test_collapsed_samples_have_no_recall():
    reference = features(5, 200)
    precision, recall, *_ = shares(reference, reference[:1].repeat(50, 1), Distances(), 3, 5)
    assert precision == 1
    assert recall == pytest.approx(1 / 200)  # the one image that is repeated
    precision, recall, *_, copies = shares(reference, (reference[:1] + 0.01).repeat(50, 1), Distances(), 3, 5)
    assert (precision, recall, copies) == (1, 0, 1)


@pytest.mark.parametrize("shift", [0.0, 30.0])
def test_copies_are_seen_where_every_reference_image_is_there_twice(shift):
    reference, others = features(6, 60, d=64, shift=shift), 4 * features(7, 40, d=64) + shift
    distances = Distances(centre=reference.mean(dim=0))
    doubled = torch.cat([reference, reference])
    for of in (reference, doubled):
        assert shares(of, reference[:20] + 0.0, distances, 3, 5)[4] == 1
        half_copied = torch.cat([reference[:20], others[:20]])
        assert shares(of, half_copied, distances, 3, 5)[4] == 0.5


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
