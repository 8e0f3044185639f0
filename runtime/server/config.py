"""The server's settings: one struct, one YAML file, unknown keys refused. Knows no model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec

from ...spec.errors import UsageError

Count = Annotated[int, msgspec.Meta(ge=1)]
Seconds = Annotated[float, msgspec.Meta(gt=0)]


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a server behaves. None in a limit means: as much as the model allows.

    `max_waiting` sequences may queue beyond those that run; `max_prompt_tokens` and `max_output_tokens` (over
    all prompts and completions) bound one request; `max_sequences` bounds prompts times `n` of one request;
    `max_concurrency_per_key` bounds the sequences of one API key. Bodies beyond `max_body_bytes`, or slower
    than `body_timeout_s`, are refused. A reader that takes nothing for `send_timeout_s` is given up. At the
    end running requests have `drain_timeout_s`. No step for `watchdog_s` while there is work makes
    `/health` fail. `api_keys` names a file with a key a line, `name:key` or `key`.
    """

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
    json_logs: bool = False
    access_log: bool = False
    max_requests: Count | None = None
    max_model_len: Count | None = None
    cache_bytes: Annotated[int, msgspec.Meta(ge=0)] | None = None
    num_threads: Annotated[int, msgspec.Meta(ge=0)] | None = None
    timeout_s: Seconds | None = None

    def validate(self) -> None:
        """Raises UsageError for settings that do not fit together."""
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise UsageError(
                "server.tls",
                "Only one of tls_certificate and tls_key is set.",
                "TLS needs both.",
                "Set both, or neither.",
            )


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
