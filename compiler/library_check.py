"""Every library that this processor can run is held to the oracle before its artifact is committed."""

from __future__ import annotations

from ..artifact.cpu import CPU_UNIT, decode_unit
from ..artifact.oracle import Oracle
from ..artifact.reader import Artifact
from ..runtime.config import RuntimeConfig
from ..runtime.executors.cpu import open_level, processor_features, runnable_levels
from ..runtime.oracle import oracle_problems
from ..spec.errors import CheckFailed


def check_libraries(artifact: Artifact, oracle: Oracle) -> None:
    """Run the oracle's prompts through each library. Raises CheckFailed naming the level that differs."""
    unit = decode_unit(artifact.read_bytes(CPU_UNIT))
    tokens = sum(len(prompt.token_ids) for prompt in oracle.prompts)
    config = RuntimeConfig(
        max_requests=len(oracle.prompts),
        max_step_tokens=tokens,
        max_model_len=min(2 * tokens, artifact.manifest.spec.max_context),
    )
    for level in runnable_levels(unit, processor_features()):
        executor = open_level(artifact, unit, level, config)
        try:
            problems = oracle_problems(executor, oracle)
        finally:
            executor.close()
        if problems:
            raise CheckFailed(
                "cpu.library_differs",
                f"The library for {level} does not compute what the program says.",
                f"{problems[0]}.",
                "Compile with --target reference, and report the model and the compiler's version.",
            )
