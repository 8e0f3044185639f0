"""What each node of a program launches for arguments of given shapes, as data: its operator says so once, on
tensors without memory. Launches nothing."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from ...kernels.cuda.launch import Launch, Specialisation
from ...kernels.cuda.operators import CudaOperators
from .cuda_table import SCRATCH

# Sources of a parameter or a value beside the tensors of a node's arguments, which are 0, 1, …, and those
# that it makes, which come behind them: none (a number, or a tensor without elements), and the zeros that
# products in parts count in. Below these are the results of a node that torch carries out.
NOTHING, ARRIVED, RESULTS = -1, -2, -3


class Layout(NamedTuple):
    """A tensor but for its memory; `offset` counts elements."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    offset: int = 0


# What a node gives: a tensor, several, or nothing.
Value = Layout | tuple[Layout | None, ...] | None


def layout_of(tensor: Tensor, *, is_own: bool = False) -> Layout:
    """Of a tensor; of one that `is_own` memory, as if that began with it."""
    offset = 0 if is_own else int(tensor.storage_offset())
    return Layout(tuple(tensor.shape), tensor.stride(), tensor.dtype, offset)


def tensors_of(value: Value) -> tuple[Layout | None, ...]:
    """The tensors of a value, in order."""
    return (value,) if value is None or isinstance(value, Layout) else value


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """A node, at its `place` in the program. Calls of one `kind` differ in weights and caches alone, whose
    layouts are the same. `arguments` are the places of its nodes, `varying` those of them that depend on the
    step; `constants` are the others, without memory."""

    place: int
    kind: int
    node: fx.Node
    arguments: tuple[int, ...]
    varying: tuple[int, ...]
    constants: Mapping[fx.Node, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Form:
    """What calls of a kind do for arguments of certain layouts.

    Forms with the same `skeleton` launch the same kernels on the same memory, in other numbers: `words` (of
    each parameter and scratch pointer, in order, its number's bits or how many bytes behind its source's
    beginning it points), the `grids` of launches and `sizes` (bytes of the tensors that are made).
    `sources` are those of the parameters, `outputs` those of the tensors of `value`. Where torch computes,
    nothing is launched.
    """

    skeleton: int
    specialisations: tuple[Specialisation, ...]
    sources: tuple[int, ...]
    words: tuple[int, ...]
    grids: tuple[tuple[int, int, int], ...]
    sizes: tuple[int, ...]
    value: Value
    outputs: tuple[int, ...]
    by_torch: bool


@dataclass(slots=True)
class _Seen:
    """What an operator did: tensors that it made, launches."""

    made: list[Tensor] = field(default_factory=list[Tensor])
    launches: list[Launch] = field(default_factory=list[Launch])


class Forms:
    """Finds forms, and remembers them. Nodes of graphs that it is asked about call `operators`."""

    def __init__(self, operators: CudaOperators) -> None:
        self._seen = _Seen()
        self._arrived = torch.empty_like(operators.arrived, device="meta")
        self.operators = replace(
            operators,
            launch=self._note_launch,
            empty=self._note_empty,
            arrived=self._arrived,
        )
        self._skeletons: dict[object, int] = {}
        self._kinds: dict[object, int] = {}
        self._numbers: dict[Value, int] = {}
        self._values: list[Value] = []
        self._known: dict[tuple[int, ...], Form] = {}

    def _note_launch(self, launch: Launch) -> None:
        """`kernels.cuda.launch.Launcher`."""
        self._seen.launches.append(launch)

    def _note_empty(self, like: Any, shape: tuple[int, ...], dtype: torch.dtype | None) -> Tensor:
        """`kernels.cuda.products.Empty`."""
        tensor = torch.empty(shape, dtype=dtype or like.dtype, device=like.device)
        self._seen.made.append(tensor)
        return tensor

    def number_kind(self, shape: object) -> int:
        """A number for the kind of whatever `shape` describes: equal ones have the same."""
        return self._kinds.setdefault(shape, len(self._kinds))

    def kind_of(self, node: fx.Node, constants: Mapping[fx.Node, Layout]) -> int:
        """The number of a node's kind."""
        names: dict[fx.Node, str] = {}

        def name(source: fx.Node) -> str:
            known = constants.get(source)
            return names.setdefault(source, f"{len(names)}: {known}")

        target: Any = node.target
        is_ours = isinstance(getattr(target, "__self__", None), CudaOperators)
        shown = (target.__name__ if is_ours else target, repr(fx.map_arg((node.args, node.kwargs), name)))
        return self.number_kind(shown)

    def number_of(self, value: Value) -> int:
        """A number for a value, by which a step's values are told apart."""
        number = self._numbers.setdefault(value, len(self._values))
        if number == len(self._values):
            self._values.append(value)
        return number

    def value_of(self, number: int) -> Value:
        """Inverse of `number_of`."""
        return self._values[number]

    @property
    def num_known(self) -> int:
        """Forms that are remembered."""
        return len(self._known)

    def forget(self) -> None:
        """Remember no forms and no numbers of values."""
        self._known.clear()
        self._numbers.clear()
        self._values.clear()

    def form_of(self, call: Call, numbers: Mapping[int, int]) -> Form:
        """The form of a call; `numbers` has those of its varying arguments by place."""
        key = (call.kind, *[numbers[place] for place in call.varying])
        form = self._known.get(key)
        if form is None:
            values = {place: self._values[numbers[place]] for place in call.varying}
            form = self._known[key] = self._form(call, values)
        return form

    def _form(self, call: Call, values: Mapping[int, Value]) -> Form:
        """Carry out a node on tensors without memory."""
        self._seen = seen = _Seen()
        arguments: dict[fx.Node, Any] = dict(call.constants)
        for node, place in zip(call.node.all_input_nodes, call.arguments, strict=True):
            if node in arguments:
                continue
            value = values[place]
            tensors = tuple(None if each is None else without_memory(each) for each in tensors_of(value))
            arguments[node] = (
                tensors if isinstance(value, tuple) and not isinstance(value, Layout) else tensors[0]
            )
        given = [each for node in call.node.all_input_nodes for each in _tensors(arguments[node])]
        target: Callable[..., Any] = call.node.target  # pyright: ignore[reportAssignmentType]
        named = call.node.kwargs and fx.map_arg(call.node.kwargs, arguments.__getitem__)
        with torch.no_grad():
            found = target(*fx.map_arg(call.node.args, arguments.__getitem__), **named)
        return self._described(seen, given, found)

    def _described(self, seen: _Seen, given: Sequence[Tensor | None], found: Any) -> Form:
        owners = {_memory(self._arrived): ARRIVED}
        tensors = [*given, *seen.made]
        owners |= {_memory(each): index for index, each in enumerate(tensors) if each is not None}
        results = _tensors(found)
        words: list[int] = []
        sources: list[int | None] = []
        for launch in seen.launches:
            for name, kind in launch.specialisation.parameters:
                source, word = _parameter(kind, launch.values[name], owners)
                sources.append(source)
                words.append(word)
            sources += [NOTHING] * SCRATCH
            words += [0] * SCRATCH
        # An operator of torch computes where a tensor is of memory that nobody here gave, or was written.
        outputs = [
            NOTHING if each is None or not each.numel() else owners.get(_memory(each)) for each in results
        ]
        by_torch = None in sources or None in outputs
        by_torch |= any(each is not None and each._version for each in (*tensors, self._arrived))  # pyright: ignore[reportPrivateUsage]
        if by_torch:
            seen, words, sources = _Seen(), [], []
            inner = range(len(given))
            outputs = [
                source if source == NOTHING or source in inner else RESULTS - index
                for index, source in enumerate(outputs)
            ]
        value = tuple(None if each is None else layout_of(each) for each in results)
        specialisations = tuple(launch.specialisation for launch in seen.launches)
        shape = (specialisations, tuple(sources), tuple(outputs), len(given), len(seen.made), by_torch)
        return Form(
            skeleton=self._skeletons.setdefault(shape, len(self._skeletons)),
            specialisations=specialisations,
            sources=tuple(sources),  # pyright: ignore[reportArgumentType]
            words=tuple(words),
            grids=tuple(launch.grid for launch in seen.launches),
            sizes=tuple(each.numel() * each.element_size() for each in seen.made),
            value=value if isinstance(found, tuple | list) else value[0],
            outputs=tuple(outputs),  # pyright: ignore[reportArgumentType]
            by_torch=by_torch,
        )


def _parameter(kind: str, value: Any, owners: Mapping[int, int]) -> tuple[int | None, int]:
    """The source of a launch's value, None for memory of nobody's, and its word."""
    if kind == "i32":
        return NOTHING, int(value) & 0xFFFFFFFF
    if kind == "fp32":
        return NOTHING, int.from_bytes(struct.pack("<f", value), "little")
    return owners.get(_memory(value)), value.storage_offset() * value.element_size()


def _tensors(found: Any) -> tuple[Tensor | None, ...]:
    return tuple(found) if isinstance(found, tuple | list) else (found,)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]


def without_memory(layout: Layout) -> Tensor:
    """A tensor of that layout, of which nothing can be read."""
    steps = (max(0, size - 1) * stride for size, stride in zip(layout.shape, layout.stride, strict=True))
    whole = torch.empty(layout.offset + sum(steps) + 1, dtype=layout.dtype, device="meta")
    return whole.as_strided(layout.shape, layout.stride, layout.offset)
