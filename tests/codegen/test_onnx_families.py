"""ONNX graphs against the interpreted program: every supported family, whole, in chunks and by token."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from llmc.codegen.onnx.forms import code_shifts, packed_zeros, stored_store
from llmc.codegen.onnx.graph import StoredTensor
from llmc.codegen.onnx.lowered import Export, lower, serialize
from llmc.codegen.onnx.stored import StoredWeights
from llmc.codegen.programs import tensor_bytes
from llmc.models.families import FAMILIES
from llmc.passes.probe import logits_of
from llmc.passes.quantize.rtn import Rtn

SUPPORTED = [family.name for family in FAMILIES if family.refused is None]
# Of each kind of attention, rope, norm, cache and feed-forward one.
FAST = ("llama3", "gemma3n", "gpt_oss", "deepseek_v3")
LENGTHS = (17, 25, 26, 27)


def export(program, folder, *, contrib=True, logits="rows", activations=None):
    """Writes weights and graph into `folder`; the path of the graph."""
    shifts, zeros = code_shifts(program, contrib), packed_zeros(program, contrib)
    store = stored_store(program.weights, shifts, zeros)
    places, data = {}, b""
    for name in program.used_weights():
        data += bytes(-len(data) % 64)
        values = tensor_bytes(store.evaluate(name)).tobytes()
        places[name] = StoredTensor("weights.bin", len(data), len(values))
        data += values
    (folder / "weights.bin").write_bytes(data)
    options = Export(contrib=contrib, logits=logits, activations=activations or {})
    path = folder / "model.onnx"
    path.write_bytes(serialize(lower(program, StoredWeights(store, places), options, {"a": "b"})))
    return path


def session(path):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def step(model, ids, mask, past):
    """Logits of all rows, and the caches after the step by the names of the inputs."""
    feeds = {"input_ids": ids, "attention_mask": mask, "out_rows": np.arange(ids.size)}
    for entry in model.get_inputs():
        if entry.name.startswith("past"):
            empty = np.zeros((ids.shape[0], entry.shape[1], 0, entry.shape[3]), np.float32)
            feeds[entry.name] = past.get(entry.name, empty)
    names = [entry.name for entry in model.get_outputs()]
    found = dict(zip(names, model.run(None, feeds), strict=True))
    logits = found.pop("logits")
    return logits, {name.replace("present", "past_key_values"): array for name, array in found.items()}


def relative_error(program, folder, **options):
    """Largest difference of a logit from the interpreted program's, over the largest logit."""
    path = export(program, folder, **options)
    onnx.checker.check_model(str(path), full_check=True)
    model = session(path)
    ids = np.random.default_rng(0).integers(3, program.spec.vocab_size, LENGTHS[-1])
    expected = logits_of(program, [ids.tolist()]).numpy()
    found, past, start = [], {}, 0
    for stop in LENGTHS:
        mask = np.ones((1, stop), np.int64)
        logits, past = step(model, ids[None, start:stop], mask, past)
        found.append(logits)
        start = stop
    return float(np.abs(np.concatenate(found) - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", FAST)
def test_a_graph_computes_what_the_program_says(name, portable_program, tmp_path):
    assert relative_error(portable_program(name), tmp_path) <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SUPPORTED if name not in FAST])
def test_the_graph_of_every_other_family(name, portable_program, tmp_path):
    assert relative_error(portable_program(name), tmp_path) <= 1e-4


@pytest.mark.parametrize("name", ["gpt_oss", "gemma2"])
def test_standard_operators_alone_compute_the_same(name, portable_program, tmp_path):
    program = portable_program(name)
    assert relative_error(program, tmp_path, contrib=False) <= 1e-4
    graph = onnx.load(str(tmp_path / "model.onnx"), load_external_data=False).graph
    assert {node.domain for node in graph.node} == {""}


@pytest.mark.parametrize("contrib", [True, False])
@pytest.mark.parametrize(
    "scheme",
    [
        {"bits": 4, "group_size": 32},
        {"bits": 8, "group_size": 32},
        {"bits": 4, "group_size": 32, "symmetric": False, "head_bits": 4},
        {"bits": 3, "group_size": 64, "embedding_bits": 3},
        {"bits": 4, "group_size": 0},
    ],
    ids=["int4", "int8", "int4_asym", "int3", "int4_channel"],
)
def test_quantised_matrices_keep_the_codes_of_the_passes(scheme, contrib, portable_program, tmp_path):
    program = portable_program("llama", Rtn(**scheme))
    assert relative_error(program, tmp_path, contrib=contrib) <= 1e-4


def test_quantised_experts_and_a_tied_table_share_their_codes(portable_program, tmp_path):
    program = portable_program("qwen3_moe", Rtn(bits=4, group_size=32))
    assert relative_error(program, tmp_path) <= 1e-4
    tied = portable_program("gemma", Rtn(bits=4, group_size=32, head_bits=8))
    assert relative_error(tied, tmp_path) <= 1e-4
    graph = onnx.load(str(tmp_path / "model.onnx"), load_external_data=False).graph
    places = {
        entry.name: {item.key: item.value for item in entry.external_data} for entry in graph.initializer
    }
    table = [place for name, place in places.items() if name.startswith("model.embed_tokens.weight.codes")]
    assert len(table) == 2
    assert table[0] == table[1]


def test_padding_on_the_right_changes_no_row(portable_program, tmp_path):
    program = portable_program("qwen2-swa")
    model = session(export(program, tmp_path))
    rng = np.random.default_rng(1)
    ids = rng.integers(3, program.spec.vocab_size, (3, 24))
    lengths = np.array([9, 24, 17])
    mask = (np.arange(24)[None] < lengths[:, None]).astype(np.int64)
    logits, past = step(model, ids, mask, {})
    follow = rng.integers(3, program.spec.vocab_size, (3, 1))
    grown = (np.arange(25)[None] < lengths[:, None] + 1).astype(np.int64)
    next_logits, _ = step(model, follow, grown, past)
    for row, length in enumerate(lengths):
        text = [*ids[row, :length].tolist(), int(follow[row, 0])]
        expected = logits_of(program, [text]).numpy()
        assert np.abs(logits.reshape(3, 24, -1)[row, :length] - expected[:-1]).max() <= 1e-4
        assert np.abs(next_logits[row] - expected[-1]).max() <= 1e-4


def test_inputs_rounded_in_blocks_are_those_of_the_reference(portable_program, tmp_path):
    program = portable_program("llama", Rtn(bits=4, group_size=32, head_bits=4))
    graph = program.copy_graph()
    codes = {}
    for node in graph.nodes:
        if str(node.target) == "llmc.quantized_linear.default":
            codes[str(node.args[1].target)] = "int8_g32"
            node.args = (*node.args[:6], "int8_g32", None)
    rounded = program.replace(graph=graph)
    assert relative_error(rounded, tmp_path) <= 2e-3
    accurate = logits_of(program, [[3, 4, 5]]).numpy()
    assert np.abs(logits_of(rounded, [[3, 4, 5]]).numpy() - accurate).max() > 0
