"""Folders of images as batches: order, shares of ranks, crops, and files that are not what they seem."""

import random
import struct
import zlib
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from guided_diffusion.settings.options import BadInput
from guided_diffusion.storage.images import (
    center_crop,
    check_images,
    list_image_files,
    random_crop,
    read_picture,
)
from guided_diffusion.training.data import VariedImages, load_data, with_low_res
from running import refused

COUNT = 10


@pytest.fixture
def folder(tmp_path):
    """Ten 20×24 pictures of two classes; picture i is filled with 20·i."""
    for i in range(COUNT):
        Image.new("RGB", (24, 20), (20 * i,) * 3).save(tmp_path / f"{'cat' if i % 2 else 'dog'}_{i}.png")
    return tmp_path


def first(count, folder, **settings):
    """The first batches of a folder."""
    return list(islice(load_data(data_dir=str(folder), image_size=16, **settings), count))


def numbers(batches):
    """Which of the ten pictures the rows are."""
    return [round((float(image[0, 0, 0]) + 1) * 127.5 / 20) for images, _ in batches for image in images]


def test_data_comes_scaled_and_labelled(folder):
    batches = first(3, folder, batch_size=5, class_cond=True, deterministic=True)
    images, condition = batches[0]
    assert images.shape == (5, 3, 16, 16)
    assert condition["y"].tolist() == [0] * 5  # cats come first
    torch.testing.assert_close(images[:, 0, 0, 0], torch.tensor([20.0, 60, 100, 140, 180]) / 127.5 - 1)
    assert batches[1][1]["y"].tolist() == [1] * 5
    assert batches[2][1]["y"].tolist() == [0] * 5
    assert first(1, folder, batch_size=5)[0][1] == {}


