"""Measures of masks against closed forms."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.integrate import quad
from scipy.stats import hypergeom

from guided_diffusion.analysis.known_images import KnownImages
from guided_diffusion.analysis.measures import (
    Mean,
    as_many,
    from_centre,
    intersection_over_union,
    log_spectra,
    magnitudes,
    patch_side,
    selected_mean,
)
from running import SCRIPTS

MODELS = SCRIPTS.parent / "configs" / "models"


def sine(side, down, across, amplitude=10.0, mean=100.0):
    rows, columns = torch.meshgrid(*2 * [torch.arange(side).double()], indexing="ij")
    return mean + amplitude * torch.cos(2 * math.pi * (down * rows + across * columns) / side)


def test_magnitudes_of_a_sine():
    """A Hann window leaves half of A/2 at each neighbour along either axis: A/2 at k, A/4 and A/8 beside it."""
    found = magnitudes(sine(16, 4, 5, amplitude=8.0))
    wanted = torch.zeros(16, 9, dtype=torch.float64)
    for down, a in ((3, 0.5), (4, 1.0), (5, 0.5)):
        for across, b in ((4, 0.5), (5, 1.0), (6, 0.5)):
            wanted[down, across] = 4.0 * a * b
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)


def test_magnitudes_of_a_plain_patch_are_zero():
    assert magnitudes(torch.full((8, 8), 200.0, dtype=torch.float64)).max() < 1e-12


def test_log_spectrum_of_white_noise():
    """|F| is Rayleigh with E|F|² = σ² Σw² / (Σw)², so E ln(1 + |F|) is an integral; all annuli but the first agree."""
    side, sigma = 16, 20.0
    window = np.hanning(side + 1)[:-1]
    power = sigma**2 * ((window**2).sum() / window.sum() ** 2) ** 2
    wanted, _ = quad(lambda u: math.log1p(math.sqrt(power * u)) * math.exp(-u), 0, 60)
    noise = 128 + sigma * torch.randn(6000, 1, side, side, generator=torch.Generator().manual_seed(0))
    mean = Mean()
    mean.add(log_spectra(noise, (1, 1), side)[:, 0])
    # Annuli 2 … 6 hold no bin where the real input's mirror image comes within reach of the window.
    middle = slice(3, 6)
    assert (np.abs(mean.value - wanted) < 4 * mean.error)[middle].all()
    assert mean.error[middle].max() < 0.005 * wanted


def test_log_spectra_look_around_the_right_cells():
    """Detail in one corner is seen by the cells there, and a plain image by none."""
    image = torch.full((2, 3, 32, 32), 128.0)
    image[0, :, :8, 24:] += sine(8, 2, 2, mean=0.0).float()
    spectra = log_spectra(image, (8, 8), 8)
    assert spectra.shape == (2, 64, 4)
    assert spectra[1].abs().max() < 1e-4
    strength = spectra[0].mean(dim=1).reshape(8, 8)
    assert (strength[:2, 6:] > 0.3).all()
    assert strength[4:].abs().max() < 1e-4
    assert strength[:, :4].abs().max() < 1e-4
    # A cell of its patch's size sees exactly itself.
    alone = magnitudes(image[0, 0, :8, 24:]).log1p()
    rows, columns = torch.fft.fftfreq(8)[:, None] * 8, torch.fft.rfftfreq(8)[None] * 8
    ring = (rows.square() + columns.square()).sqrt().round() == 3
    twice = torch.where((columns > 0) & (columns < 4), 2.0, 1.0).expand(8, -1)
    wanted = (alone * twice)[ring].sum() / twice[ring].sum()
    torch.testing.assert_close(log_spectra(image, (4, 4), 8)[0, 3, 2], wanted)


def test_a_map_that_does_not_tile_is_refused():
    with pytest.raises(ValueError, match="do not tile 32×32 pixels"):
        log_spectra(torch.zeros(1, 3, 32, 32), (5, 5), 8)


def test_patch_side():
    assert patch_side(32, [(8, 8), (16, 16)]) == 8
    assert patch_side(256, [(8, 8), (32, 32)]) == 32
    assert patch_side(16, [(1, 1)]) == 16


def test_selected_mean():
    spectra = torch.arange(8.0).reshape(1, 4, 2).expand(2, -1, -1)
    masks = torch.tensor([[[[True, False], [False, True]]], [[[False, False], [False, False]]]])
    found = selected_mean(spectra, masks)
    assert found[0].tolist() == [3.0, 4.0]
    assert found[1].isnan().all()


def test_iou_of_known_masks():
    masks = torch.zeros(4, 1, 4, 4, dtype=torch.bool)
    objects = torch.zeros(4, 1, 4, 4, dtype=torch.bool)
    masks[0, :, :2], objects[0, :, 1:3] = True, True  # a row of three
    masks[1], objects[1] = True, True
    masks[2] = True
    found = intersection_over_union(masks, objects)
    torch.testing.assert_close(found[:3], torch.tensor([1 / 3, 1.0, 0.0]))
    assert found[3].isnan()


def test_random_masks_have_the_expected_overlap():
    """With k of T cells at random and an object of o cells, |M ∩ O| is hypergeometric."""
    cells, size, of_object, rows = 64, 20, 25, 20000
    like = torch.zeros(rows, 1, 8, 8, dtype=torch.bool)
    like.view(rows, -1)[:, :size] = True
    objects = torch.zeros(rows, 1, 8, 8, dtype=torch.bool)
    objects.view(rows, -1)[:, 10 : 10 + of_object] = True
    drawn = as_many(like, torch.rand(rows, cells + 7, generator=torch.Generator().manual_seed(0)))
    assert (drawn.flatten(1).sum(dim=1) == size).all()
    overlap = np.arange(size + 1)
    iou = overlap / (size + of_object - overlap)
    wanted = (hypergeom(cells, of_object, size).pmf(overlap) * iou).sum()
    mean = Mean()
    mean.add(intersection_over_union(drawn, objects))
    assert abs(mean.value - wanted) < 4 * mean.error
    assert mean.error < 0.01 * wanted


def test_masks_keep_each_rows_own_share_and_grow_from_the_middle():
    like = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    like[0, 0, 0], like[1, 0, :, 0] = True, True
    like[1, 0, 0] = True
    found = as_many(like, from_centre((4, 4)))
    assert found.flatten(1).sum(dim=1).tolist() == [4, 7]
    assert found[0, 0, 1:3, 1:3].all()


def test_mean_and_error_of_batches():
    values = torch.randn(50, 3, generator=torch.Generator().manual_seed(1)) + 5
    values[:20, 1] = torch.nan
    values[1:, 2] = torch.nan
    mean = Mean()
    for batch in values.split(7):
        mean.add(batch)
    assert mean.n.tolist() == [50, 30, 1]
    for column, kept in ((0, values[:, 0]), (1, values[20:, 1])):
        kept = kept.double()
        assert mean.value[column] == pytest.approx(kept.mean().item(), rel=1e-12)
        assert mean.error[column] == pytest.approx(kept.std().item() / len(kept) ** 0.5, rel=1e-9)
    assert np.isnan(mean.error[2])


def test_the_embedded_masks_fit_the_embedded_pictures():
    """Where a glyph is not, its picture is the background; where it is opaque, its picture is mostly not."""
    known = KnownImages(str(MODELS / "emoji32_train.npz"), str(MODELS / "emoji32_masks.npz"), 32)
    assert len(known) == 742
    with np.load(MODELS / "emoji32_train.npz") as file, np.load(MODELS / "emoji32_masks.npz") as masks:
        images, opacity = file["arr_0"], masks["arr_0"]
    background = (images == 128).all(axis=-1)
    assert background[opacity == 0].all()
    assert background[opacity == 255].mean() < 0.01
    # A neighbour's mask does not fit, so the order matters.
    assert not background[np.roll(opacity, 1, axis=0) == 0].all()
    levels, objects = known.read(range(3, 7))
    assert torch.equal(levels, torch.from_numpy(images[3:7]).permute(0, 3, 1, 2).float())
    assert torch.equal(objects[:, 0], torch.from_numpy(opacity[3:7] >= 128))


@pytest.fixture
def folders(tmp_path):
    """Two pictures of 16×12 pixels and their masks, the object to the left, in folders."""
    for number, suffix in ((0, "jpg"), (1, "png")):
        (tmp_path / "images" / "deep").mkdir(parents=True, exist_ok=True)
        (tmp_path / "masks" / "deep").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 12), (50 * number, 0, 0)).save(tmp_path / "images" / "deep" / f"{number}.{suffix}")
        mask = np.zeros((12, 16), np.uint8)
        mask[:, : 2 + 6 * number] = 255
        Image.fromarray(mask).save(tmp_path / "masks" / "deep" / f"{number}.png")
    return tmp_path / "images", tmp_path / "masks"


def test_pictures_and_masks_of_folders(folders):
    known = KnownImages(*map(str, folders), 12)
    levels, objects = known.read(range(2))
    assert levels.shape == (2, 3, 12, 12)
    assert levels[1, 0].eq(50).all()
    # The middle square begins two pixels further right.
    assert objects.sum().item() == 12 * 6
    assert objects[1, 0, :, :6].all()


def test_wrong_known_images_are_refused(folders, tmp_path):
    images, masks = map(str, folders)
    mask = folders[1] / "deep" / "1.png"
    Image.new("L", (16, 12), 1).save(mask)
    with pytest.raises(ValueError, match="wanted 255 where the object is, got at most 1"):
        KnownImages(images, masks, 12).read(range(2))
    mask.unlink()
    with pytest.raises(ValueError, match="has no picture called deep/1"):
        KnownImages(images, masks, 12)
    np.savez(tmp_path / "one.npz", np.zeros((1, 12, 12), np.uint8))
    with pytest.raises(ValueError, match="wanted 2 masks, got 1"):
        KnownImages(images, str(tmp_path / "one.npz"), 12)
    with pytest.raises(ValueError, match="arr_0: wanted uint8"):
        KnownImages(str(tmp_path / "one.npz"), "", 12)
    with pytest.raises(ValueError, match="data_dir: no such file"):
        KnownImages(str(tmp_path / "none.npz"), "", 12)
