"""The translation unit under construction: deduplicated functions, the calls of one step, buffers.

Knows C++ text and lifetimes of buffers; nothing of operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .value import C_BYTES, Size, Value, c_size, product

Parameter = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Call:
    """One statement of the step: a function over buffers, run by every thread, then a barrier."""

    comment: str
    function: str
    arguments: tuple[str, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]


@dataclass(slots=True)
class Unit:
    """Functions by their text (two nodes of one shape share one), calls in order, buffer sizes in bytes, and
    the attention shapes whose kernels share the scratch memory."""

    functions: dict[str, str] = field(default_factory=dict[str, str])
    calls: list[Call] = field(default_factory=list[Call])
    buffers: dict[str, Size] = field(default_factory=dict[str, Size])
    scratch: set[str] = field(default_factory=set[str])

    def new_buffer(self, name: str, ctype: str, shape: Sequence[Size]) -> str:
        """Declare an arena buffer of `shape` elements; gives its name."""
        self.buffers[name] = product(tuple(shape)) * C_BYTES[ctype]
        return name

    def function(self, stem: str, parameters: Sequence[Parameter], body: str) -> str:
        """The name of a function with these parameters and body, defined once."""
        signature = ", ".join(f"{ctype} {name}" for ctype, name in parameters)
        comma = ", " if signature else ""
        text = f"(const Step& s, int tid, int nt{comma}{signature}) {{\n{body}\n}}"
        if text not in self.functions:
            self.functions[text] = f"{stem}_{len(self.functions)}"
        return self.functions[text]

    def call(
        self,
        comment: str,
        function: str,
        arguments: Sequence[str],
        reads: Sequence[Value],
        writes: Sequence[Value],
    ) -> None:
        """Append a statement; its buffers live from their first to their last statement."""
        self.calls.append(
            Call(
                comment,
                function,
                tuple(arguments),
                tuple(value.base for value in reads),
                tuple(value.base for value in writes),
            )
        )

    def lifetimes(self) -> dict[str, tuple[int, int]]:
        """First and last statement of every arena buffer."""
        spans: dict[str, tuple[int, int]] = {}
        for index, call in enumerate(self.calls):
            for base in (*call.reads, *call.writes):
                if base in self.buffers:
                    first, _ = spans.get(base, (index, index))
                    spans[base] = (first, index)
        return spans


def pointer(value: Value, ctype: str | None = None) -> str:
    """C++ for the address of a view's first element; arena buffers are macros named after them."""
    kind = ctype or value.ctype
    offset = "" if value.offset == 0 else f" + {c_size(value.offset)}"
    return f"({kind}*){value.base}{offset}"
