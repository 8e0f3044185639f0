"""Calibration text is prepared once for all recipes of a model, and gives the bytes that it would have given
alone."""

from __future__ import annotations

import pytest

from llmc.compiler import calibrate, self_text
from llmc.compiler.cache.config import CacheConfig
from llmc.compiler.cache.sequences import recall_sequences
from llmc.compiler.cache.session import CompileCache
from llmc.compiler.driver import compile_model
from llmc.passes.quantize.scale_search import ScaleSearch
from llmc.passes.recipes import Recipe, preset_recipe, to_yaml
from llmc.spec.errors import UsageError


def ledger_note(result, stage):
    return next(entry.note for entry in result.ledger if entry.stage == stage)


def test_text_of_the_models_own_is_written_once_for_all_recipes(
    stories_1m, tmp_path, cache_folder, contents, monkeypatch
):
    searched = [
        ScaleSearch(bits=4, group_size=32) if pass_.name in ("rtn", "scale_search") else pass_
        for pass_ in preset_recipe("int4-fast").passes
    ]
    few = {"target": "reference", "verify": "off", "recipe": tmp_path / "few.yaml"}
    few["recipe"].write_text(to_yaml(Recipe(name="few", passes=tuple(searched))))
    monkeypatch.setattr(calibrate, "_NUM_WRITTEN", 4)
    first = compile_model(stories_1m, output=tmp_path / "one.llmc", **few)
    assert ledger_note(first, "prepare calibration") == "1024 tokens of text of its own"

    def refuse(*arguments, **options):
        raise AssertionError("the text was written again")

    monkeypatch.setattr(self_text, "write_sequences", refuse)
    second = compile_model(
        stories_1m, output=tmp_path / "two.llmc", overrides=["scale_search.group_size=64"], **few
    )
    assert ledger_note(second, "prepare calibration") == "1024 tokens of text of its own, known"
    assert second.reuse.hits["calibration"] == 1
    monkeypatch.undo()
    monkeypatch.setattr(calibrate, "_NUM_WRITTEN", 4)
    alone = compile_model(
        stories_1m,
        output=tmp_path / "three.llmc",
        overrides=["scale_search.group_size=64"],
        cache=False,
        **few,
    )
    assert contents(alone.path) == contents(second.path)
    with pytest.raises(UsageError, match=r"nobody\.txt"):
        compile_model(stories_1m, output=tmp_path / "four.llmc", calibration=tmp_path / "nobody.txt", **few)


def test_a_file_of_text_is_prepared_again_when_it_says_something_else(stories_1m, tmp_path, cache_folder):
    text = tmp_path / "text.txt"
    notes = []
    for content in ("a dog ran home. " * 200, "a dog ran home. " * 200, "a cat ran home. " * 200):
        text.write_text(content)
        with CompileCache(CacheConfig.from_environment()) as cache:
            prepared = recall_sequences(
                cache,
                ("compiler/calibration.py",),
                lambda: (cache.file_digest(text),),
                "t",
                lambda: ((1, 2),),
            )
            notes.append(prepared.cached)
            assert prepared.sequences == ((1, 2),)
    assert notes == [False, True, False]
