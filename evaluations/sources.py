"""What an evaluation reads: images from npz files, shard folders and folders of pictures, and statistics."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import blobfile as bf
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from evaluations.arrays import ArrayFile, names
from evaluations.moments import Gaussian
from evaluations.pickles import load_pickle

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
MAX_DIMENSIONS = 16384
STATISTICS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
PICKLED = {"fid": "inception", "fd_dinov2": "dinov2-edm2"}
"""The features of each entry of a pickle of EDM2's kind."""
INCEPTION = 2048
"""Dimensions of Inception's features; no other network here has as many."""


@dataclass(frozen=True, eq=False)
class Part:
    """Images of one file: rows start to start + count of the whole set."""

    path: str
    start: int
    count: int
    array: ArrayFile | None = None

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        if self.array is not None:
            return self.array.read(start, stop)
        return _picture(self.path)[None]


@dataclass(frozen=True, eq=False)
class Images:
    """N images of one size, uint8, in an order that is always the same."""

    parts: Sequence[Part]
    size: tuple[int, int]
    labels: NDArray | None = None

    @property
    def sorted_labels(self) -> bool:
        """Whether the classes are known and stand in order."""
        labels = self.labels
        return labels is not None and len(labels) > 1 and labels[0] != labels[-1] and bool((np.diff(labels) >= 0).all())

    def __len__(self) -> int:
        return self.parts[-1].start + self.parts[-1].count

    def first(self, count: int) -> "Images":
        """The first `count` images; a ValueError if there are fewer."""
        if not 0 < count <= len(self):
            raise ValueError(f"wanted 1 to {len(self)} images, got {count}")
        parts = [replace(part, count=min(part.count, count - part.start)) for part in self.parts if part.start < count]
        return replace(self, parts=parts, labels=None if self.labels is None else self.labels[:count])

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Images start to stop, [N, H, W, 3]; a ValueError if they are not what was announced."""
        starts = [part.start for part in self.parts]
        first = int(np.searchsorted(starts, start, side="right")) - 1
        pieces = []
        for part in self.parts[first:]:
            if part.start >= stop:
                break
            low, high = max(start - part.start, 0), min(stop - part.start, part.count)
            piece = part.read(low, high)
            if piece.shape[1:] != (*self.size, 3):
                raise ValueError(
                    f"{part.path}: wanted {_shape(self.size)} like the others, got {_shape(piece.shape[1:])}"
                )
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


@dataclass(frozen=True, eq=False)
class Source:
    """One side of an evaluation. statistics: by feature, "pool" and "spatial", where the file brings them.

    statistics_of: the features that they are of, by the network's name (`FeatureNetwork.name`); empty where the file
    does not say. about: what the run that made the images says of itself (its manifest), where there is one.
    """

    path: str
    images: Images | None = None
    statistics: dict[str, Gaussian] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    statistics_of: str = ""


def open_source(path: str, features: str = "inception") -> Source:
    """What lies at `path`: an npz, a pickle of statistics, a folder of shards or of pictures.

    features: those that statistics must be of; a file that has images too is taken without others. A ValueError says
    what is wrong.
    """
    if bf.isdir(path):
        return _open_folder(path)
    if path.endswith((".pkl", ".pickle")):
        return _open_pickle(path, features)
    found = names(path)
    has_images = "arr_0" in found
    statistics = _statistics(path, found)
    statistics_of = _features_of(path, found, statistics) if statistics else ""
    if statistics_of.partition("-")[0] not in ("", features):
        if not has_images:
            raise ValueError(f"{path}: holds statistics of {statistics_of} features, wanted those of {features}")
        statistics, statistics_of = {}, ""
    if not has_images and not statistics:
        raise ValueError(
            f"{path}: wanted images (arr_0) or statistics (mu, sigma), got {', '.join(found) or 'nothing'}"
        )
    images = None
    if has_images:
        array = _image_array(path)
        images = Images([Part(path, 0, len(array), array)], array.shape[1:3], _labels([path], len(array)))
    manifest = _manifest(bf.join(bf.dirname(path), "manifest.json"))
    about = manifest if manifest.get("file") == bf.basename(path) else {}
    return Source(path, images, statistics, about, statistics_of)


def _shape(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def _labels(paths: Sequence[str], count: int) -> NDArray | None:
    """The classes arr_1 of npz files, one after the other; None unless all `count` images have one."""
    parts = [ArrayFile(path, "arr_1").all() for path in paths if "arr_1" in names(path)]
    if any(part.ndim != 1 or part.dtype.kind not in "iu" for part in parts) or sum(map(len, parts)) != count:
        return None
    return np.concatenate(parts)


def _image_array(path: str) -> ArrayFile:
    """arr_0 of an npz, which must be uint8 [N, H, W, 3]."""
    array = ArrayFile(path, "arr_0")
    wrong = f"{path}: arr_0: wanted uint8 [N, H, W, 3], got {array.dtype} {list(array.shape)}"
    if array.dtype != np.uint8:
        raise ValueError(f"{wrong}{_advice(array)}")
    if len(array.shape) != 4 or array.shape[3] != 3:
        if len(array.shape) == 4 and array.shape[1] == 3:
            raise ValueError(f"{wrong}: channels come last, transpose(0, 2, 3, 1)")
        raise ValueError(wrong)
    if array.fortran:
        raise ValueError(f"{wrong} in Fortran order: save numpy.ascontiguousarray of it")
    if not array.shape[0] or 0 in array.shape:
        raise ValueError(f"{wrong}: no image")
    return array


def _advice(array: ArrayFile) -> str:
    """What was probably meant by images that are not uint8."""
    if array.dtype.kind not in "fiu" or not len(array) or array.fortran:
        return ""
    some = array.read(0, min(len(array), 16))
    low, high = float(some.min()), float(some.max())
    if array.dtype.kind in "iu":
        return ": cast it to uint8" if low >= 0 and high <= 255 else ""
    if low >= 0 and high <= 1:
        return ", which look like [0, 1]: times 255, rounded, as uint8"
    if low >= -1 and high <= 1:
        return ", which look like [-1, 1]: (x + 1) · 127.5, rounded, as uint8"
    if low >= 0 and high <= 255:
        return ", which look like [0, 255]: rounded, as uint8"
    return ""


def _statistics(path: str, found: Sequence[str]) -> dict[str, Gaussian]:
    statistics = {}
    for feature, pair in STATISTICS.items():
        there = [name for name in pair if name in found]
        if len(there) == 1:
            raise ValueError(f"{path}: wanted both {pair[0]} and {pair[1]}, got {there[0]} alone")
        if there:
            statistics[feature] = _gaussian(path, {name: ArrayFile(path, name) for name in pair})
    if "spatial" in statistics and "pool" not in statistics:
        raise ValueError(f"{path}: wanted mu and sigma beside mu_s and sigma_s, got none")
    return statistics


def _features_of(path: str, found: Sequence[str], statistics: dict[str, Gaussian]) -> str:
    """The features that an npz's statistics are of: what its text `features` says, else what their shapes tell."""
    if "features" in found:
        text = ArrayFile(path, "features")
        if text.dtype.kind != "U" or text.shape or text.dtype.itemsize > 4 * 64:
            raise ValueError(f"{path}: features: wanted a name like dinov2-edm2, got {text.dtype} {list(text.shape)}")
        return str(text.read(0, 1)[0])
    return "inception" if "spatial" in statistics or len(statistics["pool"].mean) == INCEPTION else ""


