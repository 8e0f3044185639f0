"""Everything that can be wrong with an artifact, as a list: its bytes, then what it computes."""

from __future__ import annotations

import os

from ..artifact.checksums import Problem
from ..artifact.oracle import read_oracle
from ..artifact.reader import open_unchecked
from ..artifact.reader import verify_artifact as verify_files
from .config import RuntimeConfig
from .executors.registry import open_executor
from .oracle import oracle_problems


def verify_artifact(path: str | os.PathLike[str], config: RuntimeConfig | None = None) -> list[Problem]:
    """What is wrong with the artifact at `path`; empty when its files are whole and its oracle holds.

    Nothing is computed from files that are damaged. Raises ArtifactError when there is no artifact to look
    at, TargetError when it is whole but cannot run on this machine.
    """
    problems = verify_files(path)
    if problems:
        return problems
    artifact = open_unchecked(path)
    executor = open_executor(artifact, config or RuntimeConfig())
    try:
        return oracle_problems(executor, read_oracle(artifact))
    finally:
        executor.close()
