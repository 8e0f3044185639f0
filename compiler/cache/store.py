"""The compile cache on disk: entries by kind and key, each a folder that appears whole or not at all.

Safe under concurrent processes and kills. Knows neither what keys mean nor what entries hold.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock
from typing import IO, Any

from ...artifact.checksums import sha256_of
from .config import CacheConfig

_FORMAT = "v1"
_ENTRY = "entry.json"
# https://bford.info/cachedir/: backup tools leave folders with this file out.
_TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# Results that llmc can compute again.\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheEntry:
    """One entry: what it is, in words; its bytes, and when it was last used (seconds since the epoch)."""

    kind: str
    key: str
    label: str
    size_bytes: int
    used_s: float


@dataclass(slots=True)
class Usage:
    """What one process had of one kind of entries, each counted once; `saved_s` is what those found took
    when they were made."""

    hits: int = 0
    misses: int = 0
    written_bytes: int = 0
    saved_s: float = 0.0


@dataclass(slots=True)
class _Session:
    """One process's use of the store: a locked file that lists what may not be removed meanwhile."""

    path: Path
    file: IO[str]
    temporary: Path
    held: set[str] = field(default_factory=set[str])


class CacheStore:
    """A folder of entries. Thread-safe; each process opens its own. With a limit of 0 it finds and keeps
    nothing.

    A disk that is full or cannot be written turns keeping off and is told in `problem`: a cache is never
    why a compile fails. What `find` returned stays until `close`, even where another process clears.
    """

    def __init__(self, config: CacheConfig, clock: Callable[[], float] = time.time) -> None:
        self.config = config
        self.problem = ""
        self.usage: dict[str, Usage] = {}
        self._root = config.folder / _FORMAT
        self._clock = clock
        self._session: _Session | None = None
        self._thread_lock = RLock()

    def find(self, kind: str, key: str, *, counted: bool = True) -> Path | None:
        """The folder of an entry, whole and checked, or None; `usage` is told where it is to be `counted`. A
        damaged entry is removed."""
        if self.config.max_bytes == 0:
            return None
        with self._thread_lock:
            folder = self._root / kind / key
            again = self._session is not None and f"{kind}/{key}" in self._session.held
            entry = self._held(kind, key, folder)
            if counted and not (again and entry is not None):
                self.count(kind, None if entry is None else float(entry.get("seconds", 0.0)))
            return None if entry is None else folder

    def has(self, kind: str, key: str) -> bool:
        """Whether there is an entry, sound or not; counts neither as found nor as missed."""
        return self.config.max_bytes > 0 and (self._root / kind / key / _ENTRY).is_file()

    def count(self, kind: str, saved_s: float | None) -> None:
        """Tell `usage` of a result found that took `saved_s` seconds once, or of one missed (None)."""
        usage = self.usage.setdefault(kind, Usage())
        if saved_s is None:
            usage.misses += 1
        else:
            usage.hits += 1
            usage.saved_s += saved_s

    def keep(
        self, kind: str, key: str, label: str, fill: Callable[[Path], None], *, seconds: float = 0.0
    ) -> Path | None:
        """Make an entry of what `fill` writes into the folder it is given, which took `seconds` to compute;
        None where it could not be written."""
        with self._thread_lock:
            if self.problem or self.config.max_bytes == 0:
                return None
            folder = self._root / kind / key
            try:
                self._publish(kind, key, folder, label, fill, seconds)
            except OSError as error:
                self.problem = f"nothing more is kept in {self.config.folder}: {error.strerror or error}"
                return None
            return folder

    def entries(self) -> list[CacheEntry]:
        """Every entry, the one used longest ago first."""
        found: list[CacheEntry] = []
        for path in self._root.glob(f"*/*/{_ENTRY}"):
            with contextlib.suppress(OSError, ValueError, KeyError):  # removed, or damaged, meanwhile
                data = json.loads(path.read_text(encoding="utf-8"))
                size = sum(size for size, _ in data["files"].values()) + path.stat().st_size
                used = path.parent.stat().st_mtime
                key = path.parent.name
                found.append(
                    CacheEntry(
                        kind=path.parent.parent.name,
                        key=key,
                        label=data["label"],
                        size_bytes=size,
                        used_s=used,
                    )
                )
        return sorted(found, key=lambda entry: (entry.used_s, entry.kind, entry.key))

    def trim(self, max_bytes: int | None = None) -> list[CacheEntry]:
        """Remove what was used longest ago until at most `max_bytes` (the configured limit) are left, and
        what killed processes left behind. What a living process uses stays. Returns what went."""
        limit = self.config.max_bytes if max_bytes is None else max_bytes
        removed: list[CacheEntry] = []
        if not self._root.is_dir():
            return removed
        with self._locked():
            held = self._held_by_others()
            entries = self.entries()
            total = sum(entry.size_bytes for entry in entries)
            for entry in entries:
                if total <= limit:
                    break
                if f"{entry.kind}/{entry.key}" not in held:
                    self._discard(self._root / entry.kind / entry.key)
                    total -= entry.size_bytes
                    removed.append(entry)
        self._empty_trash()
        return removed

    def close(self) -> None:
        """Give up what was found, and trim. Idempotent."""
        with self._thread_lock:
            session, self._session = self._session, None
            if session is not None:
                with contextlib.suppress(OSError):
                    shutil.rmtree(session.temporary, ignore_errors=True)
                    session.path.unlink(missing_ok=True)
                session.file.close()
                with contextlib.suppress(OSError):
                    self.trim()

    def _held(self, kind: str, key: str, folder: Path) -> dict[str, Any] | None:
        """The record of an entry that from now on is this session's, too; None when there is no sound one."""
        if not (folder / _ENTRY).is_file():
            return None
        try:
            session = self._open_session()
            with self._locked():
                record = json.loads((folder / _ENTRY).read_text(encoding="utf-8"))
                if f"{kind}/{key}" in session.held:
                    return record
                session.held.add(f"{kind}/{key}")
                session.file.write(f"{kind}/{key}\n")
                session.file.flush()
                os.utime(folder, (self._clock(), self._clock()))
            if all(_is_sound(folder / name, *found) for name, found in record["files"].items()):
                return record
            with self._locked():
                self._discard(folder)
            return None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _publish(
        self,
        kind: str,
        key: str,
        folder: Path,
        label: str,
        fill: Callable[[Path], None],
        seconds: float,
    ) -> None:
        session = self._open_session()
        making = Path(tempfile.mkdtemp(dir=session.temporary))
        try:
            fill(making)
            files = {
                path.relative_to(making).as_posix(): (path.stat().st_size, sha256_of(path))
                for path in sorted(making.rglob("*"))
                if path.is_file()
            }
            record = {"label": label, "seconds": round(seconds, 3), "files": files}
            (making / _ENTRY).write_text(json.dumps(record), encoding="utf-8")
            folder.parent.mkdir(parents=True, exist_ok=True)
            with self._locked():
                if (folder / _ENTRY).is_file():
                    return  # another process was as fast
                making.rename(folder)
                session.held.add(f"{kind}/{key}")
                session.file.write(f"{kind}/{key}\n")
                session.file.flush()
            usage = self.usage.setdefault(kind, Usage())
            usage.written_bytes += sum(size for size, _ in files.values())
        finally:
            shutil.rmtree(making, ignore_errors=True)

    def _open_session(self) -> _Session:
        if self._session is None:
            self._root.mkdir(parents=True, exist_ok=True)
            (self.config.folder / "CACHEDIR.TAG").write_text(_TAG, encoding="utf-8")
            sessions, temporary = self._root / ".sessions", self._root / ".tmp"
            sessions.mkdir(exist_ok=True)
            temporary.mkdir(exist_ok=True)
            with self._locked():
                descriptor, name = tempfile.mkstemp(dir=sessions, text=True)
                file = os.fdopen(descriptor, "w", encoding="utf-8")
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                own = temporary / Path(name).name
                own.mkdir()
            self._session = _Session(path=Path(name), file=file, temporary=own)
        return self._session

    @contextmanager
    def _locked(self) -> Generator[None]:
        """The store to this process alone, for as long as it takes to rename."""
        with (self._root / ".lock").open("a", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _held_by_others(self) -> set[str]:
        """What living processes use; what dead ones left is removed."""
        held: set[str] = set(self._session.held) if self._session is not None else set()
        for path in (self._root / ".sessions").glob("*"):
            with path.open("r+", encoding="utf-8") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    held.update(file.read().split())
                    continue
                path.unlink(missing_ok=True)
            shutil.rmtree(self._root / ".tmp" / path.name, ignore_errors=True)
        return held

    def _discard(self, folder: Path) -> None:
        """Take an entry out at once; its bytes go later."""
        trash = self._root / ".trash"
        trash.mkdir(exist_ok=True)
        folder.rename(Path(tempfile.mkdtemp(dir=trash)) / folder.name)

    def _empty_trash(self) -> None:
        shutil.rmtree(self._root / ".trash", ignore_errors=True)


def total_bytes(entries: Iterable[CacheEntry]) -> int:
    """Bytes of `entries` together."""
    return sum(entry.size_bytes for entry in entries)


def _is_sound(path: Path, size: int, digest: str) -> bool:
    return path.is_file() and path.stat().st_size == size and sha256_of(path) == digest
