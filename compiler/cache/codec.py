"""Lazy weights as data: a table of expressions, shared ones once, files by digest, constants apart."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ...ir.weights import Expr, Source
from .digest import Uncachable, tensor_digest

_PLAIN = (bool, int, float, str)


class ExpressionWriter:
    """Collects expressions into `table`, and by digest their tensors into `tensors`, the files they read
    into `files`.

    A value that is neither plain, nor a tensor, nor a dataclass of such is Uncachable.
    """

    def __init__(self, file_digest: Callable[[Path], str]) -> None:
        self.table: list[Any] = []
        self.tensors: dict[str, Tensor] = {}
        self.files: dict[str, Path] = {}
        self._file_digest = file_digest
        self._places: dict[int, int] = {}
        self._kept: list[Any] = []

    def add(self, expr: Expr) -> int:
        """The place of `expr` in the table."""
        if id(expr) not in self._places:
            entry = self._entry(expr)
            self._places[id(expr)] = len(self.table)
            self._kept.append(expr)
            self.table.append(entry)
        return self._places[id(expr)]

    def _entry(self, value: Any) -> dict[str, Any]:
        names = [entry.name for entry in fields(value)]
        data: dict[str, Any] = {name: self._encode(getattr(value, name)) for name in names}
        if isinstance(value, Source):
            path = Path(value.path)
            digest = self._file_digest(path)
            self.files[digest] = path
            data["path"] = {"file": digest}
        return {"type": f"{type(value).__module__}:{type(value).__qualname__}", "fields": data}

    def _encode(self, value: Any) -> Any:
        if value is None or isinstance(value, _PLAIN):
            return value
        if isinstance(value, tuple):
            return {"tuple": [self._encode(item) for item in value]}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, Tensor):
            digest = tensor_digest(value).removeprefix("tensor=")
            self.tensors[digest] = value
            return {"tensor": digest}
        if is_dataclass(value) and not isinstance(value, type):
            is_expression = hasattr(value, "evaluate")
            return {"shared": self.add(cast(Expr, value))} if is_expression else self._entry(value)
        raise Uncachable(f"a weight's expression holds a {type(value).__name__}")


def read_expressions(
    table: list[Any], file: Callable[[str], str], tensor: Callable[[str], Tensor]
) -> list[Any]:
    """Inverse of `ExpressionWriter`: `file` gives a path by its digest, `tensor` a tensor.

    Raises KeyError for a file that is not there, and ValueError for a type that is no loaded dataclass.
    """
    made: list[Any] = []

    def decode(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if "type" in value:
            return _class_named(value["type"])(**{k: decode(v) for k, v in value["fields"].items()})
        ((kind, inner),) = value.items()
        match kind:
            case "tuple":
                return tuple(decode(item) for item in inner)
            case "dtype":
                return getattr(torch, inner)
            case "tensor":
                return tensor(inner)
            case "file":
                return file(inner)
            case "shared":
                return made[inner]
            case _:
                raise ValueError(f"a stored expression holds {kind!r}")

    for entry in table:
        made.append(decode(entry))
    return made


def stored_sources(exprs: Iterable[Any]) -> Iterator[Source]:
    """The stored tensors that `exprs` read, each expression looked into once."""
    seen: dict[int, Any] = {}
    left = list(exprs)
    while left:
        value = left.pop()
        if isinstance(value, tuple):
            left.extend(value)
        elif is_dataclass(value) and not isinstance(value, type) and id(value) not in seen:
            seen[id(value)] = value
            if isinstance(value, Source):
                yield value
            else:
                left.extend(getattr(value, entry.name) for entry in fields(value))


def _class_named(name: str) -> Any:
    """A dataclass of a module that is loaded already: nothing is imported for what a file says."""
    module, _, qualname = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        found = getattr(found, part, None)
    if not (isinstance(found, type) and is_dataclass(found)):
        raise ValueError(f"{name} is no loaded dataclass")
    return found
