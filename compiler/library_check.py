"""Every library that this processor can run is held to the oracle before its artifact is committed: the best
one by its numbers, each of the others by giving the best one's bits."""

from __future__ import annotations

from collections.abc import Sequence

from ..artifact.cpu import CPU_UNIT, decode_unit
from ..artifact.oracle import Oracle
from ..artifact.reader import Artifact
from ..runtime.config import RuntimeConfig
from ..runtime.executors.cpu import executor_of, open_model, processor_features, runnable_levels
from ..runtime.executors.cpu_model import CpuModel
from ..runtime.executors.tiles import SequencePart
from ..runtime.oracle import oracle_problems
from ..spec.errors import CheckFailed

# (tokens of the first sequence, of the second) of each step: a chunk, a mixed step, a step of decoding. Slow
# levels take seconds a token of a large model, and every kernel is in every step.
_STEPS = ((9, 0), (1, 2), (1, 0))


def check_libraries(artifact: Artifact, oracle: Oracle) -> None:
    """Run the oracle's prompts through the best library, and the beginnings of two through all of them.

    Raises CheckFailed naming the level that differs.
    """
    unit = decode_unit(artifact.read_bytes(CPU_UNIT))
    tokens = sum(len(prompt.token_ids) for prompt in oracle.prompts)
    config = RuntimeConfig(
        max_requests=max(2, len(oracle.prompts)),
        max_step_tokens=tokens,
        max_model_len=min(2 * tokens, artifact.manifest.spec.max_context),
    )
    prompts = [oracle.prompts[0].token_ids, oracle.prompts[-1].token_ids]
    best: list[bytes] = []
    for level in runnable_levels(unit, processor_features()):
        model, caps = open_model(artifact, unit, level, config)
        executor = executor_of(model, caps)
        try:
            if not best:
                problems = oracle_problems(executor, oracle)
                if problems:
                    raise _differs(level, f"{problems[0]}")
            bits = _bits(model, prompts, len(artifact.manifest.cache.groups))
        finally:
            executor.close()
        if best and bits != best:
            step = next(index for index, (a, b) in enumerate(zip(bits, best, strict=True)) if a != b)
            raise _differs(
                level, f"its logits of step {step + 1} are not those of the best level, to the bit"
            )
        best = best or bits


def _bits(model: CpuModel, prompts: Sequence[Sequence[int]], num_groups: int) -> list[bytes]:
    """The logits of each step of `_STEPS` over the beginnings of two prompts, as far as they go."""
    done, bits = [0, 0], list[bytes]()
    for counts in _STEPS:
        parts: list[SequencePart] = []
        for index, count in enumerate(counts):
            ids = prompts[index][done[index] : done[index] + count]
            if ids:
                parts.append(
                    SequencePart(
                        start=done[index],
                        token_ids=ids,
                        block_tables=[[index]] * num_groups,
                        wanted=range(len(ids)),
                    )
                )
            done[index] += len(ids)
        if parts:
            bits.append(b"".join(tile.logits.tobytes() for tile in model.run(parts)))
    return bits


def _differs(level: str, what: str) -> CheckFailed:
    return CheckFailed(
        "cpu.library_differs",
        f"The library for {level} does not compute what the program says.",
        f"{what}.",
        "Compile with --target reference, and report the model and the compiler's version.",
    )
