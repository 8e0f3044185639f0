"""Weights that other toolkits find for the same model, scheme and tokens, as folders to be measured.

Each toolkit runs its driver under `judges/` in an environment of its own.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_DRIVERS = Path(__file__).parent / "judges"
# What each toolkit can round with, and to how many bits.
METHODS: dict[str, dict[str, tuple[int, ...]]] = {
    "llm_compressor": {"gptq": (4, 3), "awq": (4, 3)},
    "auto_round": {"default": (4, 3), "light": (4, 3)},
    "nncf": {"awq_scale_estimation": (4,)},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeCase:
    """One method of one toolkit at one symmetric scheme, and the Python that has the toolkit."""

    toolkit: str
    method: str
    bits: int
    group_size: int
    python: Path

    @property
    def scheme(self) -> str:
        """As cases name schemes."""
        return f"int{self.bits} g{self.group_size}"

    @property
    def name(self) -> str:
        """Toolkit, method and scheme."""
        return f"{self.toolkit} {self.method} {self.scheme}"


def judge_cases(pythons: Sequence[str], group_size: int) -> list[JudgeCase]:
    """The cases of `TOOLKIT=PYTHON` entries. Raises ValueError for a toolkit that has no driver."""
    found: list[JudgeCase] = []
    for entry in pythons:
        toolkit, _, python = entry.partition("=")
        if toolkit not in METHODS or not python:
            raise ValueError(f"{entry!r} is not TOOLKIT=PYTHON with one of {', '.join(METHODS)}")
        found += [
            JudgeCase(
                toolkit=toolkit,
                method=method,
                bits=bits,
                group_size=group_size,
                python=Path(python).absolute(),
            )
            for method, known in METHODS[toolkit].items()
            for bits in known
        ]
    return found


class Took(NamedTuple):
    """Seconds that it took to find codes: by the clock, and of all threads on a core."""

    wall_s: float
    cpu_s: float


def run_judge(case: JudgeCase, model: Path, tokens: Path, output: Path) -> Took:
    """Write the judge's weights to `output`, a model folder; return what it took to find them.

    Raises RuntimeError with the end of what the judge printed when it fails.
    """
    command = [
        str(case.python),
        str(_DRIVERS / f"with_{case.toolkit}.py"),
        str(model),
        str(tokens),
        str(output),
    ]
    options = ["--method", case.method, "--bits", str(case.bits), "--group-size", str(case.group_size)]
    done = subprocess.run(
        [*command, *options], capture_output=True, text=True, check=False, cwd=output.parent
    )
    if done.returncode:
        raise RuntimeError(f"{case.name} failed:\n{(done.stdout + done.stderr)[-2000:]}")
    told = json.loads((output / "judge.json").read_text(encoding="utf-8"))
    return Took(told["quantise_s"], told["cpu_s"])
