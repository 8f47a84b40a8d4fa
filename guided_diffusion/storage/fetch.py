"""Files by address: fetched once into a cache, resumed after a break, their hash checked from then on."""

import hashlib
import http.client
import json
import os
import re
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import blobfile as bf
from filelock import FileLock
from tqdm import tqdm

from .files import cache_folder, is_address, json_text, sha256, write_atomically, writing
from .hashes import known_sha256

CHUNK = 2**20
TIMEOUT_S = 60

OPENAI = "https://openaipublic.blob.core.windows.net/diffusion/"
LICENCES = {
    f"{OPENAI}jul-2021/": "none is named for the file; that of the code it belongs to, guided-diffusion, is MIT; its "
    "model card asks for research use only",
    f"{OPENAI}march-2021/": "none is named for the file; that of the code it belongs to, improved-diffusion, is MIT",
    "https://dl.fbaipublicfiles.com/DiT/": "CC BY-NC 4.0, code and weights of DiT: not for commercial use",
    "https://www.dl.dropboxusercontent.com/scl/fi/as9oeomcbub47de5g4be0/": "MIT, that of SiT's code",
}
"""What is known of the licence of published files, by how their addresses begin."""

bf.configure(retry_limit=2, log_callback=lambda message: None)

WEB_PAGE = re.compile(rb"\s*<(!doctype|html)", re.IGNORECASE)
"""How a page that asks to sign in, or an error's, begins."""


@dataclass(frozen=True)
class Source:
    """An open stream, the offset it begins at, the whole file's size (None: the stream itself tells its end).

    tag: what the server calls this content, empty if it does not.
    """

    stream: BinaryIO
    start: int
    size: int | None
    tag: str


def local_path(path: str) -> Path:
    """`path` itself if it is local, else its file in the cache, fetched if it is not there.

    A file goes to NAME.part until it is whole; an interrupted fetch goes on from there if the content is still the
    same. Beside the file, NAME.json holds its size and SHA-256, which are checked on every later use; so is the hash of
    an address that ends with #sha256=HASH. A ValueError says what went wrong; what is not right does not stay.
    """
    if not is_address(path):
        return Path(path)
    path, _, wanted = path.partition("#sha256=")
    if wanted and not re.fullmatch("[0-9a-f]{64}", wanted):
        raise ValueError(f"{path}: #sha256=: wanted 64 digits from 0 to f, got {wanted!r}")
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
                _check(file, wanted)
            else:
                _fetch(path, file, wanted)
    except OSError as error:
        raise ValueError(f"{path}: cannot be kept in {file.parent} ({error})") from None
    return file