@pytest.mark.parametrize("batch_size", [1, 3, 10, 25])
def test_every_epoch_has_every_image_once_in_an_order_of_its_own(folder, batch_size):
    stream = numbers(first(40 // batch_size + 1, folder, batch_size=batch_size))
    epochs = [stream[start : start + COUNT] for start in range(0, 40, COUNT)]
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4
    assert epochs[0] == numbers(first(1, folder, batch_size=COUNT))
    assert epochs[0] != numbers(first(1, folder, batch_size=COUNT, seed=1))


def test_orders_stay_what_they_are(folder):
    """Trainings that are resumed with a later version go on in these orders: they may not change."""
    orders = [2, 4, 8, 6, 3, 9, 5, 0, 7, 1], [8, 2, 3, 5, 0, 1, 7, 4, 6, 9]
    assert numbers(first(2, folder, batch_size=COUNT, seed=1)) == [*orders[0], *orders[1]]


AUGMENTED = {"random_crop": True, "class_cond": True}


@pytest.fixture
def patterned(tmp_path):
    """Seven pictures of random pixels, all different under every crop and flip."""
    pixels = np.random.default_rng(0).integers(256, size=(7, 40, 30, 3), dtype=np.uint8)
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(tmp_path / f"{'ab'[i % 2]}_{i}.png")
    return tmp_path


def assert_same(ours, expected):
    for (images, condition), (other_images, other_condition) in zip(ours, expected, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(condition["y"], other_condition["y"])


@pytest.mark.parametrize("size", [2, 3, 6])
def test_ranks_share_a_batch(patterned, size):
    whole = first(4, patterned, batch_size=6, **AUGMENTED)
    parts = [first(4, patterned, batch_size=6, rank=rank, size=size, **AUGMENTED) for rank in range(size)]
    assert all(len(part[0][0]) == 6 // size for part in parts)
    together = [
        (torch.cat([images for images, _ in row]), {"y": torch.cat([condition["y"] for _, condition in row])})
        for row in zip(*parts, strict=True)
    ]
    assert_same(together, whole)


def test_a_batch_is_a_function_of_its_number(patterned):
    """Neither the threads that read, nor where one begins, nor the global random states count."""
    whole = first(9, patterned, batch_size=4, seed=3, **AUGMENTED)
    random.seed(5)
    torch.manual_seed(5)
    before = random.getstate(), torch.get_rng_state()
    assert_same(first(9, patterned, batch_size=4, seed=3, num_workers=2, **AUGMENTED), whole)
    for start in (1, 5):
        later = first(9 - start, patterned, batch_size=4, seed=3, start_batch=start, **AUGMENTED)
        assert_same(later, whole[start:])
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_skipped_batches_are_not_read(folder, monkeypatch):
    batches = load_data(data_dir=str(folder), batch_size=4, image_size=16, start_batch=1000)
    read = []
    monkeypatch.setattr(VariedImages, "__getitem__", lambda self, item: (read.append(item), (torch.zeros(1), 0))[1])
    next(batches)
    assert len(read) == 4


def test_crops_and_flips_belong_to_epoch_and_image(patterned):
    data = VariedImages(str(patterned), 16, class_cond=False, crop=True, flip=True, seed=0)
    assert torch.equal(data[3][0], VariedImages(str(patterned), 16, False, True, True)[3][0])
    epochs = torch.stack([data[epoch * len(data) + 3][0] for epoch in range(20)])
    assert len(epochs.unique(dim=0)) > 15
    plain = VariedImages(str(patterned), 16, False, False, True)
    seen = [plain[item][0] for item in range(len(plain) * 30)]
    first_epoch = VariedImages(str(patterned), 16, False, False, False)
    flipped = [torch.equal(image, first_epoch[item % 7][0].flip(2)) for item, image in enumerate(seen)]
    kept = [torch.equal(image, first_epoch[item % 7][0]) for item, image in enumerate(seen)]
    assert all(f != k for f, k in zip(flipped, kept, strict=True))
    assert 80 < sum(flipped) < 130  # of 210


def test_crops():
    pixels = np.arange(60 * 40 * 3, dtype=np.uint32).astype(np.uint8).reshape(40, 60, 3)
    picture = Image.fromarray(pixels)
    assert center_crop(picture, 16).size == (16, 16)
    assert center_crop(picture, 40).getpixel((0, 0)) == picture.getpixel((10, 0))
    chance = np.random.default_rng(0)
    assert random_crop(picture, 16, chance).size == (16, 16)
    # Where nothing is scaled, a crop is a window of the picture; all 21 places come.
    windows = {pixels[:, left : left + 40].tobytes() for left in range(21)}
    crops = {np.asarray(random_crop(picture, 40, chance, min_fraction=1)).tobytes() for _ in range(300)}
    assert crops == windows


def test_low_resolution_images_are_means_of_areas(folder):
    batches = with_low_res(load_data(data_dir=str(folder), batch_size=2, image_size=16, class_cond=True), 4)
    images, condition = next(batches)
    assert set(condition) == {"y", "low_res"}
    torch.testing.assert_close(condition["low_res"], images.unflatten(3, (4, 4)).unflatten(2, (4, 4)).mean(dim=(3, 5)))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"batch_size": 5, "size": 2}, "batch_size: wanted a multiple of the 2 ranks, got 5"),
        ({"batch_size": 0}, "batch_size: wanted a multiple of the 1 ranks, got 0"),
        ({"batch_size": 1, "num_workers": -1}, "num_workers: wanted 0 or more"),
        ({"batch_size": 1, "seed": -1}, "seed: wanted"),
    ],
)
def test_impossible_settings_are_refused_at_once(folder, settings, said):
    with pytest.raises(ValueError, match=said):
        load_data(data_dir=str(folder), image_size=16, **settings)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="data_dir: no image"):
        load_data(data_dir=str(tmp_path), batch_size=1, image_size=16)


def test_files_without_a_class_are_named_where_classes_are_wanted(folder):
    Image.new("RGB", (4, 4)).save(folder / "plain.png")
    Image.new("RGB", (4, 4)).save(folder / "_empty.png")
    with pytest.raises(ValueError, match=r"2 of 12 files have no class in their name .*first .*_empty.png"):
        load_data(data_dir=str(folder), batch_size=1, image_size=16, class_cond=True)
    assert len(first(1, folder, batch_size=12)[0][0]) == 12


