"""The graph of an ONNX artifact is held to the oracle before it is committed, and its logits are compared
with those that the quality was measured on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..artifact.onnx import ONNX_ENGINE, ONNX_UNIT, OnnxUnit, decode_onnx_unit
from ..artifact.oracle import Oracle, OraclePrompt
from ..artifact.reader import Artifact
from ..runtime.config import RuntimeConfig
from ..runtime.executors.processors import usable_processors
from ..runtime.executors.stepped import OracleSampled, SteppedExecutor
from ..runtime.executors.tiles import SequencePart
from ..runtime.oracle import differences, measure_prompts
from ..spec.errors import CheckFailed
from .quality import Quality, compare

if TYPE_CHECKING:
    from ..runtime.executors.onnx_model import OnnxModel


class Judged(NamedTuple):
    """Prompts, and the logits `[tokens of all prompts, vocab]` that the reference backend gave for them: of
    the model as traced, and of the compiled program."""

    prompts: Sequence[Sequence[int]]
    original: Tensor
    compiled: Tensor


# Weights of more bytes are not opened as one graph: packed, they take up to twice as much.
_WHOLE_BYTES = 2**30
_PIECE_BYTES = 2**29


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendQuality:
    """What the executor computes. On the oracle's prompts, over `tokens` logprobs: largest and mean
    difference in nats from the reference backend, and the share of positions with the same likeliest token.
    On the prompts that the quality was measured on: all logits against those of the compiled program by the
    reference backend, and against those of the model as traced."""

    executor: str
    tokens: int
    max_logprob_error: float
    mean_logprob_error: float
    same_top: float
    from_reference: Quality
    from_original: Quality


def check_graph(artifact: Artifact, oracle: Oracle, judged: Judged) -> BackendQuality:
    """Run the judged prompts and the oracle's through ONNX Runtime: through the executor's model, or, where
    its weights would fill much memory when packed for running, piece by piece.

    Raises CheckFailed naming the first token that differs by more than the oracle allows.
    """
    weights = sum(entry.size_bytes for entry in artifact.manifest.of_kind("weights"))
    if weights > _WHOLE_BYTES:
        found = run_in_pieces(artifact, oracle, judged.prompts, _PIECE_BYTES)
    else:
        found = run_whole(artifact, oracle, judged.prompts)
    measured = found.measured
    problems = differences(oracle, measured)
    if problems:
        raise CheckFailed(
            "onnx.graph_differs",
            "ONNX Runtime does not compute what the program says.",
            f"{problems[0]}.",
            "Compile with --target reference, and report the model and the version of onnxruntime.",
        )
    pairs = list(zip(oracle.prompts, measured, strict=True))
    errors = [abs(a - b) for told, one in pairs for a, b in zip(told.logprobs, one.logprobs, strict=True)]
    same = [a == b for told, one in pairs for a, b in zip(told.best_ids, one.best_ids, strict=True)]
    return BackendQuality(
        executor=found.executor,
        tokens=len(errors),
        max_logprob_error=max(errors),
        mean_logprob_error=sum(errors) / len(errors),
        same_top=sum(same) / len(same),
        from_reference=compare(judged.compiled, found.logits, judged.prompts),
        from_original=compare(judged.original, found.logits, judged.prompts),
    )


def logits_by(model: OnnxModel, prompts: Sequence[Sequence[int]], num_groups: int) -> Tensor:
    """Logits of every token of `prompts`, `[tokens of all prompts, vocab]`. No pages are given: nothing is
    kept."""
    found: list[Tensor] = []
    for prompt in prompts:
        tables = [[-1] * len(prompt)] * num_groups
        part = SequencePart(start=0, token_ids=prompt, block_tables=tables, wanted=range(len(prompt)))
        found += [torch.from_numpy(tile.logits) for tile in model.run([part])]
    return torch.cat(found)


class GraphRun(NamedTuple):
    """Logits of the judged prompts, as `Judged` has them, and what an oracle is compared with."""

    executor: str
    logits: Tensor
    measured: Sequence[OraclePrompt]


def run_whole(artifact: Artifact, oracle: Oracle, prompts: Sequence[Sequence[int]]) -> GraphRun:
    """What the executor's model says, its graph opened once and whole."""
    from ..runtime.executors.onnxruntime import open_model

    tokens = sum(len(prompt.token_ids) for prompt in oracle.prompts)
    config = RuntimeConfig(
        max_requests=len(oracle.prompts),
        max_step_tokens=tokens,
        max_model_len=min(2 * tokens, artifact.manifest.spec.max_context),
    )
    model, caps = open_model(artifact, config)
    logits = logits_by(model, prompts, len(artifact.manifest.cache.groups))
    executor = SteppedExecutor(OracleSampled(model), caps)
    try:
        measured = measure_prompts(executor, [prompt.token_ids for prompt in oracle.prompts])
    finally:
        executor.close()
    return GraphRun(caps.name, logits, measured)


def run_in_pieces(
    artifact: Artifact, oracle: Oracle, prompts: Sequence[Sequence[int]], most_bytes: int
) -> GraphRun:
    """As the whole model gives it: each prompt alone from its beginning, with weights of `most_bytes` in
    memory at a time."""
    from .onnx_pieces import run_pieces

    unit = decode_onnx_unit(artifact.read_bytes(ONNX_UNIT))
    past = empty_past(unit)
    told = [prompt.token_ids for prompt in oracle.prompts]
    feeds = [step_feeds(ids, 0, past) for ids in (*prompts, *told)]
    ran = run_pieces(artifact.path / ONNX_ENGINE, feeds, {"logits"}, most_bytes, usable_processors())
    found = [values["logits"] for values in ran]
    logits = torch.cat([torch.from_numpy(one) for one in found[: len(prompts)]])
    measured = [_as_prompt(ids, one) for ids, one in zip(told, found[len(prompts) :], strict=True)]
    return GraphRun("onnxruntime", logits, measured)


def empty_past(unit: OnnxUnit) -> dict[str, NDArray[Any]]:
    """The caches of a sequence that has not begun, by the names of the graph's inputs."""
    return {
        f"past_key_values.{cache.layer}.{kind}": np.zeros((1, cache.num_kv_heads, 0, width), np.float32)
        for cache in unit.caches
        for kind, width in (("key", cache.k_dim), ("value", cache.v_dim))
    }


def step_feeds(ids: Sequence[int], start: int, past: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The inputs of the engine's graph for tokens `ids` of one sequence that knows `start` tokens, in `past`;
    the logits of all of them are wanted."""
    return {
        "input_ids": np.asarray([ids], np.int64),
        "attention_mask": np.ones((1, start + len(ids)), np.int64),
        "out_rows": np.arange(len(ids)),
        **past,
    }


def _as_prompt(token_ids: tuple[int, ...], logits: NDArray[np.float32]) -> OraclePrompt:
    """What `logits[n, vocab]` say of the tokens after the first, in an oracle's form."""
    wide = logits[:-1].astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    logprobs = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    top = -np.partition(-logprobs, 1)[:, :2]
    return OraclePrompt(
        token_ids=token_ids,
        logprobs=tuple(logprobs[np.arange(len(logprobs)), list(token_ids[1:])].tolist()),
        best_ids=tuple(logprobs.argmax(-1).tolist()),
        margins=tuple((top[:, 0] - top[:, 1]).tolist()),
    )
