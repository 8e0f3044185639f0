"""Weights as lazy expressions over safetensors slices, evaluated one tensor at a time.

Knows where bytes lie and how they are rearranged; knows no graph and holds no model in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import safe_open
from torch import Tensor

from ..spec.errors import InternalError, ModelError
from ..spec.quant import QuantScheme
from .bands import map_bands
from .finite import all_finite, is_narrower, refused_values
from .quantized import QTensor, part_dtype, part_shape, quantize_rtn

_READ_BYTES = 256 << 20
_KEPT_BYTES = 1 << 30


class TensorCache(Protocol):
    """Remembers tensors that are expensive to compute, from one compile to the next."""

    def recall(
        self, inputs: tuple[object, ...], label: str, compute: Callable[[], Mapping[str, Tensor]]
    ) -> Mapping[str, Tensor]:
        """The tensors that `compute` makes of `inputs` (expressions, tensors, options: all it depends on but
        code), computed or as they were; `label` says in words what they are."""
        ...


class Reader:
    """Open safetensors files, mapped on first use, and what was computed before from what they hold.

    What was read through a mapping stays resident with it, so all are given up after `_READ_BYTES`: reading
    a checkpoint from end to end takes no more memory than that and the tensors still in use.
    """

    def __init__(self, cache: TensorCache | None = None) -> None:
        self._cache = cache
        self._files: dict[str, safe_open] = {}
        self._num_bytes = 0
        self._sound: set[tuple[str, str]] = set()
        self._quantized: tuple[Expr, QuantScheme, QTensor] | None = None

    def tensor(self, path: str, key: str) -> Tensor:
        """The stored tensor `key` of file `path`. Raises ModelError naming it when it holds NaN or infinity,
        for which it is looked through the first time."""
        if self._num_bytes > _READ_BYTES:
            self._files.clear()
            self._num_bytes = 0
        if path not in self._files:
            self._files[path] = safe_open(path, framework="pt")
        tensor = self._files[path].get_tensor(key)
        self._num_bytes += tensor.nbytes
        if (path, key) not in self._sound:
            _check_stored(tensor, path, key)
            self._sound.add((path, key))
        return tensor

    def quantized(self, of: Expr, scheme: QuantScheme) -> QTensor:
        """`of` rounded to nearest. The last result is kept, since its parts are asked for one by one."""
        last = self._quantized
        if last is None or last[0] is not of or last[1] != scheme:
            self._quantized = None
            self._quantized = last = (of, scheme, self._rounded(of, scheme))
        return last[2]

    def recall(
        self, inputs: tuple[object, ...], label: str, compute: Callable[[], Mapping[str, Tensor]]
    ) -> Mapping[str, Tensor]:
        """`TensorCache.recall` of this reader's cache; computed where it has none."""
        return compute() if self._cache is None else self._cache.recall(inputs, label, compute)

    def _rounded(self, of: Expr, scheme: QuantScheme) -> QTensor:
        def compute() -> dict[str, Tensor]:
            rounded = quantize_in_bands(finite_values(of, self), scheme)
            return {name: part for name, part in rounded._asdict().items() if part is not None}

        label = f"{scheme.name} codes of {'x'.join(map(str, of.shape))}"
        parts = self.recall(("rounded to nearest", of, scheme), label, compute)
        return QTensor(parts["codes"], parts["scales"], parts.get("zeros"))

    def close(self) -> None:
        """Unmap everything but what is still in use."""
        self._files.clear()
        self._num_bytes = 0
        self._quantized = None


class Expr(Protocol):
    """A tensor that is not there yet: its shape and dtype are known, its values on `evaluate`."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def evaluate(self, reader: Reader) -> Tensor:
        """The values, as a fresh or mapped tensor that the caller must not change."""
        ...


@dataclass(frozen=True, slots=True)
class SameForm:
    """The part of an expression that changes values, and neither their shape nor their dtype."""

    of: Expr

    @property
    def shape(self) -> tuple[int, ...]:
        """As `of`."""
        return self.of.shape

    @property
    def dtype(self) -> torch.dtype:
        """As `of`."""
        return self.of.dtype


@dataclass(frozen=True, slots=True)
class Source:
    """The tensor `key` of the safetensors file at `path`."""

    path: str
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def evaluate(self, reader: Reader) -> Tensor:
        """Read the tensor; ModelError when the file holds another shape than its header said."""
        tensor = reader.tensor(self.path, self.key)
        if tuple(tensor.shape) != self.shape:
            raise ModelError(
                "model.tensor_shape",
                f"Tensor {self.key!r} in {Path(self.path).name} has shape {list(tensor.shape)}.",
                f"The model needs {list(self.shape)}.",
                "Check that the weights and config.json belong together.",
            )
        return tensor


@dataclass(frozen=True, slots=True)
class Unbound:
    """A parameter known by shape alone: a program traced from a config, before weights are bound."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def evaluate(self, reader: Reader) -> Tensor:
        """Never possible: raises InternalError."""
        raise InternalError(
            "ir.unbound_weight",
            f"Weight {self.name!r} has no values.",
            "The program was traced from a config and no checkpoint was bound to it.",
            "Bind a checkpoint before evaluating weights.",
        )


