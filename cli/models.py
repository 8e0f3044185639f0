"""`llmc models`: which model families compile, and why the others do not."""

from __future__ import annotations

import click

from .output import Output, table, with_output


@click.command()
@with_output
def models(output: Output) -> None:
    """List the model configurations that are checked against transformers, and what comes of each."""
    from ..models.families import FAMILIES

    rows = [
        ("yes" if family.refused is None else "no", family.name, family.config, family.refused or family.note)
        for family in FAMILIES
    ]
    num_compiled = sum(family.refused is None for family in FAMILIES)
    data = {
        "models": [
            {
                "name": family.name,
                "config": family.config,
                "compiles": family.refused is None,
                "refused": family.refused,
                "note": family.note,
            }
            for family in FAMILIES
        ],
        "compiled": num_compiled,
    }
    text = table(rows, ("compiles", "name", "config", "note or reason"))
    output.result(data, f"{text}\n\n{num_compiled} of {len(FAMILIES)} configurations compile.")
