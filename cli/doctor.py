"""`llmc doctor`: what this machine can do, with reasons."""

from __future__ import annotations

import click

from .output import Output, table, with_output


@click.command()
@with_output
def doctor(output: Output) -> None:
    """Say what this installation and this machine can do, and why not where they cannot."""
    from .machine import examine

    findings = examine()
    rows = [("yes" if each.ok else "no", each.subject, each.detail) for each in findings]
    data = {"findings": [{"subject": f.subject, "ok": f.ok, "detail": f.detail} for f in findings]}
    output.result(data, table(rows, ("ok", "subject", "detail")))
