"""Makes the oracle of an artifact: a few prompts through the reference executor, before the artifact is
committed. Knows which prompts and which tolerance; measuring is the runtime's."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from ..artifact.oracle import Oracle
from ..ir.program import Program
from ..runtime.config import RuntimeConfig
from ..runtime.oracle import measure_prompts
from ..spec.cache import CacheLayout
from ..spec.model import ModelSpec

# Prose, code with numbers, and text that is not English: each as many tokens as below, so that all
# prompts together fill two tiles of the reference executor.
_TEXTS = (
    "The old keeper climbed the stairs every evening, lit the lamp, and wrote the weather in a green book.",
    "def area(width: float, height: float = 2.5) -> float:\n    return width * height  # 3 * 2.5 = 7.5\n",
    "Am nächsten Morgen lag Schnee auf den Dächern, und die Kinder liefen früh hinaus, um ihn zu sehen.",
)
_PROMPT_TOKENS = 21
_PAGES_FOR_TOKENS = 256

# Difference of a logprob, in nats, that two correct implementations may have: other machines and
# libraries sum in another order, and round to the compute or cache dtype at other places.
_TOLERANCES = {"float32": 2e-3, "float16": 5e-2, "bfloat16": 0.25, "int8": 0.25, "float8_e4m3fn": 0.5}


def make_oracle(program: Program, encode: Callable[[str], Sequence[int]] | None) -> Oracle:
    """The oracle of a final program, with its weights as they were written, by the reference executor.

    `encode` is its tokenizer; without one (None) the prompts are random ids. Every quantised matrix is
    dequantised as it is needed, so that memory stays at one matrix beyond the mapped weights.
    """
    from ..runtime.executors.reference import make_executor, source_of_program

    source = source_of_program(program)
    spec, layout = source.spec, source.cache
    prompts = oracle_prompts(encode, spec.vocab_size)
    config = RuntimeConfig(
        max_requests=len(prompts),
        max_step_tokens=len(prompts) * _PROMPT_TOKENS,
        max_model_len=min(_PAGES_FOR_TOKENS, spec.max_context),
    )
    executor = make_executor(source, config, dense_bytes=0)
    try:
        measured = measure_prompts(executor, prompts)
    finally:
        executor.close()
    return Oracle(prompts=measured, tolerance=tolerance_of(spec, layout))


def oracle_prompts(
    encode: Callable[[str], Sequence[int]] | None, vocab_size: int
) -> tuple[tuple[int, ...], ...]:
    """Prompts of the same length, always the same for one tokenizer and vocabulary.

    A text that has fewer tokens, or ids that the model does not know, is filled up with random ids.
    """
    prompts: list[tuple[int, ...]] = []
    for index, text in enumerate(_TEXTS):
        rng = random.Random(index)
        ids = list(encode(text)) if encode is not None else []
        known = [token_id for token_id in ids if token_id < vocab_size][:_PROMPT_TOKENS]
        missing = _PROMPT_TOKENS - len(known)
        prompts.append((*known, *(rng.randrange(vocab_size) for _ in range(missing))))
    return tuple(prompts)


def tolerance_of(spec: ModelSpec, layout: CacheLayout) -> float:
    """The oracle's tolerance: that of the coarsest dtype among compute and cache."""
    dtypes = {spec.compute_dtype, *(group.dtype for group in layout.groups)}
    return max(_TOLERANCES[dtype] for dtype in dtypes)
