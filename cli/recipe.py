"""`llmc recipe`: presets, printed and checked as the YAML they can be written as."""

from __future__ import annotations

from pathlib import Path

import click

from .output import Output, table, with_output


@click.group()
def recipe() -> None:
    """List, show and check recipes: the passes of a compile, in order, with their options."""


@recipe.command("list")
@with_output
def list_recipes(output: Output) -> None:
    """List the presets that --quant knows."""
    from ..passes.presets import PRESETS

    rows = [(preset.name, preset.summary) for preset in PRESETS]
    data = {"presets": [{"name": name, "summary": summary} for name, summary in rows]}
    output.result(data, table(rows, ("preset", "what it makes")))


@recipe.command("show")
@click.argument("preset")
@with_output
def show_recipe(output: Output, preset: str) -> None:
    """Print PRESET as YAML, what it is for in its first line, to be edited and given to `llmc compile
    --recipe`."""
    from ..passes.presets import preset_named
    from ..passes.recipes import preset_recipe, to_yaml

    summary = preset_named(preset).summary
    text = f"# {summary}\n{to_yaml(preset_recipe(preset))}"
    output.result({"name": preset, "summary": summary, "yaml": text}, text.rstrip("\n"))


@recipe.command("check")
@click.argument("file", type=click.Path(path_type=Path))
@with_output
def check_recipe_file(output: Output, file: Path) -> None:
    """Check that FILE is a recipe whose passes exist, fit together, and end in a program that can run."""
    from ..passes.recipes import check_recipe, read_recipe

    found = read_recipe(file)
    check_recipe(found)
    names = [pass_.name for pass_ in found.passes]
    output.result(
        {"ok": True, "name": found.name, "passes": names}, f"{file} is a recipe of {len(names)} passes."
    )
