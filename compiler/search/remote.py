"""An evaluator in a process of its own, which can be ended at any time and whose memory is its own.

Knows the worker's protocol; judges nothing.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Timer
from types import TracebackType
from typing import Any, Self

from ...passes.recipes import Recipe, to_yaml
from ...spec.errors import TargetError
from ..compare.runner import error_named
from .evaluator import Setting
from .search import Judgement, OutOfTime


class RemoteEvaluator:
    """A `search.Evaluator`. A process that dies, for want of memory perhaps, fails its own recipe: the next
    order gets a new one. A context manager."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._folder = TemporaryDirectory(prefix="llmc-search-")
        self._process: subprocess.Popen[str] | None = None

    @property
    def pid(self) -> int | None:
        """The process, while there is one; it leads a group of its own."""
        return None if self._process is None else self._process.pid

    def prepare(self, timeout_s: float) -> None:
        """Start the process, which compiles the original."""
        self._start(timeout_s)

    def size_bytes(self, recipe: Recipe, timeout_s: float) -> int:
        """Bytes of all weights, from the config alone."""
        return self._ask("size", recipe, timeout_s)

    def judge(self, recipe: Recipe, timeout_s: float) -> Judgement:
        """Compiled, and run on few tokens."""
        return Judgement(*self._ask("judge", recipe, timeout_s))

    def measure(self, recipe: Recipe, timeout_s: float) -> Mapping[str, float]:
        """Timed beside the unquantised model."""
        return self._ask("measure", recipe, timeout_s)

    def close(self) -> None:
        """End the process and all that it started. Idempotent."""
        if self._process is not None:
            _end(self._process)
            self._process = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        self._folder.cleanup()

    def _start(self, timeout_s: float) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", f"{__package__}.worker", json.dumps(asdict(self._setting))]
        with self._errors().open("w", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                encoding="utf-8",
                start_new_session=True,  # so that all it starts can be ended with it
            )
        self._answer(self._process, timeout_s)
        return self._process

    def _ask(self, what: str, recipe: Recipe, timeout_s: float) -> Any:
        until = time.monotonic() + timeout_s
        process = self._process or self._start(timeout_s)
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # the answer says why
            process.stdin.write(json.dumps({"do": what, "recipe": to_yaml(recipe)}) + "\n")
            process.stdin.flush()
        return self._answer(process, until - time.monotonic())

    def _answer(self, process: subprocess.Popen[str], timeout_s: float) -> Any:
        assert process.stdout is not None
        is_over = Event()

        def end() -> None:
            is_over.set()
            _kill(process)

        timer = Timer(max(0.0, timeout_s), end)
        timer.start()
        try:
            line = process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            self.close()
            if is_over.is_set():
                raise OutOfTime
            raise self._died(process)
        told: dict[str, Any] = json.loads(line)
        if "error" in told:
            error = told["error"]
            raise error_named(told["kind"])(error["code"], error["what"], error["why"], error["fix"])
        return told["done"]

    def _errors(self) -> Path:
        return Path(self._folder.name) / "stderr"

    def _died(self, process: subprocess.Popen[str]) -> TargetError:
        text = self._errors().read_text(encoding="utf-8", errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        said = f" Its last words: {lines[-1]}." if lines else " It said nothing; memory may have run out."
        return TargetError(
            "search.worker",
            "The process that compiled and measured recipes ended.",
            f"It left with code {process.wait()}.{said}",
            "Compile the recipe by itself to see more, or search on a machine with more memory.",
        )


def _kill(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _end(process: subprocess.Popen[str]) -> None:
    _kill(process)
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with suppress(BrokenPipeError):
                stream.close()
