"""The unmodified ONNX Runtime GenAI over graphs of every family: greedy tokens against the program
interpreted."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from llmc.artifact.onnx import GENAI_CONFIG, OnnxCache, OnnxUnit, StoredForms
from llmc.codegen.onnx.genai import genai_config
from llmc.codegen.onnx.graph import IR_VERSION, OPSET
from llmc.codegen.onnx.lowered import cache_widths
from llmc.models.families import FAMILIES
from llmc.passes.probe import logits_of
from llmc.passes.quantize.rtn import Rtn

SUPPORTED = [family.name for family in FAMILIES if family.refused is None]
# Layers that read the caches of others, sinks, latent heads.
FAST = ("gemma3n", "gpt_oss", "deepseek_v3")
NEW_TOKENS = 64


def generate(folder, prompt):
    """Tokens that GenAI adds to `prompt`, end-of-text tokens included in what may follow."""
    import onnxruntime_genai as genai

    model = genai.Model(str(folder))
    params = genai.GeneratorParams(model)
    length = len(prompt) + NEW_TOKENS
    params.set_search_options(max_length=length, min_length=length)
    generator = genai.Generator(model, params)
    generator.append_tokens(np.asarray(prompt, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return generator.get_sequence(0)[len(prompt) :].tolist()


def assert_greedy(program, folder, graph, *, contrib=True):
    """GenAI's tokens are the likeliest ones of the interpreted program, given the same beginning; end-of-text
    tokens, which GenAI is told not to give here, left out."""
    graph(program, folder, contrib=contrib, logits="last")
    caches = tuple(OnnxCache(**widths) for widths in cache_widths(program.spec, contrib))
    unit = OnnxUnit(
        opset=OPSET, ir_version=IR_VERSION, operators={}, notes=(), genai_problem="",
        in_place=contrib, caches=caches, forms=StoredForms(),
    )  # fmt: skip
    (folder / GENAI_CONFIG).write_bytes(genai_config(program.spec, unit))
    prompt = np.random.default_rng(0).integers(3, program.spec.vocab_size, 11).tolist()
    found = generate(folder, prompt)
    assert len(found) == NEW_TOKENS
    logits = logits_of(program, [[*prompt, *found]]).numpy()[len(prompt) - 1 : -1].copy()
    logits[:, list(program.spec.eos_token_ids)] = -np.inf
    assert found == logits.argmax(-1).tolist()


@pytest.mark.parametrize("name", FAST)
def test_genai_generates_what_the_program_says(name, portable_program, onnx_graph, tmp_path):
    assert_greedy(portable_program(name), tmp_path, onnx_graph)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SUPPORTED if name not in FAST])
def test_genai_runs_every_other_family(name, portable_program, onnx_graph, tmp_path):
    assert_greedy(portable_program(name), tmp_path, onnx_graph)


@pytest.mark.parametrize("name", ["gemma3n", "gpt_oss"])
def test_genai_runs_standard_operators_too(name, portable_program, onnx_graph, tmp_path):
    assert_greedy(portable_program(name), tmp_path, onnx_graph, contrib=False)


def test_genai_runs_quantised_experts(portable_program, onnx_graph, tmp_path):
    program = portable_program("gpt_oss", Rtn(bits=4, group_size=32))
    assert_greedy(program, tmp_path, onnx_graph)
    kinds = [node.op_type for node in onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.node]
    assert kinds.count("QMoE") == len(program.spec.attention)
