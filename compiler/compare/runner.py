"""One side of a comparison while it runs: a process of its own that holds one artifact and answers orders.

Knows the worker's protocol; judges nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

from ...spec.errors import InternalError, LlmcError, TargetError


class Single(NamedTuple):
    """One request alone: seconds to its first token, seconds per token behind it, and its tokens."""

    ttft_s: float
    tpot_s: float
    token_ids: tuple[int, ...]


class Batch(NamedTuple):
    """Requests together: wall seconds, tokens made, and (TTFT, TPOT) of each in seconds."""

    wall_s: float
    output_tokens: int
    times: tuple[tuple[float, float], ...]


class Facts(NamedTuple):
    """What loading took: seconds, and the largest resident size of the process in bytes."""

    load_s: float
    peak_bytes: int
    executor: str


class Runner(Protocol):
    """Generates greedily, end tokens banned, prompts never cached: the same work each time."""

    def single(self, prompt: Sequence[int], num_tokens: int) -> Single:
        """One request alone."""
        ...

    def batch(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Batch:
        """All requests at once."""
        ...

    def score(self, prompts: Sequence[Sequence[int]]) -> tuple[float, ...]:
        """The log-probability of each prompt's last token (of two at least) after those before it."""
        ...

    def facts(self) -> Facts:
        """Of the loading, and of memory so far."""
        ...

    def close(self) -> None:
        """Give everything back. Idempotent."""
        ...


class WorkerRunner:
    """A `Runner` in a child process, so that memory is its own and nothing else shares its interpreter."""

    def __init__(
        self,
        path: Path,
        *,
        num_threads: int = 0,
        max_requests: int = 8,
        module: str = f"{__package__}.worker",
    ) -> None:
        """Loads the artifact at `path` in a process that runs `module`. Raises what loading raises."""
        self._path = path
        command = [sys.executable, "-m", module, str(path), str(num_threads), str(max_requests)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )
        self._facts = Facts(**self._answer())

    def single(self, prompt: Sequence[int], num_tokens: int) -> Single:
        """One request alone."""
        told = self._ask({"do": "single", "prompt": list(prompt), "num_tokens": num_tokens})
        return Single(told["ttft_s"], told["tpot_s"], tuple(told["token_ids"]))

    def batch(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Batch:
        """All requests at once."""
        told = self._ask({"do": "batch", "prompts": [list(p) for p in prompts], "num_tokens": num_tokens})
        times = tuple((ttft, tpot) for ttft, tpot in told["times"])
        return Batch(told["wall_s"], told["output_tokens"], times)

    def score(self, prompts: Sequence[Sequence[int]]) -> tuple[float, ...]:
        """The log-probability of each prompt's last token after those before it."""
        return tuple(self._ask({"do": "score", "prompts": [list(p) for p in prompts]})["logprobs"])

    def facts(self) -> Facts:
        """Of the loading, and of memory so far."""
        return self._facts._replace(peak_bytes=self._ask({"do": "memory"})["peak_bytes"])

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer says why
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise TargetError(
                "compare.worker",
                f"The process that ran {self._path.name!r} ended.",
                f"It answered nothing and left with code {self._process.wait()}.",
                "Try `llmc generate` on this artifact; if memory ran out, compare fewer at a time.",
            )
        told: dict[str, Any] = json.loads(line)
        if "error" in told:
            error = told["error"]
            raise error_named(told["kind"])(error["code"], error["what"], error["why"], error["fix"])
        return told


def error_named(name: str) -> type[LlmcError]:
    """The class of llmc's errors that a worker met, by its name."""
    return next((kind for kind in LlmcError.__subclasses__() if kind.__name__ == name), InternalError)
