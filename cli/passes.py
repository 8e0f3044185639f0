"""`llmc passes`: every pass there is, with its options."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from .output import Output, table, with_output

if TYPE_CHECKING:
    from ..passes.base import OptionInfo
    from ..passes.registry import PassInfo


@click.command()
@click.argument("name", required=False)
@with_output
def passes(output: Output, name: str | None) -> None:
    """List all passes, or explain the one called NAME and its options."""
    from ..passes.registry import describe_passes, pass_named

    known = describe_passes()
    if name is None:
        rows = [(info.stage.name, info.name, info.contract, info.summary) for info in known]
        text = table(rows, ("stage", "pass", "contract", "what it does"))
    else:
        pass_named(name)  # raises for a name that no pass has
        known = tuple(info for info in known if info.name == name)
        text = "\n\n".join(map(_explained, known))
    output.result({"passes": [_as_data(info) for info in known]}, text)


def _explained(info: PassInfo) -> str:
    lines = [
        f"{info.name} ({info.stage.name}): {info.summary}",
        f"  contract  {info.contract}",
        f"  requires  {', '.join(info.requires) or 'nothing'}",
        f"  provides  {', '.join(info.provides) or 'nothing'}",
    ]
    rows = [
        (f"  {option.name}", option.kind.__name__, str(option.default), _doc(option))
        for option in info.options
    ]
    return "\n".join([*lines, "", table(rows, ("  option", "type", "default", "meaning"))])


def _doc(option: OptionInfo) -> str:
    if option.choices:
        return f"{option.doc} One of: {', '.join(map(str, option.choices))}."
    return option.doc


def _as_data(info: PassInfo) -> dict[str, Any]:
    data = asdict(info)
    data["stage"] = info.stage.name
    data["options"] = [asdict(option) | {"kind": option.kind.__name__} for option in info.options]
    return data
