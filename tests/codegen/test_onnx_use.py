"""An ONNX artifact as its user meets it: served, explained, loaded by other tools; and what is refused."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx.reference import ReferenceEvaluator
from openai import OpenAI

import llmc
from llmc.artifact.reader import open_unchecked
from llmc.cli.main import main
from llmc.codegen.onnx.genai import genai_problem
from llmc.compiler import driver
from llmc.models.families import FAMILIES
from llmc.passes.probe import logits_of
from llmc.passes.quantize.rtn import Rtn
from llmc.runtime.config import RuntimeConfig
from llmc.runtime.executors import onnx_model
from llmc.runtime.executors.registry import open_executor
from llmc.spec.errors import TargetError

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def artifact(stories_1m, tmp_path_factory):
    """The small bundled model at int4, computed in float32 as ONNX does."""
    path = tmp_path_factory.mktemp("onnx") / "stories.llmc"
    llmc.compile(stories_1m, quant="int4-fast", dtype="float32", target="onnx", output=path, verify="off")
    return path


def test_the_server_answers_an_openai_client(artifact):
    params = llmc.SamplingParams(max_tokens=24, temperature=1.0, seed=3)
    with llmc.load(artifact) as llm:
        own = llm.generate(PROMPT, params)[0].text
    process = subprocess.Popen(
        [sys.executable, "-m", "llmc.cli", "serve", str(artifact), "--port", "0", "--json"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        ready = json.loads(process.stdout.readline())
        client = OpenAI(base_url=f"{ready['url']}/v1", api_key="none")
        asked = {"model": ready["models"][0], "prompt": PROMPT, "max_tokens": 24, "temperature": 1, "seed": 3}
        assert client.completions.create(**asked).choices[0].text == own
        streamed = [part.choices[0].text for part in client.completions.create(**asked, stream=True)]
        assert "".join(streamed) == own
    finally:
        process.terminate()
        process.communicate(timeout=30)
    assert process.returncode in (0, 130, -15)


def test_the_quality_report_compares_the_graph_with_the_reference_backend(artifact):
    report = json.loads((artifact / "report.json").read_text())
    found = report["backend"]
    assert found["from_reference"]["tokens"] == report["quality"]["tokens"] > 50
    assert found["from_reference"]["kl_mean"] < 1e-8
    assert found["from_reference"]["max_abs"] < 1e-2
    assert found["from_reference"]["same_top"] == 1.0
    assert found["from_original"]["kl_mean"] == pytest.approx(report["quality"]["kl_mean"], rel=1e-3)
    assert found["from_original"]["kl_mean"] > 1e-4
    page = (artifact / "report.html").read_text()
    assert "What its executor computes" in page
    assert f"{found['from_original']['kl_mean']:.4g}" in page


def test_inspect_says_what_the_graph_is_and_how_close_it_comes(artifact):
    shown = CliRunner().invoke(main, ["inspect", str(artifact)])
    assert shown.exit_code == 0
    told = json.loads(CliRunner().invoke(main, ["inspect", str(artifact), "--json"]).output)["onnx"]
    model = onnx.load(str(artifact / "model.onnx"), load_external_data=False)
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    assert (told["opset"], told["ir_version"]) == (opsets[""], model.ir_version)
    assert f"ONNX opset {opsets['']}, IR version {model.ir_version}" in shown.output
    kinds = [node.op_type for node in model.graph.node]
    assert told["operators"]["GroupQueryAttention"] == kinds.count("GroupQueryAttention") > 0
    assert "runs the folder as it is" in shown.output
    assert f"mean KL {told['quality']['from_original']['kl_mean']:.3g}" in shown.output


def test_a_model_without_an_end_of_text_token_is_said_to_be_none_for_genai(portable_program):
    from dataclasses import replace

    spec = portable_program("llama3").spec
    assert genai_problem(spec) == ""
    assert "eos_token_id" in genai_problem(replace(spec, eos_token_ids=()))


def test_standard_operators_run_in_the_reference_evaluator(portable_program, onnx_graph, tmp_path):
    program = portable_program("llama3", Rtn(bits=4, group_size=32))
    graph = onnx_graph(program, tmp_path, contrib=False)
    model = onnx.load(str(graph.path))
    kinds = {node.op_type for node in model.graph.node}
    assert {"Attention", "RMSNormalization", "RotaryEmbedding", "DequantizeLinear"} <= kinds
    assert {node.domain for node in model.graph.node} == {""}
    assert [entry.domain for entry in model.opset_import] == [""]
    ids = np.random.default_rng(2).integers(3, program.spec.vocab_size, (1, 9))
    feeds = {"input_ids": ids, "attention_mask": np.ones((1, 9), np.int64), "out_rows": np.arange(9)}
    for entry in graph.session.get_inputs():
        if entry.name.startswith("past"):
            feeds[entry.name] = np.zeros((1, entry.shape[1], 0, entry.shape[3]), np.float32)
    (logits,) = ReferenceEvaluator(model).run(["logits"], feeds)
    expected = logits_of(program, ids.tolist()).numpy()
    assert np.abs(logits - expected).max() / np.abs(expected).max() <= 1e-4


def test_the_gpu_is_used_where_the_library_offers_it(artifact, monkeypatch):
    asked = []

    def session(path, options, providers):
        asked.append(providers)
        return real(path, options, providers=["CPUExecutionProvider"])

    real = onnx_model.onnxruntime.InferenceSession
    monkeypatch.setattr(onnx_model.onnxruntime, "InferenceSession", session)
    offered = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    for available in (offered, offered[2:]):
        monkeypatch.setattr(onnx_model.onnxruntime, "get_available_providers", lambda found=available: found)
        executor = open_executor(open_unchecked(artifact), RuntimeConfig(max_requests=1))
        assert executor.caps.details["providers"] == "CPUExecutionProvider"
        executor.close()
    assert asked == [
        [("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"],
        ["CPUExecutionProvider"],
    ]


@pytest.mark.parametrize("library", ["onnx_ir", "onnx", "onnxruntime"])
def test_a_missing_library_is_named_with_the_way_to_install_it(library, stories_1m, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    asked = ["compile", str(stories_1m), "-o", str(tmp_path / "a.llmc"), "--target", "onnx", "--json"]
    shown = CliRunner().invoke(main, asked)
    assert shown.exit_code == 4
    error = json.loads(shown.stdout)["error"]
    assert error["code"] == "target.missing_library"
    assert error["what"].endswith(f"needs the library {library}.")
    assert "pip install 'llmc-compiler[onnx]'" in error["fix"]
    assert list(tmp_path.iterdir()) == []


def test_what_the_graph_cannot_hold_is_refused_before_it_is_calibrated(stories_1m, tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "calibration_of", lambda *_: pytest.fail("it was calibrated"))
    with pytest.raises(TargetError, match="cannot keep the KV cache in int8"):
        llmc.compile(
            stories_1m, quant="int4", kv_dtype="int8", target="onnx", output=tmp_path / "a.llmc", verify="off"
        )
    assert list(tmp_path.iterdir()) == []


def test_a_preset_that_operators_cannot_hold_is_refused_with_the_nearest(stories_1m, tmp_path):
    with pytest.raises(TargetError, match="no operator for weights of scheme 'fp8") as caught:
        llmc.compile(stories_1m, quant="fp8", target="onnx", output=tmp_path / "a.llmc", verify="off")
    assert "model.layers.0." in caught.value.why
    assert "int8" in caught.value.fix
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(stories_1m, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TargetError, match="became full"):
        llmc.compile(stories_1m, target="onnx", output=tmp_path / "a.llmc", verify="off")
    assert list(tmp_path.iterdir()) == []


def test_the_page_names_every_family_and_its_genai_program_runs(artifact, request, tmp_path):
    page = (request.config.rootpath / "docs" / "onnx.md").read_text(encoding="utf-8")
    listed = re.findall(r"`([^`]+)`", page.partition("## Families")[2].partition("## Limits")[0])
    supported = [family.name for family in FAMILIES if family.refused is None]
    assert [name for name in listed if name != "decoder"] == supported
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "stories.llmc").symlink_to(artifact)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    params = llmc.SamplingParams(temperature=0.0, max_tokens=40)
    with llmc.load(artifact) as llm:
        text = llm.generate(PROMPT, params)[0].text
    assert len(text) > 40
    assert done.stdout.startswith(text[:40])
