"""What is asked, and when: lengths, prompts and arrival times, drawn from a seed. Knows no server."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from ...spec.errors import UsageError

# Means of prompt and output tokens in two public sets of conversations, as reported by Kwon et al. 2023
# (PagedAttention, figure 11). The spread of both is close to log-normal.
_MEANS = {"sharegpt": (161.31, 337.99), "alpaca": (19.31, 58.45)}
_SIGMA = 1.0
_MOST = 1024
_WORDS = (
    *("the", "of", "and", "to", "in", "is", "that", "it", "was", "for", "on", "are", "with", "as", "they"),
    *(
        "be",
        "at",
        "one",
        "have",
        "this",
        "from",
        "or",
        "had",
        "by",
        "hot",
        "word",
        "but",
        "what",
        "some",
        "we",
    ),
    *(
        "can",
        "out",
        "other",
        "were",
        "all",
        "there",
        "when",
        "up",
        "use",
        "your",
        "how",
        "said",
        "an",
        "each",
    ),
    *("which", "do", "their", "time", "if", "will", "way", "about", "many", "then", "them", "write", "would"),
    *("like", "so", "these", "long", "make", "thing", "see", "two", "has", "look", "more", "day", "could"),
)


@dataclass(frozen=True, slots=True)
class Size:
    """Tokens of one prompt, and of the output asked for."""

    num_prompt_tokens: int
    num_output_tokens: int


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: when it is due, in seconds from the start, its prompt, its output tokens."""

    at_s: float
    prompt: str | tuple[int, ...]
    num_output_tokens: int


def draw_sizes(lengths: str, count: int, rng: random.Random, max_model_len: int | None) -> list[Size]:
    """`count` sizes of a distribution: `sharegpt`, `alpaca`, `fixed:IN,OUT` or `uniform:A-B,C-D`. Sizes
    beyond `max_model_len` are drawn again. UsageError for another word, or one that can never fit."""
    draw = _Drawer(lengths, rng)
    sizes: list[Size] = []
    for _ in range(count):
        for _ in range(1000):
            size = draw()
            if max_model_len is None or size.num_prompt_tokens + size.num_output_tokens <= max_model_len:
                break
        else:
            raise _invalid(lengths, f"no draw in 1000 fits the context of {max_model_len} tokens")
        sizes.append(size)
    return sizes


def arrivals(count: int, rate_per_s: float | None, rng: random.Random) -> list[float]:
    """When requests are due: all at once for no rate, else a Poisson process."""
    if rate_per_s is None:
        return [0.0] * count
    times: list[float] = []
    now = 0.0
    for _ in range(count):
        times.append(now)
        now += rng.expovariate(rate_per_s)
    return times


def make_asks(
    sizes: Sequence[Size], times: Sequence[float], rng: random.Random, vocab_size: int | None
) -> list[Ask]:
    """Requests with prompts that share no prefix: token ids where the vocabulary is known, so that lengths
    are exact, else as many common words."""
    asks: list[Ask] = []
    for size, at_s in zip(sizes, times, strict=True):
        prompt: str | tuple[int, ...]
        if vocab_size is None:
            prompt = " ".join(rng.choices(_WORDS, k=size.num_prompt_tokens))
        else:
            prompt = tuple(rng.randrange(vocab_size) for _ in range(size.num_prompt_tokens))
        asks.append(Ask(at_s, prompt, size.num_output_tokens))
    return asks


class _Drawer:
    """A distribution by its name."""

    def __init__(self, lengths: str, rng: random.Random) -> None:
        self._rng = rng
        self._means = _MEANS.get(lengths)
        self._ranges: tuple[tuple[int, int], tuple[int, int]] | None = None
        if self._means is None:
            self._ranges = _parse(lengths)

    def __call__(self) -> Size:
        if self._ranges is not None:
            return Size(*(self._rng.randint(low, high) for low, high in self._ranges))
        assert self._means is not None
        return Size(*(self._lognormal(mean) for mean in self._means))

    def _lognormal(self, mean: float) -> int:
        """A whole number around `mean`, redrawn beyond the longest."""
        while True:
            value = round(self._rng.lognormvariate(math.log(mean) - _SIGMA**2 / 2, _SIGMA))
            if 1 <= value <= _MOST:
                return value


def _parse(lengths: str) -> tuple[tuple[int, int], tuple[int, int]]:
    kind, _, rest = lengths.partition(":")
    parts = rest.split(",")
    try:
        if kind == "fixed" and len(parts) == 2:
            ranges = tuple((int(part), int(part)) for part in parts)
        elif kind == "uniform" and len(parts) == 2:
            pairs = [part.split("-") for part in parts]
            ranges = tuple((int(low), int(high)) for low, high in pairs)
        else:
            raise _invalid(lengths, "there is no such distribution")
    except ValueError as error:
        raise _invalid(lengths, f"{error}") from error
    (first, second) = ranges
    if not (1 <= first[0] <= first[1] and 1 <= second[0] <= second[1]):
        raise _invalid(lengths, "every length is at least 1, and a range goes upwards")
    return first, second


def _invalid(lengths: str, why: str) -> UsageError:
    return UsageError(
        "bench.lengths",
        f"Lengths cannot be drawn from {lengths!r}.",
        f"{why[0].upper()}{why[1:]}.",
        "Use sharegpt, alpaca, fixed:IN,OUT or uniform:A-B,C-D.",
    )
