"""Makes the oracle of an artifact: a few prompts through the reference executor, before the artifact is
committed. Knows which prompts and which tolerance; measuring is the runtime's."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..artifact.oracle import Oracle, OraclePrompt
from ..ir.arguments import argument
from ..ir.program import Program
from ..ir.weights import Reader, SameForm
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
# Where rounding alone moves logprobs further, so many times as far is still no error.
_ROUNDINGS = 3


def make_oracle(program: Program, encode: Callable[[str], Sequence[int]] | None) -> Oracle:
    """The oracle of a final program, with its weights as they were written, by the reference executor.

    `encode` is its tokenizer; without one (None) the prompts are random ids. Every quantised matrix is
    dequantised as it is needed, so that memory stays at one matrix beyond the mapped weights.
    """
    prompts = oracle_prompts(encode, program.spec.vocab_size)
    measured = _measure(program, prompts)
    assert program.cache is not None
    tolerance = tolerance_of(program.spec, program.cache)
    if tolerance == _TOLERANCES["float32"] and _rounds_inputs(program):
        tolerance = max(tolerance, _ROUNDINGS * _furthest(measured, _measure(_shaken(program), prompts)))
    return Oracle(prompts=measured, tolerance=tolerance)


def _measure(program: Program, prompts: Sequence[tuple[int, ...]]) -> tuple[OraclePrompt, ...]:
    from ..runtime.executors.reference import make_executor, source_of_program

    source = source_of_program(program)
    config = RuntimeConfig(
        max_requests=len(prompts),
        max_step_tokens=len(prompts) * _PROMPT_TOKENS,
        max_model_len=min(_PAGES_FOR_TOKENS, source.spec.max_context),
    )
    executor = make_executor(source, config, dense_bytes=0)
    try:
        return measure_prompts(executor, prompts)
    finally:
        executor.close()


def _rounds_inputs(program: Program) -> bool:
    """Whether a product rounds what it reads to codes: there a difference in the last place becomes one of a
    whole code, and what follows moves by as much as rounding to codes itself does."""
    rounding = {
        torch.ops.llmc.quantized_linear.default: "activation",
        torch.ops.llmc.quantized_moe.default: "activation_scheme",
    }
    return any(
        argument(node, rounding[node.target]) for node in program.graph.nodes if node.target in rounding
    )


def _shaken(program: Program) -> Program:
    """`program` with every float32 weight (those of norms, at least) changed in its last place."""
    entries = {
        name: _Shaken(expr, seed)
        for seed, (name, expr) in enumerate(program.weights.entries.items())
        if expr.dtype == torch.float32
    }
    return program.replace(weights=program.weights.with_entries(entries))


@dataclass(frozen=True, slots=True)
class _Shaken(SameForm):
    """`of`, its values changed by about one unit in their last place."""

    seed: int

    def evaluate(self, reader: Reader) -> Tensor:
        """The changed values, always the same."""
        noise = torch.randn(self.shape, generator=torch.Generator().manual_seed(self.seed))
        return self.of.evaluate(reader) * (1 + noise * torch.finfo(self.dtype).eps)


def _furthest(measured: Sequence[OraclePrompt], moved: Sequence[OraclePrompt]) -> float:
    """The largest difference of a logprob."""
    return max(
        abs(a - b)
        for one, other in zip(measured, moved, strict=True)
        for a, b in zip(one.logprobs, other.logprobs, strict=True)
    )


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
