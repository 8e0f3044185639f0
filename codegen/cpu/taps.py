"""Generated code that also tells what it computes: after each call that a node ends with, its value is copied
to memory of the host. For finding faults; what ships has no taps."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ...ir.program import Program
from ...spec.errors import ArtifactError
from .emitter import Emitter
from .source import lower_all
from .unit import Call
from .value import Symbols, Value, contiguous_strides, symbol_for

SET_TAPS = "llmc_set_taps"
_BARRIER = "  barrier.wait();"
_STEP = "void run_step("


@dataclass(frozen=True, slots=True, kw_only=True)
class Tap:
    """One node whose value is told: rows of `width` float32 values, a row a token where the logits of every
    token are wanted; `call` is the comment of the statement that made it."""

    node: str
    width: int
    call: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TappedSource:
    """Generated code with taps, in the order of its statements. `llmc_set_taps` takes as many addresses."""

    text: str
    taps: tuple[Tap, ...]


@dataclass(frozen=True, slots=True)
class _Point:
    """A node's value, known once `num_calls` statements are done."""

    node: fx.Node
    value: Value
    num_calls: int
    width: int


def tap_source(program: Program, text: str) -> TappedSource:
    """`text`, the generated code of `program` as an artifact holds it, with taps at every node that has rows
    of floating-point values, a row a token.

    Raises ArtifactError where the code is not that of this program.
    """
    emitter = Emitter(Symbols.of(program.graph, program.inputs))
    points: list[_Point] = []

    def observe(node: fx.Node) -> None:
        point = _point(emitter, node, program.spec.vocab_size)
        if point is not None:
            points.append(point)

    lower_all(program, emitter, observe)
    unit = emitter.unit
    num_calls, known = len(unit.calls), set(unit.functions.values())
    _check_calls(text, unit.calls)
    for index, point in enumerate(points):
        shape = point.value.shape
        out = Value(f"taps[{index}]", "float", shape, contiguous_strides(shape))
        emitter.loop(f"tap of {point.node.name}", out, [point.value], "{0}")
    extra: dict[int, list[str]] = {}
    for point, call in zip(points, unit.calls[num_calls:], strict=True):
        extra.setdefault(point.num_calls, []).extend(_statement(call))
    functions = [f"static void {name}{body}" for body, name in unit.functions.items() if name not in known]
    taps = tuple(
        Tap(node=point.node.name, width=point.width, call=unit.calls[point.num_calls - 1].comment)
        for point in points
    )
    return TappedSource(text=_woven(text, functions, extra, len(points)), taps=taps)


def _point(emitter: Emitter, node: fx.Node, vocab_size: int) -> _Point | None:
    """Where the value of a node can be told; None for sizes, tuples, inputs, logits, values of other rows."""
    value = emitter.env.get(node)
    if not isinstance(value, Value) or value.ctype != "float" or not emitter.unit.calls:
        return None
    if not value.shape or value.shape[0] not in (symbol_for("T"), symbol_for("L")):
        return None
    width = 1
    for size in value.shape[1:]:
        if size.free_symbols:
            return None
        width *= int(size)
    if value.shape[0] == symbol_for("L") and width >= vocab_size:
        return None
    return _Point(node, value, len(emitter.unit.calls), width)


def _statement(call: Call) -> list[str]:
    arguments = "".join(f", {argument}" for argument in call.arguments)
    return [f"  // {call.comment}", f"  {call.function}(s, tid, nt{arguments});", _BARRIER]


def _check_calls(text: str, calls: list[Call]) -> None:
    """The code must have one statement for each of ours, of the same nodes."""
    lines = text.split("\n")
    ends = [index for index, line in enumerate(lines) if line == _BARRIER]
    comments = [lines[index - 2].strip() for index in ends]
    if comments == [f"// {call.comment}" for call in calls]:
        return
    raise ArtifactError(
        "artifact.cpu_source",
        "The generated code of this artifact is not what this llmc generates for its program.",
        f"It has {len(comments)} statements, of which some belong to other nodes; {len(calls)} are expected.",
        "Compile the model again with this version of llmc, then trace it.",
    )


def _woven(text: str, functions: list[str], extra: dict[int, list[str]], num_taps: int) -> str:
    found: list[str] = []
    num_calls = 0
    for line in text.split("\n"):
        if line.startswith(_STEP):
            found += [f"static float* taps[{max(1, num_taps)}];", "", *functions, ""]
        found.append(line)
        if line == _BARRIER:
            num_calls += 1
            found += extra.get(num_calls, [])
    found += [
        f'extern "C" __attribute__((visibility("default"))) void {SET_TAPS}(float* const* addresses) {{',
        f"  for (int i = 0; i < {num_taps}; ++i) taps[i] = addresses[i];",
        "}",
        "",
    ]
    return "\n".join(found)
