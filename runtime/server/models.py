"""From settings to engines: what is served under which name, and how each artifact is opened. Knows no routes
and no sockets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from ...artifact.reader import open_unchecked
from ...spec.errors import UsageError
from ..config import RuntimeConfig
from ..load import StartLedger, load
from ..tokenizer import Tokenizer
from .channel import EngineChannel, LocalChannel
from .config import ModelConfig, ServerConfig
from .process_channel import ProcessChannel, engine_command

_ENGINE_SETTINGS = (
    "max_requests",
    "max_model_len",
    "cache_bytes",
    "num_threads",
    "timeout_s",
    "draft",
    "response_cache_bytes",
    "fairness",
    "long_prompt_tokens",
    "long_share",
    "max_wait_s",
    "grammar_timeout_s",
    "device_graphs",
    "device_lists",
)


class Opened(NamedTuple):
    """A model that is ready to be served."""

    name: str
    channel: EngineChannel
    tokenizer: Tokenizer | None


def with_artifacts(config: ServerConfig, artifacts: Sequence[Path]) -> ServerConfig:
    """The settings with the artifacts of the command line behind those of the file. UsageError when there
    are none, two of one name, or one name for several."""
    given = [ModelConfig(artifact=str(path)) for path in artifacts]
    models = [*config.models, *given]
    if not models:
        raise UsageError(
            "server.no_model",
            "There is nothing to serve.",
            "Neither an ARTIFACT was named, nor are there models in a configuration file.",
            "Name an artifact, or list `models` in the file given with --config.",
        )
    if config.served_name is not None:
        if len(models) > 1:
            raise UsageError(
                "server.served_name",
                f"One name was given for {len(models)} artifacts.",
                "Clients choose among several by their names.",
                "Leave --served-name out, or serve one artifact.",
            )
        models = [msgspec.structs.replace(models[0], name=config.served_name)]
    merged = msgspec.structs.replace(config, models=tuple(models))
    merged.validate()
    return merged


def runtime_config(model: ModelConfig, config: ServerConfig) -> RuntimeConfig:
    """The engine's part of the settings, the model's own first. The server admits; the engine's own queue
    need only be as long."""
    given = {
        name: own if (own := getattr(model, name)) is not None else getattr(config, name)
        for name in _ENGINE_SETTINGS
    }
    base = {name: value for name, value in given.items() if value is not None}
    usual = RuntimeConfig()
    max_requests = base.get("max_requests", usual.max_requests)
    return RuntimeConfig(
        **base,
        max_waiting=config.max_waiting + max_requests,
        max_step_tokens=max(usual.max_step_tokens, max_requests),
    )


def open_model(model: ModelConfig, config: ServerConfig, ledger: StartLedger) -> Opened:
    """Loads an artifact, here or in a child process. Errors are those of `load`."""
    path = Path(model.artifact)
    if _runs_in_child(model, config):
        settings = runtime_config(model, config)
        channel = ProcessChannel(engine_command(path, settings), max_restarts=config.max_restarts)
        artifact = open_unchecked(path)
        has_tokenizer = bool(artifact.manifest.of_kind("tokenizer"))
        tokenizer = Tokenizer.from_folder(artifact.tokenizer_folder) if has_tokenizer else None
        ledger.mark("child process")
        return Opened(model.served_name, channel, tokenizer)
    llm = load(path, runtime_config(model, config), ledger=ledger)
    return Opened(model.served_name, LocalChannel(llm), llm.tokenizer)


def _runs_in_child(model: ModelConfig, config: ServerConfig) -> bool:
    """A fault of a CUDA device ends the process it happens in."""
    chosen = model.channel if model.channel != "auto" else config.channel
    if chosen == "auto":
        return open_unchecked(model.artifact).manifest.target.kind == "cuda"
    return chosen == "process"
