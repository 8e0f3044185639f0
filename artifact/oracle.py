"""The oracle of an artifact: prompts, and what its model said about each of their tokens when it was made.
Knows the file; measuring and comparing are the runtime's."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..spec.errors import ArtifactError
from .reader import Artifact
from .schema import ORACLE
from .tensors import TensorSpec
from .writer import ArtifactWriter


@dataclass(frozen=True, slots=True, kw_only=True)
class OraclePrompt:
    """One prompt of n tokens under teacher forcing. Entry i of the rest, n - 1 long, is about the token that
    follows token i: the logprob of the prompt's own next token, the most probable token, and by how
    much its logprob exceeds that of the second."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    best_ids: tuple[int, ...]
    margins: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Oracle:
    """It holds when every logprob is within `tolerance` (nats) of the stored one, and the most probable
    token is the same wherever its margin exceeds twice the tolerance."""

    prompts: tuple[OraclePrompt, ...]
    tolerance: float


def write_oracle(writer: ArtifactWriter, oracle: Oracle) -> None:
    """Writes the oracle's file: the prompts joined, with the start of each."""
    starts = np.cumsum([0, *(len(prompt.token_ids) for prompt in oracle.prompts)])
    arrays: dict[str, tuple[str, NDArray[Any]]] = {
        "token_ids": ("int64", _joined([prompt.token_ids for prompt in oracle.prompts], "<i8")),
        "starts": ("int64", starts.astype("<i8")),
        "logprobs": ("float64", _joined([prompt.logprobs for prompt in oracle.prompts], "<f8")),
        "best_ids": ("int64", _joined([prompt.best_ids for prompt in oracle.prompts], "<i8")),
        "margins": ("float64", _joined([prompt.margins for prompt in oracle.prompts], "<f8")),
        "tolerance": ("float64", np.asarray([oracle.tolerance], dtype="<f8")),
    }
    specs = [TensorSpec(name, dtype, array.shape) for name, (dtype, array) in arrays.items()]
    writer.write_tensors(ORACLE, "oracle", specs, lambda name: arrays[name][1])


def read_oracle(artifact: Artifact) -> Oracle:
    """The oracle of `artifact`. ArtifactError when it has none, or one that makes no sense."""
    views = artifact.read_tensors(ORACLE)
    try:
        lists = {name: view.data.tolist() for name, view in views.items()}
        starts = lists["starts"]
        prompts = tuple(
            _prompt(lists, index, start, stop) for index, (start, stop) in enumerate(pairwise(starts))
        )
        (tolerance,) = lists["tolerance"]
    except (KeyError, ValueError, TypeError) as error:
        raise ArtifactError(
            "artifact.oracle",
            f"The oracle of {artifact.path.name!r} cannot be read.",
            f"{ORACLE} is incomplete ({type(error).__name__}: {error}).",
            "Compile the model again.",
        ) from error
    return Oracle(prompts=prompts, tolerance=tolerance)


def _prompt(lists: dict[str, list[Any]], index: int, start: int, stop: int) -> OraclePrompt:
    known = slice(start - index, stop - index - 1)
    return OraclePrompt(
        token_ids=tuple(lists["token_ids"][start:stop]),
        logprobs=tuple(lists["logprobs"][known]),
        best_ids=tuple(lists["best_ids"][known]),
        margins=tuple(lists["margins"][known]),
    )


def _joined(parts: list[tuple[Any, ...]], dtype: str) -> NDArray[Any]:
    return np.asarray([value for part in parts for value in part], dtype=dtype)
