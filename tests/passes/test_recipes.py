"""Recipes: presets, YAML there and back, overrides, plugins, and errors that lead to the right name."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmc.passes import registry
from llmc.passes.base import Exact, OptionInfo, Stage, expect_option, option_values, options_of
from llmc.passes.kv_layout import KvLayout
from llmc.passes.options import build_pass, check_value, closest, parse_value
from llmc.passes.paged_attention import PagedAttention
from llmc.passes.pipeline import BUILT_IN
from llmc.passes.presets import PRESETS
from llmc.passes.quantize.rtn import Rtn
from llmc.passes.recipes import (
    Recipe,
    check_recipe,
    from_yaml,
    override,
    preset_recipe,
    read_recipe,
    recipe_for,
    to_yaml,
)
from llmc.spec.errors import RecipeError


def request(**given):
    base = {"quant": None, "recipe": None, "overrides": (), "kv_dtype": None}
    return SimpleNamespace(**(base | given))


@pytest.mark.parametrize("kind", BUILT_IN)
def test_every_pass_is_a_documented_frozen_dataclass(kind):
    assert is_dataclass(kind)
    assert kind.__dataclass_params__.frozen
    assert "__dict__" not in dir(kind())
    assert kind.__doc__.strip().endswith(".")
    names = [info.name for info in options_of(kind)]
    assert "expect" in names
    assert all(info.doc.endswith(".") for info in options_of(kind))
    for entry in fields(kind):
        check_value(kind.name, next(i for i in options_of(kind) if i.name == entry.name), entry.default)


def test_pass_names_are_unique():
    names = [kind.name for kind in BUILT_IN]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_presets_fit_together_and_survive_yaml(preset):
    recipe = preset_recipe(preset.name)
    check_recipe(recipe)
    assert from_yaml(to_yaml(recipe)) == recipe


def test_a_recipe_reads_like_a_table_of_contents(golden):
    golden(to_yaml(preset_recipe("int4")), "int4.yaml")


@given(
    bits=st.sampled_from((3, 4, 8)),
    group_size=st.sampled_from((0, 32, 64, 128)),
    symmetric=st.booleans(),
    skip=st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=30),
    expect=st.integers(0, 5),
    name=st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=10),
)
def test_any_options_survive_yaml(bits, group_size, symmetric, skip, expect, name):
    pass_ = Rtn(bits=bits, group_size=group_size, symmetric=symmetric, skip=skip, expect=expect)
    recipe = Recipe(name=name, passes=(pass_, KvLayout(dtype="bfloat16")))
    assert from_yaml(to_yaml(recipe)) == recipe


def test_a_request_chooses_preset_overrides_and_cache_dtype():
    recipe = recipe_for(request(quant="int4", overrides=("gptq.group_size=64",), kv_dtype="bfloat16"))
    by_name = {pass_.name: pass_ for pass_ in recipe.passes}
    assert (by_name["gptq"].bits, by_name["gptq"].group_size) == (4, 64)
    assert by_name["kv_layout"].dtype == "bfloat16"
    assert recipe_for(request()).name == "none"


def test_a_request_reads_a_recipe_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(to_yaml(preset_recipe("int8")))
    assert recipe_for(request(recipe=path)) == preset_recipe("int8")


@pytest.mark.parametrize(
    ("overrides", "code", "message"),
    [
        (("gptq.bits",), "recipe.override_form", "pass.option=value"),
        (("bits=4",), "recipe.override_form", "pass.option=value"),
        (("rnt.bits=4",), "recipe.unknown_pass", "Did you mean rtn?"),
        (("gptq.bit=4",), "recipe.unknown_option", "Did you mean bits or head_bits?"),
        (("gptq.bits=5",), "recipe.option_value", "It is one of: 3, 4, 8."),
        (("gptq.bits=four",), "recipe.option_value", "a whole number"),
        (("gptq.symmetric=maybe",), "recipe.option_value", "true or false"),
        (("gptq.min_rows=0",), "recipe.option_value", "at least 1"),
        (("kv_layout.page_tokens=100000",), "recipe.option_value", "at most 4096"),
        (("kv_layout.dtype=bf16",), "recipe.option_value", "auto, float32, bfloat16, float16"),
    ],
)
def test_wrong_overrides_say_what_is_right(overrides, code, message):
    with pytest.raises(RecipeError) as caught:
        recipe_for(request(quant="int4", overrides=overrides))
    assert caught.value.code == code
    assert message in str(caught.value)


def test_an_override_needs_its_pass_in_the_recipe_once():
    with pytest.raises(RecipeError, match="does not have pass 'rtn'"):
        recipe_for(request(overrides=("rtn.bits=4",)))
    twice = Recipe(name="x", passes=(Rtn(skip="a"), Rtn(bits=8)))
    with pytest.raises(RecipeError, match="has pass 'rtn' 2 times"):
        override(twice, ["rtn.bits=4"])


def test_overrides_apply_in_order_and_keep_other_options():
    recipe = Recipe(name="x", passes=(Rtn(group_size=128, symmetric=False),))
    changed = override(recipe, ["rtn.bits=8", "rtn.skip= *.a.weight ", "rtn.bits=3"]).passes[0]
    assert option_values(changed) == option_values(
        Rtn(group_size=128, symmetric=False, bits=3, skip="*.a.weight")
    )


def test_unknown_presets_name_the_closest():
    with pytest.raises(RecipeError, match="no preset 'int5'") as caught:
        preset_recipe("int5")
    assert "int4" in caught.value.fix
    assert "none, int8, int4, int4-fast" in caught.value.why


HEAD = "version: 1\nname: x\npasses:\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is empty, not a mapping"),
        ("- rtn\n", "it is a list, not a mapping"),
        ("version: 2\nname: x\npasses: []\n", "version is 2, and this llmc reads 1"),
        ("version: 1\nname: x\npass: []\n", "unknown key 'pass'"),
        ("version: 1\nname: x\n", "it needs a name (a text) and passes (a list)"),
        (HEAD + "  - 3\n", "the pass 3 is neither"),
        (HEAD + "  - rtn: 4\n", "the options of pass 'rtn' are a int"),
        (HEAD + "  - rtm\n", "Did you mean rtn?"),
        (HEAD + "  - rtn: {bitz: 4}\n", "Did you mean bits?"),
        (HEAD + "  - rtn: {bits: '4'}\n", "a value of type int"),
        (HEAD + "  - rtn: {symmetric: 1}\n", "a value of type bool"),
        (
            HEAD + "  - rtn:\n      bits: 4\n      bits: 8\n",
            "in line 6. The YAML reader says: key 'bits' is given",
        ),
        (HEAD + "  - rtn: {skip: *.weight}\n", "cannot be parsed in line 4"),
        (HEAD + "  - !!python/object/apply:os.getcwd []\n", "cannot be parsed in line 4"),
    ],
)
def test_malformed_recipes_say_where_and_why(text, message):
    with pytest.raises(RecipeError) as caught:
        from_yaml(text, "mine.yaml")
    assert message in str(caught.value)


def test_unreadable_recipe_files(tmp_path):
    with pytest.raises(RecipeError, match="No such file"):
        read_recipe(tmp_path / "missing.yaml")
    with pytest.raises(RecipeError, match="int8 is a preset: name it with --quant int8"):
        read_recipe(Path("int8"))
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not UTF-8"):
        read_recipe(binary)


def test_a_recipe_must_end_in_something_that_runs():
    passes = tuple(pass_ for pass_ in preset_recipe("none").passes if pass_.stage < Stage.layout)
    with pytest.raises(RecipeError, match="makes no program that can be served"):
        check_recipe(Recipe(name="short", passes=passes))
    with pytest.raises(RecipeError, match="'paged_attention' needs a program that is 'kv_layout'"):
        check_recipe(Recipe(name="short", passes=(*passes, PagedAttention())))


def test_values_from_text():
    number = OptionInfo(name="x", kind=float, default=0.5, doc="X.", low=0.0, high=1.0)
    assert parse_value("p", number, "1") == 1.0
    assert build_pass(Rtn, {"bits": 8}) == Rtn(bits=8)
    assert check_value("p", number, 1) == 1.0
    with pytest.raises(RecipeError, match="at least 0 and at most 1"):
        parse_value("p", number, "nan")
    flag = OptionInfo(name="x", kind=bool, default=True, doc="X.")
    assert [parse_value("p", flag, text) for text in ("true", "No", "off")] == [True, False, False]


def test_closest_names():
    assert closest("fuse_qvk", ["fuse_qkv", "rtn"]) == "Did you mean fuse_qkv?"
    assert closest("zzz", ["b", "a"]) == "Choose one of: a, b."
    assert closest("zzz", []) == "There are none to choose from."


@dataclass(frozen=True, slots=True, kw_only=True)
class Plugin:
    """A pass of somebody else."""

    name: ClassVar[str] = "plugin"
    stage: ClassVar[Stage] = Stage.fuse
    requires: ClassVar[frozenset[str]] = frozenset()
    provides: ClassVar[frozenset[str]] = frozenset()
    contract: ClassVar[Exact] = Exact()
    expect: int = expect_option()

    def run(self, program, context):
        raise NotImplementedError


class Taken(Plugin):
    name = "rtn"


@dataclass(frozen=True, slots=True, kw_only=True)
class Undocumented(Plugin):
    strength: float = 1.0


def with_entry_points(monkeypatch, **values):
    """Entry points as an installed package would declare them."""
    monkeypatch.setattr(
        registry,
        "entry_points",
        lambda group: [EntryPoint(name, value, group) for name, value in values.items()],
    )


def module_value(monkeypatch, name):
    """Make this test module importable under a name, as a plugin's would be."""
    import sys

    monkeypatch.setitem(sys.modules, "somebodys_passes", sys.modules[__name__])
    return f"somebodys_passes:{name}"


