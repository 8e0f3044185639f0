"""`llmc models`: which model families compile, and why the others do not."""

from __future__ import annotations

import click

from .output import Output, table, with_output


@click.command()
@with_output
def models(output: Output) -> None:
    """List the model configurations that are checked against transformers, and what comes of each."""
    from ..models.families import swept_families

    swept = swept_families()
    rows = [
        (
            row.status,
            row.name,
            row.config,
            "" if row.nodes is None else str(row.nodes),
            "" if row.error is None else f"{row.error:.1e}",
            row.code or row.note,
        )
        for row in swept
    ]
    num_compiled = sum(row.status == "supported" for row in swept)
    data = {
        "models": [
            {
                "name": row.name,
                "config": row.config,
                "compiles": row.status == "supported",
                "refused": row.code,
                "why": row.why,
                "nodes": row.nodes,
                "error": row.error,
                "note": row.note,
            }
            for row in swept
        ],
        "compiled": num_compiled,
    }
    text = table(rows, ("status", "name", "config", "nodes", "error", "note or reason"))
    output.result(data, f"{text}\n\n{num_compiled} of {len(swept)} configurations compile.")
