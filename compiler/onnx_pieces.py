"""Runs the graph of an ONNX model piece by piece, so that memory holds the weights of one piece at a time:
ONNX Runtime packs the weights of a whole graph when it opens it. Knows ONNX, and nothing of llmc's models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
from numpy.typing import NDArray

Array = NDArray[Any]
Values = dict[str, Array]
# The folder that the external data of a graph given as bytes lies in.
_FOLDER_KEY = "session.model_external_initializers_file_folder_path"


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive nodes, with all that derives from weights alone; the values that it `reads` of the inputs
    and of other pieces, and those of its own that are read after it."""

    nodes: tuple[Any, ...]
    weights: tuple[Any, ...]
    reads: tuple[str, ...]
    makes: tuple[str, ...]


def run_pieces(
    path: Path,
    feeds: Sequence[Mapping[str, Array]],
    wanted: AbstractSet[str],
    most_bytes: int,
    num_threads: int,
) -> list[Values]:
    """The values `wanted` of the graph at `path`, outputs or not, for each of `feeds`, whose arrays are its
    inputs.

    A piece has weights of at most `most_bytes`, or one node.
    """
    model: Any = onnx.load(str(path), load_external_data=False)
    live: list[Values] = [dict(feed) for feed in feeds]
    pieces = cut(model.graph, wanted, most_bytes)
    for number, piece in enumerate(pieces):
        session = _open(_model_of(model, piece, live[0]), path.parent, num_threads)
        later = {*wanted, *(name for after in pieces[number + 1 :] for name in after.reads)}
        for values in live:
            found = session.run(list(piece.makes), {name: values[name] for name in piece.reads})
            values.update(zip(piece.makes, found, strict=True))
            for name in values.keys() - later:
                del values[name]
    return live


def cut(graph: Any, wanted: AbstractSet[str], most_bytes: int) -> list[Piece]:
    """The pieces of `graph` that make its values `wanted`, in order."""
    sizes = {weight.name: _bytes_of(weight) for weight in graph.initializer}
    fixed: dict[str, Any] = {}
    moving: list[Any] = []
    for node in graph.node:
        is_fixed = all(name in sizes or name in fixed for name in _reads(node))
        if is_fixed:
            fixed |= dict.fromkeys(node.output, node)
        else:
            moving.append(node)
    groups: list[list[Any]] = []
    filled = 0
    held: set[str] = set()
    for node in moving:
        new = {name for name in _closure(node, fixed, sizes) if name in sizes} - held
        more = sum(sizes[name] for name in new)
        if not groups or filled + more > most_bytes:
            groups.append([])
            filled, held = 0, set()
        groups[-1].append(node)
        filled, held = filled + more, held | new
    return _pieces(graph, groups, fixed, wanted)


def _pieces(
    graph: Any, groups: list[list[Any]], fixed: Mapping[str, Any], wanted: AbstractSet[str]
) -> list[Piece]:
    weights = {weight.name: weight for weight in graph.initializer}
    needed, pieces = set(wanted), list[Piece]()
    for group in reversed(groups):
        made = {name for node in group for name in node.output if name}
        derived = {name for node in group for name in _closure(node, fixed, weights)}
        read = {name for node in group for name in _reads(node)} - made - derived
        kept = [node for node in graph.node if any(name in derived for name in node.output)]
        pieces.append(
            Piece(
                nodes=(*kept, *group),
                weights=tuple(weights[name] for name in sorted(derived) if name in weights),
                reads=tuple(sorted(read)),
                makes=tuple(sorted(made & needed)),
            )
        )
        needed |= read
    return pieces[::-1]


def _closure(node: Any, fixed: Mapping[str, Any], weights: Mapping[str, Any]) -> set[str]:
    """The weights that `node` reads, directly or through nodes of weights alone, and what is between."""
    found: set[str] = set()
    open_names = list(_reads(node))
    while open_names:
        name = open_names.pop()
        if name in found or (name not in fixed and name not in weights):
            continue
        found.add(name)
        if name in fixed:
            open_names += _reads(fixed[name])
    return found


def _reads(node: Any) -> Iterator[str]:
    """Names of the values that a node reads, those that its subgraphs take from outside included."""
    yield from filter(None, node.input)
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            body = attribute.g
            own = {entry.name for entry in body.input} | {name for one in body.node for name in one.output}
            inner = {name for one in body.node for name in _reads(one)} | {out.name for out in body.output}
            yield from inner - own


def _bytes_of(weight: Any) -> int:
    if weight.external_data:
        return int({entry.key: entry.value for entry in weight.external_data}["length"])
    return int(weight.ByteSize())


def _model_of(model: Any, piece: Piece, values: Values) -> bytes:
    """The piece as a model of its own; its inputs have the dtypes and ranks of `values`."""
    helper: Any = onnx.helper
    inputs = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(values[name].dtype), [None] * values[name].ndim
        )
        for name in piece.reads
    ]
    outputs = [helper.make_empty_tensor_value_info(name) for name in piece.makes]
    graph = helper.make_graph(piece.nodes, "piece", inputs, outputs, initializer=piece.weights)
    whole = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    return bytes(whole.SerializeToString())


def _open(model: bytes, folder: Path, num_threads: int) -> Any:
    library: Any = onnxruntime
    options = library.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry(_FOLDER_KEY, str(folder))
    return library.InferenceSession(model, options, providers=["CPUExecutionProvider"])
