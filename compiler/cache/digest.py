"""Digests of values: what a result was computed from, as one hexadecimal number.

Knows how plain data, tensors and lazy weights are told apart by content; chooses no key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...ir.weights import Source


class Uncachable(Exception):
    """A value has no content that could be told from another's."""


class Digester:
    """Digests by content. `file_digest` gives that of a weight file, so that no path enters;
    `code_digest` that of a module's code, by its name, since what a class does is in its methods.

    Plain values, tuples, lists, sets, mappings, dtypes, tensors and dataclasses of these have a digest; so
    has any object with a method `cache_key() -> str`. Anything else is Uncachable. Expressions are
    remembered, so that what many share is digested once.
    """

    def __init__(self, file_digest: Callable[[Path], str], code_digest: Callable[[str], str]) -> None:
        self._file_digest = file_digest
        self._code_digest = code_digest
        self._known: dict[int, tuple[Any, str]] = {}

    def of(self, *values: Any) -> str:
        """The digest of `values`, in order."""
        digest = hashlib.sha256()
        for value in values:
            part = self._text(value).encode()
            digest.update(f"{len(part)}:".encode())
            digest.update(part)
        return digest.hexdigest()

    def _text(self, value: Any) -> str:
        match value:
            case None | bool() | int() | float() | str():
                return f"{type(value).__name__}={value!r}"
            case bytes():
                return f"bytes={hashlib.sha256(value).hexdigest()}"
            case Enum():
                return f"enum={type(value).__qualname__}.{value.name}"
            case torch.dtype():
                return str(value)
            case Tensor():
                return self._remembered(value, tensor_digest)
            case tuple() | list():
                return f"{type(value).__name__}({','.join(map(self._text, value))})"
            case frozenset() | set():
                return f"set({','.join(sorted(map(self._text, value)))})"
            case Mapping():
                pairs = [f"{self._text(key)}:{self._text(item)}" for key, item in value.items()]
                return f"map({','.join(sorted(pairs))})"
            case Source():
                return self._remembered(value, self._of_source)
            case _:
                return self._of_object(value)

    def _of_object(self, value: Any) -> str:
        own: Any = getattr(value, "cache_key", None)
        if callable(own):
            return f"{self._kind(value)}[{own()}]"
        if is_dataclass(value) and not isinstance(value, type):
            return self._remembered(value, self._of_fields)
        raise Uncachable(f"a {type(value).__name__} has no content to tell it by")

    def _of_fields(self, value: Any) -> str:
        parts = [f"{entry.name}={self._text(getattr(value, entry.name))}" for entry in fields(value)]
        return hashlib.sha256(f"{self._kind(value)}({';'.join(parts)})".encode()).hexdigest()

    def _kind(self, value: Any) -> str:
        try:
            code = self._code_digest(type(value).__module__)
        except (ValueError, OSError) as error:
            raise Uncachable(f"the code of a {type(value).__name__} cannot be read: {error}") from error
        return f"{type(value).__module__}.{type(value).__qualname__}@{code}"

    def _of_source(self, source: Source) -> str:
        return f"source={self._file_digest(Path(source.path))}/{source.key}"

    def _remembered(self, value: Any, compute: Callable[[Any], str]) -> str:
        known = self._known.get(id(value))
        if known is None:
            known = (value, compute(value))  # the value is kept, so that its id stays its own
            self._known[id(value)] = known
        return known[1]


def tensor_digest(tensor: Tensor) -> str:
    """The digest of a tensor's dtype, shape and bytes."""
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    digest = hashlib.sha256(f"{tensor.dtype}{list(tensor.shape)}".encode())
    digest.update(values.data)
    return f"tensor={digest.hexdigest()}"
