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
    from ..runtime.config import RuntimeConfig
    from ..runtime.llm import LLM
    from ..runtime.load import StartLedger
    from ..runtime.server.config import ServerConfig

_ENGINE_SETTINGS = ("max_requests", "max_model_len", "cache_bytes", "num_threads", "timeout_s")


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
        from ..runtime.server.channel import LocalChannel
        from ..runtime.server.keys import ApiKeys, read_keys
        from ..runtime.server.logs import set_up_logs
        from ..runtime.server.process import Server, listen
        from ..runtime.server.state import make_state
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    from ..runtime.load import StartLedger

    set_up_logs(config.json_logs, config.access_log)
    ledger = StartLedger()
    ledger.steps["python and imports"] = process_age_s()
    keys = read_keys(Path(config.api_keys)) if config.api_keys is not None else ApiKeys()
    names = served_names(artifacts, config.served_name)
    with contextlib.ExitStack() as stack:
        bound = listen(config)
        stack.callback(bound.close)
        ledger.mark("settings")
        loaded = [stack.enter_context(_load(path, config, ledger)) for path in artifacts]
        engines = [(name, LocalChannel(llm), llm.tokenizer) for name, llm in zip(names, loaded, strict=True)]
        state = make_state(config, engines, keys)

        def on_ready() -> None:
            ledger.mark("server")
            _announce(output, config, names, server.port, ledger)

        server = Server(state, bound, on_ready)
        server.run()
    logging.getLogger("llmc.server").info("ended")
    return 0


def served_names(artifacts: Sequence[Path], served_name: str | None) -> list[str]:
    """What clients call each artifact: its folder's name without .llmc, or `served_name` for the only one.
    UsageError for two of one name."""
    if served_name is not None:
        if len(artifacts) > 1:
            raise UsageError(
                "server.served_name",
                f"One name was given for {len(artifacts)} artifacts.",
                "Clients choose among several by their names.",
                "Leave --served-name out, or serve one artifact.",
            )
        return [served_name]
    names = [path.resolve().name.removesuffix(".llmc") for path in artifacts]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(
                "server.served_name",
                f"Two artifacts are called {name}.",
                "Clients choose among several by their names.",
                "Rename one of the folders.",
            )
    return names


def runtime_config(config: ServerConfig) -> RuntimeConfig:
    """The engine's part of the settings. The server admits; the engine's own queue need only be as long."""
    from ..runtime.config import RuntimeConfig

    given = {name: getattr(config, name) for name in _ENGINE_SETTINGS}
    base = {name: value for name, value in given.items() if value is not None}
    usual = RuntimeConfig()
    max_requests = base.get("max_requests", usual.max_requests)
    return RuntimeConfig(
        **base,
        max_waiting=config.max_waiting + max_requests,
        max_step_tokens=max(usual.max_step_tokens, max_requests),
    )


def _load(path: Path, config: ServerConfig, ledger: StartLedger) -> LLM:
    from ..runtime.load import load

    return load(path, runtime_config(config), ledger=ledger)


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