def _open_pickle(path: str, features: str) -> Source:
    """Statistics as EDM2 keeps them: a dict of {"mu", "sigma"} by metric."""
    found = load_pickle(path)
    entries = {entry: PICKLED.get(entry, entry) for entry, part in found.items() if isinstance(part, dict)}
    for entry, statistics_of in entries.items():
        if statistics_of.partition("-")[0] == features:
            missing = [name for name in STATISTICS["pool"] if not isinstance(found[entry].get(name), np.ndarray)]
            if missing:
                raise ValueError(f"{path}: {entry}: wanted arrays mu and sigma, got no {missing[0]}")
            pair = {f"{entry}: {name}": found[entry][name] for name in STATISTICS["pool"]}
            return Source(path, statistics={"pool": _gaussian(path, pair)}, statistics_of=statistics_of)
    got = ", ".join(f"{entry} ({of})" for entry, of in entries.items()) or "none"
    raise ValueError(f"{path}: wanted statistics of {features} features, got {got:.200}")


def _gaussian(path: str, arrays: dict[str, NDArray | ArrayFile]) -> Gaussian:
    """The Gaussian of a mean and a covariance, by their names in the file."""
    mean_name, covariance_name = arrays
    shape = arrays[mean_name].shape
    if shape and shape[0] > MAX_DIMENSIONS:
        raise ValueError(f"{path}: {mean_name}: wanted at most {MAX_DIMENSIONS} dimensions, got {shape[0]}")
    for name, wanted in ((mean_name, shape[:1]), (covariance_name, shape * 2)):
        array = arrays[name]
        if len(shape) != 1 or array.shape != wanted or array.dtype.kind != "f":
            kind = "floats [D]" if name == mean_name else f"floats {list(wanted)}"
            raise ValueError(f"{path}: {name}: wanted {kind}, got {array.dtype} {list(array.shape)}")
    mean, covariance = (np.asarray(array.all() if isinstance(array, ArrayFile) else array, np.float64)
                        for array in arrays.values())  # fmt: skip
    for name, value in ((mean_name, mean), (covariance_name, covariance)):
        if not np.isfinite(value).all():
            raise ValueError(f"{path}: {name}: wanted finite numbers, got NaN or infinity")
    asymmetry = np.abs(covariance - covariance.T).max() if len(covariance) else 0
    if asymmetry > 1e-5 * max(np.abs(covariance).max(), 1e-300):
        raise ValueError(
            f"{path}: {covariance_name}: wanted a symmetric matrix, got one that differs by {asymmetry:.2g}"
        )
    smallest = covariance.diagonal().min(initial=0)
    if smallest < 0:
        raise ValueError(f"{path}: {covariance_name}: wanted variances of at least 0, got {smallest:.3g}")
    return Gaussian(mean, (covariance + covariance.T) / 2)


