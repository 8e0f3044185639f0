"""What the graph of an ONNX artifact computes at every node in ONNX Runtime, against the program it was
exported from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..artifact.onnx import ONNX_ENGINE, ONNX_UNIT, decode_onnx_unit
from ..artifact.reader import Artifact
from ..codegen.onnx.forms import chosen_activations
from ..codegen.onnx.options import OnnxOptions
from ..codegen.onnx.taps import GraphOperator, GraphTap, graph_taps
from ..ir.arguments import argument, argument_names
from ..ir.program import Program
from ..ir.vocabulary import operator_name
from ..ir.widened import widened
from ..runtime.config import RuntimeConfig
from ..runtime.executors.onnxruntime import open_model
from ..runtime.executors.processors import usable_processors
from ..runtime.executors.tiles import SequencePart
from .code_lines import ROUNDING, CodeTrace, code_lines
from .compare.quality import portable_program
from .node_values import NodeRun, attention_nodes, relative_error, run_nodes
from .onnx_check import empty_past, step_feeds
from .onnx_pieces import run_pieces

# Weights in memory at a time while the tapped graph runs.
_PIECE_BYTES = 2**29
_LINEAR = "llmc.quantized_linear.default"


def trace_graph(artifact: Artifact, final: Program, prompts: Sequence[tuple[int, ...]]) -> CodeTrace:
    """Run the engine's graph on `prompts` with the values of the nodes told, all tokens of a prompt but the
    last in one step, and the last in another; then run it as the executor does. The program is computed in
    float32, as the graph is.

    Nodes have the names of `final`, the artifact's final program, where it has them. Raises ArtifactError for
    a graph that another version of llmc exported.
    """
    portable = portable_program(artifact)
    model: Any = onnx.load(str(artifact.path / ONNX_ENGINE), load_external_data=False)
    operators = [GraphOperator(node.op_type, node.name, tuple(node.output)) for node in model.graph.node]
    taps = graph_taps(portable, final, OnnxOptions.of(artifact.manifest.target), operators)
    _round_inputs(portable, final)
    expected = run_nodes(widened(portable), prompts)
    rows = {tap.node: tap for tap in taps if tap.node in expected.rows}
    found = _run_tapped(artifact, tuple(rows.values()), prompts)
    shipped = _run_shipped(artifact, prompts)
    lines = code_lines(portable, expected, found.rows, {name: tap.operator for name, tap in rows.items()})
    names = {
        own.name: other.name
        for own, other in zip(attention_nodes(portable), attention_nodes(final), strict=True)
    }
    return CodeTrace(
        code="The graph in ONNX Runtime",
        part="operator",
        file=ONNX_ENGINE,
        lines=tuple(replace(line, node=names.get(line.node, line.node)) for line in lines),
        same_as_shipped=torch.equal(found.logits, shipped),
        difference=_difference(relative_error(found.logits, shipped)),
    )


def _round_inputs(portable: Program, final: Program) -> None:
    """Let products of `portable` round their inputs as those of `final` do, as the export does."""
    rounded = chosen_activations(final)
    for node in portable.graph.nodes:
        if node.op != "call_function" or operator_name(node.target) != _LINEAR:
            continue
        activation = rounded.get(str(argument(node, "codes").target))
        if activation and not argument(node, "activation"):
            index = argument_names(node).index("activation")
            if index < len(node.args):
                node.update_arg(index, activation)
            else:
                node.update_kwarg("activation", activation)


def _run_tapped(artifact: Artifact, taps: Sequence[GraphTap], prompts: Sequence[tuple[int, ...]]) -> NodeRun:
    unit = decode_onnx_unit(artifact.read_bytes(ONNX_UNIT))
    kept = [f"{cache.layer}.{kind}" for cache in unit.caches for kind in ("key", "value")]
    wanted = {"logits", *(tap.value for tap in taps)}
    begun = [step_feeds(prompt[:-1], 0, empty_past(unit)) for prompt in prompts]
    first = _pieces(artifact, begun, {*wanted, *(f"present.{name}" for name in kept)})
    ended = [
        step_feeds(
            prompt[-1:],
            len(prompt) - 1,
            {f"past_key_values.{name}": values[f"present.{name}"] for name in kept},
        )
        for prompt, values in zip(prompts, first, strict=True)
    ]
    last = _pieces(artifact, ended, wanted)
    joined = {
        name: torch.cat(
            [
                torch.from_numpy(values[name]).float().reshape(count, -1)
                for prompt, pair in zip(prompts, zip(first, last, strict=True), strict=True)
                for values, count in zip(pair, (len(prompt) - 1, 1), strict=True)
            ]
        )
        for name in sorted(wanted)
    }
    return NodeRun(rows={tap.node: joined[tap.value] for tap in taps}, logits=joined["logits"])


def _pieces(
    artifact: Artifact, feeds: Sequence[Mapping[str, NDArray[Any]]], wanted: set[str]
) -> list[dict[str, NDArray[Any]]]:
    return run_pieces(artifact.path / ONNX_ENGINE, feeds, wanted, _PIECE_BYTES, usable_processors())


def _run_shipped(artifact: Artifact, prompts: Sequence[tuple[int, ...]]) -> Tensor:
    """The logits of the executor's model, in the same steps."""
    most = max(map(len, prompts))
    model, _ = open_model(artifact, RuntimeConfig(max_requests=1, max_step_tokens=most, max_model_len=most))
    tables = [list(range(group.pages_for(most))) for group in artifact.manifest.cache.groups]
    logits: list[Tensor] = []
    try:
        for prompt in prompts:
            for start, ids in ((0, prompt[:-1]), (len(prompt) - 1, prompt[-1:])):
                part = SequencePart(start=start, token_ids=ids, block_tables=tables, wanted=range(len(ids)))
                logits += [torch.from_numpy(tile.logits.copy()) for tile in model.run([part])]
    finally:
        model.close()
    return torch.cat(logits)


def _difference(error: float) -> str:
    """What it means that the graph without taps gives logits that are `error` off."""
    if error <= ROUNDING:
        return ""
    return (
        f"Opened whole and without taps the graph gives logits that are {error:.2g} of their size off: what "
        "ONNX Runtime fuses there is to blame."
    )
