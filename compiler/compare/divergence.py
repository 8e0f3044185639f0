"""Where greedy texts of two sides part, and how sure each side was of its own token there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .measure import Samples
from .runner import Runner


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """Where greedy text leaves the baseline's: prompt and token index, both tokens, and by how much each side
    prefers its own (logit of its token above that of the other's, given the common text), in the logits that
    the side itself computed."""

    prompt: int
    index: int
    token: int
    baseline_token: int
    gap: float
    baseline_gap: float
    continuation: tuple[int, ...]
    baseline_continuation: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Parting:
    """The first token at which two texts differ, over all prompts in order of index."""

    prompt: int
    index: int


def first_divergences(
    samples: Mapping[str, Samples],
    baseline: str,
    prompts: Sequence[tuple[int, ...]],
    make: Mapping[str, Callable[[], Runner]],
) -> dict[str, Divergence | None]:
    """Of each side the first token at which its greedy text leaves that of `baseline`; None where none does.

    Gaps are differences of log-probabilities, which are those of logits, told by sides that `make` opens once
    more: what a token's logits are depends on nothing but the tokens before it.
    """
    texts = {name: found.token_ids for name, found in samples.items()}
    partings = {name: _parting(own, texts[baseline]) for name, own in texts.items()}
    asked: dict[str, list[tuple[int, ...]]] = {}
    for name, parting in partings.items():
        if parting is not None:
            own, other = (texts[each][parting.prompt] for each in (name, baseline))
            common = (*prompts[parting.prompt], *own[: parting.index])
            asked[name] = [(*common, own[parting.index]), (*common, other[parting.index])]
    theirs = _scored(make[baseline], [prompt for pair in asked.values() for prompt in pair])
    found: dict[str, Divergence | None] = dict.fromkeys(samples)
    for place, (name, pair) in enumerate(asked.items()):
        parting = partings[name]
        assert parting is not None
        ours = _scored(make[name], pair)
        own, other = (texts[each][parting.prompt][parting.index :] for each in (name, baseline))
        found[name] = Divergence(
            prompt=parting.prompt,
            index=parting.index,
            token=own[0],
            baseline_token=other[0],
            gap=ours[0] - ours[1],
            baseline_gap=theirs[2 * place + 1] - theirs[2 * place],
            continuation=own,
            baseline_continuation=other,
        )
    return found


def _parting(
    tokens: Mapping[int, tuple[int, ...]], expected: Mapping[int, tuple[int, ...]]
) -> _Parting | None:
    earliest: _Parting | None = None
    for prompt, own in tokens.items():
        pairs = enumerate(zip(own, expected[prompt], strict=False))
        index = next((index for index, (one, two) in pairs if one != two), None)
        if index is not None and (earliest is None or index < earliest.index):
            earliest = _Parting(prompt, index)
    return earliest


def _scored(make: Callable[[], Runner], prompts: Sequence[tuple[int, ...]]) -> Sequence[float]:
    if not prompts:
        return ()
    runner = make()
    try:
        return runner.score(prompts)
    finally:
        runner.close()
