"""A folder that appears whole or not at all: filled under a temporary name beside its final place, then
renamed. Knows nothing of what is in it."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from ..spec.errors import TargetError, UsageError


class StagingFolder:
    """A temporary sibling of `final`, locked while it is being filled.

    The lock goes with its process, so a folder left behind by one that was killed is recognised and
    removed by the next writer of the same artifact.
    """

    def __init__(self, final: Path, marker: str) -> None:
        self.final = final
        self._marker = marker
        self._prefix = f".{final.name}.partial-"
        final.parent.mkdir(parents=True, exist_ok=True)
        self._remove_abandoned()
        self.path = Path(tempfile.mkdtemp(prefix=self._prefix, dir=final.parent))
        self._lock = os.open(self.path, os.O_RDONLY)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.path.chmod(0o755)

    def publish(self, *, replace: bool) -> None:
        """Gives the folder its final name. What stood there goes only once the new one is in place.

        Raises UsageError when something stands there and `replace` is False.
        """
        sync_folders(self.path)
        if replace and self.final.exists():
            old = self.path.with_name(self.path.name + ".old")
            self.final.rename(old)
            try:
                self.path.rename(self.final)
            except BaseException:
                old.rename(self.final)
                raise
            shutil.rmtree(old)
        else:
            check_free_name(self.final, self._marker, force=False)
            self.path.rename(self.final)
        _sync(self.final.parent)
        os.close(self._lock)

    def discard(self) -> None:
        """Removes the folder and all in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)

    def _remove_abandoned(self) -> None:
        for path in self.final.parent.glob(f"{self._prefix}*"):
            folder = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # another process is writing it now
            finally:
                os.close(folder)
            shutil.rmtree(path, ignore_errors=True)


def check_free_name(final: Path, marker: str, *, force: bool) -> None:
    """Raises UsageError when `final` exists; with `force`, only when it is not a folder that holds the
    file `marker`, so that nothing but an artifact is ever replaced."""
    if not final.exists() and not final.is_symlink():
        return
    if not force:
        raise UsageError(
            "artifact.exists",
            f"The output {str(final)!r} exists already.",
            "An artifact is not overwritten unless that is asked for.",
            "Choose another name with -o, or pass --force to replace it.",
        )
    if final.is_symlink() or not (final / marker).is_file():
        raise UsageError(
            "artifact.not_an_artifact",
            f"The output {str(final)!r} exists and is no artifact.",
            f"Only a folder that holds a {marker} is replaced.",
            "Choose another name with -o.",
        )


def check_disk_space(folder: Path, needed_bytes: int) -> None:
    """Raises TargetError with both numbers when the file system of `folder` has less free than needed."""
    free_bytes = free_disk_bytes(folder)
    if needed_bytes > free_bytes:
        raise TargetError(
            "target.disk_space",
            f"The artifact needs {needed_bytes} bytes of disk.",
            f"Only {free_bytes} bytes are free at {str(folder)!r}.",
            "Free some space, or write to another place with -o.",
        )


def free_disk_bytes(folder: Path) -> int:
    """Bytes free on the file system where `folder` is or would be made."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def sync_folders(root: Path) -> None:
    """Makes the names in `root` and its subfolders durable (the files are synced as they are closed)."""
    for folder, _, _ in os.walk(root):
        _sync(Path(folder))


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
