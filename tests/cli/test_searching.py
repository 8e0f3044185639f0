"""`llmc compare --search` on the command line: what is refused, and a real search of the smallest model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from click.testing import CliRunner

from llmc.cli.main import main
from llmc.compiler.search.evaluator import Setting
from llmc.compiler.search.remote import RemoteEvaluator
from llmc.compiler.search.run import MARGIN_S
from llmc.compiler.search.search import OutOfTime
from llmc.compiler.search.trial import MEASURED, UNFINISHED
from llmc.passes.recipes import check_recipe, preset_recipe, read_recipe
from llmc.spec.errors import TargetError, UsageError


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("M", "--search", "--limit", "kl=much"), "--limit is 'much'"),
        (("M", "--search", "--limit", "kl=-1"), "--limit is '-1'"),
        (("M", "--search", "--limit", "size=big"), "'big' is no size"),
        (("M", "--search", "--limit", "size=0"), "'size=0' is none"),
        (("M", "--search", "--limit", "speed=1"), "'speed=1' cannot be read"),
        (("M", "--search", "--limit", "kl"), "'kl' cannot be read"),
        (("M", "--search", "--limit", "kl=1", "--limit", "kl=2"), "kl was given twice"),
        (("M", "--search", "--price-per-hour", "nan"), "--price-per-hour is 'nan'"),
        (("M", "--search", "--budget-minutes", "0"), "--budget-minutes is '0'"),
        (("M", "--search", "--budget-minutes", "soon"), "--budget-minutes is 'soon'"),
        (("M", "N", "--search"), "2 were named"),
        (("M", "--search", "--recipe", "int4"), "--recipe cannot be given"),
        (("M", "--search", "--html", "x"), "--html cannot be given"),
        (("M", "--budget-minutes", "3"), "--budget-minutes was given without --search"),
        (("M", "--recipe", "int4", "--limit", "kl=1"), "with --search also kl=NATS"),
        (("M", "--search", "--tokens", "1"), "num_tokens is 1"),
        (("M", "--search", "--target", "abacus"), "abacus"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(arguments, told, tmp_path, stories_1m):
    given = [str(stories_1m) if argument == "M" else argument for argument in arguments]
    result = CliRunner().invoke(main, ["compare", *given])
    assert result.exit_code in (2, 4), result.output
    assert told in result.output


def test_a_process_that_takes_too_long_is_ended(stories_1m):
    with RemoteEvaluator(Setting(model=str(stories_1m), target="reference")) as evaluator:
        started = time.monotonic()
        with pytest.raises(OutOfTime):
            evaluator.size_bytes(preset_recipe("none"), 0.3)
        assert time.monotonic() - started < 5


@pytest.mark.slow
def test_a_process_that_cannot_begin_says_why(stories_1m):
    setting = Setting(model=str(stories_1m), target="reference", num_tokens=10**6)
    with RemoteEvaluator(setting) as evaluator, pytest.raises(UsageError, match="1000000 tokens do not fit"):
        evaluator.prepare(400.0)


@pytest.mark.slow
def test_a_process_that_dies_is_told_of_and_replaced(stories_1m, tmp_path, monkeypatch):
    monkeypatch.setenv("LLMC_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("LLMC_CACHE_BYTES", str(1 << 30))
    with RemoteEvaluator(Setting(model=str(stories_1m), target="reference")) as evaluator:
        evaluator.prepare(400.0)
        size = evaluator.size_bytes(preset_recipe("int8"), 60.0)
        os.killpg(evaluator.pid, signal.SIGKILL)
        with pytest.raises(TargetError, match=r"ended\. It left with code -9"):
            evaluator.size_bytes(preset_recipe("int8"), 60.0)
        assert evaluator.size_bytes(preset_recipe("int8"), 400.0) == size


@pytest.mark.slow
def test_a_real_search_keeps_to_its_budget_is_interrupted_and_goes_on(stories_1m, tmp_path):
    """From nothing to the front of the smallest model; then a second one of the same study."""
    variables = {**os.environ, "LLMC_CACHE_DIR": str(tmp_path / "cache"), "LLMC_CACHE_BYTES": str(1 << 30)}
    small = [
        "--rounds",
        "3",
        "--budget-seconds",
        "2",
        "--tokens",
        "8",
        "--concurrency",
        "2",
        "--threads",
        "1",
        "--json",
    ]
    limits = ["--limit", "kl=0.5", "--limit", "size=1G"]
    command = [sys.executable, "-m", "llmc.cli", "compare", str(stories_1m), "--search", *limits]
    command += ["--target", "reference", "--budget-minutes", "0.5", *small]
    for _ in range(4):  # on a busy machine the first does for little more than compiling
        started = time.monotonic()
        done = subprocess.run(
            command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False
        )
        seconds = time.monotonic() - started
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["seconds"] <= 30 + MARGIN_S + 1
        assert seconds <= 30 + MARGIN_S + 60, "imports and checks come before the budget"
        states = {trial["name"]: trial["state"] for trial in found["trials"]}
        if states.get("none") == MEASURED:
            break
    assert states["none"] == MEASURED
    assert "none" in found["front"]
    assert found["advice"].startswith("Take ")
    for name in found["front"]:
        check_recipe(read_recipe(tmp_path / found["recipes"][name]))
    hear = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # which a background job inherits as ignored
    running = subprocess.Popen(
        command, cwd=tmp_path, env=variables, stderr=subprocess.PIPE, text=True, preexec_fn=hear
    )
    time.sleep(8)
    running.send_signal(signal.SIGINT)
    _, told = running.communicate(timeout=30)
    assert running.returncode == 130, told
    (path,) = (tmp_path / "cache" / "studies").glob("*.json")
    kept = json.loads(path.read_text())["trials"]
    finished = [trial["name"] for trial in found["trials"] if trial["state"] != UNFINISHED]
    assert [trial["name"] for trial in kept][: len(finished)] == finished
