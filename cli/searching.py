"""`llmc compare --search`: its options, its limits, and what it says in the end."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..spec.errors import UsageError
from .inspection import parse_bytes
from .output import Output, table
from .progress import shown_progress

if TYPE_CHECKING:
    from ..compiler.search.run import SearchRequest

SEARCH_ONLY = ("budget_minutes", "study", "out")
# Options of a comparison that mean nothing for a search.
_COMPARE_ONLY = {
    "recipes": "--recipe",
    "overrides": "--set",
    "baseline": "--baseline",
    "data": "--data",
    "html": "--html",
}
_DEFAULT_MINUTES = "10"
_SEARCH_LIMITS = ("kl", "size", "ttft", "tpot")


def run_search(
    output: Output, paths: tuple[str, ...], given: Iterable[str], options: Mapping[str, Any]
) -> None:
    """Search over recipes of the one model in `paths`. Raises UsageError for options that cannot be meant."""
    request = _request(paths, set(given), options)

    from ..compiler.search.run import run_search as run
    from ..compiler.search.words import front_rows, search_advice, summary

    with shown_progress(output) as progress:
        try:
            found = run(request, progress=progress)
        except KeyboardInterrupt:
            output.note("What was tried is kept: the same command goes on from here.")
            raise
    header, rows = front_rows(found)
    written = [f"  {path}" for path in found.recipes.values()]
    lines = [table(rows, header) if rows else "", summary(found)]
    lines.append("\n".join(["Recipes of the front:", *written]) if written else "")
    lines.append(search_advice(found))
    data = {**found.as_dict(), "advice": search_advice(found)}
    output.result(data, "\n\n".join(line for line in lines if line))


def _request(paths: tuple[str, ...], given: set[str], options: Mapping[str, Any]) -> SearchRequest:
    model = _the_model(paths, given)
    limits = parse_limits(options["limits"], _SEARCH_LIMITS)
    minutes = parse_number("--budget-minutes", options["budget_minutes"] or _DEFAULT_MINUTES)
    price = options["price_per_hour"]
    chosen = {name: options[name] for name in ("target", "dtype", "num_tokens", "concurrency", "num_threads")}
    if "rounds" in given:
        chosen["rounds"] = options["rounds"]
    if "budget_s" in given:
        chosen["rounds_s"] = options["budget_s"]
    if options["prompts"]:
        chosen["prompts"] = options["prompts"]

    from ..compiler.search.run import SearchRequest
    from ..compiler.search.trial import Limits

    return SearchRequest(
        model=model,
        budget_s=60.0 * minutes,
        out=options["out"] or Path(f"{Path(model).name}-recipes"),
        limits=Limits(**limits),
        study=options["study"],
        price_per_hour=None if price is None else parse_number("--price-per-hour", price),
        **chosen,
    )


def refuse_search_options(given: Iterable[str]) -> None:
    """Raises UsageError where an option of --search stands without it."""
    alone = sorted(set(given) & set(SEARCH_ONLY))
    if alone:
        name = f"--{alone[0].replace('_', '-')}"
        raise UsageError(
            "usage.search",
            f"{name} was given without --search.",
            "It says how recipes are searched for.",
            f"Add --search, or leave {name} out.",
        )


def parse_limits(texts: tuple[str, ...], names: tuple[str, ...]) -> dict[str, float]:
    """Texts `name=number` by name, sizes in bytes. Raises UsageError for another name or no number."""
    found: dict[str, float] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or name not in names:
            legal = {"kl": "kl=NATS", "size": "size=BYTES", "ttft": "ttft=SECONDS", "tpot": "tpot=SECONDS"}
            also = "" if "kl" in names else "; with --search also kl=NATS or size=BYTES"
            raise UsageError(
                "usage.limit",
                f"The limit {text!r} cannot be read.",
                f"A limit is {' or '.join(legal[name] for name in names)}{also}.",
                "Write for example --limit ttft=0.5.",
            )
        if name in found:
            raise UsageError(
                "usage.limit", f"The limit {name} was given twice.", "One of them holds.", "Keep one."
            )
        found[name] = float(parse_bytes(value)) if name == "size" else parse_number("--limit", value)
        if not found[name] > 0:
            raise UsageError(
                "usage.limit", f"The limit {text!r} is none.", "It is 0.", "Choose a larger one."
            )
    return found


def parse_number(option: str, text: str) -> float:
    """A finite number above 0. Raises UsageError for anything else."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise UsageError(
            "usage.number", f"{option} is {text!r}.", "It must be a number above 0.", "Write for example 0.5."
        )
    return value


def _the_model(paths: tuple[str, ...], given: set[str]) -> str:
    useless = [text for name, text in _COMPARE_ONLY.items() if name in given]
    if useless:
        raise UsageError(
            "usage.search",
            f"{useless[0]} cannot be given with --search.",
            "A search makes its own recipes and judges each beside the unquantised model.",
            f"Leave {useless[0]} out.",
        )
    if len(paths) != 1:
        raise UsageError(
            "usage.search",
            "A search is over the recipes of one model.",
            f"{len(paths)} were named.",
            "Name one model folder.",
        )
    return paths[0]
