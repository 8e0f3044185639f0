"""Steps of one program as lists of ready launches: one is made for all steps that launch the same kernels,
and each of those steps writes its numbers and pointers into it. Knows no requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from ...kernels.cuda.launch import Specialisation
from ...spec.arena import Buffer, arena_bytes, place
from ...spec.errors import InternalError
from .cuda_arena import StepMemory
from .cuda_blocks import BlockForm, BlockForms, blocks_of
from .cuda_forms import (
    ARRIVED,
    NOTHING,
    RESULTS,
    Call,
    Form,
    Forms,
    Layout,
    Value,
    layout_of,
    tensors_of,
    without_memory,
)
from .cuda_table import LaunchTable, ReadyLaunch

# Makes launches of such kernels ready.
Pack = Callable[[Sequence[Specialisation]], LaunchTable]

_ALIGNMENT = 16
# Steps whose numbers are kept.
_STEPS = 256


class Listed:
    """A program's nodes, as lists need them. `node_forms` calls the operators of `forms`, `graph` those that
    carry out; both are the same otherwise. `constant(node)` is the tensor of a weight or a cache, None for an
    input of the step."""

    def __init__(
        self,
        node_forms: fx.Graph,
        graph: fx.Graph,
        forms: BlockForms,
        constant: Callable[[fx.Node], Tensor | None],
    ) -> None:
        self.forms = forms
        self.constants: dict[int, Tensor] = {}
        self.layouts: dict[int, Layout] = {}
        self.inputs: dict[str, int] = {}
        self.calls: list[Call] = []
        self.nodes: list[fx.Node] = []
        places: dict[fx.Node, int] = {}
        layouts: dict[fx.Node, Layout] = {}
        self.output: int | None = None
        for place_of, (node, own) in enumerate(zip(node_forms.nodes, graph.nodes, strict=True)):
            places[node] = place_of
            if node.op == "output":
                self.output = next((places[source] for source in node.all_input_nodes), None)
            elif node.op == "call_function":
                self.nodes.append(own)
                self.calls.append(_call(place_of, node, places, layouts, forms.forms))
            elif (tensor := constant(own)) is not None:
                self.constants[place_of] = tensor
                layouts[node] = self.layouts[place_of] = layout_of(tensor, is_own=True)
            else:
                self.inputs[str(own.target)] = place_of
        self.blocks = blocks_of(self.calls, forms.forms.number_kind)
        # Block, and call of the block, that gives what stands at a place.
        self.whose = {
            call.place: (number, index)
            for number, block in enumerate(self.blocks)
            for index, call in enumerate(block.calls)
        }


def _call(
    own: int, node: fx.Node, places: Mapping[fx.Node, int], layouts: Mapping[fx.Node, Layout], forms: Forms
) -> Call:
    sources = node.all_input_nodes
    constants = {source: layouts[source] for source in sources if source in layouts}
    return Call(
        place=own,
        kind=forms.kind_of(node, constants),
        node=node,
        arguments=tuple(places[source] for source in sources),
        varying=tuple(places[source] for source in sources if source not in constants),
        constants={source: without_memory(layout) for source, layout in constants.items()},
    )


@dataclass(slots=True)
class _Storages:
    """The pieces of memory that a list works in, by number: 0 is none, 1 what products count in. Of each
    place of the program those of its tensors; of each piece that is made, and of each result of torch's, the
    calls from which and up to which it is needed."""

    held: dict[int, tuple[int, ...]] = field(default_factory=dict[int, tuple[int, ...]])
    count: int = 2
    first: dict[int, int] = field(default_factory=dict[int, int])
    last: dict[int, int] = field(default_factory=dict[int, int])
    made: list[int] = field(default_factory=list[int])
    results: set[int] = field(default_factory=set[int])

    def new(self) -> int:
        self.count += 1
        return self.count - 1

    def add(self, index: int, call: Call, form: Form) -> list[int]:
        """Note what call `index` works in; the storages of its parameters, in order."""
        given = [storage for each in call.arguments for storage in self.held[each]]
        made = [self.new() for _ in form.sizes]
        self.made += made
        known = [*given, *made]
        fixed = {NOTHING: 0, ARRIVED: 1}
        results = {source: self.new() for source in form.outputs if source <= RESULTS}

        def storage(source: int) -> int:
            found = fixed.get(source, results.get(source))
            return known[source] if found is None else found

        self.held[call.place] = tuple(storage(source) for source in form.outputs)
        self.results.update(results.values())
        for each in (*known, *results.values()):
            self.first.setdefault(each, index)
            self.last[each] = index
        return [storage(source) for source in form.sources]


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """Launches of a list from `start` to `stop`, and the call behind them that torch carries out."""

    start: int
    stop: int
    by_torch: int | None


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """The numbers of one step of a list: words, grids, of each part the launches that have programs, and the
    values that torch sees, by place."""

    own: LaunchList
    words: NDArray[np.uint64]
    grids: NDArray[np.uint32]
    launches: tuple[tuple[ReadyLaunch, ...], ...]
    values: Mapping[int, Value]


class LaunchList:
    """The launches of steps whose forms have the same skeletons."""

    def __init__(self, program: Listed, forms: Sequence[Form], arrived: Tensor, pack: Pack) -> None:
        self._program = program
        self._storages = storages = _Storages()
        for own in (*program.constants, *program.inputs.values()):
            storages.held[own] = (storages.new(),)
        slots: list[int] = []
        self._parts: list[_Part] = []
        start = stop = 0
        for index, (call, form) in enumerate(zip(program.calls, forms, strict=True)):
            slots += storages.add(index, call, form)
            stop += len(form.specialisations)
            if form.by_torch:
                self._parts.append(_Part(start, stop, index))
                start = stop
        self._parts.append(_Part(start, stop, None))
        seen = {program.calls[part.by_torch] for part in self._parts if part.by_torch is not None}
        self.shown = {own for call in seen for own in (call.place, *call.varying)}
        if program.output is not None:
            self.shown.add(program.output)
            storages.last.update(dict.fromkeys(storages.held[program.output], len(forms)))
        self.table = pack([each for form in forms for each in form.specialisations])
        self._slots = np.asarray(slots, np.intp)
        self._pointers = np.flatnonzero(self._slots)
        # Tensors that pieces of memory are, those of results of torch as long as they are needed.
        self._tensors = {storages.held[own][0]: tensor for own, tensor in program.constants.items()}
        self._bases = np.zeros(storages.count, np.uint64)
        self._bases[1] = arrived.data_ptr()
        for storage, tensor in self._tensors.items():
            self._bases[storage] = tensor.data_ptr()
        self._made = np.asarray(storages.made, np.intp)
        self._made_index = {storage: index for index, storage in enumerate(storages.made)}
        self._slots_of: dict[int, NDArray[np.intp]] = {}
        self._sizes = np.zeros(len(self._made), np.int64)
        self._offsets = np.zeros(len(self._made), np.uint64)
        self.num_bytes = 0

    def step(self, found: Sequence[BlockForm], values: Mapping[int, Value]) -> Step:
        """The numbers of a step of such blocks, for which there is room from now on; `values` are of the
        places in `shown`."""
        sizes = np.concatenate([block.sizes for block in found])
        if (sizes > self._sizes).any():
            self._make_room(sizes)
        grids = np.concatenate([block.grids for block in found])
        words = np.concatenate([block.words for block in found])
        has_programs: NDArray[np.bool_] = np.all(grids, axis=1)
        parts = tuple(self.table.launches[part.start : part.stop] for part in self._parts)
        if not has_programs.all():
            parts = tuple(
                tuple(
                    launch
                    for launch, runs in zip(own, has_programs[part.start : part.stop], strict=True)
                    if runs
                )
                for own, part in zip(parts, self._parts, strict=True)
            )
        return Step(self, words, grids, parts, values)

    def _make_room(self, sizes: NDArray[np.int64]) -> None:
        """Place anew what is made, each with room up to a power of two, so that most steps of other lengths
        need no other places."""
        rounded = [1 << (size - 1).bit_length() if size else 0 for size in sizes.tolist()]
        self._sizes = np.maximum(self._sizes, np.asarray(rounded, np.int64))
        first, last = self._storages.first, self._storages.last
        slots = place(
            [
                Buffer(value=str(index), size_bytes=size, first=first[storage], last=last[storage])
                for index, (storage, size) in enumerate(
                    zip(self._storages.made, self._sizes.tolist(), strict=True)
                )
                if size
            ]
        )
        for slot in slots:
            self._offsets[int(slot.value)] = slot.offset_bytes
        self.num_bytes = arena_bytes(slots)

    def run(self, step: Step, inputs: Mapping[str, Tensor], memory: Tensor, stream: int) -> Tensor | None:
        """Enqueue a step of this list on `inputs`, its tensors in `memory`; what the program gives."""
        bases, table = self._bases, self.table
        for storage in self._storages.results:
            self._tensors.pop(storage, None)
        for name, own in self._program.inputs.items():
            storage = self._storages.held[own][0]
            self._tensors[storage] = inputs[name]
            bases[storage] = inputs[name].data_ptr()
        bases[self._made] = self._offsets + np.uint64(memory.data_ptr())
        np.add(bases[self._slots], step.words, out=table.values)
        if int(np.bitwise_or.reduce(table.values[self._pointers])) % _ALIGNMENT:
            raise _unaligned()
        table.grids[:] = step.grids
        table.go_to(stream)
        for part, launches in zip(self._parts, step.launches, strict=True):
            table.launch(launches)
            if part.by_torch is not None:
                self._compute(part.by_torch, step, memory)
        output = self._program.output
        return None if output is None else self._arguments(output, step, memory)

    def _compute(self, index: int, step: Step, memory: Tensor) -> None:
        """Have torch carry out a call, and point the launches behind it to its results."""
        call, node = self._program.calls[index], self._program.nodes[index]
        given = {
            source: self._arguments(own, step, memory)
            for source, own in zip(node.all_input_nodes, call.arguments, strict=True)
        }
        target: Callable[..., Any] = node.target  # pyright: ignore[reportAssignmentType]
        with torch.no_grad():
            found = target(
                *fx.map_arg(node.args, given.__getitem__), **fx.map_arg(node.kwargs, given.__getitem__)
            )
        found = tuple(found) if isinstance(found, tuple | list) else (found,)
        storages, last = self._storages, self._storages.last
        for storage in [each for each in storages.results if each in self._tensors and last[each] <= index]:
            del self._tensors[storage]
        expected = tensors_of(step.values[call.place])
        for tensor, layout, storage in zip(found, expected, storages.held[call.place], strict=True):
            if storage not in storages.results:
                continue
            if layout is None or _differ(layout_of(tensor), layout):
                raise _unexpected(node.name, tensor, layout)
            self._tensors[storage] = tensor
            begins = np.uint64(tensor.data_ptr() - layout.offset * tensor.element_size())
            where = self._where(storage)
            self.table.values[where] = step.words[where] + begins

    def _where(self, storage: int) -> NDArray[np.intp]:
        """The parameters that point into a result of torch's."""
        if storage not in self._slots_of:
            self._slots_of[storage] = np.flatnonzero(self._slots == storage)
        return self._slots_of[storage]

    def _arguments(self, own: int, step: Step, memory: Tensor) -> Any:
        """The tensors at a place of the program, as torch takes them."""
        value = step.values[own] if own in step.values else self._program.layouts[own]
        tensors = tuple(
            None if layout is None else self._tensor(storage, layout, memory)
            for layout, storage in zip(tensors_of(value), self._storages.held[own], strict=True)
        )
        return tensors[0] if value is None or isinstance(value, Layout) else tensors

    def _tensor(self, storage: int, layout: Layout, memory: Tensor) -> Tensor:
        if storage == 0:
            return memory.new_empty(layout.shape, dtype=layout.dtype)
        if storage in self._tensors:
            held = self._tensors[storage]
            own = held.view(layout.dtype)
            begins = 0 if storage in self._storages.results else int(held.storage_offset())
        else:
            own = memory.view(layout.dtype)
            begins = int(self._offsets[self._made_index[storage]]) // layout.dtype.itemsize
        return own.as_strided(layout.shape, layout.stride, begins + layout.offset)


