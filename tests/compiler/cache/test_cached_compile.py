"""A compile takes up what earlier ones left: the same bytes, no early pass run for a late change."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from llmc.compiler.cache.config import CacheConfig
from llmc.compiler.cache.digest import Digester, Uncachable
from llmc.compiler.cache.session import CompileCache
from llmc.compiler.cache.sources import SourceDigests
from llmc.compiler.driver import compile_model
from llmc.ir.weights import Constant, Slice
from llmc.passes.quantize import solve


def compile_tiny(model, output, **options):
    return compile_model(
        model, output=output, quant="int8", target="reference", verify="structure", **options
    )


def test_a_second_compile_gives_the_same_bytes_and_reuses_every_pass(
    stories_1m, tmp_path, cache_folder, contents
):
    first = compile_tiny(stories_1m, tmp_path / "one.llmc")
    second = compile_tiny(stories_1m, tmp_path / "two.llmc")
    assert contents(first.path) == contents(second.path)
    assert not any(entry.cached for entry in first.passes)
    assert all(entry.cached for entry in second.passes)
    assert [entry.matches for entry in first.passes] == [entry.matches for entry in second.passes]
    assert second.reuse.misses.get("weights", 0) == 0
    assert next(entry.note for entry in second.ledger if entry.stage == "trace") == "known"
    off = compile_tiny(stories_1m, tmp_path / "three.llmc", cache=False)
    assert off.reuse is None
    assert contents(off.path) == contents(first.path)


def test_another_page_size_quantises_nothing_again(stories_1m, tmp_path, cache_folder, monkeypatch):
    compile_tiny(stories_1m, tmp_path / "one.llmc")

    def refuse(*arguments):
        raise AssertionError("a weight was quantised again")

    monkeypatch.setattr(solve, "round_matrix", refuse)
    second = compile_tiny(stories_1m, tmp_path / "two.llmc", overrides=["kv_layout.page_tokens=16"])
    cached = {entry.name: entry.cached for entry in second.passes}
    assert cached["scale_search"]
    assert not cached["kv_layout"]
    assert not cached["memory_plan"]


def test_another_option_of_an_early_pass_runs_it_and_all_behind_it(
    stories_1m, tmp_path, cache_folder, contents
):
    compile_tiny(stories_1m, tmp_path / "one.llmc")
    second = compile_tiny(stories_1m, tmp_path / "two.llmc", overrides=["scale_search.group_size=64"])
    names = [entry.name for entry in second.passes]
    border = names.index("scale_search")
    assert all(entry.cached for entry in second.passes[:border])
    assert not any(entry.cached for entry in second.passes[border:])
    off = compile_tiny(
        stories_1m, tmp_path / "three.llmc", overrides=["scale_search.group_size=64"], cache=False
    )
    assert contents(off.path) == contents(second.path)


def test_other_weights_share_no_entry(stories_1m, tmp_path, cache_folder):
    compile_tiny(stories_1m, tmp_path / "one.llmc")
    changed = tmp_path / "model"
    changed.mkdir()
    for path in stories_1m.iterdir():
        (changed / path.name).write_bytes(path.read_bytes())
    data = bytearray((changed / "model.safetensors").read_bytes())
    data[-2] ^= 1
    (changed / "model.safetensors").write_bytes(bytes(data))
    second = compile_tiny(changed, tmp_path / "two.llmc")
    assert not any(entry.cached for entry in second.passes)
    assert next(entry.note for entry in second.ledger if entry.stage == "trace") == "known"


def test_a_source_digest_changes_with_what_is_imported_and_with_nothing_else(tmp_path):
    (tmp_path / "late.py").write_text("from . import shared\n")
    (tmp_path / "shared.py").write_text("from .deep import value\n")
    (tmp_path / "deep.py").write_text("value = 1\n")
    (tmp_path / "stranger.py").write_text("value = 1\n")

    def digest():
        return SourceDigests().of_files(tmp_path / "late.py")

    before = digest()
    (tmp_path / "stranger.py").write_text("value = 2\n")
    assert digest() == before
    (tmp_path / "deep.py").write_text("value = 2\n")
    assert digest() != before


def test_expressions_are_told_apart_by_content_not_identity():
    def digest(value):
        return Digester(str, str).of(value)

    def slice_of(numbers, stop):
        return Slice(Constant(torch.tensor(numbers)), 0, 0, stop)

    assert digest(slice_of([1.0, 2.0], 1)) == digest(slice_of([1.0, 2.0], 1))
    assert digest(slice_of([1.0, 2.0], 1)) != digest(slice_of([1.0, 2.0], 2))
    assert digest(slice_of([1.0, 2.0], 1)) != digest(slice_of([1.0, 3.0], 1))
    assert digest(slice_of([1.0], 1)) != digest(slice_of([1], 1))
    assert digest((1, "1")) != digest(("1", 1))
    with pytest.raises(Uncachable, match="a function has no content"):
        digest(lambda: 0)


@dataclass(frozen=True)
class Closure:
    """An expression that holds what cannot be written down."""

    make: object


def test_what_cannot_be_told_by_content_is_computed_and_noted(tmp_path):
    with CompileCache(CacheConfig(folder=tmp_path)) as cache:
        computed = cache.recall((Closure(lambda: 0),), "codes of x", lambda: {"x": torch.ones(2)})
        assert computed["x"].tolist() == [1, 1]
        assert cache.notes == ["codes of x: a function has no content to tell it by"]
