"""Calibrated passes on whole programs: what reaches each layer, what is kept, what interruptions change."""

from __future__ import annotations

import errno
import gc
import weakref

import pytest
import torch
from safetensors.torch import save_file

from llmc.ir.interpret import interpret
from llmc.ir.weights import Constant, Source
from llmc.passes.base import PassContext
from llmc.passes.calibration import Calibration
from llmc.passes.fuse_qkv import FuseQkv
from llmc.passes.graph import argument
from llmc.passes.instruments import NumericContract, Verification
from llmc.passes.manager import run_passes
from llmc.passes.probe import logits_of, probe_sequences
from llmc.passes.quantize import activations, solve
from llmc.passes.quantize.footprint import calibration_footprint
from llmc.passes.quantize.fp8 import Fp8
from llmc.passes.quantize.gptq import Gptq
from llmc.passes.quantize.rtn import Rtn
from llmc.passes.quantize.scale_search import ScaleSearch
from llmc.passes.quantize.segments import product_sites
from llmc.passes.quantize.walk import Walk, packed_inputs, run_nodes
from llmc.spec.errors import ModelError, RecipeError, TargetError


def calibration(program, folder, **options):
    sequences = tuple(probe_sequences(program.spec, seed) for seed in range(4))
    flat = tuple(sequence for some in sequences for sequence in some)
    return Calibration(sequences=flat, source="random tokens", folder=folder, **options)


def quantize(program, folder, *passes, **options):
    context = PassContext(calibration=calibration(program, folder, **options))
    return run_passes(program, passes, context, [Verification(), NumericContract()])


