"""Files by address: fetched once into a cache, resumed after a break, their hash checked from then on."""

import hashlib
import http.client
import json
import os
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import blobfile as bf
from filelock import FileLock
from tqdm import tqdm

from .files import is_address, json_text, sha256

CHUNK = 2**20
TIMEOUT_S = 60

OPENAI = "https://openaipublic.blob.core.windows.net/diffusion/"
LICENCES = {
    f"{OPENAI}jul-2021/": "none is named for the file; that of the code it belongs to, guided-diffusion, is MIT; its "
    "model card asks for research use only",
    f"{OPENAI}march-2021/": "none is named for the file; that of the code it belongs to, improved-diffusion, is MIT",
}
"""What is known of the licence of published files, by how their addresses begin."""

bf.configure(retry_limit=2, log_callback=lambda message: None)

Source = tuple[BinaryIO, int, int | None]
"""An open stream, the offset it begins at, and the size of the whole file if it is known."""


def cache_folder() -> Path:
    """$SAG_CACHE, else self-attention-guidance in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SAG_CACHE") or Path(base, "self-attention-guidance"))


def local_path(path: str) -> Path:
    """`path` itself if it is local, else its file in the cache, fetched if it is not there.

    A file goes to NAME.part until it is whole; an interrupted fetch goes on from there. Beside the file, NAME.json
    holds its size and SHA-256, which are checked on every later use. A ValueError says what went wrong.
    """
    if not is_address(path):
        return Path(path)
    address = urllib.parse.urlsplit(path)
    names = PurePosixPath(address.path.lstrip("/"))
    if not names.name or address.path.endswith("/"):
        raise ValueError(f"{path}: names no file")
    if ".." in names.parts:
        raise ValueError(f"{path}: an address with .. in it")
    if address.query:
        # Another question is another file.
        names = names.with_name(f"{hashlib.sha256(address.query.encode()).hexdigest()[:16]}-{names.name}")
    file = cache_folder() / address.netloc / names
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # One process at a time fetches a file; the others wait.
        with FileLock(file.with_name(f"{file.name}.lock")):
            if file.exists():
                _check(file)
            else:
                _fetch(path, file)
    except OSError as error:
        raise ValueError(f"{path}: cannot be kept in {file.parent} ({error})") from None
    return file


def _check(file: Path) -> None:
    record = json.loads(file.with_name(f"{file.name}.json").read_text(encoding="utf-8"))
    again = f"delete {file} to fetch it again from {record['address']}"
    if file.stat().st_size != record["size"]:
        raise ValueError(f"{file}: wanted {record['size']} bytes, got {file.stat().st_size}; {again}")
    if sha256(file) != record["sha256"]:
        raise ValueError(f"{file}: its SHA-256 is no longer that of the file that was fetched; {again}")


def _open_blob(path: str, offset: int) -> Source:
    size = bf.stat(path).size
    stream = bf.BlobFile(path, "rb", streaming=True)
    stream.seek(offset)
    return stream, offset, size


def _open_http(path: str, offset: int) -> Source:
    request = urllib.request.Request(path, headers={"Range": f"bytes={offset}-"} if offset else {})
    response = urllib.request.urlopen(request, timeout=TIMEOUT_S)
    length = response.headers.get("Content-Length")
    start = offset if response.status == 206 else 0
    return response, start, None if length is None else start + int(length)


def _openers(path: str) -> list[Callable[[str, int], Source]]:
    """How to reach an address, best first: blobfile where it knows the service, then plain HTTP."""
    web = path.startswith(("https://", "http://"))
    blob = not web or ".blob.core.windows.net/" in path
    return [_open_blob] * blob + [_open_http] * web


def _open(path: str, offset: int) -> Source:
    reasons = []
    for opener in _openers(path):
        try:
            return opener(path, offset)
        except (OSError, http.client.HTTPException, bf.Error, ValueError) as error:
            reasons.append(" ".join(f"{type(error).__name__}: {error}".split())[:80])
    raise ValueError(f"{path}: cannot be fetched ({reasons[-1]}); fetch it by hand and give its local path")


def _terms(path: str, size: int | None) -> str:
    """What is to be known of a file before it is fetched: its size, address and licence, a line each."""
    licence = next((licence for beginning, licence in LICENCES.items() if path.startswith(beginning)), "not known here")
    amount = "of unknown size" if size is None else f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
    return f"fetching {path} ({amount})\n  licence: {licence}\n"


def _fetch(path: str, file: Path) -> None:
    part = file.with_name(f"{file.name}.part")
    offset = part.stat().st_size if part.exists() else 0
    try:
        stream, start, size = _open(path, offset)
    except ValueError:
        if not offset:
            raise
        # The part may be longer than a file that has changed since: begin again.
        stream, start, size = _open(path, 0)
    sys.stderr.write(f"{_terms(path, size)}  to {file}\n")
    bar = tqdm(total=size, initial=start, unit="B", unit_scale=True, desc=file.name, dynamic_ncols=True, disable=None)
    with stream, open(part, "r+b" if start else "wb") as target, bar:
        target.seek(start)
        target.truncate()
        try:
            while chunk := stream.read(CHUNK):
                target.write(chunk)
                bar.update(len(chunk))
        except (OSError, http.client.HTTPException, bf.Error) as error:
            raise ValueError(f"{path}: broke off ({error}); the same command goes on from there") from None
        target.flush()
        os.fsync(target.fileno())
        got = target.tell()
    if size is not None and got != size:
        raise ValueError(f"{path}: broke off at {got} of {size} bytes; the same command goes on from there")
    record = {"address": path, "size": got, "sha256": sha256(part)}
    file.with_name(f"{file.name}.json").write_text(json_text(record), encoding="utf-8")
    os.replace(part, file)
