"""Programs become documents and back, weights become files one at a time."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import fx

from llmc.artifact.schema import Manifest, Provenance, Recipe
from llmc.artifact.tensors import read_tensors
from llmc.artifact.writer import ArtifactWriter
from llmc.codegen.base import backend_for
from llmc.codegen.programs import shared_weights, tensor_bytes, write_weights
from llmc.ir import ops
from llmc.ir.document import decode_program, encode_program
from llmc.ir.infer import infer
from llmc.ir.interpret import interpret
from llmc.ir.printer import print_program
from llmc.ir.program import TRACE_INPUTS, Program
from llmc.ir.weights import Constant, WeightStore
from llmc.spec.cache import CacheLayout
from llmc.spec.errors import InternalError, TargetError
from llmc.spec.model import ModelSpec
from llmc.spec.target import REFERENCE, Target

assert ops  # importing it registers the operators
llmc_ops = torch.ops.llmc
SPEC = ModelSpec(
    family="bigram", architecture="Bigram", num_layers=0, hidden_size=6, vocab_size=11, max_context=32,
    compute_dtype="float32", tied_head=False, num_parameters=132, attention=(),
)  # fmt: skip


@dataclass
class Watched:
    """A weight that records when it is evaluated."""

    value: torch.Tensor
    log: list = field(default_factory=list)

    @property
    def shape(self):
        return tuple(self.value.shape)

    @property
    def dtype(self):
        return self.value.dtype

    def evaluate(self, reader):
        self.log.append(self.shape)
        return self.value.clone()


def bigram(names=("embed", "head"), dtype=torch.float32, seed=0, cap=30.0):
    """Logits of the next token from the last one alone: look-up, product, soft cap, and a few constants in
    the arguments that documents must carry."""
    graph = fx.Graph()
    ids, _, rows = (graph.placeholder(entry.name) for entry in TRACE_INPUTS)
    random = torch.Generator().manual_seed(seed)
    entries = {name: Constant(torch.randn(11, 6, generator=random).to(dtype)) for name in names}
    embed, head = (graph.create_node("get_attr", name) for name in names)
    x = graph.call_function(llmc_ops.embedding.default, (ids, embed))
    x = graph.call_function(torch.ops.aten.clamp.default, (x, -float("inf"), 3.0))
    x = graph.call_function(torch.ops.aten._to_copy.default, (x,), {"dtype": torch.float32})
    x = graph.call_function(llmc_ops.gather_rows.default, (x, rows))
    wide = graph.call_function(torch.ops.aten._to_copy.default, (head,), {"dtype": torch.float32})
    logits = graph.call_function(llmc_ops.linear.default, (x, wide, None))
    graph.output(graph.call_function(llmc_ops.softcap.default, (logits, cap)))
    program = Program(graph=graph, inputs=TRACE_INPUTS, weights=WeightStore(entries), spec=SPEC)
    infer(program)
    return program


def emitted(path, program, portable=None, **changes):
    manifest = Manifest(
        provenance=Provenance(model="bigram", llmc_version="0"), spec=SPEC, recipe=Recipe(name="none"),
        target=REFERENCE, cache=CacheLayout(groups=()),
    )  # fmt: skip
    with ArtifactWriter(path) as writer:
        backend_for(REFERENCE).emit(program, portable or program, writer, **changes)
        return writer.commit(manifest)


def run(graph, weight):
    inputs = {
        "input_ids": torch.tensor([3, 1, 4]),
        "positions": torch.arange(3),
        "out_rows": torch.tensor([0, 2]),
    }
    return interpret(graph, inputs, weight)


def test_a_document_computes_what_the_program_computes(tmp_path):
    program = bigram()
    made = emitted(tmp_path / "b.llmc", program)
    document = decode_program(made.read_bytes("program.json"))
    weights = {name: torch.from_numpy(view.data.copy()) for name, view in made.weights().items()}
    expected = run(program.graph, program.weights.evaluate)
    assert torch.equal(run(document.graph, weights.__getitem__), expected)
    assert document.inputs == TRACE_INPUTS


def test_documents_survive_the_round_trip():
    program = bigram().replace(facts=frozenset({"b", "a"}))
    data = encode_program(program)
    document = decode_program(data)
    again = program.replace(graph=document.graph, inputs=document.inputs, facts=document.facts)
    assert encode_program(again) == data
    infer(again)
    assert print_program(again) == print_program(program)
    assert len(data.decode().splitlines()) == program.num_nodes + len(TRACE_INPUTS) + 3


def test_the_files_are_those_of_an_artifact(tmp_path):
    program, portable = bigram(), bigram(cap=20.0)
    made = emitted(tmp_path / "b.llmc", program, portable)
    assert {entry.path: entry.kind for entry in made.manifest.files} == {
        "program.json": "program",
        "program.portable.json": "program",
        "program.txt": "program",
        "weights-00001.safetensors": "weights",
    }
    assert made.read_bytes("program.txt").decode() == print_program(program)
    assert made.read_bytes("program.portable.json") == encode_program(portable)


def test_bits_of_every_dtype_are_kept(tmp_path):
    values = torch.randn(11, 6) * 100
    for dtype in (
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.int8,
        torch.uint8,
        torch.bool,
        torch.int64,
    ):
        store = WeightStore({"w": Constant(values.to(dtype)), "s": Constant(values[0, 0].to(dtype))})
        with ArtifactWriter(tmp_path / "x.llmc") as writer:
            write_weights(store, writer)
            views = read_tensors(writer.folder / "weights-00001.safetensors")
            for name in ("w", "s"):
                stored = store.evaluate(name)
                assert views[name].dtype == str(dtype).removeprefix("torch.")
                assert views[name].shape == tuple(stored.shape)
                assert views[name].data.tobytes() == tensor_bytes(stored).tobytes()


def test_weights_are_evaluated_once_each_in_order_with_progress(tmp_path):
    log, told = [], []
    store = WeightStore({f"w{n}": Watched(torch.zeros(n + 1, 10), log) for n in range(5)})
    with ArtifactWriter(tmp_path / "x.llmc") as writer:
        write_weights(store, writer, shard_bytes=200, progress=told.append)
        shards = [entry.path for entry in writer.entries]
    assert log == [(1, 10), (2, 10), (3, 10), (4, 10), (5, 10)]
    assert [step.done_bytes for step in told] == [0, 40, 120, 240, 400]
    assert {step.total_bytes for step in told} == {600}
    assert shards == [f"weights-{number:05}.safetensors" for number in range(1, 5)]


def test_weights_of_the_portable_program_are_kept_too():
    program, portable = bigram(("embed", "packed")), bigram(("embed", "head"))
    assert list(shared_weights(program, portable)) == ["embed", "packed", "head"]


def test_one_name_for_two_tensors_is_refused():
    with pytest.raises(InternalError, match="'embed' means two things"):
        shared_weights(bigram(), bigram(dtype=torch.bfloat16))


def test_the_estimate_is_an_upper_bound(tmp_path):
    program = bigram()
    made = emitted(tmp_path / "b.llmc", program)
    assert made.size_bytes < backend_for(REFERENCE).estimate_bytes(program, program)


def test_a_target_without_a_backend_is_named():
    with pytest.raises(TargetError, match="abacus"):
        backend_for(Target(kind="abacus"))