@dataclass(frozen=True, slots=True, eq=False)
class Constant:
    """A tensor held in memory: buffers, small folded results, random test weights."""

    value: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the value."""
        return tuple(self.value.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the value."""
        return self.value.dtype

    def evaluate(self, reader: Reader) -> Tensor:
        """The value itself."""
        return self.value


@dataclass(frozen=True, slots=True)
class Slice:
    """`of` narrowed to `start <= index < stop` along `dim`."""

    of: Expr
    dim: int
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape with the narrowed dimension."""
        shape = list(self.of.shape)
        shape[self.dim] = self.stop - self.start
        return tuple(shape)

    @property
    def dtype(self) -> torch.dtype:
        """As `of`."""
        return self.of.dtype

    def evaluate(self, reader: Reader) -> Tensor:
        """A view of `of`."""
        return self.of.evaluate(reader).narrow(self.dim, self.start, self.stop - self.start)


@dataclass(frozen=True, slots=True)
class Concat:
    """`parts` joined along `dim`."""

    parts: tuple[Expr, ...]
    dim: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape with the joined dimension."""
        shape = list(self.parts[0].shape)
        shape[self.dim] = sum(part.shape[self.dim] for part in self.parts)
        return tuple(shape)

    @property
    def dtype(self) -> torch.dtype:
        """As the first part."""
        return self.parts[0].dtype

    def evaluate(self, reader: Reader) -> Tensor:
        """Fill one result part by part, so that no two parts are in memory at once."""
        out = torch.empty(self.shape, dtype=self.dtype)
        start = 0
        for part in self.parts:
            stop = start + part.shape[self.dim]
            out.narrow(self.dim, start, stop - start).copy_(part.evaluate(reader))
            start = stop
        return out


