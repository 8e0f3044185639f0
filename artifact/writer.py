"""Writes an artifact: files into a staging folder, each hashed as it is written, the manifest last.
Knows no target and no tensor library; what the files hold is the caller's business."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from numpy.typing import NDArray

from ..spec.errors import InternalError, TargetError
from .checksums import ChunkHasher
from .folder import StagingFolder, check_disk_space, check_free_name
from .reader import Artifact
from .schema import MANIFEST, FileEntry, FileKind, Manifest, encode_manifest, is_inside
from .tensors import TensorSpec, write_tensors

_COPY_BYTES = 2**20


class _HashedFile:
    """A file being written, and the digests of what went in."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hasher = ChunkHasher()
        self.size_bytes = 0

    def write(self, data: bytes | memoryview) -> int:
        self._hasher.update(data)
        self._file.write(data)
        self.size_bytes += len(data)
        return len(data)

    def entry(self, path: str, kind: FileKind) -> FileEntry:
        return FileEntry(path=path, kind=kind, size_bytes=self.size_bytes, chunks=self._hasher.finish())


class ArtifactWriter:
    """Context manager around one artifact in the making.

    Entering raises UsageError when `path` exists (unless `force`, and it is an artifact) and TargetError
    when the disk has less than `needed_bytes` free. Leaving without `commit`, for whatever reason,
    removes everything written. The artifact appears at `path` only in `commit`, whole.
    """

    def __init__(self, path: Path, *, force: bool = False, needed_bytes: int = 0) -> None:
        self.path = Path(os.path.abspath(path))
        self._force = force
        self._needed_bytes = needed_bytes
        self._staging: StagingFolder | None = None
        self._entries: dict[str, FileEntry] = {}

    def __enter__(self) -> ArtifactWriter:
        check_free_name(self.path, MANIFEST, force=self._force)
        check_disk_space(self.path.parent, self._needed_bytes)
        self._staging = StagingFolder(self.path, MANIFEST)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._staging is not None:
            self._staging.discard()
            self._staging = None

    @property
    def folder(self) -> Path:
        """Where the files lie until `commit`."""
        return self._open_staging().path

    @property
    def entries(self) -> tuple[FileEntry, ...]:
        """The files written so far, in order of path."""
        return tuple(self._entries[path] for path in sorted(self._entries))

    def write_bytes(self, path: str, kind: FileKind, data: bytes) -> None:
        """Writes one small file."""
        with self._create(path, kind) as file:
            file.write(data)

    def copy_file(self, path: str, kind: FileKind, source: Path) -> None:
        """Copies the bytes of `source`, unchanged."""
        with source.open("rb") as original, self._create(path, kind) as file:
            while data := original.read(_COPY_BYTES):
                file.write(data)

    def write_tensors(
        self, path: str, kind: FileKind, specs: Sequence[TensorSpec], fetch: Callable[[str], NDArray[Any]]
    ) -> None:
        """Writes one safetensors file, a tensor at a time (see `tensors.write_tensors`)."""
        with self._create(path, kind) as file:
            write_tensors(file, specs, fetch)

    def preview(self, manifest: Manifest) -> Artifact:
        """What has been written so far, as an artifact that executors can open before `commit`."""
        return Artifact(path=self.folder, manifest=replace(manifest, files=self.entries))

    def commit(self, manifest: Manifest) -> Artifact:
        """Writes `manifest` with the list of files put in, makes all of it durable and gives the artifact
        its name. Nothing can be written afterwards."""
        staging = self._open_staging()
        whole = replace(manifest, files=self.entries)
        with _explain_full_disk(self.path), _synced(staging.path / MANIFEST) as file:
            file.write(encode_manifest(whole))
        staging.publish(replace=self._force)
        self._staging = None
        return Artifact(path=self.path, manifest=whole)

    @contextmanager
    def _create(self, path: str, kind: FileKind) -> Generator[_HashedFile, None, None]:
        folder = self._open_staging().path
        if not is_inside(path) or path in self._entries or path == MANIFEST:
            raise InternalError(
                "artifact.file_name",
                f"The file {path!r} cannot be written to the artifact.",
                "Its name was used already, is reserved, or leads outside of the artifact.",
                "Report this with the command that led to it.",
            )
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with _explain_full_disk(self.path), _synced(target) as file:
            hashed = _HashedFile(file)
            yield hashed
        self._entries[path] = hashed.entry(path, kind)

    def _open_staging(self) -> StagingFolder:
        if self._staging is None:
            raise InternalError(
                "artifact.writer_closed",
                "The artifact writer is not open.",
                "It was committed, left, or never entered.",
                "Write between entering the writer and committing.",
            )
        return self._staging


@contextmanager
def _synced(path: Path) -> Generator[BinaryIO, None, None]:
    """A new file whose bytes are on the disk when the block ends."""
    with path.open("xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _explain_full_disk(path: Path) -> Generator[None, None, None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise TargetError(
            "target.disk_full",
            f"The disk became full while {path.name!r} was written.",
            f"No space is left at {str(path.parent)!r}; what was written has been removed.",
            "Free some space, or write to another place with -o.",
        ) from error
