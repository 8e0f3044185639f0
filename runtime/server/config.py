"""The server's settings: one struct, one YAML file, unknown keys refused. Knows no model."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from ...spec.errors import UsageError

Count = Annotated[int, msgspec.Meta(ge=1)]
Seconds = Annotated[float, msgspec.Meta(gt=0)]
Switch = Literal["auto", "on", "off"]


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One artifact to serve under `name` (its folder's name where None) and `aliases`.

    When it cannot take a request because the server is full (`overload`), or because prompt and output do
    not fit its context (`long_prompt`), the model called `fallback` answers, and says so in `model` of the
    answer. `channel` is where its engine runs: in this process (`local`), in a child (`process`), or `auto`,
    a child where a device fault can end the process. `tool_format` and `reasoning_format` say how the model
    writes tool calls and thoughts; `auto` reads its chat template. `draft` is the artifact of a smaller model
    that drafts for it. `response_cache_bytes` bounds the memory for responses of greedy and seeded requests,
    which are answered from there when they are asked again. A form of structured output that takes longer
    than `grammar_timeout_s` to compile is a 400. `fairness`, `long_prompt_tokens`, `long_share` and
    `max_wait_s` say who goes first, `device_graphs` and `device_lists` how a GPU runs steps, as in
    RuntimeConfig. Settings that are None are the server's.
    """

    artifact: str
    name: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    aliases: tuple[Annotated[str, msgspec.Meta(min_length=1)], ...] = ()
    fallback: str | None = None
    fallback_on: tuple[Literal["overload", "long_prompt"], ...] = ("overload", "long_prompt")
    channel: Literal["auto", "local", "process"] = "auto"
    tool_format: Literal["auto", "none", "hermes", "llama3", "mistral"] = "auto"
    reasoning_format: Literal["auto", "none", "think"] = "auto"
    max_requests: Count | None = None
    max_model_len: Count | None = None
    cache_bytes: Annotated[int, msgspec.Meta(ge=0)] | None = None
    num_threads: Annotated[int, msgspec.Meta(ge=0)] | None = None
    timeout_s: Seconds | None = None
    draft: str | None = None
    response_cache_bytes: Annotated[int, msgspec.Meta(ge=0)] | None = None
    fairness: bool | None = None
    long_prompt_tokens: Annotated[int, msgspec.Meta(ge=0)] | None = None
    long_share: Annotated[float, msgspec.Meta(gt=0, lt=1)] | None = None
    max_wait_s: Seconds | None = None
    grammar_timeout_s: Seconds | None = None
    device_graphs: Switch | None = None
    device_lists: Switch | None = None

    @property
    def served_name(self) -> str:
        """What clients call it."""
        return self.name or Path(self.artifact).resolve().name.removesuffix(".llmc")


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a server behaves. None in a limit means: as much as the model allows.

    `max_waiting` sequences may queue beyond those that run; `max_prompt_tokens` and `max_output_tokens` (over
    all prompts and completions) bound one request; `max_sequences` bounds prompts times `n` of one request;
    `max_concurrency_per_key` bounds the sequences of one API key. Bodies beyond `max_body_bytes`, or slower
    than `body_timeout_s`, are refused. A reader that takes nothing for `send_timeout_s` is given up. At the
    end running requests have `drain_timeout_s`. No step for `watchdog_s` while there is work makes
    `/health` fail. `api_keys` names a file with a key a line, `name:key` or `key`. `vllm_metrics` exports
    what vLLM counts too under its names as well. `hourly_price` is what the machine costs, for the cost of
    1000 tokens on the status page. An engine in a child process that dies is started again at most
    `max_restarts` times within ten minutes.
    """

    models: tuple[ModelConfig, ...] = ()
    host: str = "127.0.0.1"
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 8000
    api_keys: str | None = None
    tls_certificate: str | None = None
    tls_key: str | None = None
    served_name: str | None = None
    max_waiting: Annotated[int, msgspec.Meta(ge=0)] = 256
    max_prompt_tokens: Count | None = None
    max_output_tokens: Count | None = None
    max_sequences: Count = 64
    max_concurrency_per_key: Count | None = None
    max_body_bytes: Count = 4 * 2**20
    body_timeout_s: Seconds = 30.0
    send_timeout_s: Seconds = 30.0
    drain_timeout_s: Annotated[float, msgspec.Meta(ge=0)] = 30.0
    watchdog_s: Seconds = 120.0
    max_connections: Count = 1024
    vllm_metrics: bool = False
    hourly_price: Annotated[float, msgspec.Meta(ge=0)] | None = None
    currency: Annotated[str, msgspec.Meta(max_length=8)] = "$"
    channel: Literal["auto", "local", "process"] = "auto"
    max_restarts: Annotated[int, msgspec.Meta(ge=0)] = 3
    json_logs: bool = False
    access_log: bool = False
    max_requests: Count | None = None
    max_model_len: Count | None = None
    cache_bytes: Annotated[int, msgspec.Meta(ge=0)] | None = None
    num_threads: Annotated[int, msgspec.Meta(ge=0)] | None = None
    timeout_s: Seconds | None = None
    draft: str | None = None
    response_cache_bytes: Annotated[int, msgspec.Meta(ge=0)] | None = None
    fairness: bool | None = None
    long_prompt_tokens: Annotated[int, msgspec.Meta(ge=0)] | None = None
    long_share: Annotated[float, msgspec.Meta(gt=0, lt=1)] | None = None
    max_wait_s: Seconds | None = None
    grammar_timeout_s: Seconds | None = None
    device_graphs: Switch | None = None
    device_lists: Switch | None = None

    def validate(self) -> None:
        """Raises UsageError for settings that do not fit together."""
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise UsageError(
                "server.tls",
                "Only one of tls_certificate and tls_key is set.",
                "TLS needs both.",
                "Set both, or neither.",
            )
        _check_names(self.models)


def _check_names(models: tuple[ModelConfig, ...]) -> None:
    """Every name and alias once; every fallback leads to a model, and never back."""
    names = Counter(name for model in models for name in (model.served_name, *model.aliases))
    for name, count in names.items():
        if count > 1:
            raise UsageError(
                "server.served_name",
                f"{'Two' if count == 2 else count} artifacts are called {name}.",
                "Clients choose among several by their names.",
                "Give them different names, or rename one of the folders.",
            )
    by_name = {model.served_name: model for model in models}
    for model in models:
        seen = [model.served_name]
        while (after := by_name[seen[-1]].fallback) is not None:
            if after not in by_name or after in seen:
                raise UsageError(
                    "server.fallback",
                    f"The fallback of {seen[-1]} is {after}.",
                    "That leads back to a model that was asked before."
                    if after in by_name
                    else f"There is no model of that name; there are {', '.join(by_name)}.",
                    "Name another model as fallback, or leave it out.",
                )
            seen.append(after)


def read_config(path: Path) -> ServerConfig:
    """The settings in a YAML file. UsageError naming the key that is unknown or wrong."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise _invalid(path, f"{error}") from error
    try:
        config = msgspec.yaml.decode(text, type=ServerConfig) if text.strip() else ServerConfig()
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _invalid(path, str(error)) from error
    config.validate()
    return config


def config_schema() -> dict[str, object]:
    """The JSON schema of the configuration file."""
    return msgspec.json.schema(ServerConfig)


def _invalid(path: Path, why: str) -> UsageError:
    return UsageError(
        "server.config",
        f"The configuration file {path} cannot be used.",
        f"{why.rstrip('.')}.",
        "Correct it: docs/serving.md lists every key.",
    )
