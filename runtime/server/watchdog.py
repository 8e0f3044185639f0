"""Looks after engines that have work and do not move: says once what they were at, and starts those again
that live in a process of their own. Knows no route."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import threading
import traceback

import msgspec

from .state import ServedModel, ServerState

_POLL_S = 1.0


async def watch(state: ServerState) -> None:
    """Until it is cancelled. `/health` fails meanwhile, by itself."""
    log = logging.getLogger("llmc.server")
    told: set[str] = set()
    while True:
        await asyncio.sleep(min(_POLL_S, state.config.watchdog_s / 4))
        stuck = state.stuck()
        told &= stuck.keys()
        for name in stuck.keys() - told:
            told.add(name)
            model = state.models[name]
            log.error("%s Its state: %s", stuck[name], dump_of(model, state.clock()))
            if model.client.recover():
                log.error("the engine of %s is ended and started again", name)


def dump_of(model: ServedModel, now_s: float) -> str:
    """What an engine counts, its live requests, and where its thread is, as one JSON object."""
    return json.dumps(
        {
            "engine": msgspec.to_builtins(model.client.snapshot()),
            "requests": [
                {
                    "age_s": round(now_s - run.arrival_s, 3),
                    "prompt_tokens": sum(map(len, run.plan.prompts)),
                    "output_tokens": run.num_output_tokens,
                    "sequences": run.plan.num_sequences,
                }
                for run in list(model.live)
            ],
            "threads": engine_stacks(),
        }
    )


def engine_stacks() -> list[list[str]]:
    """Where the engine threads of this process are, innermost call last."""
    frames = sys._current_frames()  # pyright: ignore[reportPrivateUsage] - the one way to another thread's stack
    return [
        [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_stack(frames[ident])]
        for ident in (each.ident for each in threading.enumerate() if each.name == "llmc-engine")
        if ident in frames
    ]
