"""The frame of every command: options, three-line errors, exit codes, and how fast it starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from llmc.cli.failures import INTERRUPTED, explain, run_guarded
from llmc.cli.generate import read_prompt
from llmc.cli.inspection import parse_bytes
from llmc.cli.main import main
from llmc.cli.output import human_bytes, table
from llmc.spec.errors import (
    ArtifactError,
    CheckFailed,
    InternalError,
    ModelError,
    RecipeError,
    TargetError,
    UsageError,
)

pytestmark = pytest.mark.pure


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_help_lists_every_command_and_no_other():
    result = run("--help")
    assert result.exit_code == 0
    expected = {
        "bench",
        "bisect",
        "cache",
        "compare",
        "compile",
        "eval",
        "export",
        "generate",
        "serve",
        "verify",
        "inspect",
        "passes",
        "recipe",
        "retarget",
        "targets",
        "models",
        "doctor",
    }
    assert set(main.commands) == expected
    assert all(name in result.output for name in expected)


def leaf_commands(group=main, prefix=()):
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from leaf_commands(command, (*prefix, name))
        else:
            yield (*prefix, name)


@pytest.mark.parametrize("command", list(leaf_commands()), ids=" ".join)
def test_every_command_takes_the_common_options(command):
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert all(option in result.output for option in ("--json", "--quiet", "--debug"))


def test_help_starts_quickly_and_without_torch():
    code = (
        "import sys\nsys.argv = ['llmc', '--help']\n"
        "from llmc.cli.main import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'rich'} & set(sys.modules)))"
    )
    seconds = []
    for _ in range(5):
        before = os.times()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        after = os.times()
        seconds.append(sum(after[2:4]) - sum(before[2:4]))  # of the processor, whoever else wants it
        assert done.stdout.splitlines()[-1] == "[]"
    assert min(seconds) < 0.3


def test_version():
    import llmc

    assert run("--version").output.strip() == f"llmc {llmc.__version__}"


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["compile"], "Missing argument 'MODEL'."),
        (["compile", "x", "--qant", "int4"], "No such option"),
        (["nonsense"], "No such command 'nonsense'"),
        (["compile", "x", "--max-model-len", "many"], "'many' is not a valid integer"),
    ],
)
def test_wrong_use_is_three_lines_and_exit_code_2(arguments, what):
    result = run(*arguments)
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("Error: ")
    assert what in lines[0]
    assert "--help" in lines[2]
    assert result.stdout == ""


def test_debug_adds_a_traceback():
    plain = run("generate", "absent.llmc", "--prompt", "x")
    assert "Traceback" not in plain.stderr
    debugged = run("generate", "absent.llmc", "--prompt", "x", "--debug")
    assert "Traceback" in debugged.stderr
    assert plain.exit_code == debugged.exit_code == 3


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (CheckFailed, 1),
        (InternalError, 1),
        (UsageError, 2),
        (RecipeError, 2),
        (ModelError, 3),
        (ArtifactError, 3),
        (TargetError, 4),
    ],
)
def test_exit_codes_follow_whose_fault_it_is(kind, code, capsys):
    def fail():
        raise kind("a.code", "What happened.", "Why it did.", "What to do.")

    assert run_guarded(fail, []) == code
    assert capsys.readouterr().err == "Error: What happened.\nWhy it did.\nWhat to do.\n"
    assert run_guarded(fail, ["--json"]) == code
    captured = capsys.readouterr()
    assert json.loads(captured.out)["error"]["what"] == "What happened."
    assert captured.err == ""


def test_an_interrupt_is_130(capsys):
    def interrupted():
        raise KeyboardInterrupt

    assert run_guarded(interrupted, []) == INTERRUPTED == 130
    assert capsys.readouterr().err == "Interrupted.\n"


@pytest.mark.parametrize(
    ("error", "kind", "fragment"),
    [
        (ModuleNotFoundError("no", name="transformers"), TargetError, "llmc-compiler[compile]"),
        (ModuleNotFoundError("no", name="torch._C"), TargetError, "llmc-compiler[compile]"),
        (MemoryError(), TargetError, "memory"),
        (PermissionError(13, "Permission denied", "out"), TargetError, "'out'"),
        (ZeroDivisionError("division by zero"), InternalError, "ZeroDivisionError: division by zero"),
    ],
)
def test_unforeseen_errors_are_explained(error, kind, fragment):
    found = explain(error)
    assert type(found) is kind
    assert fragment in f"{found.what} {found.why} {found.fix}"


def test_a_prompt_is_needed_and_understood(tmp_path):
    result = run("generate", "any.llmc")
    assert result.exit_code == 2
    assert "There is no prompt." in result.stderr
    result = run("generate", "any.llmc", "Hello")
    assert "--prompt 'Hello'" in result.stderr
    result = run("generate", "any.llmc", "--prompt-file", tmp_path / "absent.txt")
    assert "absent.txt cannot be read" in result.stderr


@pytest.mark.parametrize(
    ("content", "prompt"), [("a", "a"), ("a\n", "a"), ("a\r\n", "a"), ("a\n\n", "a\n"), ("", "")]
)
def test_one_newline_at_the_end_of_a_prompt_file_is_left_out(tmp_path, content, prompt):
    (tmp_path / "prompt.txt").write_bytes(content.encode())
    assert read_prompt(tmp_path / "prompt.txt") == prompt


def test_targets_and_models_and_doctor_answer():
    assert "reference" in run("targets").output
    listed = json.loads(run("models", "--json").output)
    assert listed["compiled"] == sum(entry["compiles"] for entry in listed["models"])
    findings = {entry["subject"]: entry for entry in json.loads(run("doctor", "--json").output)["findings"]}
    assert findings["python"]["detail"].startswith("3.")


@pytest.mark.parametrize(
    ("text", "count"), [("8G", 8 << 30), ("1.5k", 1536), ("100", 100), ("2 GiB", 2 << 30), ("5MB", 5 << 20)]
)
def test_sizes_are_parsed(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "G", "-1", "1X", "1 2"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UsageError, match="is no size"):
        parse_bytes(text)


def test_sizes_and_tables_read_well():
    assert [human_bytes(n) for n in (0, 1023, 1024, 1536 << 20, 5 << 40)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "1.5 GiB",
        "5.0 TiB",
    ]
    assert table([("a", "1"), ("long", "2")], ("name", "n")) == "name  n\na     1\nlong  2"
    assert table([]) == ""
