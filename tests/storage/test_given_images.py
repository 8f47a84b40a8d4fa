"""Images that a run is given: folders, single pictures and npz files, and their labels."""

import numpy as np
import pytest
from PIL import Image

from guided_diffusion.storage.given_images import GivenImages
from guided_diffusion.storage.images import center_crop, fitted


def save(folder, **colours):
    for name, colour in colours.items():
        Image.new("RGB", (12, 20), (colour,) * 3).save(folder / f"{name}.png")
    return str(folder)


def test_pictures_go_round_in_the_order_of_their_names(tmp_path):
    images = GivenImages(save(tmp_path, b=0, a=255, c=51), 8, 8, "init_image")
    assert len(images) == 3
    assert images.labels is None
    x = images.read([0, 1, 5, 6])
    assert x.shape == (4, 3, 8, 8)
    assert x[:, 0, 0, 0].tolist() == pytest.approx([1, -1, -0.6, 1])


def test_the_middle_is_taken():
    ramp = Image.fromarray(np.tile(np.arange(100, dtype=np.uint8), (40, 1)))
    wide = np.asarray(fitted(ramp, 20, 30)).astype(float)
    assert wide.shape == (20, 30)
    # 60 of the 100 columns, two to a pixel.
    np.testing.assert_allclose(wide[10, 2:-2], 20.5 + 2 * np.arange(2, 28), atol=1)
    assert np.array_equal(fitted(ramp, 16, 16), center_crop(ramp, 16))


def test_labels_of_file_names_are_places_in_their_order(tmp_path):
    images = GivenImages(save(tmp_path, b_1=0, a_2=1, b_0=2), 8, 8, "base_samples", num_classes=2)
    assert images.labels.tolist() == [0, 1, 1]
    with pytest.raises(ValueError, match=r"base_samples: .*: wanted pictures of all 3 classes of the network, got 2"):
        GivenImages(str(tmp_path), 8, 8, "base_samples", num_classes=3)
    save(tmp_path, plain=3)
    with pytest.raises(ValueError, match=r"base_samples: 1 of 4 files have no class in their name"):
        GivenImages(str(tmp_path), 8, 8, "base_samples", num_classes=2)


def test_an_npz_is_as_it_is(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 12, 3), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", pixels, np.array([2, 0, 1]))
    images = GivenImages(str(tmp_path / "x.npz"), 8, 12, "init_image", num_classes=3)
    assert images.labels.tolist() == [2, 0, 1]
    read = images.read([4]).numpy()
    np.testing.assert_allclose(read[0].transpose(1, 2, 0), pixels[1] / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ([np.zeros((0, 8, 8, 3), np.uint8)], "init_image: .*holds no image"),
        ([np.zeros((2, 8, 8), np.uint8)], r"arr_0: wanted uint8 \[N, 8, 8, 3\], got uint8 \[2, 8, 8\]"),
    ],
)
def test_what_holds_no_images(tmp_path, arrays, said):
    np.savez(tmp_path / "x.npz", *arrays)
    with pytest.raises(ValueError, match=said):
        GivenImages(str(tmp_path / "x.npz"), 8, 8, "init_image")