def stored(program):
    return {name: program.weights.evaluate(name).clone() for name in program.used_weights()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("memory_bytes", [1 << 30, 0])
def test_a_walk_gives_each_product_the_inputs_that_the_whole_program_gives_it(toy, tmp_path, memory_bytes):
    """Segment by segment, spilled or not, as in one run; and nothing is left on disk."""
    program = run_passes(toy(bias=True), (FuseQkv(),), PassContext())
    data = calibration(program, tmp_path, memory_bytes=memory_bytes)
    walk = Walk(program, product_sites(program.graph), data)
    seen = []
    for segment in walk.segments:
        if segment.x is not None:
            seen.append((segment.x.name, torch.cat(list(walk.values(segment.x)))))
        walk.advance(segment, {})
    assert len(seen) == len({argument(site, "x") for site in product_sites(program.graph)})
    whole = {}
    tokens = [token for sequence in data.sequences for token in sequence]
    inputs = {
        "input_ids": torch.tensor(tokens),
        "positions": torch.cat([torch.arange(len(sequence)) for sequence in data.sequences]),
        "out_rows": torch.arange(len(tokens)),
    }
    interpret(
        program.graph, inputs, program.weights.evaluate, lambda node, value: whole.update({node.name: value})
    )
    for name, value in seen:
        assert torch.allclose(value, whole[name], atol=1e-4), name
    walk.close()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_values_of_a_step_go_with_it(toy):
    """At once, not when garbage is next collected: those of wide layers take gigabytes."""
    program = toy()
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    gc.collect()
    gc.disable()
    try:
        found = run_nodes(nodes, {}, packed_inputs([(1, 2, 3)]), program.weights.evaluate)
        references = [weakref.ref(value) for value in found.values() if isinstance(value, torch.Tensor)]
        del found
        assert len(references) > 12
        assert not any(reference() is not None for reference in references)
    finally:
        gc.enable()


def test_calibrated_weights_come_closer_than_rounded_ones(toy, tmp_path):
    program = toy(bias=True)
    options = {"bits": 3, "group_size": 32, "head_bits": 3, "embedding_bits": 8}
    exact = logits_of(program, probe_sequences(program.spec, 9))
    errors = {}
    for pass_ in (
        Rtn(**options),
        ScaleSearch(**options),
        ScaleSearch(data=False, **options),
        Gptq(**options),
    ):
        done = quantize(program, tmp_path, pass_)
        found = logits_of(done, probe_sequences(program.spec, 9))
        errors[f"{pass_.name} {getattr(pass_, 'data', '')}"] = float((found - exact).pow(2).mean())
        for layer in done.history[-1].errors:
            assert layer.error <= layer.nearest_error * 1.001
    assert errors["gptq "] < errors["rtn "]
    assert errors["scale_search True"] < errors["rtn "]


def test_an_interrupted_run_goes_on_where_it_stopped_and_ends_the_same(toy, tmp_path, monkeypatch):
    program = toy(bias=True)
    whole = stored(quantize(program, tmp_path / "whole", Gptq()))
    solved = solve.solve_linears
    count = 0

    def stops(*args):
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return solved(*args)

    monkeypatch.setattr(solve, "solve_linears", stops)
    with pytest.raises(KeyboardInterrupt):
        quantize(program, tmp_path / "cut", Gptq())
    first = count
    assert not list((tmp_path / "cut").rglob("*.bin"))
    monkeypatch.setattr(solve, "solve_linears", solved)
    again = []
    monkeypatch.setattr(solve, "solve_linears", lambda *args: again.append(1) or solved(*args))
    resumed = stored(quantize(program, tmp_path / "cut", Gptq()))
    assert same(whole, resumed)
    total = len(list((tmp_path / "whole").rglob("segment-*.safetensors"))) - 1
    assert len(again) == total - (first - 1)


def test_a_damaged_result_is_computed_again(toy, tmp_path):
    program = toy()
    whole = stored(quantize(program, tmp_path, Gptq()))
    path = max(tmp_path.rglob("segment-*.safetensors"))
    path.write_bytes(path.read_bytes()[:-7])
    assert same(whole, stored(quantize(toy(), tmp_path, Gptq())))


def test_results_of_other_options_tokens_or_weights_are_not_taken_up(toy, tmp_path):
    program = toy()
    quantize(program, tmp_path, Gptq())
    name = next(name for name in program.used_weights() if len(program.weights[name].shape) == 2)
    value = program.weights.evaluate(name).clone()
    value[0, 0] += 1
    changed = program.replace(weights=program.weights.with_entries({name: Constant(value)}))
    for other, pass_ in ((program, Gptq(rounds=0)), (changed, Gptq())):
        fresh = stored(quantize(other, tmp_path / f"fresh{id(other)}", pass_))
        assert same(fresh, stored(quantize(other, tmp_path, pass_)))


@pytest.mark.parametrize("poison", [float("nan"), float("-inf")])
@pytest.mark.parametrize(
    "pass_",
    [ScaleSearch(data=False), Gptq(), Rtn(), Rtn(bits=8, group_size=0, symmetric=False), Fp8()],
    ids=["by weights", "calibrated", "nearest", "with zero points", "floats"],
)
def test_weights_that_are_no_numbers_are_refused_by_name(toy, tmp_path, pass_, poison):
    """Whether they are rounded at once or when they are asked for; by the stored tensor."""
    program = toy()
    name = next(name for name in program.used_weights() if "down" in name or "o_proj" in name)
    value = program.weights.evaluate(name).contiguous().clone()
    value[0, 0] = poison
    save_file({"stored.weight": value}, tmp_path / "model.safetensors")
    source = Source(str(tmp_path / "model.safetensors"), "stored.weight", tuple(value.shape), value.dtype)
    broken = program.replace(weights=program.weights.with_entries({name: source}))
    context = PassContext(calibration=calibration(broken, tmp_path))
    with pytest.raises(ModelError) as caught:
        stored(run_passes(broken, (pass_,), context))
    assert caught.value.code == "model.not_finite"
    assert "'stored.weight' in model.safetensors" in caught.value.what


def test_a_layer_that_no_token_activates_is_rounded_by_its_weights_and_said_to_be(toy, tmp_path):
    program = toy()
    names = [name for name in program.used_weights() if len(program.weights[name].shape) == 1]
    zero = {name: Constant(torch.zeros_like(program.weights.evaluate(name))) for name in names}
    silent = program.replace(weights=program.weights.with_entries(zero))
    context = PassContext(calibration=calibration(silent, tmp_path))
    done = run_passes(silent, (Gptq(),), context)
    reasons = [decision.reason for decision in done.history[-1].decisions]
    assert any("no calibration token activated it" in reason for reason in reasons)


def test_a_full_disk_is_said_and_leaves_what_was_done(toy, tmp_path, monkeypatch):
    def full(value, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("llmc.passes.quantize.activations.write_bytes", full)
    program = toy()
    with pytest.raises(TargetError) as caught:
        quantize(program, tmp_path, Gptq(), memory_bytes=0)
    assert caught.value.code == "target.disk_full"
    assert "takes up where it stopped" in caught.value.fix


@pytest.mark.parametrize("shape", [{}, {"experts": 4}, {"tied": True, "hidden": 64, "ffn": 96}])
def test_spilled_activations_are_foreseen(toy, tmp_path, monkeypatch, shape):
    """All of them spilled, both streams: as much as was said, and not far less."""
    written, most = {}, [0]
    write, take = activations.write_bytes, activations.Path.unlink

    def counted(value, path):
        write(value, path)
        written[path] = value.nbytes
        most[0] = max(most[0], sum(written.values()))

    def removed(path, *rest, **options):
        written.pop(path, None)
        take(path, *rest, **options)

    monkeypatch.setattr(activations, "write_bytes", counted)
    monkeypatch.setattr(activations.Path, "unlink", removed)
    program = toy(**shape)
    quantize(program, tmp_path, Gptq(bits=4, group_size=0), memory_bytes=0)
    num_tokens = calibration(program, tmp_path).num_tokens
    said = calibration_footprint(program, num_tokens, 0)
    assert said.spilled_bytes / 4 < most[0] <= said.spilled_bytes
    held = calibration_footprint(program, num_tokens, 1 << 30)
    assert held.spilled_bytes == 0
    assert held.memory_bytes == said.memory_bytes + said.spilled_bytes


@pytest.mark.parametrize("pass_", [Gptq(), ScaleSearch(data=False)], ids=["calibrated", "by weights"])
def test_codes_of_one_layer_alone_are_held_in_memory(toy, tmp_path, monkeypatch, pass_):
    """What was found for earlier ones is in files: memory does not grow with the layers."""
    found, held = [], []
    save = solve.SolvedFolder.save

    def counted(folder, segment, results):
        gc.collect()
        held.append(sum(reference() is not None for reference in found))
        found.extend(weakref.ref(result.tensor.codes) for result in results.values())
        save(folder, segment, results)

    monkeypatch.setattr(solve.SolvedFolder, "save", counted)
    quantize(toy(), tmp_path, pass_)
    assert len(found) > 12
    assert max(held) <= 3  # those of the product before, three where keys, queries and values are apart


def test_passes_that_need_tokens_say_so(toy):
    with pytest.raises(RecipeError, match="no calibration data"):
        run_passes(toy(), (Gptq(),), PassContext())
    planned = run_passes(toy(), (Gptq(),), PassContext(planning=True))
    assert planned.history[-1].matches > 0


def test_experts_that_no_token_chose_are_calibrated_and_named(toy, tmp_path):
    program = toy(experts=4)
    data = calibration(program, tmp_path)
    few = Calibration(sequences=(data.sequences[1],), source="one token", folder=tmp_path)
    done = run_passes(program, (Gptq(min_rows=1),), PassContext(calibration=few))
    stacks = [decision for decision in done.history[-1].decisions if "of 4 experts" in decision.reason]
    assert stacks
    assert all("chosen by no calibration token" in decision.reason for decision in stacks)
    full = quantize(program, tmp_path, Gptq(min_rows=1))
    exact = logits_of(program, probe_sequences(program.spec, 9))
    plain = run_passes(program, (Rtn(min_rows=1),), PassContext())
    errors = [(logits_of(p, probe_sequences(program.spec, 9)) - exact).pow(2).mean() for p in (full, plain)]
    assert errors[0] < 1.2 * errors[1]
