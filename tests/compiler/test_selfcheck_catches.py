"""The self-check says no when a compiled model is wrong: bugs are planted, each must be found and named."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from llmc.compiler import selfcheck
from llmc.compiler.hf.adapter import config_of
from llmc.compiler.selfcheck import TOLERANCE, default_passes, self_check
from llmc.models.families import family_named
from llmc.passes.base import TRACED, Exact, PassReport, PassResult, Stage, expect_option
from llmc.passes.graph import calls, set_argument
from llmc.spec.errors import CheckFailed, InternalError

ATTENTION = torch.ops.llmc.attention.default


def sabotage(operator, argument, value):
    """A pass that sets one argument of the last call of an operator to something else."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Sabotage:
        name: ClassVar[str] = "sabotage"
        stage: ClassVar[Stage] = Stage.canonicalise
        requires: ClassVar[frozenset[str]] = frozenset({TRACED})
        provides: ClassVar[frozenset[str]] = frozenset()
        contract: ClassVar[Any] = Exact()
        expect: int = expect_option()

        def run(self, program, context):
            graph = program.copy_graph()
            set_argument(calls(graph, operator)[-1], argument, value)
            return PassResult(program=program.replace(graph=graph), report=PassReport(matches=1))

    return Sabotage()


def config_for(name, **changes):
    family = family_named(name)
    return config_of(family.config, {**family.options, **changes})


RMS_NORM = torch.ops.llmc.rms_norm.default


@pytest.mark.parametrize(
    ("name", "operator", "argument", "value"),
    [
        ("mistral", ATTENTION, "window", 0),
        ("mistral", ATTENTION, "window", 9),
        ("gemma2", ATTENTION, "softcap", 0.0),
        ("gpt_oss", ATTENTION, "sinks", None),
        ("llama", ATTENTION, "scale", 0.251),
        ("gemma2", RMS_NORM, "offset", 0.0),
        ("llama", RMS_NORM, "eps", 1e-3),
    ],
)
def test_a_planted_bug_is_found(name, operator, argument, value):
    wrong = sabotage(operator, argument, value)
    with pytest.raises(CheckFailed) as caught:
        self_check(config_for(name), passes=(wrong, *default_passes()))
    assert caught.value.code == "check.self"
    assert "mixed steps of the paged program" in caught.value.why
    assert "differs from position" in caught.value.why


def test_a_wrong_window_shows_only_beyond_it():
    wrong = sabotage(ATTENTION, "window", 0)
    with pytest.raises(CheckFailed, match="sequence 1 of 23 tokens differs from position 8 on"):
        self_check(config_for("mistral"), passes=(wrong, *default_passes()))


def test_a_bug_of_the_trace_is_found(monkeypatch):
    original = selfcheck.trace_config

    def trace_without_window(config, **options):
        program = original(config, **options)
        for node in calls(program.graph, ATTENTION):
            set_argument(node, "window", 0)
        return program

    monkeypatch.setattr(selfcheck, "trace_config", trace_without_window)
    with pytest.raises(CheckFailed, match="one packed step of the traced program"):
        self_check(config_for("mistral"))


def test_logits_that_are_not_numbers_are_found():
    wrong = sabotage(ATTENTION, "scale", float("nan"))
    with pytest.raises(CheckFailed, match="nan"):
        self_check(config_for("llama"), passes=(wrong, *default_passes()))


def test_passes_must_page_attention():
    with pytest.raises(InternalError, match="do not page"):
        self_check(config_for("llama"), passes=default_passes()[:-1])


def test_the_tolerance_is_the_stated_one_where_rounding_allows_it():
    report = self_check(config_for("llama"))
    assert report.tolerance == TOLERANCE
    assert 0 < report.sensitivity < TOLERANCE / 3
    tight = self_check(config_for("llama"), tolerance=1e-9)
    assert tight.tolerance == pytest.approx(3 * report.sensitivity)
