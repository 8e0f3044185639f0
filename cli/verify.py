"""`llmc verify`: are an artifact's bytes what was written, and does it still compute what it did?"""

from __future__ import annotations

from pathlib import Path

import click

from .output import Output, with_output


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@with_output
def verify(output: Output, artifact: Path) -> int:
    """Check every checksum of ARTIFACT, and that it reproduces the logits stored in its oracle.

    Exits with 1 when something is wrong.
    """
    from ..runtime.verify import verify_artifact

    problems = [str(problem) for problem in verify_artifact(artifact)]
    text = "\n".join(problems) if problems else f"{artifact} is whole, and its oracle holds."
    output.result({"ok": not problems, "problems": problems}, text)
    return 1 if problems else 0
