"""docs/how-to-add-a-target.md names files, classes and tables that exist, and the tables agree."""

from __future__ import annotations

import re

import pytest

from llmc.cli import targets
from llmc.codegen import base
from llmc.runtime import protocol
from llmc.runtime.executors import registry
from llmc.spec import target, target_options

PLACEHOLDERS = {"codegen/KIND/backend.py", "runtime/executors/KIND.py"}


@pytest.fixture(scope="module")
def page(request):
    return (request.config.rootpath / "docs" / "how-to-add-a-target.md").read_text(encoding="utf-8")


def test_every_file_that_the_page_names_exists(request, page):
    named = set(re.findall(r"`([\w/]+/[\w/]*(?:\.py)?)`", page))
    assert {"spec/target.py", "codegen/base.py", "tests/codegen/"} <= named
    assert not [name for name in named - PLACEHOLDERS if not (request.config.rootpath / name).exists()]


def test_every_name_of_the_page_is_in_the_code(page):
    for name, module in {
        "KNOWN": target,
        "parse_target": target,
        "TARGET_OPTIONS": target_options,
        "_BACKENDS": base,
        "_EXTRAS": base,
        "_EXECUTORS": registry,
        "Executor": protocol,
    }.items():
        assert f"`{name}`" in page
        assert hasattr(module, name)
    fields = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", page, re.MULTILINE)
    documented = {name for row in fields for name in re.findall(r"\w+", row)}
    assert documented | {"features"} == set(target.Target.__dataclass_fields__)
    methods = {name for name in vars(base.Backend) if not name.startswith("_")}
    assert set(re.findall(r"^- `(\w+)\(", page, re.MULTILINE)) == methods


def test_a_target_stands_in_every_table():
    kinds = {known.kind for known in target.KNOWN.values()}
    assert kinds == set(base._BACKENDS) == set(registry._EXECUTORS)
    assert set(target.KNOWN) == set(targets._ABOUT)
