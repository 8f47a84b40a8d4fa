"""What an evaluation reads: every layout it takes, and a sentence for each that it does not."""

import io
import os
import zipfile

import numpy as np
import pytest
from PIL import Image

from evaluations.sources import open_source
from sample_files import pictures, shard


@pytest.fixture
def gaussian():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((50, 6))
    return {"mu": x.mean(axis=0), "sigma": np.cov(x.T)}


def test_one_npz(tmp_path):
    images = pictures()
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", images)
        source = open_source(str(tmp_path / "a.npz"))
        assert (len(source.images), source.images.size) == (10, (8, 8))
        for start, stop in ((0, 3), (3, 10), (2, 5)):
            assert (source.images.read(start, stop) == images[start:stop]).all()


def test_the_first_images(tmp_path):
    images = pictures(11)
    for first, stop in ((0, 4), (4, 8), (8, 11)):
        shard(tmp_path / "shards", first, images[first:stop])
    source = open_source(str(tmp_path)).images
    for count in (1, 4, 7, 11):
        assert len(source.first(count)) == count
        assert (source.first(count).read(0, count) == images[:count]).all()
    for count in (0, 12):
        with pytest.raises(ValueError, match=f"wanted 1 to 11 images, got {count}"):
            source.first(count)


def test_shards_in_order_without_regard_to_their_files(tmp_path):
    images = pictures(11)
    for first, stop in ((4, 8), (0, 4), (8, 11)):
        shard(tmp_path / "shards", first, images[first:stop])
    source = open_source(str(tmp_path))
    assert (source.images.read(0, 11) == images).all()
    assert (source.images.read(3, 9) == images[3:9]).all()


def test_manifest_tells_how_many_samples_there_are(tmp_path):
    for first in (0, 4, 8):
        shard(tmp_path / "shards", first, pictures(4))
    (tmp_path / "manifest.json").write_text('{"samples": 8, "guidance": "off"}')
    source = open_source(str(tmp_path))
    assert len(source.images) == 8
    assert source.about["guidance"] == "off"
    (tmp_path / "manifest.json").write_text('{"samples": 20}')
    with pytest.raises(ValueError, match="wanted the 20 samples of its manifest, got 12"):
        open_source(str(tmp_path))


