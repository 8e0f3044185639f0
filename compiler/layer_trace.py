"""What each layer of an artifact computes on prompts, how far it is from a reference, and whether the
target's own code says the same as the program: a defect of a pass is told from one of a kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..artifact.reader import Artifact
from ..ir.program import Program
from ..passes.probe import logits_of
from ..runtime.config import RuntimeConfig
from ..runtime.executors.registry import open_executor
from ..runtime.oracle import measure_prompts
from ..spec.errors import ArtifactError, TargetError
from .code_lines import CodeTrace
from .code_trace import trace_code
from .compare.quality import stored_program
from .node_values import NodeRun, attention_nodes, relative_error, run_nodes
from .oracle import tolerance_of

_HEAD = "logits"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerLine:
    """One layer's attention output (or the logits): statistics, the relative error to the reference, and that
    of the target's code to the program where it was traced."""

    layer: str
    node: str
    mean: float
    deviation: float
    largest: float
    error: float
    exceeds: bool
    code_error: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTrace:
    """All layers in order. `code_error` is the largest difference, in nats, of a token's logprob between the
    target's code and the program it was generated from; beyond `code_bound` the code is to blame, where
    lines exceed `bound` the passes are. `code` is the code node by node, of a target whose code can be
    traced; None elsewhere, and `code_note` says why where it should have been."""

    executor: str
    reference: str
    bound: float
    lines: tuple[LayerLine, ...]
    code_error: float
    code_bound: float
    code: CodeTrace | None = None
    code_note: str = ""

    @property
    def first(self) -> LayerLine | None:
        """The first line beyond the bound."""
        return next((line for line in self.lines if line.exceeds), None)

    def verdict(self) -> str:
        """What it comes to, in words."""
        parts: list[str] = []
        if self.first is not None:
            where = f"{self.first.layer} ({self.first.node})"
            parts.append(
                f"The program first leaves {self.reference} at {where}: {self.first.error:.2g} of its size, "
                f"where {self.bound:g} is allowed."
            )
        else:
            parts.append(f"Every layer is within {self.bound:g} of {self.reference}.")
        differs = self.code_error > self.code_bound
        agreed = f"({self.code_bound:g} allowed)" if differs else "at most"
        parts.append(
            f"Token for token the {self.executor} code {'leaves' if differs else 'follows'} the program, by "
            f"{self.code_error:.2g} nats {agreed}{': a kernel is to blame' if differs else ''}."
        )
        if self.code is not None:
            parts.append(self.code.sentence())
        if self.code_note:
            parts.append(self.code_note)
        return " ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """The object that `llmc inspect --trace --json` prints."""
        first = self.code.first if self.code is not None else None
        return {
            **asdict(self),
            "verdict": self.verdict(),
            "first": None if self.first is None else self.first.layer,
            "first_code_node": None if first is None else first.node,
        }


def trace_layers(
    artifact: Artifact,
    prompts: Sequence[tuple[int, ...]],
    *,
    reference: Program,
    reference_name: str,
    bound: float,
) -> LayerTrace:
    """Run the program that `artifact` stores, `reference` (a program of the same model with its weights) and
    the target's own code on `prompts` (token ids)."""
    program = stored_program(artifact)
    own, expected = run_nodes(program, prompts), run_nodes(reference, prompts)
    code, note, logits = _traced_code(artifact, program, own, prompts)
    lines = [
        _line(f"layer {index}", node.name, rows, other, bound, code)
        for index, (node, rows, other) in enumerate(
            zip(
                attention_nodes(program),
                _outputs(program, own),
                _outputs(reference, expected),
                strict=True,
            )
        )
    ]
    lines.append(_line(_HEAD, "output", own.logits, expected.logits, bound, code))
    assert program.cache is not None
    return LayerTrace(
        executor=artifact.manifest.target.name + ("" if logits is None else " (interpreted)"),
        reference=reference_name,
        bound=bound,
        lines=tuple(lines),
        code_error=_code_error(artifact, program, prompts)
        if logits is None
        else _logprob_error(own.logits, logits, prompts),
        code_bound=tolerance_of(program.spec, program.cache),
        code=code,
        code_note=note,
    )


class _Traced(NamedTuple):
    """`code` node by node where it can be told, else why not in `note`; `logits` `[tokens, vocab]` of that
    run where no executor can run the artifact here to say them."""

    code: CodeTrace | None = None
    note: str = ""
    logits: Tensor | None = None


def _traced_code(
    artifact: Artifact, program: Program, own: NodeRun, prompts: Sequence[tuple[int, ...]]
) -> _Traced:
    """The target's code node by node. Raises TargetError and ArtifactError where a `cuda` target's cannot be
    run, since nothing else of it can be then."""
    kind = artifact.manifest.target.kind
    if kind == "cuda":
        from .kernel_trace import trace_kernels

        code, run = trace_kernels(artifact, program, own, prompts)
        return _Traced(code, "", None if torch.cuda.is_available() else run.logits)
    try:
        if kind == "cpu":
            return _Traced(trace_code(artifact, program, own, prompts))
        if kind == "onnx":
            from .onnx_trace import trace_graph

            return _Traced(trace_graph(artifact, program, prompts))
    except (TargetError, ArtifactError) as error:
        return _Traced(note=f"Its nodes were not traced: {error.what} {error.why} {error.fix}")
    return _Traced()


def _outputs(program: Program, run: NodeRun) -> list[Tensor]:
    return [run.rows[node.name] for node in attention_nodes(program)]


def _line(
    layer: str, node: str, rows: Tensor, other: Tensor, bound: float, code: CodeTrace | None
) -> LayerLine:
    error = relative_error(other, rows)
    values = rows.double()
    return LayerLine(
        layer=layer,
        node=node,
        mean=float(values.mean()),
        deviation=float(values.std()),
        largest=float(values.abs().max()),
        error=error,
        exceeds=not error <= bound,
        code_error=None if code is None else code.error_at(node),
    )


def _code_error(artifact: Artifact, program: Program, prompts: Sequence[tuple[int, ...]]) -> float:
    """The largest difference of a token's logprob between the target's executor and its program."""
    total = sum(map(len, prompts))
    config = RuntimeConfig(max_requests=len(prompts), max_step_tokens=max(total, len(prompts)))
    executor = open_executor(artifact, config)
    try:
        measured = measure_prompts(executor, prompts)
    finally:
        executor.close()
    worst = 0.0
    for prompt, found in zip(prompts, measured, strict=True):
        logprobs = torch.log_softmax(logits_of(program, [prompt]).double(), dim=-1)
        for index, logprob in enumerate(found.logprobs):
            worst = max(worst, abs(float(logprobs[index, prompt[index + 1]]) - logprob))
    return worst


def _logprob_error(expected: Tensor, found: Tensor, prompts: Sequence[tuple[int, ...]]) -> float:
    """The largest difference of a known token's logprob between logits `[tokens of all prompts, vocab]`."""
    following = [token for prompt in prompts for token in (*prompt[1:], -1)]
    rows = [row for row, token in enumerate(following) if token >= 0]
    known = torch.tensor([following[row] for row in rows])[:, None]
    one, two = (torch.log_softmax(logits[rows].double(), dim=-1) for logits in (expected, found))
    return float((one.gather(1, known) - two.gather(1, known)).abs().max())