def _record(file: Path) -> dict[str, Any]:
    """What NAME.json says of a file or of its part, {} where it is not there or damaged."""
    try:
        record = json.loads(file.with_name(f"{file.name}.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _write_record(file: Path, **record: Any) -> None:
    write_atomically(f"{file}.json", lambda stream: stream.write(json_text(record).encode()))


def _check(file: Path, wanted: str) -> None:
    """Raise a ValueError, and take the file away, where it is not the one that was fetched."""
    record, size = _record(file), file.stat().st_size
    if not record.keys() >= {"size", "sha256"}:
        wrong = "nothing is known of it any more"
    elif size != record["size"]:
        wrong = f"wanted {record['size']} bytes, got {size}"
    elif (found := known_sha256(file)) != record["sha256"]:
        wrong = "its SHA-256 is no longer that of the file that was fetched"
    elif wanted not in ("", found):
        wrong = f"wanted the SHA-256 {wanted}, got {found}"
    else:
        return
    file.unlink()
    file.with_name(f"{file.name}.json").unlink(missing_ok=True)
    raise ValueError(f"{file}: {wrong}; it was deleted, and the same command fetches it anew")


def _open_blob(path: str, offset: int, tag: str) -> Source:
    about = bf.stat(path)
    now = str(about.version or about.mtime)
    stream = bf.BlobFile(path, "rb", streaming=True)
    start = offset if tag in ("", now) else 0
    stream.seek(start)
    return Source(stream, start, about.size, now)


def _open_http(path: str, offset: int, tag: str) -> Source:
    headers = {"Range": f"bytes={offset}-"} | ({"If-Range": tag} if tag else {}) if offset else {}
    response = urllib.request.urlopen(urllib.request.Request(path, headers=headers), timeout=TIMEOUT_S)
    if response.headers.get_content_type() == "text/html":
        raise ValueError("a web page, not a file; does it ask to sign in?")
    etag = response.headers.get("ETag", "W/")
    now = response.headers.get("Last-Modified", "") if etag.startswith("W/") else etag
    if response.status == 206:
        told = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if not told or int(told[1]) != offset or now != tag:
            raise ValueError("another part than was asked for, or of another file")
    elif response.length is None and not response.chunked:
        raise ValueError("the server does not say how long the file is, so a broken one could not be told")
    start = offset if response.status == 206 else 0
    return Source(response, start, None if response.length is None else start + response.length, now)


def _openers(path: str) -> list[Callable[[str, int, str], Source]]:
    """How to reach an address, best first: blobfile where it knows the service, then plain HTTP."""
    web = path.startswith(("https://", "http://"))
    blob = not web or ".blob.core.windows.net/" in path
    return [_open_blob] * blob + [_open_http] * web


def _open(path: str, offset: int, tag: str) -> Source:
    reasons = []
    for opener in _openers(path):
        try:
            return opener(path, offset, tag)
        except (OSError, http.client.HTTPException, bf.Error, ValueError) as error:
            reasons.append(" ".join(f"{type(error).__name__}: {error}".split())[:80])
    raise ValueError(f"{path}: cannot be fetched ({reasons[-1]}); fetch it by hand and give its local path")


def _terms(path: str, size: int | None) -> str:
    """What is to be known of a file before it is fetched: its size, address and licence, a line each."""
    licence = next((licence for beginning, licence in LICENCES.items() if path.startswith(beginning)), "not known here")
    amount = "of unknown size" if size is None else f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
    return f"fetching {path} ({amount})\n  licence: {licence}\n"


def _begun(path: str, part: Path, before: Mapping[str, Any], wanted: str) -> Source:
    """The rest of the file where a part of the same content is there, else all of it."""
    tag = str(before.get("tag") or "")
    offset = part.stat().st_size if part.exists() and before.get("address") == path and (tag or wanted) else 0
    if offset:
        try:
            return _open(path, offset, tag)
        except ValueError:
            pass  # the part may be of another file, or longer than one that has changed since: begin anew
    return _open(path, 0, "")


def _chunks(path: str, stream: BinaryIO) -> Iterator[bytes]:
    try:
        while chunk := stream.read(CHUNK):
            yield chunk
    except (OSError, http.client.HTTPException, bf.Error) as error:
        raise ValueError(f"{path}: broke off ({error}); the same command goes on from there") from None


def _fetch(path: str, file: Path, wanted: str) -> None:
    part = file.with_name(f"{file.name}.part")
    source = _begun(path, part, _record(file), wanted)
    size, start = source.size, source.start
    sys.stderr.write(f"{_terms(path, size)}  to {file}\n")
    bar = tqdm(total=size, initial=start, unit="B", unit_scale=True, desc=file.name, dynamic_ncols=True, disable=None)
    with source.stream, writing(part), open(part, "r+b" if start else "wb") as target, bar:
        _write_record(file, address=path, size=size, tag=source.tag)
        target.seek(start)
        target.truncate()
        for chunk in _chunks(path, source.stream):
            target.write(chunk)
            bar.update(len(chunk))
        target.flush()
        os.fsync(target.fileno())
        got = target.tell()
    if size is not None and got < size:
        raise ValueError(f"{path}: broke off at {got} of {size} bytes; the same command goes on from there")
    found = sha256(part)
    with open(part, "rb") as begun:
        head = begun.read(64)
    if not got:
        wrong = "an empty file"
    elif WEB_PAGE.match(head):
        wrong = "a web page, not a file; does it ask to sign in?"
    elif size not in (None, got):
        wrong = f"wanted {size} bytes, got {got}"
    elif wanted not in ("", found):
        wrong = f"wanted the SHA-256 {wanted}, got {found}"
    else:
        _write_record(file, address=path, size=got, sha256=found)
        os.replace(part, file)
        return
    part.unlink()
    file.with_name(f"{file.name}.json").unlink()
    raise ValueError(f"{path}: {wrong}; nothing was kept, and the same command begins anew")
