"""The experts function of a trace: one `llmc.moe` per expert block, its activation recognised by trying it.
Knows how transformers stores experts; knows no router."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...ir.ops.activation import ACTIVATIONS
from ...ir.ops.moe import clamped_swiglu, moe
from ...spec.errors import ModelError
from . import adapter

_PROBE_WIDTH = 16
_ALPHAS = (1.702, 1.0)
_LIMITS = (7.0, 10.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertBlock:
    """What stands between the projections of an experts module, in the words of `llmc.moe`."""

    layout: adapter.ExpertLayout
    activation: str
    interleaved: bool = False
    alpha: float = 0.0
    limit: float = 0.0


class ExpertRecorder:
    """Emits `llmc.moe` for each call of a module that `study` has recognised."""

    def __init__(self) -> None:
        self._blocks: dict[int, ExpertBlock] = {}

    def study(self, model: nn.Module) -> None:
        """Recognise every experts module of `model`. Raises ModelError for an unknown one."""
        for path, module in model.named_modules():
            layout = adapter.expert_layout(module)
            if layout is not None:
                self._blocks[id(module)] = recognise_experts(module, layout, path)

    def __call__(
        self, module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """The experts function that is registered: `[T, D]` in, `[T, D]` out."""
        block = self._blocks[id(module)]
        first, second, first_bias, second_bias = adapter.expert_weights(module, block.layout)
        if block.layout.transposed:
            first, second = first.transpose(1, 2), second.transpose(1, 2)
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        result = moe(
            flat,
            top_k_index.reshape(-1, top_k_index.shape[-1]),
            top_k_weights.reshape(-1, top_k_weights.shape[-1]),
            first,
            second,
            first_bias,
            second_bias,
            block.activation,
            block.interleaved,
            block.alpha,
            block.limit,
        )
        return cast(Tensor, result).reshape(hidden_states.shape)


def recognise_experts(module: nn.Module, layout: adapter.ExpertLayout, path: str) -> ExpertBlock:
    """The block that `module` computes, found by running its gate on random numbers.

    Raises ModelError naming `path` when no known activation gives the same result.
    """
    if layout.normed:
        raise _error(path, "normalises each expert's output")
    own = _light_copy(module)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 2 * _PROBE_WIDTH, generator=generator) * 6.0
    found = adapter.expert_activation(own, layout)(x)
    for block, formula in _candidates(layout):
        if torch.allclose(found, formula(x), rtol=1e-5, atol=1e-6):
            return block
    raise _error(path, "uses an activation that llmc does not know")


def _light_copy(module: nn.Module) -> nn.Module:
    """A copy without parameters: probing needs the method and plain attributes only."""
    registered = adapter.own_parameters(module)
    kept = dict(registered)
    registered.clear()
    try:
        return copy.deepcopy(module)
    finally:
        registered.update(kept)


def _candidates(layout: adapter.ExpertLayout) -> list[tuple[ExpertBlock, Callable[[Tensor], Tensor]]]:
    found: list[tuple[ExpertBlock, Callable[[Tensor], Tensor]]] = []
    for name, function in ACTIVATIONS.items():
        if not layout.gated:
            found.append((ExpertBlock(layout=layout, activation=f"plain:{name}"), function))
            continue
        for interleaved in (False, True):
            block = ExpertBlock(layout=layout, activation=name, interleaved=interleaved)
            found.append((block, _gated(function, interleaved=interleaved)))
    if layout.gated:
        found.extend(_clamped(layout))
    return found


def _gated(function: Callable[[Tensor], Tensor], *, interleaved: bool) -> Callable[[Tensor], Tensor]:
    def apply(x: Tensor) -> Tensor:
        gate, up = _split(x, interleaved=interleaved)
        return function(gate) * up

    return apply


def _clamped(layout: adapter.ExpertLayout) -> list[tuple[ExpertBlock, Callable[[Tensor], Tensor]]]:
    found: list[tuple[ExpertBlock, Callable[[Tensor], Tensor]]] = []
    for interleaved in (True, False):
        for alpha in _ALPHAS:
            for limit in _LIMITS:
                block = ExpertBlock(
                    layout=layout,
                    activation="clamped_swiglu",
                    interleaved=interleaved,
                    alpha=alpha,
                    limit=limit,
                )
                found.append((block, _clamped_formula(block)))
    return found


def _clamped_formula(block: ExpertBlock) -> Callable[[Tensor], Tensor]:
    def apply(x: Tensor) -> Tensor:
        gate, up = _split(x, interleaved=block.interleaved)
        return clamped_swiglu(gate, up, block.alpha, block.limit)

    return apply


def _split(x: Tensor, *, interleaved: bool) -> Any:
    return (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)


def _error(path: str, what: str) -> ModelError:
    return ModelError(
        "model.experts",
        f"The experts at {path} cannot be compiled.",
        f"Their module {what}.",
        "Choose a model family that `llmc models` lists as supported.",
    )
