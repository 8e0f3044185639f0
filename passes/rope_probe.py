"""Is this function a rotary embedding, and which? Answered by evaluating both on the same numbers.

Knows tensors alone; where such functions lie in a graph is `rope`'s to find.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..ir.ops.rope import STYLES, rope

_TOLERANCE = 1e-5
_NUM_POSITIONS = 48


@dataclass(frozen=True, slots=True)
class RopeForm:
    """The arguments of `llmc.rope` that make it equal a function.

    `candidate` indexes the inverse frequencies tried; `backward` says that they count with a minus sign.
    """

    candidate: int
    backward: bool
    scale: float
    style: str
    tail: bool


def probe_positions(max_context: int, generator: torch.Generator) -> Tensor:
    """Positions from 0 to `max_context` - 1, near and far, int64 and increasing."""
    last = max(max_context - 1, 1)
    spread = torch.logspace(0, torch.log2(torch.tensor(float(last))).item(), _NUM_POSITIONS // 2, base=2.0)
    drawn = torch.randint(0, last + 1, (_NUM_POSITIONS // 2,), generator=generator)
    picked = torch.cat([torch.tensor([0, 1, last]), spread.long().clamp(0, last), drawn])
    return picked.unique()


def recognise_rope(
    x_THD: Tensor,
    y_THD: Tensor,
    positions: Tensor,
    inv_freqs: Sequence[Tensor],
    constants: Iterable[float],
) -> RopeForm | str:
    """The form in which `llmc.rope` maps x to y at `positions`; the reason when there is none.

    All of `constants` (numbers that the function uses) and 1 are tried as its scale before a fitted one.
    """
    nearest = float("inf")
    scale_choices = (1.0, *constants)
    for form, inv_freq in _forms(inv_freqs, x_THD.shape[-1]):
        width = 2 * inv_freq.shape[0]
        plain = rope(x_THD, positions, inv_freq, 1.0, form.style, form.tail)
        scale = _scale(_rotated(plain, width, form.tail), _rotated(y_THD, width, form.tail), scale_choices)
        found = plain
        if scale != 1.0:
            found = rope(x_THD, positions, inv_freq, scale, form.style, form.tail)
        error = float((found - y_THD).abs().max() / y_THD.abs().max())
        if error <= _TOLERANCE:
            return replace(form, scale=scale)
        nearest = min(nearest, error)
    if nearest == float("inf"):
        return "no vector of inverse frequencies of at most half its width is in reach"
    return f"no form of rope gives its values (nearest: relative error {nearest:.1e})"


def _forms(inv_freqs: Sequence[Tensor], head_dim: int) -> Iterator[tuple[RopeForm, Tensor]]:
    """Every form for heads of that width, with the inverse frequencies it turns by, the usual ones first."""
    for backward in (False, True):
        for index, inv_freq in enumerate(inv_freqs):
            width = 2 * inv_freq.shape[0]
            if width > head_dim:
                continue
            for tail in (False, True) if width < head_dim else (False,):
                for style in STYLES:
                    turn = -inv_freq if backward else inv_freq
                    yield RopeForm(index, backward, 1.0, style, tail), turn


def _rotated(x: Tensor, width: int, tail: bool) -> Tensor:
    return x[..., -width:] if tail else x[..., :width]


def _scale(plain: Tensor, wanted: Tensor, choices: Iterable[float]) -> float:
    """The factor from `plain` to `wanted` by least squares, as one of `choices` if one is that close."""
    plain, wanted = plain.double(), wanted.double()
    fitted = float((plain * wanted).sum() / plain.square().sum())
    return next((one for one in choices if abs(one - fitted) <= 1e-6 * abs(one)), fitted)
