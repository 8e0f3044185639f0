"""The guide's numbers are those that were measured, and its commands are ones that exist."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex

import pytest

from llmc.cli.main import main
from llmc.passes.presets import PRESETS


@pytest.fixture(scope="module")
def guide(request):
    path = request.config.rootpath / "bench" / "compare" / "guide.py"
    spec = importlib.util.spec_from_file_location("bench_compare_guide", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def page(guide):
    return guide.PAGE.read_text(encoding="utf-8")


def test_the_page_says_what_was_measured(guide, page):
    assert guide.written(page) == page, "run python bench/compare/guide.py write"


def test_other_results_change_the_page(guide, page, tmp_path):
    """So that agreement means something."""
    for path in guide.RESULTS.glob("guide_*.json"):
        kept = json.loads(path.read_text(encoding="utf-8"))
        if path.name == "guide_comparison.json":
            kept["results"]["rows"][1]["kl_mean"] = 0.123
        (tmp_path / path.name).write_text(json.dumps(kept), encoding="utf-8")
    assert "| 0.123 |" in guide.written(page, tmp_path)


def test_every_command_of_the_page_exists_with_its_options(page):
    commands = [
        shlex.split(line) for line in re.findall(r"^llmc .*$", page, re.MULTILINE) if not line.endswith("…")
    ]
    assert len(commands) >= 6
    for _, name, *arguments in commands:
        known = {
            text for option in main.commands[name].params for text in (*option.opts, *option.secondary_opts)
        }
        assert {argument for argument in arguments if argument.startswith("-")} <= known


def test_presets_that_the_page_names_exist(page):
    names = {preset.name for preset in PRESETS}
    table = page[page.index("## Rules of thumb") :]
    named = set(re.findall(r"`(none|int\d[a-z-]*|mixed|fp8|w8a8)`", table))
    assert len(named) >= 6
    assert named <= names
