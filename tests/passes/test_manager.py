"""The manager holds passes to order, facts, expectations; instruments to rules and numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from llmc.ir.weights import Constant, Unbound
from llmc.passes.base import (
    Contract,
    Exact,
    Lossy,
    PassContext,
    PassReport,
    PassResult,
    Stage,
    Within,
    expect_option,
    option,
)
from llmc.passes.instruments import NumericContract, TextDump, Timing, Verification
from llmc.passes.manager import check_order, run_passes, until_stage
from llmc.passes.probe import logits_of, probe_sequences, with_random_weights
from llmc.spec.errors import CheckFailed, InternalError, RecipeError


@dataclass(frozen=True, slots=True, kw_only=True)
class Nudge:
    """Adds `amount` to one weight."""

    name: ClassVar[str] = "nudge"
    stage: ClassVar[Stage] = Stage.fuse
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    provides: ClassVar[frozenset[str]] = frozenset({"nudged"})
    contract: ClassVar[Contract] = Exact()
    amount: float = option(0.0, "How much.")
    held_to: str = option("exact", "Contract.", choices=("exact", "within", "lossy"))
    expect: int = expect_option()

    def run(self, program, context):
        value = program.weights.evaluate("norm.weight")
        weights = program.weights.with_entries({"norm.weight": Constant(value + self.amount)})
        contract = {"exact": Exact(), "within": Within(1e-5), "lossy": Lossy()}[self.held_to]
        report = PassReport(matches=1, misses=("a reason",), contract=contract)
        return PassResult(program=program.replace(weights=weights), report=report)


@dataclass(frozen=True, slots=True, kw_only=True)
class NeedsNudged:
    name: ClassVar[str] = "needs_nudged"
    stage: ClassVar[Stage] = Stage.quantise
    requires: ClassVar[frozenset[str]] = frozenset({"nudged"})
    provides: ClassVar[frozenset[str]] = frozenset()
    contract: ClassVar[Contract] = Lossy()
    expect: int = expect_option()

    def run(self, program, context):
        return PassResult(program=program, report=PassReport(misses=("the first reason",)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Breaks:
    """Returns a program with one attention node too few."""

    name: ClassVar[str] = "breaks"
    stage: ClassVar[Stage] = Stage.fuse
    requires: ClassVar[frozenset[str]] = frozenset()
    provides: ClassVar[frozenset[str]] = frozenset()
    contract: ClassVar[Contract] = Exact()
    expect: int = expect_option()

    def run(self, program, context):
        graph = program.copy_graph()
        node = next(node for node in graph.nodes if node.target is torch.ops.llmc.attention.default)
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)
        return PassResult(program=program.replace(graph=graph), report=PassReport())


CONTEXT = PassContext()


def test_facts_and_history_are_recorded(toy):
    done = run_passes(toy(), [Nudge(amount=0.5, held_to="lossy"), NeedsNudged()], CONTEXT)
    assert done.facts == {"traced", "canonical", "nudged"}
    assert [record.name for record in done.history] == ["nudge", "needs_nudged"]
    first = done.history[0]
    assert first.options == {"amount": 0.5, "held_to": "lossy", "expect": 0}
    assert (first.matches, first.misses, first.divergence) == (1, ("a reason",), None)
    assert first.nodes_before == first.nodes_after == done.num_nodes


def test_a_required_fact_must_come_first():
    with pytest.raises(RecipeError) as caught:
        check_order([NeedsNudged()], ["canonical"])
    assert caught.value.code == "recipe.missing_fact"
    assert "'needs_nudged' needs a program that is 'nudged'" in caught.value.what
    check_order([Nudge(), NeedsNudged()], ["canonical"])


def test_stages_run_in_order():
    with pytest.raises(RecipeError, match="'nudge' of stage 'fuse' stands after a 'quantise' pass"):
        check_order([NeedsNudged(), Nudge()], ["canonical", "nudged"])


def test_a_recipe_splits_at_a_stage():
    early, late = until_stage([Nudge(), NeedsNudged()], Stage.quantise)
    assert (early, late) == ((Nudge(),), (NeedsNudged(),))


def test_fewer_matches_than_expected_is_an_error_with_the_nearest_miss(toy):
    with pytest.raises(RecipeError) as caught:
        run_passes(toy(), [Nudge(), NeedsNudged(expect=2)], CONTEXT)
    assert caught.value.code == "recipe.no_match"
    assert "matched 0 times where the recipe expects 2" in caught.value.what
    assert "the first reason" in caught.value.why
    assert "needs_nudged.expect=0" in caught.value.fix


def test_an_invalid_result_names_the_pass(toy):
    with pytest.raises(InternalError, match="'breaks' returned an invalid program") as caught:
        run_passes(toy(), [Breaks()], CONTEXT, [Verification()])
    assert "1 attention nodes for 2 attention layers" in caught.value.why


@pytest.mark.parametrize("held_to", ["exact", "within"])
def test_a_broken_contract_names_the_pass_and_the_first_value(toy, held_to):
    with pytest.raises(CheckFailed) as caught:
        run_passes(toy(), [Nudge(amount=0.01, held_to=held_to)], CONTEXT, [NumericContract()])
    assert "'nudge'" in caught.value.what
    assert "token 0, entry 0:" in caught.value.why


def test_a_small_change_is_within_but_not_exact(toy):
    program = toy()
    done = run_passes(program, [Nudge(amount=1e-7, held_to="within")], CONTEXT, [NumericContract()])
    assert 0 < done.history[0].divergence < 1e-5
    with pytest.raises(CheckFailed, match="changes no bit"):
        run_passes(program, [Nudge(amount=1e-6)], CONTEXT, [NumericContract()])


def test_a_loss_is_measured_and_recorded(toy):
    program = toy()
    done = run_passes(
        program, [Nudge(amount=0.5, held_to="lossy"), NeedsNudged()], CONTEXT, [NumericContract()]
    )
    sequences = probe_sequences(program.spec, 0)
    expected = (logits_of(done, sequences) - logits_of(program, sequences)).abs().max()
    assert done.history[0].divergence == pytest.approx(float(expected))
    assert done.history[1].divergence == 0.0


def test_non_finite_logits_break_every_contract(toy):
    with pytest.raises(CheckFailed, match="keeps logits finite"):
        run_passes(toy(), [Nudge(amount=float("inf"), held_to="lossy")], CONTEXT, [NumericContract()])


def test_within_grows_with_the_epsilon_of_the_dtype():
    assert Within(1e-6).bound("float32") == 1e-6
    assert Within(1e-6).bound("bfloat16") == pytest.approx(1e-6 * 2**16)


def test_times_are_taken_with_the_clock_given(toy):
    ticks = iter(range(100))
    timing = Timing(lambda: float(next(ticks)))
    run_passes(toy(), [Nudge(), NeedsNudged()], CONTEXT, [timing])
    assert [tuple(entry) for entry in timing.times] == [("nudge", 1.0, 1), ("needs_nudged", 1.0, 0)]


def test_programs_are_dumped_in_order(toy, tmp_path):
    run_passes(toy(), [Nudge(), NeedsNudged()], CONTEXT, [TextDump(tmp_path / "dump")])
    names = sorted(path.name for path in (tmp_path / "dump").iterdir())
    assert names == ["00-input.txt", "01-nudge.txt", "02-needs_nudged.txt"]
    assert "facts: canonical, nudged, traced" in (tmp_path / "dump" / "01-nudge.txt").read_text()


def test_random_weights_replace_what_is_unbound_by_name(toy):
    program = toy()
    names = ["layers.0.attn.q.weight", "norm.weight"]
    unbound = {
        name: Unbound(name, program.weights[name].shape, program.weights[name].dtype) for name in names
    }
    program = program.replace(weights=program.weights.with_entries(unbound))
    one, other = with_random_weights(program, 1), with_random_weights(program, 1)
    for name in names:
        assert torch.equal(one.weights.evaluate(name), other.weights.evaluate(name))
    assert one.weights["embed.weight"] is program.weights["embed.weight"]
    assert logits_of(one, [(1, 2, 3)]).isfinite().all()
