"""Kernel bugs planted in the generated code of one layer: the trace names the node, and blames no pass."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
from click.testing import CliRunner

from llmc.artifact.cpu import CPU_SOURCE
from llmc.artifact.reader import open_artifact
from llmc.cli.main import main
from llmc.codegen.cpu import backend
from llmc.codegen.cpu.taps import tap_source
from llmc.compiler import finish
from llmc.compiler.compare.quality import portable_program, stored_program
from llmc.compiler.driver import compile_model
from llmc.compiler.layer_trace import trace_layers
from llmc.ir.infer import infer
from llmc.spec.errors import ArtifactError

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(
        not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="no C++ compiler"
    ),
]
PROMPTS = [tuple(range(5, 75)), (9, 8, 7)]


def compiled(monkeypatch, model, output, spoil):
    """An artifact whose code `spoil(statement)` has changed for one node: (name of the node, change)."""
    node, change = spoil

    def generate(program, **limits):
        source = generate_soundly(program, **limits)
        lines = source.text.split("\n")
        index = next(i for i, line in enumerate(lines) if line.startswith(f"  // {node}: "))
        spoilt = change(lines[index + 1])
        assert spoilt != lines[index + 1]
        lines[index + 1] = spoilt
        return dataclasses.replace(source, text="\n".join(lines))

    generate_soundly = backend.generate
    monkeypatch.setattr(backend, "generate", generate)
    # What would refuse to commit such an artifact.
    monkeypatch.setattr(finish, "check_libraries", lambda artifact, oracle: None)
    compile_model(model, output=output, quant="int8", target="cpu", verify="off")
    return open_artifact(output)


def traced(artifact):
    return trace_layers(
        artifact, PROMPTS, reference=portable_program(artifact), reference_name="portable", bound=0.05
    )


@pytest.fixture(scope="module")
def sound(stories_1m, tmp_path_factory):
    output = tmp_path_factory.mktemp("sound") / "a.llmc"
    compile_model(stories_1m, output=output, quant="int8", target="cpu", verify="off")
    return open_artifact(output)


def test_sound_code_is_followed_at_every_node(sound):
    found = traced(sound)
    assert found.first is None
    assert found.code.first is None
    assert found.code.same_as_shipped
    nodes = {line.node for line in found.code.lines}
    assert {"paged_attention", "paged_attention_1", "gated_activation_packed_1"} <= nodes
    assert max(line.error for line in found.code.lines) < 0.02
    assert found.lines[0].code_error == found.code.error_at("paged_attention")


@pytest.mark.parametrize(
    ("node", "change"),
    [
        ("gated_activation_packed_1", lambda line: line.replace(" + 384)", " + 383)")),
        pytest.param(
            "quantized_linear_6",
            lambda line: line.replace("s.weights[10]", "s.weights[4]"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["off by one in a gate", "another layer's weights"],
)
def test_a_bug_in_one_layers_code_is_named_as_a_kernels(stories_1m, tmp_path, monkeypatch, node, change):
    artifact = compiled(monkeypatch, stories_1m, tmp_path / "a.llmc", (node, change))
    monkeypatch.undo()
    found = traced(artifact)
    assert found.first is None, "no pass is to blame"
    assert found.code.first.node == node
    assert found.code.first.layer == "layers.1"
    assert found.code.same_as_shipped
    assert f"at node {node}" in found.verdict()
    assert found.as_dict()["first_code_node"] == node


def test_every_statement_has_its_kernel(sound):
    told = CliRunner().invoke(main, ["inspect", str(sound.path), "--kernels", "--json"])
    kernels = json.loads(told.output)["kernels"]
    text = sound.read_bytes(CPU_SOURCE).decode()
    assert len(kernels) == text.count("barrier.wait();")
    by_node = {line["node"]: line for line in kernels}
    assert by_node["quantized_linear_6"]["kernel"].startswith("quantized_linear<")
    assert "instead of" in by_node["quantized_linear_6"]["reason"]
    assert by_node["gather_rows"]["kernel"] == "a generated loop"


def test_code_of_another_program_is_not_traced(sound):
    program = stored_program(sound)
    infer(program)
    text = sound.read_bytes(CPU_SOURCE).decode()
    with pytest.raises(ArtifactError, match="not what this llmc generates"):
        tap_source(program, text.replace("// rms_norm:", "// layer_norm:"))