def test_a_folder_of_pictures(tmp_path):
    images = pictures(3)
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    source = open_source(str(tmp_path))
    assert (source.images.read(0, 3) == images).all()
    Image.fromarray(pictures(1, 9)[0]).save(tmp_path / "9.png")
    with pytest.raises(ValueError, match=r"9\.png: wanted 8×8 like the others, got 9×9×3"):
        open_source(str(tmp_path)).images.read(0, 4)
    for mode in ("L", "RGBA", "CMYK"):
        Image.new(mode, (8, 8)).save(tmp_path / "0.tiff")
        (tmp_path / "0.tiff").rename(tmp_path / "0.png")
        with pytest.raises(ValueError, match=f"0.png: wanted an RGB picture, got mode {mode}"):
            open_source(str(tmp_path))
    (tmp_path / "0.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    with pytest.raises(ValueError, match=r"0\.png: not a whole picture"):
        open_source(str(tmp_path))


def test_pictures_of_folders_in_a_folder_are_read(tmp_path):
    """As training reads them: at any depth, behind links, and round a link that leads back but once."""
    images = pictures(4)
    (tmp_path / "all" / "b" / "c").mkdir(parents=True)
    (tmp_path / "there").mkdir()
    (tmp_path / "all" / "a").symlink_to(tmp_path / "there", target_is_directory=True)
    (tmp_path / "all" / "b" / "back").symlink_to(tmp_path / "all", target_is_directory=True)
    (tmp_path / "all" / "notes.txt").write_text("no picture")
    places = ("all/9.png", "there/0.png", "all/b/0.png", "all/b/c/0.png")
    for image, place in zip(images, places, strict=True):
        Image.fromarray(image).save(tmp_path / place)
    source = open_source(str(tmp_path / "all"))
    np.testing.assert_array_equal(source.images.read(0, 4), images)
    assert len(source.images) == 4


def test_statistics(tmp_path, gaussian):
    np.savez(tmp_path / "s.npz", **gaussian, mu_s=gaussian["mu"], sigma_s=gaussian["sigma"], arr_0=pictures())
    source = open_source(str(tmp_path / "s.npz"))
    assert set(source.statistics) == {"pool", "spatial"}
    assert len(source.images) == 10
    np.savez(tmp_path / "s.npz", **gaussian)
    source = open_source(str(tmp_path / "s.npz"))
    assert set(source.statistics) == {"pool"}
    assert source.images is None


def test_sorted_labels_are_noticed(tmp_path):
    for labels, is_sorted in (([0, 0, 1, 1], True), ([0, 1, 0, 1], False), ([2, 2, 2, 2], False)):
        np.savez(tmp_path / "a.npz", pictures(4), np.array(labels))
        assert open_source(str(tmp_path / "a.npz")).images.sorted_labels == is_sorted
    shard(tmp_path / "shards", 0, pictures(2), np.array([0, 0]))
    shard(tmp_path / "shards", 2, pictures(2), np.array([1, 1]))
    assert open_source(str(tmp_path)).images.sorted_labels


FLOATS = np.random.default_rng(0).random((4, 8, 8, 3)).astype(np.float32)


@pytest.mark.parametrize(
    ("array", "sentence"),
    [
        (FLOATS, r"wanted uint8 \[N, H, W, 3\], got float32 \[4, 8, 8, 3\], which look like \[0, 1\]: times 255"),
        (FLOATS * 255, r"got float32 \[4, 8, 8, 3\], which look like \[0, 255\]: rounded, as uint8"),
        (FLOATS * 300 - 9, r"got float32 \[4, 8, 8, 3\]$"),
        (FLOATS * 2 - 1, r"got float32 \[4, 8, 8, 3\], which look like \[-1, 1\]"),
        (FLOATS * 300, r"got float32 \[4, 8, 8, 3\]$"),
        (pictures().astype(np.int64), "got int64 .*: cast it to uint8"),
        (pictures().transpose(0, 3, 1, 2), r"got uint8 \[10, 3, 8, 8\]: channels come last"),
        (pictures()[..., :1], r"got uint8 \[10, 8, 8, 1\]"),
        (np.concatenate([pictures(), pictures()[..., :1]], axis=3), r"got uint8 \[10, 8, 8, 4\]"),
        (pictures()[0], r"got uint8 \[8, 8, 3\]"),
        (np.asfortranarray(pictures()), "in Fortran order"),
        (pictures(0), "no image"),
        (np.array([{"a": 1}]), "Python objects"),
    ],
)
def test_images_that_are_none(tmp_path, array, sentence):
    np.savez(tmp_path / "a.npz", array)
    with pytest.raises(ValueError, match=sentence) as refusal:
        open_source(str(tmp_path / "a.npz"))
    assert "a.npz: arr_0: " in str(refusal.value)


def npz_with(path, name, header, data):
    """An npz whose array's header says what we like."""
    member = io.BytesIO()
    np.lib.format.write_array_header_1_0(member, header)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.npy", member.getvalue() + data)


def test_files_that_lie_or_are_broken(tmp_path):
    path = tmp_path / "a.npz"
    npz_with(path, "arr_0", {"descr": "|u1", "fortran_order": False, "shape": (1000, 8, 8, 3)}, b"short")
    with pytest.raises(ValueError, match="its header promises 192128 bytes, the file holds 133"):
        open_source(str(path))
    np.savez(path, pictures())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a\.npz: not a whole npz"):
        open_source(str(path))
    path.write_bytes(whole[:700] + bytes([whole[700] ^ 1]) + whole[701:])
    with pytest.raises(ValueError, match="CRC"):
        open_source(str(path)).images.read(0, 10)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="not a whole npz"):
        open_source(str(path))
    with pytest.raises(ValueError, match="no such file or folder"):
        open_source(str(tmp_path / "none.npz"))
    np.savez(path, other=pictures())
    with pytest.raises(ValueError, match=r"wanted images \(arr_0\) or statistics \(mu, sigma\), got other"):
        open_source(str(path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="got neither"):
        open_source(str(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("firsts", "sizes", "sentence"),
    [
        ((0, 8), (8, 8), r"wanted to begin at sample 4, got 8: samples 4 to 7 are missing"),
        ((4,), (8,), "wanted to begin at sample 0, got 4"),
        ((0, 2), (8, 8), "wanted to begin at sample 4, got 2: samples 2 to 3 are there twice"),
        ((0, 4), (8, 9), "wanted 8×8 like the others, got 9×9"),
    ],
)
def test_shards_that_do_not_fit(tmp_path, firsts, sizes, sentence):
    for first, side in zip(firsts, sizes, strict=True):
        shard(tmp_path, first, pictures(4, side))
    with pytest.raises(ValueError, match=sentence):
        open_source(str(tmp_path))


def test_a_shard_without_its_about(tmp_path):
    np.savez(tmp_path / "shard_000000.npz", arr_0=pictures())
    with pytest.raises(ValueError, match="about"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s: s.pop("sigma"), "wanted both mu and sigma, got mu alone"),
        (lambda s: s.update(mu_s=s["mu"]), "wanted both mu_s and sigma_s, got mu_s alone"),
        (lambda s: s.update(sigma=s["sigma"][:5]), r"sigma: wanted floats \[6, 6\], got float64 \[5, 6\]"),
        (lambda s: s.update(mu=s["mu"][None]), r"mu: wanted floats \[D\], got float64 \[1, 6\]"),
        (lambda s: s.update(mu=np.zeros(6, int)), r"mu: wanted floats \[D\], got int64"),
        (lambda s: s.update(mu=s["mu"] * np.nan), "mu: wanted finite numbers"),
        (lambda s: s.update(sigma=s["sigma"] + np.inf), "sigma: wanted finite numbers"),
        (lambda s: s.update(sigma=s["sigma"] + np.arange(6)), "sigma: wanted a symmetric matrix"),
        (lambda s: s.update(sigma=-np.eye(6)), "sigma: wanted variances of at least 0, got -1"),
        (lambda s: s.update(mu=np.zeros(20_000)), "at most 16384 dimensions"),
    ],
)
def test_statistics_that_are_none(tmp_path, gaussian, change, sentence):
    change(gaussian)
    np.savez(tmp_path / "s.npz", **gaussian)
    with pytest.raises(ValueError, match=sentence):
        open_source(str(tmp_path / "s.npz"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_no_picture(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png: wanted a picture, got what is no file"):
        open_source(str(tmp_path))
