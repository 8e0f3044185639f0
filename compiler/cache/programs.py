"""Programs in the compile cache: graph, facts, plans and history as one document, constants beside it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from torch import Tensor

from ...ir.document import decode_program, encode_program
from ...ir.program import Program
from ...ir.weights import Expr, Reader, WeightStore
from ...spec.cache import CacheLayout
from ...spec.errors import ArtifactError
from ...spec.history import PassRecord
from ...spec.model import ModelSpec
from ...spec.plans import CapturePlan, MemoryPlan
from .codec import ExpressionWriter, read_expressions
from .store import CacheStore
from .tensors import keep_tensor, load_tensors

_CONSTANT = "constant"
_RESULTS = "solved"
_FILE = "program.json"
_RESULT_FILE = "weights.safetensors"


class _Stored(msgspec.Struct):
    document: str
    origins: dict[str, str]
    table: list[Any]
    weights: dict[str, int]
    ties: dict[str, str]
    spec: ModelSpec
    cache: CacheLayout | None
    memory: MemoryPlan | None
    capture: CapturePlan | None
    history: tuple[PassRecord, ...]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptProgram:
    """A program as it was kept, and the seconds that were given with it."""

    program: Program
    seconds: float


class ProgramShelf:
    """Keeps programs and gives them back as they were, their lazy weights lazy still."""

    def __init__(self, store: CacheStore, file_digest: Callable[[Path], str]) -> None:
        self._store = store
        self._file_digest = file_digest

    def keep(
        self,
        kind: str,
        key: str,
        label: str,
        program: Program,
        seconds: float,
        files: Mapping[str, str] | None = None,
    ) -> None:
        """Keep `program`, which took `seconds` to make, and the files its weights read but for `files`
        (digest -> path), which whoever asks for it has. Raises Uncachable for a weight that cannot be written
        as data."""
        writer = ExpressionWriter(self._file_digest)
        weights = {name: writer.add(program.weights[name]) for name in program.weights}
        for digest, tensor in writer.tensors.items():
            if not keep_tensor(self._store, _CONSTANT, digest, f"constant of {label}", tensor):
                return
        for digest, path in writer.files.items():
            if digest not in (files or {}) and not self._keep_file(digest, path):
                return
        stored = _Stored(
            document=encode_program(program).decode(),
            origins={n.name: n.meta["module"] for n in program.graph.nodes if "module" in n.meta},
            table=writer.table,
            weights=weights,
            ties=dict(program.weights.ties),
            spec=program.spec,
            cache=program.cache,
            memory=program.memory,
            capture=program.capture,
            history=program.history,
            seconds=seconds,
        )
        data = msgspec.json.encode(stored, order="deterministic")
        self._store.keep(kind, key, label, lambda folder: _write(folder, data), seconds=seconds)

    def find(self, kind: str, key: str, files: Mapping[str, str], reader: Reader) -> KeptProgram | None:
        """The program kept under `key`, its weights read through `reader` from `files` (digest -> path);
        None where there is none, or something it needs has gone. Its nodes' values are not inferred yet."""
        folder = self._store.find(kind, key, counted=False)
        if folder is None:
            return None
        try:
            stored = msgspec.json.decode((folder / _FILE).read_bytes(), type=_Stored)
            made = read_expressions(
                stored.table, lambda digest: files.get(digest) or self._file(digest), self._constant
            )
            document = decode_program(stored.document.encode())
        except (msgspec.MsgspecError, KeyError, ValueError, TypeError, ArtifactError):
            return None
        entries: dict[str, Expr] = {name: made[place] for name, place in stored.weights.items()}
        program = Program(
            graph=document.graph,
            inputs=document.inputs,
            weights=WeightStore(entries, stored.ties, reader),
            spec=stored.spec,
            facts=document.facts,
            cache=stored.cache,
            memory=stored.memory,
            capture=stored.capture,
            history=stored.history,
        )
        for node in program.graph.nodes:
            if node.name in stored.origins:
                node.meta["module"] = stored.origins[node.name]
        return KeptProgram(program=program, seconds=stored.seconds)

    def _keep_file(self, digest: str, path: Path) -> bool:
        if self._store.find(_RESULTS, digest, counted=False) is not None:
            return True
        label = f"weights that {path.parent.name} holds"
        return self._store.keep(_RESULTS, digest, label, lambda folder: _link(path, folder)) is not None

    def _file(self, digest: str) -> str:
        folder = self._store.find(_RESULTS, digest)
        if folder is None:
            raise KeyError(digest)
        return str(folder / _RESULT_FILE)

    def _constant(self, digest: str) -> Tensor:
        found = load_tensors(self._store, _CONSTANT, digest)
        if found is None:
            raise KeyError(digest)
        return found["value"]


def _link(path: Path, folder: Path) -> None:
    """The file under another name where the disk allows it, a copy elsewhere: it may be large."""
    try:
        os.link(path, folder / _RESULT_FILE)
    except OSError:
        shutil.copyfile(path, folder / _RESULT_FILE)


def _write(folder: Path, data: bytes) -> None:
    (folder / _FILE).write_bytes(data)
