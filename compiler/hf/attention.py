"""The attention function of a trace: one `llmc.attention` per call, with every argument accounted for.
Knows how transformers calls attention; knows no model."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from ...ir.ops.attention import attention
from ...spec.errors import ModelError
from ...spec.model import AttentionSpec
from . import adapter
from .masks import MaskSpec


class AttentionRecorder:
    """Emits `llmc.attention` for each call and notes what it was: one AttentionSpec a call, in order.

    `positions[T]` must be set before the model runs. Shapes from transformers are `[1, H, T, D]`.
    """

    def __init__(self) -> None:
        self.positions: Tensor | None = None
        self.calls: list[AttentionSpec] = []
        self._stored: list[tuple[Tensor, Tensor, int]] = []

    def start(self, positions: Tensor) -> None:
        """Begin a run over tokens at `positions[T]`."""
        self.positions = positions
        self.calls.clear()
        self._stored.clear()

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        is_causal: bool | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """The attention function that is registered: gives `[1, T, H, V]` and no weights."""
        kind = type(module).__name__
        _refuse_arguments(
            kind, others, causal=is_causal is not False and not adapter.is_bidirectional(module)
        )
        window, chunk = _visibility(kind, attention_mask, sliding_window)
        layer = adapter.layer_index(module)
        if layer is None or self.positions is None:
            raise _argument_error(kind, "does not say which layer it belongs to")
        spec = AttentionSpec(
            layer=layer,
            num_heads=int(query.shape[1]),
            num_kv_heads=int(key.shape[1]),
            qk_dim=int(query.shape[3]),
            v_dim=int(value.shape[3]),
            scale=float(query.shape[3] ** -0.5 if scaling is None else scaling),
            window=window,
            chunk=chunk,
            softcap=float(softcap or 0.0),
            has_sinks=s_aux is not None,
            kv_source=self._source_of(key, value, layer),
        )
        self.calls.append(spec)
        return self._emit(query, key, value, s_aux, spec).unsqueeze(0), None

    def _source_of(self, key: Tensor, value: Tensor, layer: int) -> int:
        """The layer that computed these K and V: models that share them hand on the very tensors."""
        for stored_key, stored_value, owner in self._stored:
            if stored_key is key and stored_value is value:
                return owner
        self._stored.append((key, value, layer))
        return layer

    def _emit(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, spec: AttentionSpec) -> Tensor:
        q_THD, k_TGD, v_TGV = (tensor.squeeze(0).transpose(0, 1) for tensor in (q, k, v))
        result = attention(
            q_THD,
            k_TGD,
            v_TGV,
            self.positions,
            sinks,
            spec.layer,
            spec.kv_source,
            spec.scale,
            spec.window,
            spec.softcap,
            spec.chunk,
        )
        return cast(Tensor, result)


def _refuse_arguments(kind: str, others: dict[str, Any], *, causal: bool) -> None:
    if not causal:
        raise _argument_error(kind, "asks for attention that looks ahead (is_causal=False)")
    unknown = sorted(
        name
        for name, value in others.items()
        if value is not None and name not in adapter.HARMLESS_ATTENTION_ARGUMENTS
    )
    if unknown:
        raise _argument_error(kind, f"passes {', '.join(unknown)} to its attention function")


def _visibility(kind: str, mask: Any, sliding_window: int | None) -> tuple[int, int]:
    """(window, chunk) of a call. The mask decides, as in HF's eager attention; the argument must agree."""
    if mask is None:
        return int(sliding_window or 0), 0
    if not isinstance(mask, MaskSpec):
        raise ModelError(
            "model.attention_mask",
            f"{kind} hands a ready-made {type(mask).__name__} mask to its attention function.",
            "Only masks from transformers' mask builders tell which keys a query may see.",
            "Choose a model family that `llmc models` lists as supported.",
        )
    if sliding_window and mask.window and sliding_window != mask.window:
        raise _argument_error(kind, f"asks for a window of {sliding_window} and masks one of {mask.window}")
    return mask.window, mask.chunk


def _argument_error(kind: str, what: str) -> ModelError:
    return ModelError(
        "model.attention_argument",
        f"{kind} {what}.",
        "llmc's attention has no such argument, and leaving it out would change the result.",
        "Choose a model family that `llmc models` lists as supported.",
    )
