"""What lives as long as the server: models by name, keys, metrics, whether it drains. Knows no routes."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..tokenizer import Tokenizer
from .backlog import Backlog
from .channel import EngineChannel
from .client import EngineClient
from .codec import Codec
from .config import ModelConfig, ServerConfig
from .device_metrics import watch_devices
from .errors import ServingError
from .keys import ApiKeys
from .messages import EngineSnapshot
from .metrics import Metrics, ModelMetrics
from .plan import MAX_DRAWN_SEED
from .run import Run
from .tools import dialect_of

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """One artifact being served under `name` and `aliases`; `live` are its requests. Where `fallback_on` says
    so, the model called `fallback` answers in its place."""

    name: str
    codec: Codec
    client: EngineClient
    backlog: Backlog
    metrics: ModelMetrics
    created: int
    aliases: tuple[str, ...] = ()
    fallback: str | None = None
    fallback_on: tuple[str, ...] = ()
    live: set[Run] = field(default_factory=set[Run])


@dataclass(slots=True)
class _Progress:
    """When an engine was last seen to move."""

    num_steps: int = -1
    since_s: float = 0.0


@dataclass(slots=True, kw_only=True)
class ServerState:
    """The one object the routes share."""

    config: ServerConfig
    keys: ApiKeys
    models: dict[str, ServedModel]
    metrics: Metrics
    clock: Clock = time.monotonic
    draw_seed: Callable[[], int] = lambda: secrets.randbelow(MAX_DRAWN_SEED)
    is_draining: bool = False
    started_s: float = 0.0
    aliases: dict[str, str] = field(default_factory=dict[str, str])
    _progress: dict[str, _Progress] = field(default_factory=dict[str, _Progress])

    @property
    def num_open(self) -> int:
        """Engine requests over all models that have not ended."""
        return sum(model.client.num_open for model in self.models.values())

    def model(self, name: str | None) -> ServedModel:
        """The model a request names; the only one where it names none. A 404 for another name."""
        if name is None and len(self.models) == 1:
            return next(iter(self.models.values()))
        if name is None:
            raise ServingError(
                400,
                "request.missing_field",
                "The field model is missing.",
                f"This server has several models: {', '.join(self.models)}.",
                "Send one of these names.",
                param="model",
            )
        found = self.models.get(self.aliases.get(name, name))
        if found is None:
            raise ServingError(
                404,
                "model_not_found",
                f"The model {name[:200]!r} does not exist.",
                f"This server has {', '.join(self.models)}.",
                "Send one of these names.",
                param="model",
            )
        return found

    def check_admits(self) -> None:
        """A 503 once the server is draining."""
        if self.is_draining:
            raise ServingError(
                503,
                "server.draining",
                "The server is shutting down.",
                "It finishes what it has and takes nothing new.",
                "Send the request again; another server may take it.",
                retry_after_s=self.config.drain_timeout_s,
            )

    def starting(self) -> str | None:
        """A model whose engine is being started again; None when there is none."""
        return next(
            (name for name, model in self.models.items() if model.client.snapshot().is_starting), None
        )

    def restarted(self) -> str | None:
        """Which engines died and were started again, and why the last time; None when none was."""
        told: list[str] = []
        for name, model in self.models.items():
            snapshot = model.client.snapshot()
            if snapshot.last_death is not None:
                times = f"{snapshot.num_restarts} time{'' if snapshot.num_restarts == 1 else 's'}"
                told.append(
                    f"The engine of {name} died {times}, the last time because {snapshot.last_death}."
                )
        return " ".join(told) or None

    def failure(self) -> str | None:
        """Why an engine is not alive; None when all are."""
        for name, model in self.models.items():
            why = model.client.snapshot().failure
            if why is not None:
                return f"The engine of {name} has failed: {why}"
        return next(iter(self.stuck().values()), None)

    def stuck(self) -> dict[str, str]:
        """The models whose engines have work and have ended no step for `watchdog_s`, with a sentence each;
        call this from time to time."""
        now_s = self.clock()
        found: dict[str, str] = {}
        for name, model in self.models.items():
            snapshot = model.client.snapshot()
            progress = self._progress.setdefault(name, _Progress(since_s=now_s))
            is_idle = not (snapshot.num_running or snapshot.num_waiting)
            steps = snapshot.num_steps + snapshot.num_failed_steps
            if is_idle or steps != progress.num_steps:
                progress.num_steps, progress.since_s = steps, now_s
            elif now_s - progress.since_s > self.config.watchdog_s:
                found[name] = (
                    f"The engine of {name} has not moved for {now_s - progress.since_s:.0f} s, with "
                    f"{snapshot.num_running} sequences running and {snapshot.num_waiting} waiting."
                )
        return found


def make_state(
    config: ServerConfig,
    engines: Sequence[tuple[str, EngineChannel, Tokenizer | None]],
    keys: ApiKeys | None = None,
    clock: Clock = time.monotonic,
    created: int | None = None,
) -> ServerState:
    """The state of a server over `engines` of (served name, channel, tokenizer); aliases and fallbacks are
    those that the settings have for these names."""
    settings = {model.served_name: model for model in config.models}
    models: dict[str, ServedModel] = {}

    def snapshots() -> list[tuple[str, EngineSnapshot]]:
        return [(name, model.client.snapshot()) for name, model in models.items()]

    metrics = Metrics(snapshots, config.vllm_metrics)
    for name, channel, tokenizer in engines:
        client = EngineClient(channel)
        limits = client.facts.limits
        own = settings.get(name, ModelConfig(artifact=name))
        template = tokenizer.chat_source if tokenizer is not None else None
        dialect = dialect_of(template, own.tool_format, own.reasoning_format)
        models[name] = ServedModel(
            name=name,
            codec=Codec(tokenizer, limits, dialect),
            client=client,
            backlog=Backlog(limits.max_requests + config.max_waiting, config.max_concurrency_per_key, clock),
            metrics=ModelMetrics(metrics, name, clock),
            created=int(time.time()) if created is None else created,
            aliases=own.aliases,
            fallback=own.fallback,
            fallback_on=own.fallback_on,
        )
    watch_devices(metrics.registry, {model.client.facts.executor for model in models.values()})
    return ServerState(
        config=config,
        keys=keys or ApiKeys(),
        models=models,
        metrics=metrics,
        clock=clock,
        started_s=clock(),
        aliases={alias: name for name, model in models.items() for alias in model.aliases},
    )
