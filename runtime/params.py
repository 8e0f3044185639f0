"""What a caller may ask of one generation, checked where it enters. Knows no tokenizer and no model:
what depends on them (end tokens, vocabulary size) is passed in when the request is made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..spec.errors import RequestError
from .protocol import SamplingState
from .structured import StructuredOutput

MAX_STOP_STRINGS = 64
MAX_LOGPROBS = 100
MAX_SEED = 2**64 - 1
_SEED_STEP = 0x9E3779B97F4A7C15


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to generate. Construction raises RequestError naming the field, its value and its range.

    `max_tokens` None means up to the context length; `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and
    `min_p` 0 are off; `repetition_penalty` divides positive and multiplies negative logits of every token
    of prompt and output, the other two subtract from those of the output. `seed` None draws one per
    request. `n` independent completions: the first uses `seed` itself. `logprobs` is the number of top
    alternatives returned with each token, None for no logprobs. `stop` strings and `stop_token_ids` end
    the text and do not appear in it; the end tokens of the model do the same unless `ignore_eos`; none
    of them can come before `min_tokens` (for stop strings: none is looked for). `structured` is the form
    the text must have; a text that has it and can go no further ends, `min_tokens` or not.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float])
    skip_special_tokens: bool = True
    structured: StructuredOutput | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        self._check_numbers()
        self._check_stops()
        for token_id, bias in self.logit_bias.items():
            _check_int("logit_bias", token_id, 0, None)
            _check_float("logit_bias", bias, -100.0, 100.0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _out_of_range("min_tokens", self.min_tokens, f"0 to max_tokens = {self.max_tokens}")

    def _check_numbers(self) -> None:
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1, None)
        _check_float("temperature", self.temperature, 0.0, 100.0)
        if 0.0 < self.temperature < 1e-6:
            raise _out_of_range("temperature", self.temperature, "0 (greedy), or 1e-06 to 100")
        _check_float("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _check_int("top_k", self.top_k, 0, None)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_float("repetition_penalty", self.repetition_penalty, 0.0, 100.0, low_open=True)
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.seed is not None:
            _check_int("seed", self.seed, 0, MAX_SEED)
        _check_int("n", self.n, 1, 128)
        if self.logprobs is not None:
            _check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        _check_int("min_tokens", self.min_tokens, 0, None)
        for name in ("prompt_logprobs", "ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise _out_of_range(name, getattr(self, name), "true or false")
        if not isinstance(self.structured, StructuredOutput | None):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise _out_of_range("structured", self.structured, "a StructuredOutput, or None")

    def _check_stops(self) -> None:
        if len(self.stop) > MAX_STOP_STRINGS:
            raise _out_of_range("stop", f"{len(self.stop)} strings", f"at most {MAX_STOP_STRINGS} strings")
        for text in self.stop:
            if not isinstance(text, str) or not text:  # pyright: ignore[reportUnnecessaryIsInstance]
                raise _out_of_range("stop", text, "strings of at least one character")
        for token_id in self.stop_token_ids:
            _check_int("stop_token_ids", token_id, 0, None)

    def stop_ids(self, eos_token_ids: tuple[int, ...]) -> tuple[int, ...]:
        """The token ids that end a request: its own, and the model's unless `ignore_eos`."""
        ends = () if self.ignore_eos else eos_token_ids
        return tuple(dict.fromkeys((*ends, *self.stop_token_ids)))

    def sampling_state(
        self, seed: int, vocab_size: int, eos_token_ids: tuple[int, ...], completion: int = 0
    ) -> SamplingState:
        """What the executor needs for completion number `completion` of this request.

        `seed` is used where the request has none. RequestError for a token id outside of the vocabulary.
        """
        for name, ids in (("stop_token_ids", self.stop_token_ids), ("logit_bias", tuple(self.logit_bias))):
            for token_id in ids:
                _check_int(name, token_id, 0, vocab_size - 1)
        base = self.seed if self.seed is not None else seed
        return SamplingState(
            temperature=float(self.temperature),
            top_k=self.top_k,
            top_p=float(self.top_p),
            min_p=float(self.min_p),
            repetition_penalty=float(self.repetition_penalty),
            presence_penalty=float(self.presence_penalty),
            frequency_penalty=float(self.frequency_penalty),
            seed=(base + completion * _SEED_STEP) & MAX_SEED,
            min_tokens=self.min_tokens,
            banned_until_min=self.stop_ids(eos_token_ids) if self.min_tokens else (),
            logit_bias=tuple(sorted((token, float(bias)) for token, bias in self.logit_bias.items())),
            logprobs=self.logprobs,
        )


def _check_int(name: str, value: object, low: int, high: int | None) -> None:
    allowed = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise _out_of_range(name, value, allowed)
    if value < low or (high is not None and value > high):
        raise _out_of_range(name, value, allowed)


def _check_float(name: str, value: object, low: float, high: float, low_open: bool = False) -> None:
    allowed = f"a number {'above' if low_open else 'from'} {low:g} {'up ' if low_open else ''}to {high:g}"
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise _out_of_range(name, value, allowed)
    if value < low or value > high or (low_open and value == low):
        raise _out_of_range(name, value, allowed)


def _out_of_range(name: str, value: object, allowed: str) -> RequestError:
    return RequestError(
        f"request.{name}",
        f"{name} is {value!r}.",
        f"Allowed is {allowed}.",
        f"Send a value for {name} in that range, or leave it out.",
    )