def _manifest(path: str) -> dict[str, Any]:
    if not bf.exists(path):
        return {}
    try:
        with bf.BlobFile(path, "rb") as file:
            manifest = json.loads(file.read(2**24))
    except (ValueError, RecursionError, OSError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _open_folder(path: str) -> Source:
    folder = bf.join(path, "shards") if bf.isdir(bf.join(path, "shards")) else path
    shards = [name for name in sorted(bf.listdir(folder)) if name.startswith("shard_") and name.endswith(".npz")]
    if shards:
        about = _manifest(bf.join(path, "manifest.json"))
        return Source(path, _open_shards(folder, shards, about.get("samples")), about=about)
    pictures = _pictures(folder)
    if not pictures:
        raise ValueError(f"{path}: wanted shards (shard_….npz) or pictures (png, jpg, …) in this folder, got neither")
    parts = [Part(picture, number, 1) for number, picture in enumerate(pictures)]
    return Source(path, Images(parts, _picture(parts[0].path).shape[:2]))


def _pictures(folder: str) -> list[str]:
    """All pictures of a folder, sorted by name, and then those of each folder in it, also where links lead to one."""
    paths = [bf.join(folder, name) for name in sorted(bf.listdir(folder))]
    pictures = [path for path in paths if path.lower().endswith(IMAGE_SUFFIXES)]
    for path in paths:
        if not path.lower().endswith(IMAGE_SUFFIXES) and bf.isdir(path) and not _leads_back(path, folder):
            pictures += _pictures(path)
    return pictures


def _leads_back(inner: str, folder: str) -> bool:
    """Whether a link leads to a folder that it lies in."""
    return "://" not in folder and Path(folder).resolve().is_relative_to(Path(inner).resolve())


def _open_shards(folder: str, names_: Sequence[str], samples: int | None) -> Images:
    """Shards in the order of their first samples: each says where it begins, and together they must leave no gap."""
    found = []
    for name in names_:
        path = bf.join(folder, name)
        array = _image_array(path)
        try:
            about = json.loads(ArrayFile(path, "about").all().tobytes())
            found.append((int(about["first"]), path, array))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}: about: wanted what sampling writes into a shard, got {error}") from None
    parts: list[Part] = []
    count, size = 0, found[0][2].shape[1:3]
    for first, path, array in sorted(found, key=lambda item: item[0]):
        if isinstance(samples, int) and first >= samples:
            break
        if first != count:
            word = "are missing" if first > count else "are there twice"
            low, high = sorted((first, count))
            raise ValueError(
                f"{path}: wanted to begin at sample {count}, got {first}: samples {low} to {high - 1} {word}"
            )
        if array.shape[1:3] != size:
            raise ValueError(f"{path}: wanted {_shape(size)} like the others, got {_shape(array.shape[1:3])}")
        parts.append(Part(path, first, len(array), array))
        count += len(array)
    if isinstance(samples, int) and count != samples:
        raise ValueError(
            f"{folder}: wanted the {samples} samples of its manifest, got {count}: let the run finish first"
        )
    return Images(parts, size, _labels([part.path for part in parts], count))


def _picture(path: str) -> NDArray[np.uint8]:
    if "://" not in path and not Path(path).is_file():
        raise ValueError(f"{path}: wanted a picture, got what is no file")  # a pipe would be waited for without end
    try:
        with bf.BlobFile(path, "rb") as file, Image.open(file) as image:
            if image.mode != "RGB":
                raise ValueError(f"{path}: wanted an RGB picture, got mode {image.mode}")
            return np.asarray(image)
    except (OSError, UnidentifiedImageError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a whole picture ({' '.join(str(error).split())[:80]})") from None
