"""What is measured: an artifact, served by a child process for as long as it takes, or a server that runs
already."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ...artifact.reader import open_unchecked
from ...spec.errors import TargetError
from .client import Endpoint

_END_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """`vocab_size`, `weight_bytes` and `on_gpu` are known of artifacts only."""

    endpoint: Endpoint
    max_model_len: int | None = None
    vocab_size: int | None = None
    weight_bytes: int | None = None
    on_gpu: bool = False


class _Card(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class _Cards(msgspec.Struct):
    data: list[_Card]


def is_url(target: str) -> bool:
    return target.startswith(("http://", "https://"))


@contextlib.contextmanager
def open_target(
    target: str, *, model: str | None, api_key: str | None, ignore_eos: bool, serve_options: Sequence[str]
) -> Generator[Target]:
    """The server at a URL, or one over an artifact, started with `serve_options` and ended with the context.
    ArtifactError and TargetError for what cannot be served or reached."""
    if is_url(target):
        url = target.rstrip("/").removesuffix("/v1")
        cards = _ask_models(url, api_key)
        card = next((each for each in cards if each.id == model), cards[0] if model is None else None)
        if card is None:
            raise _unreachable(url, f"It has no model {model!r}, but {', '.join(each.id for each in cards)}.")
        endpoint = Endpoint(url=url, model=card.id, api_key=api_key, ignore_eos=ignore_eos)
        yield Target(endpoint=endpoint, max_model_len=card.max_model_len)
        return
    manifest = open_unchecked(target).manifest
    with served(Path(target), serve_options) as ready:
        url = str(ready["url"])
        card = _ask_models(url, None)[0]
        yield Target(
            endpoint=Endpoint(url=url, model=card.id, ignore_eos=ignore_eos),
            max_model_len=card.max_model_len,
            vocab_size=manifest.spec.vocab_size,
            weight_bytes=sum(entry.size_bytes for entry in manifest.of_kind("weights")),
            on_gpu=manifest.target.kind == "cuda",
        )


@contextlib.contextmanager
def served(artifact: Path, options: Sequence[str] = ()) -> Generator[dict[str, Any]]:
    """`llmc serve` as a process: what it announced, and `wall_s`, the seconds from its start to that word.
    TargetError when it ends before."""
    package = (__package__ or "llmc").split(".")[0]
    command = [sys.executable, "-m", f"{package}.cli", "serve", str(artifact), "--port", "0", "--json"]
    started_s = time.perf_counter()
    process = subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        wall_s = time.perf_counter() - started_s
        try:
            ready = json.loads(line)
            url = ready["url"]
        except (ValueError, KeyError) as error:
            said = process.communicate(timeout=_END_S)[1].strip()
            raise TargetError(
                "bench.no_start",
                f"The server over {artifact} did not start.",
                f"It said: {(line.strip() or said)[-500:]}.",
                "Try `llmc serve` with the same artifact.",
            ) from error
        yield {**ready, "url": url, "wall_s": wall_s}
    finally:
        process.terminate()
        try:
            process.communicate(timeout=_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def bench_start(artifact: Path, num_starts: int, options: Sequence[str] = ()) -> dict[str, Any]:
    """Starts a server `num_starts` times. `ready_s` are seconds from the process's start to its being ready,
    `ledger` the median start's, `ledger_gap` the largest share by which a ledger missed its wall clock."""
    starts: list[dict[str, Any]] = []
    for _ in range(num_starts):
        with served(artifact, options) as ready:
            starts.append(ready)
    starts.sort(key=lambda ready: ready["wall_s"])
    middle = starts[len(starts) // 2]
    return {
        "ready_s": middle["wall_s"],
        "ready_s_each": [ready["wall_s"] for ready in starts],
        "ledger": middle["ledger"],
        "ledger_gap": max(abs(ready["ready_s"] / ready["wall_s"] - 1) for ready in starts),
    }


def _ask_models(url: str, api_key: str | None) -> list[_Card]:
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(f"{url}/v1/models", headers=headers), timeout=30
        ) as answer:
            cards = msgspec.json.decode(answer.read(), type=_Cards).data
    except (OSError, urllib.error.URLError, ValueError) as error:
        raise _unreachable(url, f"{type(error).__name__}: {error}.") from error
    if not cards:
        raise _unreachable(url, "It serves no models.")
    return cards


def _unreachable(url: str, why: str) -> TargetError:
    return TargetError(
        "bench.unreachable",
        f"The server at {url} cannot be measured.",
        why,
        "Check the address, the model's name and the key.",
    )