class LaunchLists:
    """Carries out steps of a program by lists, which are made as they are needed. They and those that share
    `memory` work in it one after another."""

    def __init__(self, program: Listed, arrived: Tensor, pack: Pack, memory: StepMemory) -> None:
        self._program, self._arrived, self._pack, self._memory = program, arrived, pack, memory
        self._lists: dict[tuple[int, ...], LaunchList] = {}
        self._steps: dict[tuple[Layout, ...], Step] = {}

    @property
    def num_lists(self) -> int:
        """Lists that were made so far."""
        return len(self._lists)

    def run(self, inputs: Mapping[str, Tensor], stream: int) -> Tensor | None:
        """Enqueue a step on `stream`; what the program gives, which stands until the next step.

        Inputs begin at multiples of 16 bytes. Raises as `CudaDriver.call` does, and InternalError where
        torch's results have other layouts than it said.
        """
        step = self.step({name: layout_of(inputs[name], is_own=True) for name in self._program.inputs})
        return step.own.run(step, inputs, self._memory.of(step.own.num_bytes), stream)

    def step(self, inputs: Mapping[str, Layout]) -> Step:
        """The numbers of a step on inputs of such layouts."""
        key = tuple(inputs.values())
        step = self._steps.get(key)
        if step is None:
            if len(self._steps) >= _STEPS:
                self._steps.clear()
            step = self._steps[key] = self._step(inputs)
        return step

    def _step(self, inputs: Mapping[str, Layout]) -> Step:
        program, blocks = self._program, self._program.forms
        blocks.make_room()
        forms = blocks.forms
        numbers = {own: forms.number_of(inputs[name]) for name, own in program.inputs.items()}
        found = blocks.walk(program.blocks, numbers)
        kinds = tuple(block.skeleton for block in found)
        if kinds not in self._lists:
            all_forms = [form for block in found for form in block.forms]
            self._lists[kinds] = LaunchList(program, all_forms, self._arrived, self._pack)
        own = self._lists[kinds]
        for shown in own.shown - numbers.keys():
            block, index = program.whose[shown]
            numbers[shown] = found[block].values[index]
        return own.step(found, {shown: forms.value_of(numbers[shown]) for shown in own.shown})


def _differ(found: Layout, expected: Layout) -> bool:
    """Of a single row torch says different strides for the same tensor with data and without."""
    strides = zip(found.shape, found.stride, expected.stride, strict=True)
    return found[:1] + found[2:] != expected[:1] + expected[2:] or any(
        own != other for size, own, other in strides if size > 1
    )


def _unaligned() -> InternalError:
    return InternalError(
        "cuda.alignment",
        f"A parameter of a step's kernels lies at an address that is no multiple of {_ALIGNMENT}.",
        "Kernels were compiled for aligned tensors and would read elsewhere.",
        "Report this with the model; device_lists=off names the kernel.",
    )


def _unexpected(node: str, tensor: Tensor, layout: Layout | None) -> InternalError:
    return InternalError(
        "cuda.torch_layout",
        f"An operator that torch carries out gave another tensor than it was to: node {node!r}.",
        f"It has shape {tuple(tensor.shape)}, strides {tensor.stride()} and dtype {tensor.dtype}; expected "
        f"was {layout}.",
        "Run with device_lists=off, and report this with the model and the version of torch.",
    )
