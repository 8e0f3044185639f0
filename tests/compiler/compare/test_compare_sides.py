"""Real artifacts side by side: the numbers that are asked for, the page, and what is refused."""

from __future__ import annotations

import json
import re
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner

from llmc.artifact.reader import open_unchecked
from llmc.cli.main import main
from llmc.compiler.compare.compare import CompareRequest, compare
from llmc.compiler.compare.divergence import first_divergences
from llmc.compiler.compare.measure import Samples
from llmc.compiler.compare.page import comparison_page
from llmc.compiler.compare.quality import stored_program
from llmc.compiler.compare.runner import Facts, Single, WorkerRunner
from llmc.compiler.compare.sides import Side, SideRequest
from llmc.compiler.compare.words import ratio_text
from llmc.compiler.driver import compile_model
from llmc.passes.probe import logits_of
from llmc.spec.errors import UsageError


@pytest.fixture(scope="module")
def artifacts(stories_1m, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sides")
    paths = {}
    for name, quant in (("plain", None), ("eight", "int8")):
        paths[name] = folder / f"{name}.llmc"
        compile_model(stories_1m, output=paths[name], quant=quant, target="reference", verify="off")
    return paths


def request_for(*paths, **changes):
    sides = SideRequest(paths=tuple(map(str, paths)), recipes=changes.pop("recipes", ()))
    small = {"num_tokens": 8, "concurrency": 2, "rounds": 2, "num_threads": 1}
    return CompareRequest(sides=sides, **{**small, **changes})


@pytest.fixture(scope="module")
def found(artifacts):
    return compare(
        request_for(artifacts["plain"], artifacts["eight"], price_per_hour=0.36, tpot_limit_s=100.0)
    )


def test_every_column_has_a_number_for_every_side(found):
    plain, eight = found.rows
    assert (plain.name, eight.name) == ("plain", "eight")
    assert plain.values.keys() == eight.values.keys()
    assert plain.values["kl_mean"] == 0.0
    assert 0 < eight.values["kl_mean"] < 0.05
    assert eight.values["size_bytes"] < plain.values["size_bytes"]
    assert plain.values["cost_per_million"] == pytest.approx(
        0.36 / 3600 / plain.values["throughput_tokens_per_s"] * 1e6
    )
    assert eight.values["goodput_per_s"] > 0
    assert found.reference == "plain"
    assert len(eight.layers) == 3
    assert len(eight.latencies["tpot_s"]) == found.rounds * 3, "a time for every request"
    assert found.as_dict()["rows"][1]["latency"]["ttft_s"].keys() == {"p50", "p90", "p99"}
    assert all(error > 0 for error in eight.layers)
    assert set(found.pareto) == {"plain", "eight"}


def test_the_page_loads_nothing_and_names_every_side(found):
    page = comparison_page(found)

    class Reader(HTMLParser):
        tags, links = [], []

        def handle_starttag(self, tag, attrs):
            self.tags.append(tag)
            self.links += [value for name, value in attrs if name in ("src", "href")]

    reader = Reader()
    reader.feed(page)
    assert not reader.links
    assert "script" not in reader.tags
    assert reader.tags.count("svg") >= 5
    assert "prefers-color-scheme: dark" in page
    assert "width=device-width" in page
    assert re.search(r"<th>eight", page)
    json.dumps(found.as_dict())


def test_sides_of_different_models_are_refused_with_what_differs(artifacts, stories_7m, tmp_path):
    other = tmp_path / "other.llmc"
    compile_model(stories_7m, output=other, target="reference", verify="off")
    with pytest.raises(UsageError, match="They differ in num layers: 2 and 8"):
        compare(request_for(artifacts["plain"], other))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baseline": "nobody"}, "The baseline 'nobody' is none of the sides"),
        ({"rounds": 0}, "rounds is 0"),
        ({"num_tokens": 1}, "num_tokens is 1"),
        ({"price_per_hour": float("nan")}, "price_per_hour is nan"),
        ({"recipes": ("int4",)}, "1 recipes were given for 0 models"),
        ({"num_tokens": 5000}, "5000 tokens do not fit"),
        ({"prompts": ("",)}, "prompts is 1"),
        ({"data": Path("nobody.txt")}, "The text 'nobody.txt' cannot be read"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_runs(artifacts, changes, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        compare(request_for(artifacts["plain"], artifacts["eight"], **changes), open_runner=pytest.fail)


def run(*arguments):
    return CliRunner().invoke(main, ["compare", *map(str, arguments)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--price-per-hour", "cheap"), "--price-per-hour is 'cheap'"),
        (("--limit", "kl=1"), "The limit 'kl=1' cannot be read"),
        (("--limit", "ttft=soon"), "--limit is 'soon'"),
        (("--set", "rtn.bits=4"), "The override 'rtn.bits=4' changes nothing here"),
        ((), "There is 1 side to compare"),
    ],
)
def test_the_command_line_refuses_in_three_lines(artifacts, arguments, message):
    result = run(artifacts["plain"], *arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_an_artifact_that_is_not_there_is_not_taken_for_a_model(artifacts):
    result = run(artifacts["plain"], "nobody.llmc")
    assert result.exit_code == 3
    assert "There is no artifact at 'nobody.llmc'" in result.output


def test_a_recipe_with_a_typo_names_the_closest(stories_1m):
    result = run(stories_1m, "--recipe", "int44", "--recipe", "int8")
    assert result.exit_code == 2
    assert "Did you mean" in result.output


def test_a_ratio_says_no_difference_where_its_interval_holds_one(found):
    assert ratio_text(found.rows[0].ratios["tpot_s"]) == "no difference"


@pytest.mark.slow
def test_a_model_folder_is_the_original_for_the_same_target(artifacts, stories_1m):
    found = compare(request_for(artifacts["eight"], stories_1m, baseline="original"))
    original = next(row for row in found.rows if row.name == "original")
    assert found.reference == "original"
    assert original.executor == "reference"
    assert original.values["bits_per_weight"] > 31


def test_an_override_that_no_recipe_has_is_refused(stories_1m):
    result = run(stories_1m, "--recipe", "int8", "--recipe", "none", "--set", "gptg.bits=3")
    assert result.exit_code == 2
    assert "'gptg.bits=3' changes nothing here" in result.output


def test_gaps_are_those_of_the_logits_that_each_side_had(artifacts):
    """Texts are made to part at tokens that the sides did not choose, so that gaps are large and known."""
    sides = {name: Side(name=name, artifact=open_unchecked(artifacts[name])) for name in ("plain", "eight")}
    prompts, facts = ((5, 6, 7, 8),), Facts(load_s=0.0, peak_bytes=0, executor="reference")
    texts = {"plain": (9, 10, 11), "eight": (9, 30, 31)}
    samples = {
        name: Samples(facts=facts, singles=[(Single(0.1, 0.1, tokens),)]) for name, tokens in texts.items()
    }
    make = {name: partial(WorkerRunner, side.artifact.path, num_threads=1) for name, side in sides.items()}
    found = first_divergences(samples, "plain", prompts, make)
    assert found["plain"] is None
    parted = found["eight"]
    assert (parted.prompt, parted.index, parted.token, parted.baseline_token) == (0, 1, 30, 10)
    assert (parted.continuation, parted.baseline_continuation) == ((30, 31), (10, 11))
    ours, theirs = (
        logits_of(stored_program(sides[name].artifact), [(*prompts[0], 9)])[-1].double()
        for name in ("eight", "plain")
    )
    # The stored program is computed in bfloat16, whose logits differ from the executor's in the last place.
    tolerance = 4 * 2**-8 * float(theirs.abs().max())
    assert parted.gap == pytest.approx(float(ours[30] - ours[10]), abs=tolerance)
    assert parted.baseline_gap == pytest.approx(float(theirs[10] - theirs[30]), abs=tolerance)
