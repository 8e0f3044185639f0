"""Tensors in the compile cache: results of expensive expressions, mapped when they are asked for again."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .store import CacheStore

_FILE = "tensors.safetensors"


def recall_tensors(
    store: CacheStore, kind: str, key: str, label: str, compute: Callable[[], Mapping[str, Tensor]]
) -> Mapping[str, Tensor]:
    """The named tensors of entry `key`, computed and kept where there is none."""
    found = load_tensors(store, kind, key)
    if found is not None:
        return found
    started = time.perf_counter()
    computed = compute()
    seconds = time.perf_counter() - started
    store.keep(kind, key, label, lambda folder: _save(folder, computed), seconds=seconds)
    return computed


def load_tensors(store: CacheStore, kind: str, key: str) -> dict[str, Tensor] | None:
    """The named tensors of entry `key`, mapped; None where there is no such entry."""
    folder = store.find(kind, key)
    if folder is None:
        return None
    with safe_open(folder / _FILE, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping


def keep_tensor(store: CacheStore, kind: str, key: str, label: str, tensor: Tensor) -> bool:
    """Keep one tensor under the name `value`; False where it could not be written."""
    if store.find(kind, key) is not None:
        return True
    return store.keep(kind, key, label, lambda folder: _save(folder, {"value": tensor})) is not None


def _save(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / _FILE)
