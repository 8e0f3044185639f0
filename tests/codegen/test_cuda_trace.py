"""Bugs planted in a CUDA artifact's launches, without a GPU: the trace names the node, tells a kernel from a
pass, and machine code from its source."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

from llmc.artifact.cuda import CUDA_UNIT, decode_unit, encode_unit
from llmc.cli.main import main
from llmc.codegen.cuda import shipped
from llmc.compiler import kernel_trace
from llmc.compiler.compare.quality import portable_program, stored_program
from llmc.compiler.kernel_run import KernelRun, interpret_launches
from llmc.compiler.kernel_trace import Compared, compare_code
from llmc.compiler.layer_trace import trace_layers
from llmc.compiler.node_values import attention_nodes
from llmc.spec.errors import ArtifactError, TargetError

PROMPTS = [tuple(range(5, 25)), (9, 8, 7)]
SAME = Compared({}, True, "")


def traced(artifact, reference=None):
    program = reference or portable_program(artifact)
    return trace_layers(artifact, PROMPTS, reference=program, reference_name="portable", bound=0.05)


@pytest.fixture(scope="module")
def sound(cuda_artifact):
    """What the kernels launch, and give."""
    return interpret_launches(cuda_artifact, PROMPTS)


@pytest.fixture
def here(monkeypatch):
    """`here(run, compared)`: traces find that run, and compare as said."""

    def give(run, compared=None):
        monkeypatch.setattr(kernel_trace, "run_interpreted", lambda path, prompts: run)
        if compared is not None:
            monkeypatch.setattr(kernel_trace, "compare_code", lambda artifact, run: compared)

    return give


def test_sound_launches_are_followed_at_every_node(cuda_artifact, sound, here):
    here(sound, SAME)
    found = traced(cuda_artifact)
    assert found.first is None
    assert found.code.first is None
    assert found.code.same_as_shipped
    assert "run by triton's interpreter on the CPU for want of a GPU, follows the program" in found.verdict()
    assert "the cuda:sm_90 (interpreted) code follows the program" in found.verdict()
    lines = {line.node: line for line in found.code.lines}
    attention = attention_nodes(stored_program(cuda_artifact))[1].name
    assert (
        lines[attention].call == "attention.paged_attention, attention.decode_splits, attention.merge_splits"
    )
    assert lines[attention].layer == "layers.1"
    assert sum(line.layer == "layers.1" for line in found.code.lines) >= 3
    assert max(line.error for line in found.code.lines) < 0.02
    assert found.lines[1].code_error == lines[attention].error


def spoiling(is_meant, change):
    """A launcher that interprets, with the values of launches that are meant changed."""
    from llmc.kernels.cuda.jit import launch_jit

    def launch_spoilt(launch):
        launch_jit(replace(launch, values=change(launch.values)) if is_meant(launch) else launch)

    return launch_spoilt


def second_of_each_step(kernel):
    """Of two launches of `kernel` a step, the second."""
    seen = []

    def is_meant(launch):
        if launch.specialisation.kernel == kernel:
            seen.append(launch)
        return launch.specialisation.kernel == kernel and len(seen) % 2 == 0

    return is_meant


def test_a_wrong_launch_is_named_as_the_kernels(cuda_artifact, here):
    spoilt = spoiling(
        second_of_each_step("attention.decode_splits"),
        lambda values: {**values, "scale": 2.0 * values["scale"]},
    )
    here(interpret_launches(cuda_artifact, PROMPTS, spoilt), SAME)
    found = traced(cuda_artifact)
    assert found.first is None, "no pass is to blame"
    line = found.code.first
    assert line.node == attention_nodes(stored_program(cuda_artifact))[1].name
    assert line.layer == "layers.1"
    assert "attention.decode_splits" in line.call
    assert f"at node {line.node} (llmc.paged_attention.default) in layers.1" in found.verdict()
    assert "in kernels/cuda.json" in found.verdict()
    assert found.as_dict()["first_code_node"] == line.node


@pytest.mark.slow
@pytest.mark.parametrize(
    "weight", ["layers.1.self_attn.o_proj.weight.scales", "layers.1.post_attention_layernorm.weight"]
)
def test_a_launch_over_a_wrong_weight_is_named_by_who_reads_the_weight(cuda_artifact, here, weight):
    program = stored_program(cuda_artifact)
    name = next(str(n.target) for n in program.graph.nodes if n.op == "get_attr" and weight in str(n.target))
    (reader,) = (n for n in program.graph.nodes if name in {str(each.target) for each in n.all_input_nodes})
    value = program.weights.evaluate(name)

    def reads(launch):
        return any(is_value(each) for each in launch.values.values())

    def is_value(each):
        return isinstance(each, torch.Tensor) and each.shape == value.shape and torch.equal(each, value)

    def double(values):
        return {key: 2.0 * each if is_value(each) else each for key, each in values.items()}

    here(interpret_launches(cuda_artifact, PROMPTS, spoiling(reads, double)), SAME)
    found = traced(cuda_artifact)
    assert found.first is None, "no pass is to blame"
    line = found.code.first
    readers = {reader.name, *(user.name for user in reader.users)}
    assert readers & {line.node, *line.inside}
    assert line.layer == "layers.1"
    assert found.code.error_at(line.node) > 0.1


def test_a_wrong_pass_is_not_the_kernels(cuda_artifact, sound, here):
    here(sound, SAME)
    reference = portable_program(cuda_artifact)
    node = attention_nodes(reference)[1]
    index = next(i for i, value in enumerate(node.args) if isinstance(value, float) and 0 < value < 1)
    node.update_arg(index, 4.0 * node.args[index])
    found = traced(cuda_artifact, reference)
    assert found.first.layer == "layer 1"
    assert found.code.first is None
    assert found.as_dict()["first_code_node"] is None


@pytest.fixture
def few(cuda_artifact, sound):
    """The launches of the last attention and of another node alone, so that little is compiled again."""
    name = attention_nodes(stored_program(cuda_artifact))[1].name
    other = next(each for each in sound.launches if each != name)
    return KernelRun(nodes=sound.nodes, launches={each: sound.launches[each] for each in (name, other)})


class Table:
    """An artifact with another launch table."""

    def __init__(self, artifact, unit):
        self._artifact, self._unit = artifact, unit

    def __getattr__(self, name):
        return getattr(self._artifact, name)

    def read_bytes(self, name):
        return encode_unit(self._unit) if name == CUDA_UNIT else self._artifact.read_bytes(name)


def test_swapped_machine_code_is_named_by_the_node_that_launches_it(cuda_artifact, few, here):
    unit = decode_unit(cuda_artifact.read_bytes(CUDA_UNIT))
    node, merge = next((name, found[-1]) for name, found in few.launches.items() if "attention" in name)
    other = next(k for k in unit.kernels if k.file.startswith("kernels/attention.decode_splits"))
    kernels = tuple(replace(k, file=other.file) if k.key == merge.key else k for k in unit.kernels)
    here(few)
    found = traced(Table(cuda_artifact, replace(unit, kernels=kernels)))
    assert found.first is None
    assert not found.code.same_as_shipped
    assert found.code.first.node == node
    assert f"`attention.merge_splits` has other machine code in {other.file} for sm_90" in found.verdict()
    sound = compare_code(cuda_artifact, few)
    assert sound.is_same
    assert sound.foreign == {}
    assert "is what that source compiles to, to the byte, in all" in sound.note


def test_what_cannot_be_compared_is_said(cuda_artifact, few, monkeypatch):
    monkeypatch.setattr(shipped, "version", lambda name: "9.9")
    found = compare_code(cuda_artifact, few)
    assert not found.is_same
    assert "which is not installed, and was not looked at" in found.note


def test_a_launch_table_of_another_program_is_not_traced(cuda_artifact):
    unit = decode_unit(cuda_artifact.read_bytes(CUDA_UNIT))
    fewer = tuple(kernel for kernel in unit.kernels if "embedding" not in kernel.file)
    with pytest.raises(ArtifactError, match="not that of its program"):
        interpret_launches(Table(cuda_artifact, replace(unit, kernels=fewer)), PROMPTS)


def test_without_a_gpu_and_without_triton_the_trace_says_what_is_missing(cuda_artifact, monkeypatch):
    monkeypatch.setattr(kernel_trace, "find_spec", lambda name: None)
    with pytest.raises(TargetError, match="no GPU, and the library triton") as caught:
        traced(cuda_artifact)
    assert "pip install 'llmc-compiler[cuda]'" in caught.value.fix


@pytest.mark.slow
def test_the_command_interprets_in_a_process_of_its_own(cuda_artifact, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    told = CliRunner().invoke(
        main, ["inspect", str(cuda_artifact.path), "--trace", "--prompt", "Once upon a time", "--json"]
    )
    assert told.exit_code == 0, told.output
    data = json.loads(told.stdout)
    assert data["first_code_node"] is None
    assert data["code"]["same_as_shipped"]
    assert all(line["error"] <= line["allowed"] for line in data["code"]["lines"])


def test_values_of_single_steps_are_not_taken_for_rows(cuda_artifact, sound):
    tokens = sum(map(len, PROMPTS))
    assert {len(rows) for rows in sound.nodes.rows.values()} == {tokens}
    assert torch.isfinite(sound.nodes.logits).all()
