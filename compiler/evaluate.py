"""`llmc eval`: an artifact's program on text, and beside it the model it was compiled from.

Runs the portable program by the reference operators in float32, many tokens at a time: what is judged are
weights and schemes, not kernels, which `llmc verify` holds to the same program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from torch import Tensor

from ..artifact.reader import open_artifact
from ..artifact.schema import PORTABLE_PROGRAM, REPORT, TOKENIZER_FOLDER
from ..codegen.base import backend_for
from ..ir.document import decode_program
from ..ir.program import Program
from ..ir.weights import WeightStore
from ..passes.base import PassContext
from ..passes.manager import run_passes
from ..passes.pipeline import canonicalise
from ..passes.quantize.walk import packed_inputs, raised, run_nodes
from ..runtime.tokenizer import Tokenizer
from ..spec.errors import UsageError
from ..spec.history import LayerError
from .bind import bind_checkpoint
from .calibration import read_documents
from .checkpoint import open_checkpoint
from .judgement import Judgement, TokenValues, judge_tokens, token_values
from .source import find_model
from .trace import trace_config

_KEPT_BYTES = 2 << 30
_NUM_WORST = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalRequest:
    """What to evaluate on what: windows of `window` tokens (None: the model's context) of each document,
    `stride` tokens apart (None: side by side); tokens that an earlier window counted are context only."""

    artifact: Path
    data: Path
    reference: str | None = None
    window: int | None = None
    stride: int | None = None


class Evaluated(NamedTuple):
    """The judgement, how the text was cut, and what the artifact's report says: bits of a weight as stored,
    and the layers that lost most, worst first."""

    judgement: Judgement
    window: int
    stride: int
    documents: int
    bits_per_weight: float
    worst_layers: tuple[LayerError, ...]


class _Window(NamedTuple):
    """Tokens of one document; those before `first_counted` are context."""

    token_ids: tuple[int, ...]
    first_counted: int


def evaluate(request: EvalRequest, watch: Callable[[int, int, str], None]) -> Evaluated:
    """Judge the artifact. Raises UsageError for data that cannot be used and sizes that make no sense,
    ArtifactError and ModelError for what cannot be opened."""
    artifact = open_artifact(request.artifact)
    spec = artifact.manifest.spec
    window = request.window or spec.max_context
    stride = request.stride or window
    if not (2 <= window <= spec.max_context and 1 <= stride <= window):
        raise UsageError(
            "eval.window",
            f"Windows of {window} tokens, {stride} apart, cannot be evaluated.",
            f"A window has 2 to {spec.max_context} tokens, and strides are no longer than windows.",
            "Choose another --window or --stride.",
        )
    tokenizer = Tokenizer.from_folder(artifact.path / TOKENIZER_FOLDER)
    documents = [tokenizer.encode(document.text) for document in read_documents(request.data, tokenizer)]
    windows = [part for ids in documents for part in cut_windows(ids, window, stride)]
    if not windows:
        raise UsageError(
            "eval.no_tokens",
            f"{request.data} gives nothing to evaluate.",
            "No document in it has two tokens.",
            "Give a file with text.",
        )
    stored = backend_for(artifact.manifest.target).stored_weights(artifact)
    graph = decode_program(artifact.read_bytes(PORTABLE_PROGRAM))
    compiled = Program(
        graph=graph.graph,
        inputs=graph.inputs,
        weights=WeightStore(dict(stored)),
        spec=spec,
        facts=graph.facts,
    )
    reference = None if request.reference is None else reference_program(request.reference)
    if reference is not None and reference.spec.vocab_size != spec.vocab_size:
        raise UsageError(
            "eval.vocabulary",
            f"{request.reference} is not what {request.artifact.name} was compiled from.",
            f"It knows {reference.spec.vocab_size} tokens, and the artifact {spec.vocab_size}.",
            "Name the model that was compiled with --reference.",
        )
    values = compare_programs(compiled, reference, windows, watch)
    report = msgspec.json.decode(artifact.read_bytes(REPORT))
    return Evaluated(
        judge_tokens(values),
        window,
        stride,
        len(documents),
        report["size"]["bits_per_weight"],
        _worst_layers(report),
    )


def _worst_layers(report: Mapping[str, Any]) -> tuple[LayerError, ...]:
    found = [LayerError(**error) for entry in report["passes"] for error in entry["errors"]]
    return tuple(sorted(found, key=lambda error: -error.error)[:_NUM_WORST])


def reference_program(model: str) -> Program:
    """The model at `model` as it is, its norms and rope named."""
    checkpoint = open_checkpoint(find_model(model))
    bound = bind_checkpoint(
        trace_config(checkpoint.config, dtype=checkpoint.dtype, max_context=None), checkpoint
    )
    return run_passes(bound, canonicalise(), PassContext())


def compare_programs(
    compiled: Program,
    reference: Program | None,
    windows: Sequence[_Window],
    watch: Callable[[int, int, str], None],
) -> list[TokenValues]:
    """Values of every window by both programs, neither of them paged."""
    runs = [_Run(compiled), *([_Run(reference)] if reference is not None else [])]
    found: list[TokenValues] = []
    for batch in _batches(windows):
        inputs = packed_inputs([part.token_ids for part in batch])
        logits = [run.logits(inputs) for run in runs]
        start = 0
        for part in batch:
            rows = slice(start, start + len(part.token_ids))
            other = logits[1][rows] if len(logits) > 1 else None
            found.append(token_values(logits[0][rows], list(part.token_ids), other, part.first_counted))
            start = rows.stop
        watch(len(found), len(windows), "windows")
    return found


class _Run:
    """A program with its weights at hand, as many as fit in memory."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._nodes = [node for node in program.graph.nodes if node.op == "call_function"]
        self._output: Any = next(node for node in program.graph.nodes if node.op == "output").args[0]
        self._kept: dict[str, Tensor] = {}
        self._keeps = program.weights.total_bytes <= _KEPT_BYTES

    def logits(self, inputs: dict[str, Tensor]) -> Tensor:
        """Logits of all tokens of one step."""
        logits: Tensor = run_nodes(self._nodes, {}, inputs, self._read)[self._output]
        return logits

    def _read(self, name: str) -> Tensor:
        if name in self._kept:
            return self._kept[name]
        value = self._program.weights.evaluate(name)
        raised_value = raised(value) if not name.endswith(".scales") else value
        if self._keeps:
            self._kept[name] = raised_value
        return raised_value


def cut_windows(ids: Sequence[int], window: int, stride: int | None = None) -> Iterator[_Window]:
    """Windows over one document: every token but the first is predicted once."""
    counted = 0
    for start in range(0, max(1, len(ids) - 1), stride or window):
        part = tuple(ids[start : start + window])
        if len(part) > 1 and start + len(part) > counted:
            yield _Window(part, max(0, counted - start - 1) if counted else 0)
            counted = start + len(part)
        if start + window >= len(ids):
            return


def _batches(windows: Sequence[_Window], max_tokens: int = 2048) -> Iterator[list[_Window]]:
    batch: list[_Window] = []
    used = 0
    for part in windows:
        if batch and used + len(part.token_ids) > max_tokens:
            yield batch
            batch, used = [], 0
        batch.append(part)
        used += len(part.token_ids)
    if batch:
        yield batch
