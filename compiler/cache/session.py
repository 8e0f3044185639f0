"""The compile cache as one compile uses it: keys by content, results by kind."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from torch import Tensor

from ...artifact.checksums import sha256_of
from ..result import Reuse
from .config import CacheConfig
from .digest import Digester, Uncachable
from .programs import ProgramShelf
from .sources import SourceDigests, environment
from .store import CacheStore
from .tensors import recall_tensors

_BYTES, _DATA = "result", "data"
# A file changed less than this many seconds ago may change again without its time showing it.
_SETTLED_S = 2.0


class KeptBytes(NamedTuple):
    """Bytes, and whether they were known."""

    data: bytes
    cached: bool


class CompileCache:
    """What compiles before this one found out, by what they found it out from.

    Implements `ir.weights.TensorCache`. Use it as a context manager, or `close` it: what was found is kept
    from being evicted until then. `notes` say what could not be kept, and why.
    """

    def __init__(self, config: CacheConfig, clock: Callable[[], float] = time.perf_counter) -> None:
        self.store = CacheStore(config)
        self.clock = clock
        self.notes: list[str] = []
        self._sources = SourceDigests()
        self._code: dict[str, str] = {}
        self._files: dict[Path, str] = {}
        self._environment = ""
        self.digester = Digester(self.file_digest, self.code_digest)
        self.programs = ProgramShelf(self.store, self.file_digest)

    @property
    def is_on(self) -> bool:
        """Whether anything is found or kept."""
        return self.store.config.max_bytes > 0

    def key(self, *values: object) -> str:
        """The key of a result that depends on `values`, the libraries and the processor. Raises
        Uncachable."""
        self._environment = self._environment or environment()
        return self.digester.of(self._environment, *values)

    def code_digest(self, module: str) -> str:
        """The digest of the code of a loaded module and all it imports."""
        if module not in self._code:
            self._code[module] = self._sources.of_module(module)
        return self._code[module]

    def files_digest(self, paths: Sequence[Path]) -> str:
        """The digest of source files and all they import."""
        return self._sources.of_files(*paths)

    def file_digest(self, path: Path) -> str:
        """The SHA-256 of a file, read only where its size, times or place say that it may have changed."""
        if path in self._files:
            return self._files[path]
        found = path.stat()
        identity = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        key = Digester(sha256_of, str).of("file", str(path.resolve()), *identity)
        settled = time.time() - max(found.st_mtime, found.st_ctime) > _SETTLED_S
        if settled:
            label = f"digest of {path.name}"
            data, _ = self.kept_bytes("digest", key, label, lambda: sha256_of(path).encode())
            self._files[path] = data.decode()
        else:
            self._files[path] = sha256_of(path)
        return self._files[path]

    def recall(
        self, inputs: tuple[object, ...], label: str, compute: Callable[[], Mapping[str, Tensor]]
    ) -> Mapping[str, Tensor]:
        """The tensors that `compute` makes of `inputs`, which must be all it depends on but code."""
        if not self.is_on:
            return compute()
        try:
            key = self.key("tensors", *inputs)
        except Uncachable as reason:
            self.note(f"{label}: {reason}")
            return compute()
        return recall_tensors(self.store, "weights", key, label, compute)

    def recall_bytes(self, inputs: tuple[object, ...], label: str, compute: Callable[[], bytes]) -> bytes:
        """The bytes that `compute` makes of `inputs`, which must be all they depend on."""
        if not self.is_on:
            return compute()
        return self.kept_bytes(_BYTES, Digester(sha256_of, str).of("bytes", *inputs), label, compute).data

    def kept_bytes(self, kind: str, key: str, label: str, compute: Callable[[], bytes]) -> KeptBytes:
        """The bytes kept under `key`, or those that `compute` makes, which are kept; needs the cache on."""
        folder = self.store.find(kind, key)
        if folder is not None:
            return KeptBytes((folder / _DATA).read_bytes(), True)
        started = self.clock()
        data = compute()
        seconds = self.clock() - started
        self.store.keep(kind, key, label, lambda making: _write(making / _DATA, data), seconds=seconds)
        return KeptBytes(data, False)

    def reuse(self) -> Reuse | None:
        """What was found so far; None where the cache is off."""
        if not self.is_on:
            return None
        usage = self.store.usage
        return Reuse(
            hits={kind: known.hits for kind, known in usage.items()},
            misses={kind: known.misses for kind, known in usage.items()},
            saved_s=sum(known.saved_s for known in usage.values()),
            notes=(*self.notes, *([self.store.problem] if self.store.problem else [])),
        )

    def note(self, reason: str) -> None:
        """Remember once why something was not kept."""
        if reason not in self.notes:
            self.notes.append(reason)

    def close(self) -> None:
        """Let go of what was found, and bring the cache down to its limit. Idempotent."""
        self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
