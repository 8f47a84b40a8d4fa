"""SHA-256 of large files: computed by one process for all, remembered, and compared with the one beside the file."""

import hashlib
import json
import os
import re
import time
from pathlib import Path

from filelock import FileLock

from .files import cache_folder, sha256, write_atomically

SMALL = 2**24
"""Bytes up to which a file is simply hashed."""

BELIEVED_S = 86_400
"""How long a hash is believed: a disk that fails changes no time of change."""


def known_sha256(file: str | Path) -> str:
    """SHA-256 of a local file: of a large one from the cache's folder, where its size, mtime and inode are known there.

    Processes that ask at once wait for the one that computes it.
    """
    about = os.stat(file)
    if about.st_size <= SMALL:
        return sha256(file)
    key = json.dumps([os.path.realpath(file), about.st_size, about.st_mtime_ns, about.st_ino])
    memory = cache_folder() / "hashes" / hashlib.sha256(key.encode()).hexdigest()
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{memory}.lock"):
            if memory.is_file() and time.time() - memory.stat().st_mtime < BELIEVED_S:
                return memory.read_text()
            found = sha256(file)
            write_atomically(memory, lambda stream: stream.write(found.encode()))
            return found
    except OSError:  # where nothing can be kept, nothing is remembered
        return sha256(file)


def check_beside(file: Path) -> None:
    """Compare a file with the hash in FILE.sha256 (as sha256sum writes it), if that is there; a ValueError says so."""
    beside = Path(f"{file}.sha256")
    if not beside.is_file():
        return
    with open(beside, "rb") as stream:
        wanted = re.match(rb"[0-9a-f]{64}\b", stream.read(100))
    if not wanted:
        raise ValueError(f"{beside}: wanted a SHA-256, as sha256sum writes it")
    if known_sha256(file) != wanted[0].decode():
        raise ValueError(f"{file}: damaged or changed, its SHA-256 is not the one in {beside.name}; get it anew")
