"""`llmc serve`: an OpenAI-compatible server over artifacts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .output import Output, with_output


@click.command()
@click.argument("artifacts", nargs=-1, type=click.Path(path_type=Path), metavar="[ARTIFACT...]")
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="A YAML file with settings.")
@click.option("--host", metavar="NAME", help="Address to listen on; the default is loopback only.")
@click.option("--port", type=int, metavar="N", help="0 takes any free port.")
@click.option("--api-keys", type=click.Path(path_type=Path), help="A file with one key a line.")
@click.option("--tls-certificate", type=click.Path(path_type=Path), help="PEM file; makes it https.")
@click.option("--tls-key", type=click.Path(path_type=Path), help="PEM file of the certificate's key.")
@click.option("--draft", type=click.Path(path_type=Path), help="An artifact that drafts for the served one.")
@click.option("--served-name", metavar="NAME", help="The model's name for clients; for one artifact.")
@click.option("--max-requests", type=int, metavar="N", help="Most sequences that run at a time.")
@click.option("--max-waiting", type=int, metavar="N", help="Most sequences that wait beyond those.")
@click.option("--max-model-len", type=int, metavar="N", help="Most tokens of prompt and output.")
@click.option("--cache-bytes", type=int, metavar="BYTES", help="Memory for keys and values.")
@click.option(
    "--response-cache",
    "response_cache_bytes",
    type=int,
    metavar="BYTES",
    help="Memory for responses of greedy and seeded requests, to answer the same ones at once.",
)
@click.option("--json-logs", is_flag=True, default=None, help="Log lines as JSON objects.")
@click.option("--access-log", is_flag=True, default=None, help="Log every request.")
@with_output
def serve(output: Output, artifacts: tuple[Path, ...], config_file: Path | None, **options: Any) -> int:
    """Serve each ARTIFACT under its name, and the models that the configuration file lists. Options win over
    the file.

    A first SIGTERM or Ctrl-C lets running requests finish, a second one ends at once.
    """
    from .serving import serve_artifacts, settings

    given = {name: value for name, value in options.items() if value is not None}
    return serve_artifacts(output, artifacts, settings(config_file, given))
