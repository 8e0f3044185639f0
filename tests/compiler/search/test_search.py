"""The search over recipes: what it proposes, drops, remembers and advises, on made-up objectives."""

from __future__ import annotations

import json
import random
import sys

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from llmc.compiler.ledger import Silent
from llmc.compiler.search.costs import SAFETY, UNSEEN, Costs
from llmc.compiler.search.search import Judgement, OutOfTime, Search, front_of
from llmc.compiler.search.space import METHOD, Space, recipe_of, search_space
from llmc.compiler.search.study import Study
from llmc.compiler.search.trial import (
    JUDGE,
    MEASURE,
    MEASURED,
    PRUNED,
    REFUSED,
    UNFINISHED,
    Limits,
    Trial,
)
from llmc.compiler.search.words import advised, front_rows, search_advice, summary
from llmc.passes.base import option_values
from llmc.passes.presets import PRESETS
from llmc.passes.recipes import check_recipe, preset_recipe, read_recipe
from llmc.spec.errors import ModelError, UsageError

SPACE = search_space("cpu")
FACTS = {"model": "a", "target": "cpu"}
FIXED_BITS = {"none": 16, "fp8": 8, "w8a8": 8, "mixed": 5}
BUDGET, MARGIN = 60.0, 5.0


class Clock:
    """Time that passes only where work is done."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def work(self, seconds, timeout_s):
        """Passes `seconds`, or as many as there are before it is ended."""
        self.now += min(seconds, timeout_s)
        if seconds > timeout_s:
            raise OutOfTime


class MadeUp:
    """Bytes are bits, divergence is four times as large with each bit less, time goes with bytes."""

    def __init__(self, clock=None, fails=(), ends_after=None, seconds=lambda name: (1.0, 2.0)):
        self.calls = {"size": [], "judge": [], "measure": []}
        self.clock = clock or Clock()
        self.fails, self.ends_after, self.seconds = fails, ends_after, seconds

    def bits(self, recipe):
        options = {name: value for pass_ in recipe.passes for name, value in option_values(pass_).items()}
        return FIXED_BITS.get(recipe.name.partition("_")[0], options.get("bits", 16))

    def prepare(self, timeout_s):
        self.clock.work(3.0, timeout_s)

    def size_bytes(self, recipe, timeout_s):
        self.calls["size"].append(recipe.name)
        return 100 * self.bits(recipe)

    def judge(self, recipe, timeout_s):
        self.calls["judge"].append(recipe.name)
        self.clock.work(self.seconds(recipe.name)[0], timeout_s)
        if recipe.name in self.fails:
            raise ModelError("made.up", "It does not work.", "It is made up.", "Leave it.")
        return Judgement(4.0 ** (2 - self.bits(recipe)), recipe.name)

    def measure(self, recipe, timeout_s):
        if self.ends_after is not None and len(self.calls["measure"]) >= self.ends_after:
            raise KeyboardInterrupt
        self.calls["measure"].append(recipe.name)
        self.clock.work(self.seconds(recipe.name)[1], timeout_s)
        bits = self.bits(recipe)
        slowness = bits / 16
        bounds = {"slowness_low": 0.95 * slowness, "slowness_high": 1.05 * slowness}
        times = {"ttft_s": bits / 10, "tpot_s": bits / 100, "slowness": slowness, **bounds}
        return {"size_bytes": 100.0 * bits, "kl_mean": 4.0 ** (2 - bits), **times}


def run(path, evaluator, *, limits=None, budget_s=BUDGET, space=SPACE):
    with Study(path, space, FACTS) as study:
        search = Search(
            study=study,
            space=space,
            evaluator=evaluator,
            limits=limits or Limits(),
            budget_s=budget_s,
            margin_s=MARGIN,
            rounds_s=2.0,
            clock=evaluator.clock,
        )
        return search.run(path.parent / "recipes", Silent())


def test_the_space_begins_with_every_preset():
    assert [recipe_of(SPACE, params) for params in SPACE.first] == [
        preset_recipe(preset.name) for preset in PRESETS
    ]
    everything = list(SPACE.all_params())
    assert all(params in everything for params in SPACE.first)


def test_axes_are_the_values_beside_the_options_and_mean_recipes():
    bits = next(axis for axis in SPACE.methods["int4"] if axis.name == "gptq.bits")
    assert {3, 4, 8} <= set(bits.values)
    for method, axes in SPACE.methods.items():
        params = {METHOD: method} | {axis.name: axis.values[-1] for axis in axes}
        check_recipe(recipe_of(SPACE, params))
    names = [axis.name for axes in search_space("reference").methods.values() for axis in axes]
    assert "select_kernels.inputs" not in names, "it changes nothing there"


def test_two_recipes_never_share_a_name():
    drawn = random.Random(0).sample(list(SPACE.all_params()), 300)
    recipes = [recipe_of(SPACE, params) for params in drawn]
    assert len({recipe.name for recipe in recipes}) == len({recipe.passes for recipe in recipes})


def test_the_front_is_written_as_recipes_that_can_be_read(tmp_path):
    found = run(tmp_path / "study.json", MadeUp())
    assert len({json.dumps(dict(trial.params), sort_keys=True) for trial in found.trials}) == len(
        found.trials
    )
    assert len(found.trials) > 15
    sizes = [trial.values["size_bytes"] for trial in found.front]
    assert sizes == sorted(sizes, reverse=True), "here what is smaller diverges more"
    for trial in found.front:
        assert read_recipe(found.recipes[trial.name]) == recipe_of(SPACE, trial.params)
    assert len(front_rows(found)[1]) == len(found.front)
    json.dumps(found.as_dict())


def test_what_estimates_rule_out_is_never_measured(tmp_path):
    evaluator = MadeUp()
    found = run(tmp_path / "study.json", evaluator, limits=Limits(size=900, kl=0.01))
    pruned = {trial.name: trial.reason for trial in found.trials if trial.state == PRUNED}
    assert "larger than the limit" in pruned["none"]
    assert "diverges beyond" in pruned["int4"]
    assert not set(pruned) & set(evaluator.calls["measure"])
    assert "none" not in evaluator.calls["judge"], "the cheaper estimate comes first"
    assert found.front
    assert all(trial.values["size_bytes"] <= 900 for trial in found.front)


def test_what_another_beats_by_far_or_is_the_same_is_not_measured(tmp_path):
    class Worse(MadeUp):
        def judge(self, recipe, timeout_s):
            known = super().judge(recipe, timeout_s)
            if recipe.name == "fp8":
                return known._replace(kl_mean=1.0)
            return known._replace(digest="int8") if recipe.name == "w8a8" else known

    trials = {trial.name: trial for trial in run(tmp_path / "study.json", Worse()).trials}
    assert trials["fp8"].state == trials["w8a8"].state == PRUNED
    assert trials["fp8"].reason == "int8 diverges far less and takes no more bytes"
    assert trials["w8a8"].reason == "it compiles to the same as int8"


def test_recipes_that_do_not_compile_are_told_and_passed_over(tmp_path):
    found = run(tmp_path / "study.json", MadeUp(fails=("int8",)))
    (refused,) = [trial for trial in found.trials if trial.state == REFUSED]
    assert (refused.name, refused.reason) == ("int8", "It does not work. It is made up.")
    assert "1 not for this model or target" in summary(found)


@settings(max_examples=25, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(
    budget_s=st.integers(1, 100),
    costs=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), min_size=4, max_size=4),
)
def test_the_budget_and_its_margin_are_never_overrun(tmp_path_factory, budget_s, costs):
    """Whatever trials take."""
    by_method = dict(zip(("none", "int8", "fp8", "w8a8"), costs, strict=True))
    space = Space(methods=dict.fromkeys(by_method, ()), first=())
    path = tmp_path_factory.mktemp("study") / "study.json"
    evaluator = MadeUp(seconds=lambda name: by_method[name])
    found = run(path, evaluator, budget_s=budget_s, space=space)
    assert evaluator.clock.now <= budget_s + MARGIN
    finished = [trial for trial in found.trials if trial.state != UNFINISHED]
    assert len(found.trials) - len(finished) <= 1
    assert (found.ended == "exhausted") == (len(finished) == len(by_method))


def test_no_trial_begins_that_is_not_expected_to_end_in_time(tmp_path):
    slow = MadeUp(seconds=lambda name: (10.0, 20.0))
    found = run(tmp_path / "study.json", slow, budget_s=100.0)
    # 3 s for what all share; each further trial is expected to take 2 × 30 s, since methods differ
    assert [trial.name for trial in found.trials] == ["none", "int8"]
    assert slow.clock.now == 63.0
    assert found.ended == "budget"
    assert "the budget does for no other recipe" in summary(found)


def test_a_trial_that_takes_longer_than_expected_is_ended_and_tried_again_with_more_time(tmp_path):
    path = tmp_path / "study.json"
    space = Space(methods=dict.fromkeys(("none", "int8", "fp8"), ()), first=({METHOD: "none"},))

    def tried(budget_s):
        evaluator = MadeUp(seconds=lambda name: (1.0, 2.0 if name == "none" else 200.0))
        found = run(path, evaluator, budget_s=budget_s, space=space)
        return evaluator.clock.now, {trial.name: trial.state for trial in found.trials}

    seconds, states = tried(30.0)
    assert seconds == pytest.approx(30.0 - 0.5 + MARGIN)
    (slow,) = [name for name, state in states.items() if state == UNFINISHED]
    assert tried(30.0)[1][slow] == UNFINISHED, "it is known by now to take longer than this"
    assert tried(1000.0)[1] == {"none": MEASURED, "int8": MEASURED, "fp8": MEASURED}


def test_a_budget_that_does_not_do_for_preparing_ends_with_advice(tmp_path):
    found = run(tmp_path / "study.json", MadeUp(), budget_s=0.6)
    assert not found.trials
    assert not found.front
    assert "a longer one goes on from here" in search_advice(found)


@settings(max_examples=50)
@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "b", "c"]), st.floats(0.01, 1e4), st.floats(0.01, 1e4)), max_size=12
    ),
    st.floats(0.01, 1e4),
)
def test_predictions_are_never_below_what_was_seen(seen, prepare_s):
    trials = [
        Trial(name=str(n), params={METHOD: method}, state=MEASURED, seconds={JUDGE: judge, MEASURE: measure})
        for n, (method, judge, measure) in enumerate(seen)
    ]
    costs = Costs(prepare_s=prepare_s, rounds_s=1.0)
    for method in ("a", "b", "c", "d"):
        own = [judge for name, judge, _ in seen if name == method]
        every = [judge for _, judge, _ in seen]
        expected = SAFETY * max(own) if own else UNSEEN * max(every) if every else prepare_s
        assert costs.judge_s({METHOD: method}, trials) == pytest.approx(expected)
        assert costs.trial_s({METHOD: method}, trials) >= costs.measure_s({METHOD: method}, trials)


def test_an_interrupted_search_goes_on_where_it_was(tmp_path):
    path, whole = tmp_path / "study.json", tmp_path / "whole.json"
    with pytest.raises(KeyboardInterrupt):
        run(path, MadeUp(ends_after=3))
    kept = json.loads(path.read_text())["trials"]
    assert sum(trial["state"] == MEASURED for trial in kept) == 3
    again = MadeUp()
    found = run(path, again)
    assert found.num_new > 8
    assert not {trial["name"] for trial in kept} & set(again.calls["size"]), "nothing is judged twice"
    first = run(whole, MadeUp())
    count = len(SPACE.first)
    assert [t.name for t in found.trials[:count]] == [t.name for t in first.trials[:count]]


def test_a_search_ends_when_nothing_is_left(tmp_path):
    space = Space(methods={"none": (), "fp8": ()}, first=())
    found = run(tmp_path / "study.json", MadeUp(), space=space)
    assert found.ended == "exhausted"
    assert {trial.name for trial in found.trials} == {"none", "fp8"}
    assert "nothing is left to try" in summary(found)


def test_the_sampler_learns_to_keep_within_limits(tmp_path):
    """Where most of the space breaks a limit, most of what is proposed after the presets keeps to it."""
    found = run(tmp_path / "study.json", MadeUp(), limits=Limits(kl=0.01))
    later = found.trials[len(SPACE.first) :]
    assert len(later) >= 10
    assert sum(trial.violation == 0 for trial in later) > len(later) / 2


def test_a_study_of_something_else_or_in_use_is_refused(tmp_path):
    path = tmp_path / "study.json"
    run(path, MadeUp(), budget_s=25.0)
    with pytest.raises(UsageError, match="begun with another target: cpu and not cuda"):
        Study(path, SPACE, {**FACTS, "target": "cuda"})
    with Study(path, SPACE, FACTS), pytest.raises(UsageError, match="Another search is writing it"):
        Study(path, SPACE, FACTS)
    path.write_text("{")
    with pytest.raises(UsageError, match="cannot be read"):
        Study(path, SPACE, FACTS)
    path.write_text('{"version": 9, "facts": {}, "trials": []}')
    with pytest.raises(UsageError, match="Its version is 9"):
        Study(path, SPACE, FACTS)


def test_without_optuna_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UsageError, match="needs the library optuna") as caught:
        Study(tmp_path / "study.json", SPACE, FACTS)
    assert "pip install 'llmc-compiler[search]'" in caught.value.fix


def made(name, kl, size, slowness, width=0.01):
    bounds = {"slowness_low": slowness - width, "slowness_high": slowness + width}
    values = {"kl_mean": kl, "size_bytes": size, "slowness": slowness, "ttft_s": 1.0, "tpot_s": 1.0}
    return Trial(name=name, params={METHOD: name}, state=MEASURED, values=values | bounds)


def test_speeds_within_noise_are_equal_on_the_front():
    trials = [made("a", 0.0, 10.0, 1.0), made("b", 0.0, 10.0, 0.98, width=0.05), made("c", 0.1, 11.0, 0.9)]
    assert [trial.name for trial in front_of(trials, Limits())] == ["a", "b", "c"]
    assert [trial.name for trial in front_of([*trials, made("d", 0.0, 10.0, 0.8)], Limits())] == ["d"]
    assert [trial.name for trial in front_of(trials, Limits(kl=0.05))] == ["a", "b"]


def test_advice_keeps_to_the_limit_and_says_when_there_is_none(tmp_path):
    found = run(tmp_path / "study.json", MadeUp(), limits=Limits(kl=0.1))
    best = advised(found)
    assert best.values["kl_mean"] <= 0.1
    assert search_advice(found).startswith(f"Take {best.name}: it makes tokens")
    assert str(found.recipes[best.name]) in search_advice(found)
    empty = run(tmp_path / "empty.json", MadeUp(), limits=Limits(ttft=0.01), budget_s=30.0)
    assert not empty.front
    assert "those measured break ttft" in search_advice(empty)


def test_limits_say_by_how_much_they_are_broken():
    limits = Limits(kl=0.1, size=100.0)
    assert limits.broken({"kl_mean": 0.2, "size_bytes": 100.0}) == {"kl": pytest.approx(1.0)}
    assert limits.broken({}) == {}
    with pytest.raises(UsageError, match="The limit tpot is nan"):
        Limits(tpot=float("nan")).validate()


def test_recipes_that_cannot_be_written_are_an_error(tmp_path):
    (tmp_path / "recipes").write_text("a file where the folder should be")
    with pytest.raises(UsageError, match="Recipes cannot be written"):
        run(tmp_path / "study.json", MadeUp())
