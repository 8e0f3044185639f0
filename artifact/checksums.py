"""SHA-256 of files in chunks of 16 MiB: while writing, and in parallel while checking. Knows files and
their expected digests, nothing of what they mean."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from .schema import FileEntry

CHUNK_BYTES = 16 * 2**20
_READ_BYTES = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What is wrong with one file of an artifact; `what` completes a sentence that begins with `file`."""

    file: str
    what: str

    def __str__(self) -> str:
        return f"{self.file} {self.what}"


class ChunkHasher:
    """Digests of consecutive chunks of a stream of bytes."""

    def __init__(self) -> None:
        self._digests: list[str] = []
        self._current = hashlib.sha256()
        self._filled = 0

    def update(self, data: memoryview | bytes) -> None:
        """Appends `data`, a buffer of bytes, to the stream."""
        view = memoryview(data).cast("B")
        while len(view):
            part = view[: CHUNK_BYTES - self._filled]
            self._current.update(part)
            self._filled += len(part)
            view = view[len(part) :]
            if self._filled == CHUNK_BYTES:
                self._close_chunk()

    def finish(self) -> tuple[str, ...]:
        """The digests; an empty stream has none."""
        if self._filled:
            self._close_chunk()
        return tuple(self._digests)

    def _close_chunk(self) -> None:
        self._digests.append(self._current.hexdigest())
        self._current = hashlib.sha256()
        self._filled = 0


def sha256_of(path: Path) -> str:
    """The SHA-256 of a whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Chunk(NamedTuple):
    entry: FileEntry
    number: int


def check_presence(root: Path, entries: Iterable[FileEntry]) -> list[Problem]:
    """Files that are missing, or have another size than `entries` say. Reads no content."""
    problems: list[Problem] = []
    for entry in entries:
        path = root / entry.path
        if not path.is_file():
            problems.append(Problem(file=entry.path, what="is missing"))
        elif (size := path.stat().st_size) != entry.size_bytes:
            problems.append(Problem(file=entry.path, what=f"has {size} bytes instead of {entry.size_bytes}"))
        elif len(entry.chunks) != -(-entry.size_bytes // CHUNK_BYTES):
            problems.append(Problem(file=entry.path, what="does not have a checksum for each of its chunks"))
    return problems


def check_contents(root: Path, entries: Iterable[FileEntry], num_threads: int = 0) -> list[Problem]:
    """Chunks of files under `root` that do not match their digests, in order of `entries`.

    Chunks are read and hashed by `num_threads` threads (0: one a core), each holding one MiB.
    """
    chunks = [_Chunk(entry, number) for entry in entries for number in range(len(entry.chunks))]
    with ThreadPoolExecutor(num_threads or os.cpu_count() or 1, "llmc-checksum") as pool:
        found = pool.map(partial(_check_chunk, root), chunks)
        return [problem for problem in found if problem is not None]


def _check_chunk(root: Path, chunk: _Chunk) -> Problem | None:
    entry, number = chunk
    start = number * CHUNK_BYTES
    stop = min(start + CHUNK_BYTES, entry.size_bytes)
    digest = hashlib.sha256()
    try:
        with (root / entry.path).open("rb", buffering=0) as file:
            file.seek(start)
            left = stop - start
            buffer = memoryview(bytearray(min(left, _READ_BYTES)))
            while left and (count := file.readinto(buffer[:left])):
                digest.update(buffer[:count])
                left -= count
    except OSError as error:
        return Problem(file=entry.path, what=f"cannot be read: {error.strerror}")
    if digest.hexdigest() == entry.chunks[number]:
        return None
    return Problem(
        file=entry.path,
        what=f"is damaged in chunk {number} (bytes {start} to {stop - 1}): it does not match its checksum",
    )
