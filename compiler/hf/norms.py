"""Norm modules are recognised by what they compute, before anything is traced: a copy runs on random
numbers and must agree with one formula of `llmc.rms_norm` or `llmc.layer_norm`. A class name at most says
where to look."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...ir.ops.norm import layer_norm, rms_norm

# Bit-for-bit equality is asked for in this dtype, where each formula rounds in its own way.
_PROBE_DTYPE = torch.bfloat16
_COMMON_EPS = (1e-5, 1e-6, 1e-8, 1e-12)
_STYLES = ("cast_then_scale", "scale_then_cast")
# Share of elements in which torch's fused layer norm may round otherwise than the plain formula.
_FUSED_DIFFERENCE = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class NormFormula:
    """One formula of `llmc.rms_norm` (centred False) or `llmc.layer_norm` (centred True)."""

    centred: bool
    eps: float
    offset: float
    style: str

    def apply(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """The formula as its operator."""
        if self.centred:
            found = layer_norm(x, weight, bias, self.eps, self.offset, self.style)
        else:
            found = rms_norm(x, weight, self.eps, self.offset, self.style)
        return cast(Tensor, found)


def use_norm_operators(model: nn.Module) -> int:
    """Swap the forward of every recognised norm module for its operator; returns how many there were.

    What is not recognised stays as it is and is traced as generic ATen.
    """
    known: dict[Any, NormFormula | None] = {}
    count = 0
    for module in model.modules():
        if not _may_be_norm(module):
            continue
        key = (type(module), tuple(_floats(module)), _width(module), _plain_attributes(module))
        if key not in known:
            known[key] = recognise_norm(module)
        formula = known[key]
        if formula is not None:
            module.forward = _operator_forward(module, formula)
            count += 1
    return count


def recognise_norm(module: nn.Module) -> NormFormula | None:
    """The formula that `module` computes, or None when it is no norm or one of another kind."""
    if type(module) is nn.LayerNorm:  # a subclass may do something else, such as adding 1 to its weight
        return NormFormula(centred=True, eps=module.eps, offset=0.0, style="scale_then_cast")
    own = copy.deepcopy(module).to_empty(device="cpu").to(_PROBE_DTYPE)
    generator = torch.Generator().manual_seed(0)
    for parameter in own.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(_PROBE_DTYPE)
    x = torch.randn(1, 24, _width(module), generator=generator)
    x = (x * torch.logspace(-3.5, 0, 24)[:, None]).to(_PROBE_DTYPE)  # small rows show what eps is
    try:
        with torch.no_grad():
            found = own(x)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError):
        return None  # it wants other inputs than a norm does
    if not isinstance(found, Tensor) or found.shape != x.shape or found.dtype != x.dtype:
        return None
    return _matching(found, x, _weight(own), _bias(own), _floats(module))


def _matching(
    found: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps_values: list[float]
) -> NormFormula | None:
    for eps in dict.fromkeys([*eps_values, *_COMMON_EPS]):
        for centred in (False, True):
            if bias is not None and not centred:
                continue
            for offset in (0.0, 1.0) if weight is not None else (0.0,):
                for style in _STYLES if weight is not None else _STYLES[1:]:
                    formula = NormFormula(centred=centred, eps=eps, offset=offset, style=style)
                    expected = formula.apply(x, weight, bias)
                    if expected.dtype == found.dtype and _agrees(found, expected, centred=centred):
                        return formula
    return None


def _agrees(found: Tensor, expected: Tensor, *, centred: bool) -> bool:
    if torch.equal(found, expected):
        return True
    if not centred:
        return False
    differing = (found != expected).float().mean().item()
    return differing < _FUSED_DIFFERENCE and torch.allclose(found, expected, rtol=2**-7, atol=1e-6)


def _may_be_norm(module: nn.Module) -> bool:
    parameters = dict(module.named_parameters(recurse=False))
    if next(module.children(), None) is not None or next(module.buffers(), None) is not None:
        return False
    if not parameters.keys() <= {"weight", "bias"} or any(p.dim() != 1 for p in parameters.values()):
        return False
    return "weight" in parameters or "norm" in type(module).__name__.lower()


def _operator_forward(module: nn.Module, formula: NormFormula) -> Callable[[Tensor], Tensor]:
    def forward(hidden_states: Tensor) -> Tensor:
        return formula.apply(hidden_states, _weight(module), _bias(module))

    return forward


def _weight(module: nn.Module) -> Tensor | None:
    return getattr(module, "weight", None)


def _bias(module: nn.Module) -> Tensor | None:
    return getattr(module, "bias", None)


def _width(module: nn.Module) -> int:
    weight = _weight(module)
    if weight is not None:
        return int(weight.shape[-1])
    shape = getattr(module, "normalized_shape", None)
    return int(shape[-1]) if shape else 64


def _floats(module: nn.Module) -> list[float]:
    return [value for value in vars(module).values() if isinstance(value, float) and 0 < value < 1e-2]


def _plain_attributes(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    plain = (bool, int, str, type(None))
    return tuple((k, v) for k, v in sorted(vars(module).items()) if isinstance(v, plain))
