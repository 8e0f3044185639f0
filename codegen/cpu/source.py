"""The C++ of one program: a readable translation unit whose step is a list of calls with barriers.

The emitted unit exports the C ABI that `runtime/executors/cpu_library.py` calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
from torch import fx

from ...ir.paged import (
    block_table_name,
    k_cache_name,
    k_scales_name,
    slots_name,
    v_cache_name,
    v_scales_name,
)
from ...ir.program import Program
from ...spec.arena import Buffer, arena_bytes, place
from ...spec.cache import CacheGroup, CacheLayout
from ...spec.errors import TargetError
from .emitter import Emitter
from .lower.table import lowering_of
from .matrix import Slot
from .unit import Unit
from .value import Symbols, Value, contiguous_strides, symbol_for

ABI_VERSION = 4
MAX_THREADS = 64
_CACHE_TYPES = {"float32": "float", "bfloat16": "llmc::bf16", "int8": "int8_t"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Generated code and what the loader must know of it."""

    text: str
    weight_slots: tuple[Slot, ...]
    arena_bytes: int
    max_tokens: int
    max_logit_rows: int
    num_calls: int


def generate(program: Program, *, max_tokens: int, max_logit_rows: int) -> Source:
    """C++ for `program` (after the lay-out stage), for steps of up to `max_tokens` tokens, `max_tokens`
    sequences and `max_logit_rows` rows of logits.

    Raises TargetError naming the first node that has no form on this target.
    """
    assert program.cache is not None
    emitter = Emitter(Symbols.of(program.graph, program.inputs))
    result = lower_all(program, emitter)
    maxima = {"T": max_tokens, "L": max_logit_rows, "S": max_tokens, "Q": max_tokens + 1, "NT": MAX_THREADS}
    table: Any = {symbol_for(name): value for name, value in maxima.items()}
    table |= {sympy.Symbol(name): value for name, value in maxima.items()}
    buffers = {name: size for name, size in emitter.unit.buffers.items() if name != result}
    spans = emitter.unit.lifetimes()
    sizes = {name: int(size.subs(table)) for name, size in buffers.items() if name in spans}
    slots = place(
        [
            Buffer(value=name, size_bytes=size, first=spans[name][0], last=spans[name][1])
            for name, size in sizes.items()
        ]
    )
    offsets = {slot.value: slot.offset_bytes for slot in slots}
    limits = (max_tokens, max_logit_rows, program.spec.vocab_size, program.spec.max_context, MAX_THREADS)
    text = _unit_text(program, emitter.unit, offsets, sizes, result, len(emitter.slots.slots), limits)
    return Source(
        text=text,
        weight_slots=tuple(emitter.slots.slots.values()),
        arena_bytes=arena_bytes(slots),
        max_tokens=max_tokens,
        max_logit_rows=max_logit_rows,
        num_calls=len(emitter.unit.calls),
    )


def lower_all(program: Program, emitter: Emitter, observe: Callable[[fx.Node], None] | None = None) -> str:
    """Lower every node, told to `observe` once its value is in `emitter.env`; gives the name of the buffer
    that holds the logits."""
    assert program.cache is not None
    for node in program.graph.nodes:
        if node.op == "placeholder":
            emitter.env[node] = _input(program.cache, emitter, node)
        elif node.op == "call_function":
            emitter.env[node] = _lower(emitter, node)
            if observe is not None:
                observe(node)
        elif node.op == "output":
            source: Any = node.args[0]
            logits = emitter.value(source)
            if logits.base not in emitter.unit.buffers or not logits.is_contiguous or logits.offset != 0:
                copy = emitter.output(source, None)
                copy = emitter.buffer("logits", "float", copy.shape)
                emitter.loop("logits, densely", copy, [logits], "{0}")
                logits = copy
            return logits.base
    raise AssertionError("a verified program has an output")


def _lower(emitter: Emitter, node: fx.Node) -> Any:
    lowering = lowering_of(node.target)
    reason = "it has no form on this target"
    if lowering is not None:
        try:
            return lowering(emitter, node)
        except NotImplementedError as error:
            reason = f"{error} has no form on this target"
    raise TargetError(
        "cpu.operator",
        f"Node {node.name!r} ({node.target}) cannot be compiled for the CPU.",
        f"Of the operators that may be left in a program, {reason}.",
        "Compile with --target reference; to add the operator, write a lowering in codegen/cpu/lower/.",
    )


