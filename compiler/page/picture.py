"""A program as an SVG picture: one box an operator, in order, layers that do the same folded into one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from torch import fx

from ...ir.vocabulary import operator_name
from ..node_values import layer_of

_ROW, _WIDTH, _PAD = 26, 560, 16
_VIEWS = frozenset({"reshape", "slice", "permute", "getitem", "view", "select", "expand"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Operators of one part of the model: `names` are the parts that do the same, in order."""

    names: tuple[str, ...]
    operators: tuple[str, ...]


def blocks_of(graph: fx.Graph) -> tuple[Block, ...]:
    """The parts of a program in order; layers with the same operators, weights' shapes aside, are one block.
    Views are left out."""
    parts: list[tuple[str, list[str]]] = []
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        operator = operator_name(node.target)
        if operator.split(".")[1] in _VIEWS:
            continue
        layer = layer_of(node)
        if not parts or parts[-1][0] != layer:
            parts.append((layer, []))
        scheme = next((arg for arg in node.args if isinstance(arg, str) and arg[:3] in ("int", "fp8")), "")
        parts[-1][1].append(" ".join(filter(None, (operator.removesuffix(".default"), scheme))))
    blocks: list[Block] = []
    for name, operators in parts:
        last = blocks[-1] if blocks else None
        if last is not None and name and last.names[0] and last.operators == tuple(operators):
            blocks[-1] = Block(names=(*last.names, name), operators=last.operators)
        else:
            blocks.append(Block(names=(name,), operators=tuple(operators)))
    return tuple(blocks)


def program_picture(graph: fx.Graph, title: str) -> str:
    """The SVG file. Colours follow the viewer's light or dark setting."""
    blocks = blocks_of(graph)
    y, parts = 56, list[str]()
    for block in blocks:
        height = _ROW * len(block.operators) + 34
        parts.append(f"<rect class='box' x='{_PAD}' y='{y}' width='{_WIDTH}' height='{height}' rx='8'/>")
        parts.append(f"<text class='soft' x='{_PAD + 12}' y='{y + 20}'>{escape(_title(block))}</text>")
        for index, operator in enumerate(block.operators):
            row = y + 28 + index * _ROW
            kind = "own" if operator.startswith("llmc") else "other"
            parts.append(
                f"<rect class='{kind}' x='{_PAD + 12}' y='{row}' width='{_WIDTH - 24}' height='20' rx='4'/>"
                f"<text x='{_PAD + 22}' y='{row + 14}'>{escape(operator)}</text>"
            )
        y += height + 18
    return _document(parts, y, title)


def _title(block: Block) -> str:
    names: Sequence[str] = [name or "model" for name in block.names]
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}: {len(names)} layers alike"


def _document(parts: Sequence[str], height: int, title: str) -> str:
    style = (
        "text{font:13px system-ui,sans-serif;fill:#1d2330}.soft{fill:#5b6475}"
        ".box{fill:#f5f6f9;stroke:#d9dde5}"
        ".own{fill:#dbe6ff}.other{fill:#eceef2}svg{background:#fff}"
        "@media(prefers-color-scheme:dark){text{fill:#e6e9ef}.soft{fill:#9aa3b4}"
        ".box{fill:#1c2028;stroke:#2c323d}"
        ".own{fill:#263a66}.other{fill:#2b3039}svg{background:#14171d}}"
    )
    width = _WIDTH + 2 * _PAD
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' width='{width}' "
        f"height='{height}'><style>{style}</style><text x='{_PAD}' y='34' style='font-size:18px'>"
        f"{escape(title)}</text>{''.join(parts)}</svg>\n"
    )
