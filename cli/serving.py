"""How `llmc serve` gets from artifacts and settings to a running server, and what it says meanwhile."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..spec.errors import TargetError, UsageError
from .output import Output

if TYPE_CHECKING:
    from ..runtime.load import StartLedger
    from ..runtime.server.config import ServerConfig
    from ..runtime.server.models import Opened


def settings(config_file: Path | None, options: dict[str, Any]) -> ServerConfig:
    """The settings of the file, overridden by `options`. UsageError for what is unknown or out of range;
    TargetError when the libraries for serving are missing."""
    import msgspec

    try:
        from ..runtime.server.config import ServerConfig, read_config
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    base = read_config(config_file) if config_file is not None else ServerConfig()
    merged = {**msgspec.to_builtins(base), **{name: _plain(value) for name, value in options.items()}}
    try:
        config = msgspec.convert(merged, ServerConfig)
    except msgspec.ValidationError as error:
        raise UsageError(
            "server.option",
            "An option of serve is out of its range.",
            f"{str(error).rstrip('.')}.",
            "See `llmc serve --help`.",
        ) from error
    config.validate()
    return config


def serve_artifacts(output: Output, artifacts: Sequence[Path], config: ServerConfig) -> int:
    """Loads, serves until a signal comes, closes. The exit code."""
    try:
        from ..runtime.server.keys import ApiKeys, read_keys
        from ..runtime.server.logs import set_up_logs
        from ..runtime.server.models import open_model, with_artifacts
        from ..runtime.server.process import Server, listen
        from ..runtime.server.state import make_state
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    from ..runtime.load import StartLedger

    set_up_logs(config.json_logs, config.access_log)
    ledger = StartLedger()
    ledger.steps["python and imports"] = process_age_s()
    keys = read_keys(Path(config.api_keys)) if config.api_keys is not None else ApiKeys()
    config = with_artifacts(config, artifacts)
    names = [model.served_name for model in config.models]
    with contextlib.ExitStack() as stack:
        bound = listen(config)
        stack.callback(bound.close)
        ledger.mark("settings")
        engines: list[Opened] = []
        for model in config.models:
            engines.append(open_model(model, config, ledger))
            stack.callback(engines[-1].channel.close)
        state = make_state(config, engines, keys)

        def on_ready() -> None:
            ledger.mark("server")
            _announce(output, config, names, server.port, ledger)

        server = Server(state, bound, on_ready)
        server.run()
    logging.getLogger("llmc.server").info("ended")
    return 0


def _announce(
    output: Output, config: ServerConfig, names: Sequence[str], port: int, ledger: StartLedger
) -> None:
    """The start ledger and the address: the last words unless something goes wrong."""
    scheme = "https" if config.tls_certificate is not None else "http"
    host = f"[{config.host}]" if ":" in config.host else config.host
    url = f"{scheme}://{host}:{port}"
    if output.as_json:
        record = {"url": url, "models": list(names), "ready_s": ledger.total_s, "ledger": ledger.steps}
        click.echo(json.dumps(record))
        sys.stdout.flush()
        return
    steps = ", ".join(f"{name} {seconds:.2f}" for name, seconds in ledger.steps.items())
    output.note(f"ready in {ledger.total_s:.2f} s ({steps})")
    output.note(f"serving {', '.join(names)} at {url}/v1")


def process_age_s() -> float:
    """Seconds since this process began, to the kernel's tick of about 10 ms."""
    fields = Path("/proc/self/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started_s)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _missing(error: ModuleNotFoundError) -> TargetError:
    return TargetError(
        "target.missing_library",
        f"Serving needs the library {error.name}.",
        "It is not installed in this environment.",
        "Install it with `pip install 'llmc-compiler[serve]'`.",
    )
