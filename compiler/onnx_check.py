"""The graph of an ONNX artifact is held to the oracle before it is committed; how close it comes is told."""

from __future__ import annotations

from dataclasses import dataclass

from ..artifact.oracle import Oracle
from ..artifact.reader import Artifact
from ..runtime.config import RuntimeConfig
from ..runtime.executors.registry import open_executor
from ..runtime.oracle import differences, measure_prompts
from ..spec.errors import CheckFailed


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendQuality:
    """What the executor says about the oracle's prompts against what the reference backend says, over
    `tokens` logprobs: largest and mean difference in nats, and the share of positions with the same
    likeliest token."""

    executor: str
    tokens: int
    max_logprob_error: float
    mean_logprob_error: float
    same_top: float


def check_graph(artifact: Artifact, oracle: Oracle) -> BackendQuality:
    """Run the oracle's prompts through ONNX Runtime.

    Raises CheckFailed naming the first token that differs by more than the oracle allows.
    """
    tokens = sum(len(prompt.token_ids) for prompt in oracle.prompts)
    config = RuntimeConfig(
        max_requests=len(oracle.prompts),
        max_step_tokens=tokens,
        max_model_len=min(2 * tokens, artifact.manifest.spec.max_context),
    )
    executor = open_executor(artifact, config)
    try:
        measured = measure_prompts(executor, [prompt.token_ids for prompt in oracle.prompts])
        name = executor.caps.name
    finally:
        executor.close()
    problems = differences(oracle, measured)
    if problems:
        raise CheckFailed(
            "onnx.graph_differs",
            "ONNX Runtime does not compute what the program says.",
            f"{problems[0]}.",
            "Compile with --target reference, and report the model and the version of onnxruntime.",
        )
    pairs = list(zip(oracle.prompts, measured, strict=True))
    errors = [abs(a - b) for told, found in pairs for a, b in zip(told.logprobs, found.logprobs, strict=True)]
    same = [a == b for told, found in pairs for a, b in zip(told.best_ids, found.best_ids, strict=True)]
    return BackendQuality(
        executor=name,
        tokens=len(errors),
        max_logprob_error=max(errors),
        mean_logprob_error=sum(errors) / len(errors),
        same_top=sum(same) / len(same),
    )