def _input(layout: CacheLayout, emitter: Emitter, node: fx.Node) -> Value:
    shape = emitter.symbols.sizes(node.meta["val"].shape)
    name = str(node.target)
    ctype = "int64_t"
    base = f"s.{name}"
    for index, group in enumerate(layout.groups):
        if name in (block_table_name(index), slots_name(index)):
            base = f"s.{'block_table' if name.startswith('block') else 'slots'}[{index}]"
        for layer in group.layers:
            if name in (k_scales_name(layer), v_scales_name(layer)):
                base = "nullptr"  # kernels keep scales inside of their blocks
            if name in (k_cache_name(layer), v_cache_name(layer)):
                ctype = _cache_type(group.dtype)
                base = f"s.{'k' if name.startswith('k') else 'v'}_cache[{_cache_index(layout, layer)}]"
    return Value(base, ctype, shape, contiguous_strides(shape))


def _cache_type(dtype: str) -> str:
    if dtype in _CACHE_TYPES:
        return _CACHE_TYPES[dtype]
    raise TargetError(
        "cpu.kv_dtype",
        f"The KV cache is laid out as {dtype}.",
        f"The CPU target keeps keys and values as {' or '.join(_CACHE_TYPES)}.",
        "Compile with --kv-dtype int8, which takes as few bytes, or without --kv-dtype.",
    )


def _cache_index(layout: CacheLayout, layer: int) -> int:
    return sorted(owner for group in layout.groups for owner in group.layers).index(layer)


def _scratch_text(program: Program, unit: Unit) -> list[str]:
    lines = ["int64_t scratch_bytes(int threads) {", "  int64_t most = 64;"]
    for shape in sorted(unit.scratch):
        call = f"llmc::attention_step_bytes({shape}, threads, {program.spec.max_context})"
        lines.append(f"  most = std::max<int64_t>(most, {call});")
    return [*lines, "  return most;", "}"]


def _group_text(group: CacheGroup) -> str:
    window, chunk = (group.window if group.kind == kind else 0 for kind in ("window", "chunk"))
    return f"{{{group.page_tokens}, {window}, {chunk}}}"


def _unit_text(
    program: Program,
    unit: Unit,
    offsets: dict[str, int],
    sizes: dict[str, int],
    result: str,
    num_weights: int,
    limits: tuple[int, ...],
) -> str:
    assert program.cache is not None
    groups = program.cache.groups
    num_caches = sum(len(group.layers) for group in groups)
    lines = [
        f"// {program.spec.architecture}: one step over a ragged batch, generated by llmc.",
        "// Each call names the graph node it comes from; all threads run it, then meet at a barrier.",
        '#include "activation.hpp"',
        '#include "attention_step.hpp"',
        '#include "float_linear.hpp"',
        '#include "kv_cache.hpp"',
        '#include "linear.hpp"',
        '#include "norm.hpp"',
        '#include "plain.hpp"',
        '#include "rope.hpp"',
        '#include "step.hpp"',
        "",
        "namespace {",
        "",
        f"using Step = llmc::Step<{len(groups)}, {num_caches}, {num_weights}>;",
        "",
        "// Intermediate values in the arena; ranges of values that never live together overlap.",
        f"#define {result} s.logits",
    ]
    lines += [
        f"#define {name} (s.arena + {offset})  // {sizes[name]} bytes" for name, offset in offsets.items()
    ]
    lines.append("")
    for text, name in unit.functions.items():
        lines += [f"static void {name}{text}", ""]
    lines += ["void run_step(const Step& s, int tid, int nt, llmc::Barrier& barrier) {"]
    for call in unit.calls:
        lines.append(f"  // {call.comment}")
        arguments = "".join(f", {argument}" for argument in call.arguments)
        lines.append(f"  {call.function}(s, tid, nt{arguments});")
        lines.append("  barrier.wait();")
    lines += [
        "}",
        "",
        *_scratch_text(program, unit),
        "",
        f"constexpr llmc::StepLimits kLimits{{{', '.join(map(str, limits))}}};",
        f"constexpr llmc::GroupLimits kGroups[] = {{{', '.join(map(_group_text, groups))}}};",
        "",
        "}  // namespace",
        "",
        f"LLMC_EXPORT_STEP(Step, run_step, scratch_bytes, kLimits, kGroups, {ABI_VERSION})",
        "",
    ]
    return "\n".join(lines)
