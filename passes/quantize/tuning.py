"""Codes and scales learnt by gradient, so that a whole model's logits come close to what they were.

Starts from codes that were found layer by layer. Scales and codes move against the KL divergence of the next
token on calibration tokens, codes by straight-through rounding (as in AutoRound, Cheng et al. 2023, and
EfficientQAT, Chen et al. 2024, which do so block by block).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ...ir.program import Program
from ...ir.quantized import QTensor, unpack_codes
from ...spec.quant import QuantScheme
from ..calibration import Calibration
from .gradients import LogitsRun
from .grid import Grid, by_column, code_range, pack_grid, storable
from .walk import packed_inputs, raised

STEP_TOKENS = 1024
# How far a code and a scale can get in all steps together: in codes, and as a part of the scale.
_CODE_TRAVEL, _SCALE_TRAVEL = 2.0, 0.2
_LARGEST_CODE_STEP, _LARGEST_SCALE_STEP = 0.05, 0.005
_BETAS = (0.9, 0.95)
# One sequence in so many is kept to judge by.
_JUDGED = 8


class Tuned(NamedTuple):
    """Weights as they are after, and the mean KL divergence on tokens kept to judge by, before and after."""

    tensors: dict[str, QTensor]
    before: float
    after: float


def split_sequences(
    calibration: Calibration,
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Sequences to learn from, and those to judge by; of one sequence neither."""
    sequences = [sequence for sequence in calibration.sequences if len(sequence) > 1]
    if len(sequences) < 2:
        return [], []
    step = min(_JUDGED, len(sequences))
    learnt = [sequence for index, sequence in enumerate(sequences) if index % step]
    return learnt, sequences[::step]


def tune(
    program: Program,
    starts: Mapping[str, tuple[QTensor, QuantScheme]],
    others: Mapping[str, Tensor],
    calibration: Calibration,
    epochs: int,
    seed: int,
) -> Tuned:
    """Learn the codes `starts` of weights of `program`, which is not quantised, from its own logits.

    `others` are the values of weights that are rounded and stay as they are. Deterministic for one number of
    threads.
    """
    learnt = {
        name: _Learnt(tensor, scheme, program.weights[name].shape)
        for name, (tensor, scheme) in starts.items()
    }
    trainer = _Trainer(program, learnt, others)
    sequences, judged = split_sequences(calibration)
    before = trainer.divergence(judged)
    batches = _batches(sequences)
    total = epochs * len(batches)
    codes = [entry.codes for entry in learnt.values()]
    scales = [entry.factors for entry in learnt.values()]
    rates = (
        min(_LARGEST_CODE_STEP, 2 * _CODE_TRAVEL / total),
        min(_LARGEST_SCALE_STEP, 2 * _SCALE_TRAVEL / total),
    )
    optimiser = torch.optim.Adam(
        [{"params": codes, "lr": rates[0]}, {"params": scales, "lr": rates[1]}], betas=_BETAS
    )
    draw = torch.Generator().manual_seed(seed)
    step = 0
    for _ in range(epochs):
        for index in torch.randperm(len(batches), generator=draw).tolist():
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / total))
            optimiser.zero_grad()
            trainer.backward(batches[index])
            optimiser.step()
            step += 1
            calibration.watch(step, total, "learning codes and scales")
    after = trainer.divergence(judged)
    return Tuned({name: entry.packed() for name, entry in learnt.items()}, before, after)


class _Learnt:
    """One weight as it is learnt: codes that may lie between whole numbers, and factors of its scales."""

    def __init__(self, start: QTensor, scheme: QuantScheme, shape: Sequence[int]) -> None:
        self._scheme = scheme
        self._width = shape[-1]
        self._scales = start.scales.float()
        self._zeros = None if start.zeros is None else start.zeros.float()
        codes = unpack_codes(start.codes, scheme)[:, : self._width].float()
        self.codes = codes.requires_grad_()
        self.factors = torch.ones_like(self._scales).requires_grad_()

    def value(self) -> Tensor:
        """What the codes stand for, rounded as they will be; gradients pass through the rounding."""
        held = self.codes.clamp(*code_range(self._scheme))
        codes = held + (held.detach().round() - held.detach())
        if self._zeros is not None:
            codes = codes - by_column(self._zeros, self._scheme, self._width)
        return codes * by_column(self._scales * self.factors, self._scheme, self._width)

    def packed(self) -> QTensor:
        """Codes and scales as they are stored."""
        with torch.no_grad():
            codes = self.codes.clamp(*code_range(self._scheme)).round()
            scales = storable(self._scales * self.factors, self._scheme, self._scales)
            return pack_grid(codes, Grid(scales, self._zeros), self._scheme)


class _Trainer:
    """The model as it was and as it is learnt, on tokens."""

    def __init__(self, program: Program, learnt: Mapping[str, _Learnt], others: Mapping[str, Tensor]) -> None:
        self._program = program
        self._learnt = learnt
        self._others = others
        self._run = LogitsRun(program)
        self._kept: dict[str, Tensor] = {}

    def backward(self, sequences: Sequence[Sequence[int]]) -> None:
        """Add the gradients of the mean divergence over the tokens of some sequences."""
        self._divergence(sequences, gradients=True).backward()  # pyright: ignore[reportUnknownMemberType]

    def divergence(self, sequences: Sequence[Sequence[int]]) -> float:
        """The mean divergence over the tokens of some sequences."""
        parts = [(batch, sum(map(len, batch))) for batch in _batches(sequences)]
        total = sum(float(self._divergence(batch, gradients=False)) * count for batch, count in parts)
        return total / sum(count for _, count in parts)

    def _divergence(self, sequences: Sequence[Sequence[int]], *, gradients: bool) -> Tensor:
        inputs: dict[str, Any] = packed_inputs(sequences)
        target = F.log_softmax(self._run.logits(inputs, self._exact, gradients=False), dim=-1)
        found = F.log_softmax(self._run.logits(inputs, self._rounded, gradients=gradients), dim=-1)
        return F.kl_div(found, target, reduction="batchmean", log_target=True)

    def _exact(self, name: str) -> Tensor:
        if name not in self._kept:
            self._kept[name] = raised(self._program.weights.evaluate(name))
        return self._kept[name]

    def _rounded(self, name: str) -> Tensor:
        if name in self._learnt:
            return self._learnt[name].value()
        return self._others[name] if name in self._others else self._exact(name)


def _batches(sequences: Sequence[Sequence[int]]) -> list[list[Sequence[int]]]:
    """Sequences together while they fit in a step's tokens."""
    groups: list[list[Sequence[int]]] = []
    used = STEP_TOKENS
    for sequence in sequences:
        if used + len(sequence) > STEP_TOKENS:
            groups.append([])
            used = 0
        groups[-1].append(sequence)
        used += len(sequence)
    return groups