def mid(path):
    """The middle pixel of a picture as training sees it."""
    return read_picture(path, lambda image: center_crop(image, 8))[4, 4].tolist()


def test_modes_are_read_as_documented(tmp_path):
    def saved(name, image, **settings):
        image.save(tmp_path / name, **settings)
        return tmp_path / name

    assert mid(saved("grey.png", Image.new("L", (9, 9), 77))) == [77] * 3
    palette = Image.new("P", (9, 9), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    assert mid(saved("palette.png", palette)) == [10, 200, 30]
    assert mid(saved("palette2.png", palette, transparency=b"\x00\x00")) == [10, 200, 30]
    # Transparency is dropped, whatever colour it hid.
    assert mid(saved("rgba.png", Image.new("RGBA", (9, 9), (10, 200, 30, 0)))) == [10, 200, 30]
    assert mid(saved("la.png", Image.new("LA", (9, 9), (70, 0)))) == [70] * 3
    assert mid(saved("wide.png", Image.fromarray(np.full((9, 9), 0x80FF, np.uint16)))) == [0x80] * 3
    assert mid(saved("cmyk.jpg", Image.new("CMYK", (16, 16), (255, 255, 0, 0)), quality=100)) == [0, 0, 255]
    assert mid(saved("dot.png", Image.new("RGB", (1, 1), (1, 2, 3)))) == [1, 2, 3]
    frames = [Image.new("RGB", (9, 9), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    assert mid(saved("two.gif", frames[0], save_all=True, append_images=frames[1:])) == [255, 0, 0]
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90°
    sideways = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    path = saved("turned.png", sideways, exif=exif)
    assert np.array_equal(read_picture(path, lambda image: image, "L"), np.asarray(sideways))
    assert not np.array_equal(np.asarray(ImageOps.exif_transpose(Image.open(path))), np.asarray(sideways))


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def broken(folder, kind):
    """A file that is no image, one way or another."""
    path = folder / f"cat_{kind}.png"
    if kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("no image")
    elif kind == "bomb":
        header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0))
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b""))
    elif kind == "postscript":
        path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    elif kind == "folder":
        path.mkdir()
    elif kind == "truncated":
        pixels = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        path.write_bytes(path.read_bytes()[:5000])
    elif kind == "strip":
        Image.new("L", (60000, 1)).save(path)
    return path


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("empty", "an empty file"),
        ("text", "not one of BMP, GIF, JPEG, PNG, WEBP"),
        ("postscript", "not one of BMP, GIF, JPEG, PNG, WEBP"),
        ("bomb", "decompression bomb"),
        ("folder", "Is a directory"),
    ],
)
def test_what_is_no_image_is_named_at_the_start(folder, kind, said):
    path = broken(folder, kind)
    with pytest.raises(ValueError, match="data_dir: not images that can be read") as error:
        load_data(data_dir=str(folder), batch_size=1, image_size=16)
    assert str(path) in str(error.value)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_at_most_five_are_named(folder):
    for i in range(8):
        (folder / f"bad_{i}.png").touch()
    with pytest.raises(ValueError, match=r"bad_4.png \(an empty file\), and 3 more$"):
        check_images(list_image_files(str(folder)))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(("kind", "size", "said"), [("truncated", 16, "truncated"), ("strip", 64, "too long a strip")])
def test_what_breaks_in_reading_is_named_then(folder, kind, size, said, num_workers):
    path = broken(folder, kind)
    batches = load_data(data_dir=str(folder), batch_size=1, image_size=size, num_workers=num_workers)
    with pytest.raises(BadInput) as stop:
        list(islice(batches, COUNT + 1))
    assert stop.value.code == 2
    assert stop.value.message.startswith(f"{path}: not an image that can be read (")
    assert said in stop.value.message


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_training_says_one_sentence(folder, tmp_path, capsys, num_workers):
    path = broken(folder, "truncated")
    error = refused(
        capsys, "image_train", data_dir=folder, out_dir=tmp_path / "run", batch_size=11, num_workers=num_workers,
        image_size=16, num_channels=32, num_res_blocks=1, channel_mult="1,2", attention_resolutions=8,
    )  # fmt: skip
    assert str(path) in error