@dataclass(frozen=True, slots=True)
class Stack:
    """`parts` of one shape along a new first dimension."""

    parts: tuple[Expr, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape with the new first dimension."""
        return (len(self.parts), *self.parts[0].shape)

    @property
    def dtype(self) -> torch.dtype:
        """As the first part."""
        return self.parts[0].dtype

    def evaluate(self, reader: Reader) -> Tensor:
        """Fill one result part by part."""
        out = torch.empty(self.shape, dtype=self.dtype)
        for index, part in enumerate(self.parts):
            out[index].copy_(part.evaluate(reader))
        return out


@dataclass(frozen=True, slots=True)
class Permute:
    """`of` with its dimensions in another order (a transpose when there are two)."""

    of: Expr
    dims: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the new order."""
        return tuple(self.of.shape[dim] for dim in self.dims)

    @property
    def dtype(self) -> torch.dtype:
        """As `of`."""
        return self.of.dtype

    def evaluate(self, reader: Reader) -> Tensor:
        """A contiguous copy in the new order."""
        return self.of.evaluate(reader).permute(self.dims).contiguous()


@dataclass(frozen=True, slots=True)
class Reshape:
    """`of` in another shape of as many elements."""

    of: Expr
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """As `of`."""
        return self.of.dtype

    def evaluate(self, reader: Reader) -> Tensor:
        """A view, or a copy where strides ask for one."""
        return self.of.evaluate(reader).reshape(self.shape)


@dataclass(frozen=True, slots=True)
class Cast:
    """`of` rounded to `dtype`."""

    of: Expr
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """As `of`."""
        return self.of.shape

    def evaluate(self, reader: Reader) -> Tensor:
        """The rounded values. Raises ModelError when one of them is too large for `dtype`."""
        value = self.of.evaluate(reader)
        rounded = value.to(self.dtype)
        if is_narrower(self.dtype, value.dtype) and not all_finite(rounded) and all_finite(value):
            raise _too_large(self)
        return rounded


@dataclass(frozen=True, slots=True)
class Quantized:
    """One part (`codes`, `scales` or `zeros`) of `of[N, K]` or `[E, N, K]` rounded to nearest."""

    of: Expr
    scheme: QuantScheme
    part: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the portable packing."""
        return part_shape(self.of.shape, self.scheme, self.part)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the part."""
        return part_dtype(self.scheme, self.part)

    @property
    def num_parameters(self) -> int:
        """Weights that the part stands for: all of them by their codes, none by scales and zero points."""
        return math.prod(self.of.shape) if self.part == "codes" else 0

    def evaluate(self, reader: Reader) -> Tensor:
        """The part; its siblings, usually asked for next, are kept by `reader` until then."""
        whole = reader.quantized(self.of, self.scheme)
        part: Tensor = getattr(whole, self.part)
        return part.reshape(self.shape)


@runtime_checkable
class Coded(Protocol):
    """An expression that stands for another number of weights than it has elements."""

    @property
    def num_parameters(self) -> int: ...


def quantize_in_bands(weight: Tensor, scheme: QuantScheme) -> QTensor:
    """`quantize_rtn` of `weight[..., N, K]`, band by band, so that no float32 copy of it is ever made.

    Leading dimensions of the result are flattened into rows.
    """
    matrices = (
        weight.flatten(0, -3) if weight.dim() > 2 and scheme.block_rows else weight.flatten(0, -2)[None]
    )

    def solve(matrix: Tensor) -> list[QTensor]:
        rows, width = matrix.shape
        return map_bands(lambda band: quantize_rtn(matrix[band], scheme), rows, width, scheme.block_rows)

    bands = [band for matrix in matrices for band in solve(matrix)]
    zeros = [band.zeros for band in bands if band.zeros is not None]
    return QTensor(
        torch.cat([band.codes for band in bands]),
        torch.cat([band.scales for band in bands]),
        torch.cat(zeros) if zeros else None,
    )


def leaves(expr: Any) -> Iterator[Any]:
    """The expressions without parts of their own that `expr` is made of, and plain settings on the way."""
    if not is_dataclass(expr) or isinstance(expr, (Source, Constant, QuantScheme, type)):
        yield expr
        return
    for entry in fields(expr):
        value: Any = getattr(expr, entry.name)
        for item in value if isinstance(value, tuple) else (value,):
            yield from leaves(item)


def finite_values(expr: Expr, reader: Reader, name: str = "") -> Tensor:
    """The values of `expr`, a weight called `name` where it has a name, that is to be rounded. Raises
    ModelError when NaN or infinity is among them: of what is stored by the name of the tensor."""
    value = expr.evaluate(reader)
    if not all_finite(value):
        raise refused_values(f"Weight {name or 'that is to be rounded'}", value)
    return value


def _check_stored(tensor: Tensor, path: str, key: str) -> None:
    if not all_finite(tensor):
        raise refused_values(f"Tensor {key!r} in {Path(path).name}", tensor)


def _too_large(cast: Cast) -> ModelError:
    names = [leaf.key for leaf in leaves(cast.of) if isinstance(leaf, Source)]
    narrow, wide = (str(dtype).removeprefix("torch.") for dtype in (cast.dtype, cast.of.dtype))
    return ModelError(
        "model.overflow",
        f"Values of {', '.join(names[:3]) or 'a weight'} do not fit {narrow}.",
        f"They are {wide} in the checkpoint, and {narrow} reaches to {torch.finfo(cast.dtype).max:g}.",
        "Choose a precision that reaches further with --dtype, bfloat16 or float32.",
    )


@dataclass(frozen=True, slots=True, eq=False)
class WeightStore:
    """The weights of a Program by name; immutable, one owner a name.

    Tied weights are one entry that several nodes read; `ties` lists the other names the source model
    used for it (alias -> owner).
    """

    entries: Mapping[str, Expr]
    ties: Mapping[str, str] = field(default_factory=dict[str, str])
    reader: Reader = field(default_factory=Reader)

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __getitem__(self, name: str) -> Expr:
        return self.entries[name]

    def evaluate(self, name: str) -> Tensor:
        """The values of `name`; nothing is kept."""
        return self.entries[name].evaluate(self.reader)

    def fetcher(self) -> Callable[[str], Tensor]:
        """`evaluate` for many calls: results are kept, where all of them together take little memory."""
        if self.total_bytes > _KEPT_BYTES:
            return self.evaluate
        kept: dict[str, Tensor] = {}

        def fetch(name: str) -> Tensor:
            if name not in kept:
                kept[name] = self.evaluate(name)
            return kept[name]

        return fetch

    def with_entries(self, added: Mapping[str, Expr]) -> WeightStore:
        """This store with `added` put in or replaced."""
        return WeightStore({**self.entries, **added}, self.ties, self.reader)

    def restricted_to(self, used: Iterable[str]) -> WeightStore:
        """This store with only the entries named in `used`."""
        keep = set(used)
        entries = {name: expr for name, expr in self.entries.items() if name in keep}
        ties = {alias: owner for alias, owner in self.ties.items() if owner in keep}
        return WeightStore(entries, ties, self.reader)

    def num_bytes(self, name: str) -> int:
        """Bytes of one entry as stored."""
        count = 1
        for size in self.entries[name].shape:
            count *= size
        return count * self.entries[name].dtype.itemsize

    @property
    def total_bytes(self) -> int:
        """Bytes of all entries as stored."""
        return sum(self.num_bytes(name) for name in self.entries)
