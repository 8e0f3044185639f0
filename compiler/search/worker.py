"""The process behind `RemoteEvaluator`: judges the recipes of one model, an order and an answer a line."""

from __future__ import annotations

import json
import os
import sys
from typing import Any, TextIO

from ...spec.errors import LlmcError
from ..cache.config import CacheConfig
from ..cache.session import CompileCache
from .evaluator import ModelEvaluator, Setting


def main(setting: str) -> None:
    """Serve orders from stdin until it is closed. `setting` is a `Setting` as JSON."""
    answers = _own_stdout()
    values: dict[str, Any] = json.loads(setting)
    values |= {name: tuple(values[name]) for name in ("prompts", "overrides")}
    try:
        with (
            CompileCache(CacheConfig.from_environment()) as cache,
            ModelEvaluator(Setting(**values), cache) as evaluator,
        ):
            _say(answers, {"done": True})
            for line in sys.stdin:
                _say(answers, _obey(evaluator, json.loads(line)))
    except LlmcError as error:
        _say(answers, _failure(error))


def _obey(evaluator: ModelEvaluator, order: dict[str, Any]) -> dict[str, Any]:
    try:
        match order["do"]:
            case "size":
                return {"done": evaluator.size_bytes(order["recipe"])}
            case "judge":
                return {"done": evaluator.judge(order["recipe"])}
            case _:
                return {"done": evaluator.measure(order["recipe"])}
    except LlmcError as error:
        return _failure(error)


def _failure(error: LlmcError) -> dict[str, Any]:
    return {"error": error.as_dict(), "kind": type(error).__name__}


def _own_stdout() -> TextIO:
    """What was stdout, for answers alone: compilers and libraries print to stderr from here on."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def _say(answers: TextIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
