"""Findings of a search in words: a table of the front, and one sentence of advice."""

from __future__ import annotations

import math

from ..compare.statistics import Ratio
from ..compare.table import COLUMNS
from ..compare.words import ratio_text
from .search import Findings
from .trial import MEASURED, PRUNED, REFUSED, UNFINISHED, Trial, told_slowness

_SHOWN = (
    "bits_per_weight",
    "size_bytes",
    "peak_bytes",
    "kl_mean",
    "ttft_s",
    "tpot_s",
    "throughput_tokens_per_s",
    "cost_per_million",
)
# What passes for the original's text where no limit says otherwise, in nats.
_FAITHFUL_KL = 0.05
_HARDLY_TOLD_KL = 0.005


def front_rows(findings: Findings) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table with a recipe a row, most faithful first."""
    shown = [
        column
        for column in COLUMNS
        if column.key in _SHOWN and all(column.key in trial.values for trial in findings.front)
    ]
    header = ["recipe", *(column.title for column in shown), "time per token"]
    rows = [
        [trial.name, *(column.write(trial.values[column.key]) for column in shown), speed_text(trial)]
        for trial in findings.front
    ]
    return header, rows


def speed_text(trial: Trial) -> str:
    """The time per token over the unquantised model's, with its interval."""
    values = trial.values
    interval = Ratio(ratio=values["slowness"], low=values["slowness_low"], high=values["slowness_high"])
    return ratio_text(interval)


def summary(findings: Findings) -> str:
    """How many recipes were tried, what became of them, and why the search ended."""
    states = [trial.state for trial in findings.trials]
    told = [
        f"{states.count(MEASURED)} measured",
        f"{states.count(PRUNED)} dropped by estimates",
        f"{states.count(REFUSED)} not for this model or target",
    ]
    if UNFINISHED in states:
        told.append(f"{states.count(UNFINISHED)} left for want of time")
    ends = {"exhausted": "nothing is left to try", "budget": "the budget does for no other recipe"}
    return f"{len(states)} recipes ({findings.num_new} new): {', '.join(told)} · {ends[findings.ended]}"


def search_advice(findings: Findings) -> str:
    """Which recipe to take and what it costs, in plain words."""
    if not findings.front:
        return _no_front(findings)
    best, faithful = advised(findings), findings.front[0]
    share = 100 * best.values["size_bytes"] / faithful.values["size_bytes"]
    size = "" if best is faithful else f" and takes {share:.0f} % of the bytes of {faithful.name}"
    return (
        f"Take {best.name}: it {_speed_words(best)}{size}, and its text is {_closeness(best)} "
        f"(KL {best.values['kl_mean']:.2g}); compile it with `llmc compile MODEL --recipe "
        f"{findings.recipes[best.name]}`."
    )


def advised(findings: Findings) -> Trial:
    """Of the front, the least bytes times time among those near to the original: within the limit asked for,
    or else within what reads alike; the most faithful where none is."""
    limit = findings.limits.kl or _FAITHFUL_KL
    near = [trial for trial in findings.front if trial.values["kl_mean"] <= limit] or [findings.front[0]]

    def cost(trial: Trial) -> float:
        return math.log(trial.values["size_bytes"]) + math.log(told_slowness(trial.values))

    return min(near, key=cost)


def _no_front(findings: Findings) -> str:
    measured = [trial for trial in findings.trials if trial.state == MEASURED]
    if measured:
        names = sorted({name for trial in measured for name in findings.beyond(trial)})
        return f"No recipe keeps to the limits: those measured break {', '.join(names)}; allow more there."
    if any(trial.state == PRUNED for trial in findings.trials):
        return "No recipe came near enough to the limits to be measured: allow more, or search longer."
    refused = next((trial for trial in findings.trials if trial.state == REFUSED), None)
    if refused is not None:
        return f"No recipe could be measured; {refused.name} was refused: {refused.reason}"
    return "The budget did not do for one recipe: the same command with a longer one goes on from here."


def _speed_words(trial: Trial) -> str:
    slowness = told_slowness(trial.values)
    if slowness == 1.0:
        return "is about as fast as the unquantised model"
    if slowness < 1.0:
        return f"makes tokens {1 / slowness:.2f} times as fast as the unquantised model"
    return f"needs {slowness:.2f} times as long for a token as the unquantised model"


def _closeness(trial: Trial) -> str:
    kl = trial.values["kl_mean"]
    if kl <= _HARDLY_TOLD_KL:
        return "hardly told from the original's"
    if kl <= _FAITHFUL_KL:
        return "near the original's, with other words here and there"
    return "clearly another than the original's: read it before you rely on it"
