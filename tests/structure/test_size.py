"""Files and functions stay small enough to be read in one go."""

from __future__ import annotations

import ast
import statistics

import pytest

pytestmark = pytest.mark.pure

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60


@pytest.fixture(scope="module")
def all_files(repository, sources):
    """Name -> text of the package's Python and C++ files, the tests and the benches."""
    paths = [source.path for source in sources]
    for pattern in (
        "kernels/**/*.hpp",
        "codegen/**/*.hpp",
        "codegen/**/*.cpp",
        "tests/**/*.py",
        "bench/**/*.py",
    ):
        paths += sorted(repository.glob(pattern))
    return {path.relative_to(repository).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def functions_of(name, text):
    """(lines, "file:line function") of every function, its decorators left out."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.end_lineno - node.lineno + 1, f"{name}:{node.lineno} {node.name}"


def print_table(rows):
    print(f"\n{'':<12}{'count':>7}{'median':>8}{'p90':>6}{'largest':>9}")
    for title, sizes in rows:
        ordered = sorted(sizes)
        p90 = ordered[int(0.9 * (len(ordered) - 1))]
        print(f"{title:<12}{len(ordered):>7}{statistics.median(ordered):>8.0f}{p90:>6}{ordered[-1]:>9}")


def test_files_and_functions_keep_their_caps(all_files):
    lines = {name: len(text.splitlines()) for name, text in all_files.items()}
    functions = [
        function
        for name, text in all_files.items()
        if name.endswith(".py")
        for function in functions_of(name, text)
    ]
    written = [count for name, count in lines.items() if count and not name.endswith("__init__.py")]
    print_table([("files", written), ("functions", [size for size, _ in functions])])
    long_files = [f"{name}: {count} lines" for name, count in lines.items() if count > MAX_FILE_LINES]
    long_functions = [f"{where}: {size} lines" for size, where in functions if size > MAX_FUNCTION_LINES]
    assert not long_files, "\n".join(long_files)
    assert not long_functions, "\n".join(long_functions)
