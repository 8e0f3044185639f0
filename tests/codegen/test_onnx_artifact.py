"""An ONNX artifact end to end: what it holds, what runs it, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch

import llmc
from llmc.artifact.oracle import read_oracle
from llmc.artifact.reader import open_unchecked
from llmc.artifact.tensors import read_tensors
from llmc.codegen.base import backend_for
from llmc.codegen.onnx.forms import check_scheme
from llmc.compiler import onnx_check
from llmc.compiler.driver import compile_model
from llmc.compiler.onnx_check import run_in_pieces, run_whole
from llmc.compiler.onnx_pieces import cut
from llmc.runtime.config import RuntimeConfig
from llmc.runtime.executors import onnxruntime as onnxruntime_executor
from llmc.runtime.verify import verify_artifact
from llmc.spec.errors import CheckFailed, TargetError, UsageError
from llmc.spec.quant import parse_scheme
from llmc.spec.target import parse_target
from llmc.spec.target_options import with_options

GREEDY = llmc.SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)
# Two graphs, their description and GenAI's settings: some 6 kB a layer, whatever its width.
GRAPHS_BYTES = 2**18
PROMPTS = ["Once upon a time", "The dog said", "Lily and Tom went to the park because"]


@pytest.fixture(scope="module")
def compiled(stories_7m, tmp_path_factory):
    """The bundled model in float32: (ONNX artifact, reference artifact)."""
    folder = tmp_path_factory.mktemp("onnx")
    made = []
    for target in ("onnx", "reference"):
        path = folder / f"{target}.llmc"
        compile_model(
            stories_7m, output=path, target=target, dtype="float32", verify="off", cache=False,
            overrides=["onnx.file_bytes=8000000"] if target == "onnx" else [],
        )  # fmt: skip
        made.append(path)
    return tuple(made)


def greedy(path, prompts):
    with llmc.load(path) as llm:
        return [(result.prompt_token_ids, list(result.token_ids)) for result in llm.generate(prompts, GREEDY)]


def test_the_engine_gives_the_tokens_of_the_reference(compiled):
    ours, reference = compiled
    assert greedy(ours, PROMPTS) == greedy(reference, PROMPTS)


def test_the_engine_takes_as_many_threads_as_processors_may_be_used(compiled, monkeypatch):
    monkeypatch.setattr(onnxruntime_executor, "usable_processors", lambda: 3)
    artifact = open_unchecked(compiled[0])
    for config, threads in ((RuntimeConfig(), "3"), (RuntimeConfig(num_threads=1), "1")):
        executor = onnxruntime_executor.open_executor(artifact, config)
        assert executor.caps.details["threads"] == threads
        executor.close()


def assert_pieces_say_what_the_whole_says(artifact):
    oracle, prompts = read_oracle(artifact), [[5, 6, 7], [9, 8, 7, 6, 5, 4]]
    graph = onnx.load(str(artifact.path / "engine.onnx"), load_external_data=False).graph
    pieces = cut(graph, {"logits"}, 2**19)
    assert len(pieces) > 4
    assert pieces[-1].makes == ("logits",)
    whole = run_whole(artifact, oracle, prompts)
    found = run_in_pieces(artifact, oracle, prompts, 2**19)
    assert torch.allclose(found.logits, whole.logits, atol=1e-4)
    for one, other in zip(found.measured, whole.measured, strict=True):
        assert one.token_ids == other.token_ids
        assert np.allclose(one.logprobs, other.logprobs, atol=1e-4)
        assert np.allclose(one.margins, other.margins, atol=1e-4)
        assert one.best_ids == other.best_ids


def test_a_graph_in_pieces_says_what_the_whole_says(compiled):
    assert_pieces_say_what_the_whole_says(open_unchecked(compiled[0]))


def test_a_large_model_is_checked_in_pieces(compiled, monkeypatch):
    artifact = open_unchecked(compiled[0])
    oracle, prompts = read_oracle(artifact), [[5, 6, 7]]
    logits = run_whole(artifact, oracle, prompts).logits
    monkeypatch.setattr(onnx_check, "_WHOLE_BYTES", 0)
    monkeypatch.setattr(onnx_check, "run_whole", None)
    found = onnx_check.check_graph(artifact, oracle, onnx_check.Judged(prompts, logits, logits))
    assert found.from_reference.kl_mean < 1e-6
    assert found.max_logprob_error < 1e-4
    first = oracle.prompts[0]
    wrong = replace(first, logprobs=(first.logprobs[0] + 1.0, *first.logprobs[1:]))
    broken = replace(oracle, prompts=(wrong, *oracle.prompts[1:]))
    with pytest.raises(CheckFailed, match="token 1 of prompt 0"):
        onnx_check.check_graph(artifact, broken, onnx_check.Judged(prompts, logits, logits))


def test_genai_gives_the_tokens_of_the_reference(compiled):
    og = pytest.importorskip("onnxruntime_genai")
    ours, reference = compiled
    model = og.Model(str(ours))
    told = greedy(reference, PROMPTS)
    longest = max(len(prompt) for prompt, _ in told)
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=longest + 64, batch_size=len(told))
    generator = og.Generator(model, params)
    padded = [[*prompt, *[0] * (longest - len(prompt))] for prompt, _ in told]
    generator.append_tokens(np.asarray(padded, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    for row, (_, tokens) in enumerate(told):
        found = generator.get_sequence(row)[longest:].tolist()
        assert len(found) == 64
        assert found == tokens
    assert tuple(og.Tokenizer(model).encode(PROMPTS[0])) == tuple(told[0][0][1:])


def test_the_folder_is_whole_and_graphs_point_into_its_weights(compiled):
    ours, _ = compiled
    assert verify_artifact(ours) == []
    files = sorted(path.name for path in ours.glob("weights-*.safetensors"))
    assert len(files) > 1
    for name in ("model.onnx", "engine.onnx"):
        onnx.checker.check_model(str(ours / name), full_check=True)
        graph = onnx.load(str(ours / name), load_external_data=False)
        facts = {item.key: item.value for item in graph.metadata_props}
        assert (graph.producer_name, graph.producer_version) == ("llmc", llmc.__version__)
        assert (facts["llmc.target"], facts["llmc.family"], facts["llmc.option.contrib"]) == (
            "onnx", "llama", "true",
        )  # fmt: skip
        steps = json.loads(facts["llmc.recipe"])
        assert [step["name"] for step in steps] == facts["llmc.passes"].split(", ")
        assert steps[0]["name"] == "fold_constants"
        assert steps[0]["options"]["limit_bytes"] == 2**20
        used = {
            item.value for t in graph.graph.initializer for item in t.external_data if item.key == "location"
        }
        assert used <= set(files)
    report = json.loads((ours / "report.json").read_text())["backend"]
    assert report["executor"] == "onnxruntime"
    assert report["max_logprob_error"] < 1e-4


def test_a_viewer_finds_shapes_and_layers_to_fold(compiled):
    ours, _ = compiled
    model = onnx.load(str(ours / "model.onnx"), load_external_data=False)
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    layers = {name.split("/")[3] for name in names if name.startswith("/model/layers/")}
    assert layers == {str(index) for index in range(len(layers))}
    assert len(layers) > 2
    for entry in (*graph.input, *graph.output):
        dims = entry.type.tensor_type.shape.dim
        assert dims
        assert all(dim.dim_value or dim.dim_param for dim in dims)


def test_what_is_stored_is_read_back_in_the_portable_packing(stories_7m, tmp_path):
    path = tmp_path / "q.llmc"
    compile_model(
        stories_7m, output=path, target="onnx", quant="int4-fast", verify="off", cache=False,
        overrides=["select_kernels.inputs=fast"],
    )  # fmt: skip
    other = tmp_path / "r.llmc"
    compile_model(stories_7m, output=other, target="reference", quant="int4-fast", verify="off", cache=False)
    ours, theirs = open_unchecked(path), open_unchecked(other)
    read = backend_for(ours.manifest.target).stored_weights(ours)
    from llmc.ir.weights import Reader

    reader = Reader()
    for name, view in theirs.weights().items():
        found = read[name].evaluate(reader)
        assert str(found.dtype) == f"torch.{view.dtype}"
        if view.dtype != "bfloat16":
            assert np.array_equal(found.numpy(), view.data)
    assert ours.size_bytes <= 1.02 * theirs.size_bytes + GRAPHS_BYTES
    assert_pieces_say_what_the_whole_says(ours)
    assert verify_artifact(path) == []
    kinds = {
        (node.op_type, attribute.i)
        for node in onnx.load(str(path / "model.onnx"), load_external_data=False).graph.node
        for attribute in node.attribute
        if attribute.name == "accuracy_level"
    }
    assert kinds == {("MatMulNBits", 4)}
    assert read_tensors(path / "weights-00001.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["int4-fast", "int8"])
def test_a_folder_takes_no_more_than_the_native_one(quant, stories_7m, tmp_path):
    sizes = {}
    for target in ("onnx", "cpu"):
        path = tmp_path / f"{target}.llmc"
        compile_model(stories_7m, output=path, target=target, quant=quant, verify="off", cache=False)
        artifact = open_unchecked(path)
        sizes[target] = artifact.size_bytes
        sizes[f"{target} weights"] = sum(e.size_bytes for e in artifact.manifest.of_kind("weights"))
    assert sizes["onnx"] <= 1.02 * sizes["cpu"]
    assert sizes["onnx weights"] <= 1.02 * sizes["cpu weights"]


@pytest.mark.parametrize(
    ("scheme", "nearest"),
    [
        ("int4_g48", "int4_g32"),
        ("nf4_g64", "int4_g64"),
        ("fp8_b128x128", "int8_g128"),
        ("int8_g512", "int8_g256"),
    ],
)
def test_a_scheme_without_an_operator_is_refused_with_the_nearest(scheme, nearest):
    with pytest.raises(TargetError) as caught:
        check_scheme(parse_scheme(scheme), "model.layers.0.mlp.weight")
    assert scheme in caught.value.what
    assert nearest in caught.value.fix


@pytest.mark.parametrize(
    ("target", "override", "code"),
    [
        ("onnx", "onnx.contrb=false", "Did you mean onnx.contrib?"),
        ("onnx", "onnx.contrib=maybe", "Choose another value."),
        ("onnx", "onnx.file_bytes=12", "Choose another value."),
        ("reference", "onnx.contrib=false", "compile with --target onnx"),
    ],
)
def test_target_options_that_cannot_be_meant_are_refused(target, override, code):
    with pytest.raises(UsageError) as caught:
        with_options(parse_target(target), [override])
    assert code in caught.value.fix


def test_a_cache_dtype_that_the_graph_does_not_keep_is_refused(stories_7m, tmp_path):
    with pytest.raises(TargetError, match="cannot keep the KV cache in int8"):
        compile_model(stories_7m, output=tmp_path / "a.llmc", target="onnx", kv_dtype="int8", verify="off")
    assert list(tmp_path.iterdir()) == []
