"""`llmc compare`: artifacts, or one model under several recipes, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .output import Output, table, with_output
from .progress import shown_progress
from .searching import SEARCH_ONLY, parse_limits, parse_number, refuse_search_options, run_search

if TYPE_CHECKING:
    from ..compiler.compare.compare import Comparison


@click.command()
@click.argument("paths", metavar="ARTIFACT…|MODEL", nargs=-1, required=True)
@click.option("--recipe", "recipes", multiple=True, metavar="R", help="A preset or YAML file for MODEL.")
@click.option("--set", "overrides", multiple=True, metavar="PASS.OPTION=VALUE", help="Change an option.")
@click.option("--target", help="What recipes are compiled for (default: this machine's).")
@click.option("--dtype", metavar="D", help="What recipes compute in (default: the checkpoint's).")
@click.option("--baseline", metavar="NAME", help="The side that others are divided by (default: the first).")
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="A prompt (default: built in).")
@click.option("--data", type=click.Path(path_type=Path), metavar="FILE", help="Text to judge quality on.")
@click.option("--tokens", "num_tokens", default=32, show_default=True, help="Tokens made for each prompt.")
@click.option("--concurrency", default=4, show_default=True, help="Requests of a batch.")
@click.option("--rounds", default=60, show_default=True, help="Most rounds of interleaved work.")
@click.option("--budget-seconds", "budget_s", default=12.0, show_default=True, help="Time for the rounds.")
@click.option("--price-per-hour", metavar="X", help="What an hour of this machine costs.")
@click.option(
    "--limit",
    "limits",
    multiple=True,
    metavar="ttft|tpot=SECONDS",
    help="What makes a request good; with --search what a recipe must keep to, also kl=NATS and size=BYTES.",
)
@click.option("--threads", "num_threads", default=0, help="Threads of each side (default: one a core).")
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE", help="Write a page with plots.")
@click.option("--search", "is_search", is_flag=True, help="Look for the best recipes of MODEL.")
@click.option("--budget-minutes", metavar="N", help="With --search: how long (default: 10).")
@click.option("--study", type=click.Path(path_type=Path), help="With --search: the file to go on with.")
@click.option("--out", type=click.Path(path_type=Path), help="With --search: the folder for recipes.")
@with_output
@click.pass_context
def compare(
    context: click.Context, output: Output, paths: tuple[str, ...], is_search: bool, **options: Any
) -> None:
    """Do the same work through each side, interleaved, and say what differs beyond noise.

    Sides are artifacts, or MODEL compiled under each --recipe (kept in the compile cache); a model folder
    beside artifacts is the original, unquantised in float32. With --search the sides are recipes that are
    made from the options of passes, and those that none beats are written as files.
    """
    given = {name for name in context.params if _was_given(context, name)}
    if is_search:
        run_search(output, paths, given, options)
        return
    refuse_search_options(given)
    _compare(output, paths, **{name: options[name] for name in options if name not in SEARCH_ONLY})


def _was_given(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE


def _compare(output: Output, paths: tuple[str, ...], html: Path | None, **options: Any) -> None:
    from ..compiler.compare.compare import CompareRequest
    from ..compiler.compare.compare import compare as run
    from ..compiler.compare.page import comparison_page
    from ..compiler.compare.sides import SideRequest

    limits = parse_limits(options.pop("limits"), ("ttft", "tpot"))
    price = options.pop("price_per_hour")
    sides = SideRequest(
        paths=paths,
        recipes=options.pop("recipes"),
        overrides=options.pop("overrides"),
        target=options.pop("target"),
        dtype=options.pop("dtype"),
    )
    if not options["prompts"]:
        options.pop("prompts")
    request = CompareRequest(
        sides=sides,
        price_per_hour=None if price is None else parse_number("--price-per-hour", price),
        ttft_limit_s=limits.get("ttft"),
        tpot_limit_s=limits.get("tpot"),
        **options,
    )
    with shown_progress(output) as progress:
        found = run(request, progress=progress)
    if html is not None:
        html.write_text(comparison_page(found), encoding="utf-8")
        output.note(f"Wrote {html}.")
    output.result(found.as_dict(), _told(found))


def _told(found: Comparison) -> str:
    from ..compiler.compare.words import advice, divergence_lines, terminal_rows

    header, rows = terminal_rows(found)
    facts = (
        f"* on the front of quality, size and speed · {found.rounds} rounds, batches of "
        f"{found.concurrency} · ratios to {found.baseline} · KL to {found.reference}"
    )
    lines = [table(rows, header), facts, *divergence_lines(found), advice(found)]
    return "\n\n".join(line for line in lines if line)