def test_plugins_are_found_by_entry_point(monkeypatch):
    with_entry_points(monkeypatch, plugin=module_value(monkeypatch, "Plugin"))
    assert registry.pass_named("plugin") is Plugin
    assert "plugin" in [info.name for info in registry.describe_passes()]


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("no_such_module:Pass", "No module named 'no_such_module'"),
        ("llmc.passes.quantize.rtn:Rtm", "has no attribute 'Rtm'"),
        ("llmc.passes.base:PassContext", "it has no 'name'"),
    ],
)
def test_plugins_that_cannot_be_used_are_errors(monkeypatch, value, why):
    with_entry_points(monkeypatch, broken=value)
    with pytest.raises(RecipeError, match="plugin 'broken'") as caught:
        registry.known_passes()
    assert why in caught.value.why


def test_a_plugin_cannot_take_a_name(monkeypatch):
    with_entry_points(monkeypatch, taken=module_value(monkeypatch, "Taken"))
    with pytest.raises(RecipeError, match=r"'rtn' is taken by llmc\.passes\.quantize\.rtn"):
        registry.known_passes()


def test_a_plugin_documents_its_options(monkeypatch):
    with_entry_points(monkeypatch, bare=module_value(monkeypatch, "Undocumented"))
    with pytest.raises(RecipeError, match="'strength' is not made with `option`"):
        registry.known_passes()


def test_passes_are_described_in_stage_order():
    infos = registry.describe_passes()
    assert [info.stage for info in infos] == sorted(info.stage for info in infos)
    rtn = next(info for info in infos if info.name == "rtn")
    assert rtn.contract == "lossy"
    assert rtn.summary == "Round-to-nearest quantisation of linears, experts, head and embedding."
    assert next(option for option in rtn.options if option.name == "bits").choices == (3, 4, 8)
    assert {"paged", "kv_layout"} <= {fact for info in infos for fact in info.provides}


def test_recipes_are_read_from_paths_of_any_kind(tmp_path):
    path = Path(tmp_path) / "ü.yaml"
    path.write_text(to_yaml(preset_recipe("none")), encoding="utf-8")
    assert read_recipe(path).name == "none"
