"""ONNX graphs against the interpreted program: every supported family, whole, in chunks and by token."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from llmc.models.families import FAMILIES
from llmc.passes.probe import logits_of
from llmc.passes.quantize.rtn import Rtn

SUPPORTED = [family.name for family in FAMILIES if family.refused is None]
# Of each kind of attention, rope, norm, cache and feed-forward one.
FAST = ("llama3", "gemma3n", "gpt_oss", "deepseek_v3")


@pytest.mark.parametrize("name", FAST)
def test_a_graph_computes_what_the_program_says(name, portable_program, relative_error, tmp_path):
    assert relative_error(portable_program(name), tmp_path) <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SUPPORTED if name not in FAST])
def test_the_graph_of_every_other_family(name, portable_program, relative_error, tmp_path):
    assert relative_error(portable_program(name), tmp_path) <= 1e-4


@pytest.mark.parametrize("name", ["gpt_oss", "gemma2"])
def test_standard_operators_alone_compute_the_same(name, portable_program, relative_error, tmp_path):
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
def test_quantised_matrices_keep_the_codes_of_the_passes(
    scheme, contrib, portable_program, relative_error, tmp_path
):
    program = portable_program("llama", Rtn(**scheme))
    assert relative_error(program, tmp_path, contrib=contrib) <= 1e-4


def test_a_tied_table_shares_its_codes(portable_program, relative_error, tmp_path):
    tied = portable_program("gemma", Rtn(bits=4, group_size=32, head_bits=8))
    assert relative_error(tied, tmp_path) <= 1e-4
    graph = onnx.load(str(tmp_path / "model.onnx"), load_external_data=False).graph
    places = {
        entry.name: {item.key: item.value for item in entry.external_data} for entry in graph.initializer
    }
    table = [place for name, place in places.items() if name.startswith("model.embed_tokens.weight.codes")]
    assert len(table) == 2
    assert table[0] == table[1]


def test_padding_on_the_right_changes_no_row(portable_program, onnx_graph, tmp_path):
    program = portable_program("qwen2-swa")
    model = onnx_graph(program, tmp_path)
    rng = np.random.default_rng(1)
    ids = rng.integers(3, program.spec.vocab_size, (3, 24))
    lengths = np.array([9, 24, 17])
    mask = (np.arange(24)[None] < lengths[:, None]).astype(np.int64)
    logits, past = model.step(ids, mask, {})
    follow = rng.integers(3, program.spec.vocab_size, (3, 1))
    grown = (np.arange(25)[None] < lengths[:, None] + 1).astype(np.int64)
    next_logits, _ = model.step(follow, grown, past)
    for row, length in enumerate(lengths):
        text = [*ids[row, :length].tolist(), int(follow[row, 0])]
        expected = logits_of(program, [text]).numpy()
        assert np.abs(logits.reshape(3, 24, -1)[row, :length] - expected[:-1]).max() <= 1e-4
        assert np.abs(next_logits[row] - expected[-1]).max() <= 1e-4


def test_inputs_rounded_in_blocks_are_those_of_the_reference(portable_program, relative_error, tmp_path):
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
