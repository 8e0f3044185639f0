"""The worked example of docs/choose-a-configuration.md: measures it, and writes its numbers into the page.

`python bench/compare/guide.py` measures both parts, `… comparison` or `… search` one, `… write` none.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY / "bench")]

from common import RESULTS, Record  # noqa: E402

from llmc.compiler.compare.statistics import Ratio  # noqa: E402
from llmc.compiler.compare.table import COLUMNS  # noqa: E402
from llmc.compiler.compare.words import ratio_text  # noqa: E402

PAGE = REPOSITORY / "docs" / "choose-a-configuration.md"
MODEL = "models/stories-7m"
PARTS = ("comparison", "search")
RECIPES = ("none", "int8", "int4-fast", "int4")
COMPARISON = ["compare", MODEL, *(part for recipe in RECIPES for part in ("--recipe", recipe))]
COMPARISON += ["--target", "cpu", "--price-per-hour", "0.20", "--limit", "tpot=0.005"]
SEARCH = ["compare", MODEL, "--search", "--target", "cpu", "--limit", "kl=0.02", "--limit", "size=10MB"]
SEARCH += ["--threads", "1", "--budget-seconds", "4", "--budget-minutes", "7"]
SHOWN = ("bits_per_weight", "size_bytes", "kl_mean", "peak_bytes", "tpot_s", "throughput_tokens_per_s")


def run(arguments: Sequence[str]) -> dict[str, Any]:
    """What the command prints with --json, from the repository's root."""
    command = [sys.executable, "-m", "llmc.cli", *arguments, "--json"]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def measure(name: str) -> None:
    """Measure one part and keep it in bench/results."""
    record = Record(f"guide_{name}")
    if name == "comparison":
        found = run(COMPARISON)
    else:
        with tempfile.TemporaryDirectory() as folder:
            found = run([*SEARCH, "--out", folder])
        found["recipes"] = {key: f"stories-7m-recipes/{key}.yaml" for key in found["recipes"]}
        found["advice"] = re.sub(r"(--recipe )\S*/", r"\1stories-7m-recipes/", found["advice"])
    record.write({"command": " ".join(["llmc", *(COMPARISON if name == "comparison" else SEARCH)]), **found})


def comparison_table(found: Mapping[str, Any]) -> str:
    """A configuration a column, as the terminal shows it."""
    rows = found["rows"]
    names = [row["name"] + (" ★" if row["name"] in found["pareto"] else "") for row in rows]
    lines = [_line(["", *names]), _line(["---"] * (len(names) + 1))]
    for column in COLUMNS:
        if column.key not in rows[0]:
            continue
        cells = [column.write(row[column.key]) + _told(row, column.key, found["baseline"]) for row in rows]
        lines.append(_line([column.title, *cells]))
    parted = [row["first_divergence"] for row in rows]
    lines.append(
        _line(["first difference", *("none" if p is None else f"token {p['index'] + 1}" for p in parted)])
    )
    return "\n".join(lines)


def _told(row: Mapping[str, Any], key: str, baseline: str) -> str:
    ratio = row["ratios"].get(key)
    if ratio is None or row["name"] == baseline:
        return ""
    told = ratio_text(Ratio(ratio=ratio["ratio"], low=ratio["low"], high=ratio["high"]))
    return f"<br>{told}"


def search_table(found: Mapping[str, Any]) -> str:
    """The front, a recipe a row, and how many were tried."""
    trials = {trial["name"]: trial for trial in found["trials"]}
    columns = [column for column in COLUMNS if column.key in SHOWN]
    lines = [_line(["recipe", *(column.title for column in columns)]), _line(["---"] * (len(columns) + 1))]
    for name in found["front"]:
        values = trials[name]["values"]
        lines.append(_line([f"`{name}`", *(column.write(values[column.key]) for column in columns)]))
    states = [trial["state"] for trial in found["trials"]]
    counts = ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))
    minutes = found["seconds"] / 60
    told = f"{len(states)} recipes, {found['new_trials']} of them in the last {minutes:.1f} minutes"
    return "\n".join([*lines, "", f"{told}: {counts}.", "", f"> {found['advice']}"])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def written(page: str, results: Path = RESULTS) -> str:
    """The page with the numbers of `results` between its markers, which name the parts."""
    tables = {"comparison": comparison_table, "search": search_table}
    for name in re.findall(r"<!-- (\w+) -->", page):
        table = tables[name]
        kept = json.loads((results / f"guide_{name}.json").read_text(encoding="utf-8"))
        machine = kept["machine"]
        told = (
            f"```\n{kept['results']['command']}\n```\n\n{table(kept['results'])}\n\n"
            f"Measured on {machine['cpu']}, {machine['cores']} cores, {kept['date'][:10]}; others used "
            f"{100 * (kept['foreign_cpu_share'] or 0):.0f} % of the machine meanwhile."
        )
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if (page.count(start), page.count(end)) != (1, 1) or page.index(start) > page.index(end):
            raise ValueError(f"the page must have {start} and {end} once each, in this order")
        before, _, rest = page.partition(start)
        _, _, after = rest.partition(end)
        page = f"{before}{start}\n{told}\n{end}{after}"
    return page


def main() -> None:
    """Measure what is named, or everything, and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", nargs="?", choices=[*PARTS, "write"], help="both parts by default")
    part = parser.parse_args().part
    for name in PARTS if part is None else [part]:
        if name != "write":
            measure(name)
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
