"""The runtime's settings: sizes and policies, nothing about any model. Checked once, before loading."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

from ..spec.errors import UsageError

ORDERS = ("hrrn", "fcfs", "priority")
SPECULATIONS = ("none", "ngram", "draft")
SWITCHES = ("auto", "on", "off")


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeConfig:
    """How an artifact is run.

    `cache_bytes` is for KV pages over all groups, 0 for the executor's default; `max_requests` run at the
    same time; `max_waiting` more may queue; `max_step_tokens` is the budget of one mixed batch;
    `max_model_len` None means as many tokens as the model and the cache allow. `draft_tokens` is the most
    tokens speculated at once, found by matching the last `ngram_min` to `ngram_max` tokens or by the
    executor's draft model. `draft` is the path of an artifact that drafts: it makes `speculation` draft.
    `num_threads` is for the executor, 0 means one per core. `response_cache_bytes` are for finished responses
    of greedy and seeded requests, which the same request gets again without being computed; 0 keeps none.
    `device_graphs` replays recorded steps of few tokens on a GPU; `device_lists` launches the others by lists
    that stand ready, and not kernel by kernel as operators are computed. Both are shown to give the tokens of
    the latter when an artifact is loaded: where they do not, `auto` warns and goes without, `on` is an error.
    With `device_overlap` a kernel may begin there before the one ahead of it has ended, from sm_90 on.
    A form of structured output that takes longer than `grammar_timeout_s` to compile is refused.

    `order` ranks the waiting requests of one key. With `fairness` the key that was served least comes first:
    its computed prompt tokens times `prompt_weight` and generated tokens times `output_weight`. A prompt with
    more than `long_prompt_tokens` that are not cached is a long job (0: none is): together these get
    `long_share` of the prompt tokens of a step, and what others leave over. What has waited for `max_wait_s`
    is passed by no later request of its key; None for no such bound.
    """

    cache_bytes: int = 0
    max_requests: int = 64
    max_waiting: int = 4096
    max_step_tokens: int = 2048
    max_model_len: int | None = None
    prefix_cache: bool = True
    order: Literal["hrrn", "fcfs", "priority"] = "hrrn"
    fairness: bool = True
    prompt_weight: float = 1.0
    output_weight: float = 2.0
    long_prompt_tokens: int = 0
    long_share: float = 0.5
    max_wait_s: float | None = None
    speculation: Literal["none", "ngram", "draft"] = "none"
    draft_tokens: int = 4
    ngram_min: int = 2
    ngram_max: int = 4
    draft: str | None = None
    timeout_s: float | None = None
    num_threads: int = 0
    response_cache_bytes: int = 0
    device_graphs: Literal["auto", "on", "off"] = "auto"
    device_lists: Literal["auto", "on", "off"] = "auto"
    device_overlap: bool = False
    grammar_timeout_s: float = 10.0

    def validate(self) -> None:
        """Raises UsageError for a value out of its range, naming field, value and range."""
        least = {
            "cache_bytes": 0,
            "max_requests": 1,
            "max_waiting": 0,
            "max_step_tokens": 1,
            "draft_tokens": 1,
            "ngram_min": 1,
            "ngram_max": 1,
            "num_threads": 0,
            "long_prompt_tokens": 0,
            "response_cache_bytes": 0,
        }
        for item in fields(self):
            value: object = getattr(self, item.name)
            if item.name in least and (not isinstance(value, int) or value < least[item.name]):
                raise _invalid(item.name, value, f"at least {least[item.name]}")
        if self.max_model_len is not None and self.max_model_len < 1:
            raise _invalid("max_model_len", self.max_model_len, "at least 1")
        if self.max_step_tokens < self.max_requests:
            raise _invalid(
                "max_step_tokens", self.max_step_tokens, f"at least max_requests = {self.max_requests}"
            )
        if self.ngram_max < self.ngram_min:
            raise _invalid("ngram_max", self.ngram_max, f"at least ngram_min = {self.ngram_min}")
        if self.order not in ORDERS:
            raise _invalid("order", self.order, f"one of {', '.join(ORDERS)}")
        if self.speculation not in SPECULATIONS:
            raise _invalid("speculation", self.speculation, f"one of {', '.join(SPECULATIONS)}")
        for name in ("device_graphs", "device_lists"):
            switch: object = getattr(self, name)
            if switch not in SWITCHES:
                raise _invalid(name, switch, f"one of {', '.join(SWITCHES)}")
        for name, weight in (("prompt_weight", self.prompt_weight), ("output_weight", self.output_weight)):
            if not 0 < weight < math.inf:
                raise _invalid(name, weight, "a finite number above 0")
        if not 0 < self.long_share < 1:
            raise _invalid("long_share", self.long_share, "above 0 and below 1")
        for name in ("timeout_s", "max_wait_s", "grammar_timeout_s"):
            seconds: float | None = getattr(self, name)
            if seconds is not None and not seconds > 0:
                raise _invalid(name, seconds, "above 0")


def _invalid(name: str, value: object, allowed: str) -> UsageError:
    return UsageError(
        f"runtime.{name}",
        f"The runtime setting {name} is {value!r}.",
        f"It must be {allowed}.",
        f"Choose another {name}.",
    )
