"""The system's C++ compiler: found, asked, and its refusals reported. Knows no program."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ...kernels.levels import NUMERIC_FLAGS, Level
from ...spec.errors import TargetError

HEADERS = Path(__file__).parents[2] / "kernels" / "cpu"
_CANDIDATES = ("c++", "g++", "clang++")


@dataclass(frozen=True, slots=True)
class Compiler:
    """A C++ compiler by its path, and its version line."""

    path: str
    version: str


def find_compiler() -> Compiler:
    """The compiler named by the CXX variable, or the first of c++, g++ and clang++ on the path.

    Raises TargetError when there is none, offering the target that needs none.
    """
    asked = os.environ.get("CXX")
    for name in (asked,) if asked else _CANDIDATES:
        path = shutil.which(name)
        if path is not None:
            told = _run([path, "--version"])
            return Compiler(path, told.stdout.partition("\n")[0])
    missing = (
        f"{asked!r} (from CXX) is not an executable" if asked else f"none of {', '.join(_CANDIDATES)} is"
    )
    raise TargetError(
        "cpu.no_compiler",
        "There is no C++ compiler on this machine.",
        f"The CPU target compiles generated code ahead of time, and {missing} on the PATH.",
        "Install one (for example `apt install g++`), or compile with --target reference.",
    )


def compile_flags(level: Level) -> tuple[str, ...]:
    """The flags of an ISA level's library, but for paths."""
    common = ("-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-g0", "-pthread")
    return (*common, *NUMERIC_FLAGS, *level.flags)


def header_digest() -> str:
    """The SHA-256 of all kernels that generated code includes."""
    digest = hashlib.sha256()
    for path in sorted(HEADERS.glob("*.hpp")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def compile_library(compiler: Compiler, source: str, level: Level) -> bytes:
    """The shared library of `source` for an ISA level. Nothing is left behind.

    Raises TargetError with the compiler's first complaint, or when there is no room for its files.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="llmc-cpp-") as folder:
            return _compile_in(Path(folder), compiler, source, level)
    except OSError as error:
        raise TargetError(
            "cpu.compiler_files",
            f"The generated code could not be compiled for {level.name}.",
            f"A temporary file could not be written or read: {error.strerror or error}.",
            f"Make room in {tempfile.gettempdir()}, or point TMPDIR elsewhere.",
        ) from error


def _compile_in(folder: Path, compiler: Compiler, source: str, level: Level) -> bytes:
    text, library = folder / "model.cpp", folder / "model.so"
    text.write_text(source)
    # A fixed name: no path of this machine may reach the library.
    command = [compiler.path, *compile_flags(level), f"-ffile-prefix-map={folder}=.", f"-I{HEADERS}"]
    done = _run([*command, str(text), "-o", str(library)])
    if done.returncode != 0 or not library.is_file():
        raise _refused(compiler, level.name, done.stderr)
    return library.read_bytes()


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run the compiler; one that cannot be started is a refusal, not a crash."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return subprocess.CompletedProcess(command, 127, "", f"error: {command[0]}: {error.strerror}")


def _refused(compiler: Compiler, level: str, output: str) -> TargetError:
    lines = [line for line in output.splitlines() if "error" in line] or output.splitlines() or ["no message"]
    return TargetError(
        "cpu.compiler_failed",
        f"The C++ compiler refused the generated code for {level}.",
        f"{compiler.version or compiler.path} said: {lines[0].strip()}.",
        "Try another compiler with CXX=..., or compile with --target reference.",
    )
