"""Arguments of operator calls by name."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch._ops import OpOverload


def argument(node: fx.Node, name: str) -> Any:
    """The argument `name` of an operator call, wherever it was written; its default where it was not."""
    assert isinstance(node.target, OpOverload)
    for index, entry in enumerate(node.target._schema.arguments):  # pyright: ignore[reportPrivateUsage]
        if entry.name == name:
            if index < len(node.args):
                return node.args[index]
            return node.kwargs.get(name, entry.default_value)
    raise KeyError(f"{node.target} has no argument {name!r}")


def argument_names(node: fx.Node) -> list[str]:
    """The names of an operator's arguments, in order."""
    assert isinstance(node.target, OpOverload)
    return [entry.name for entry in node.target._schema.arguments]  # pyright: ignore[reportPrivateUsage]
