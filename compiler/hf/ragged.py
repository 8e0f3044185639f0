"""The form in which a causal language model is traced: one packed batch in, chosen rows of logits out."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from . import adapter
from .attention import AttentionRecorder

# The attribute that holds the model: what a state-dict name is prefixed with in the exported program.
MODEL_PREFIX = "lm."


class Ragged(nn.Module):
    """`input_ids[T]`, `positions[T]`, `out_rows[L]` -> logits `[L, vocab]` of a causal language model."""

    def __init__(self, model: nn.Module, attention: AttentionRecorder) -> None:
        super().__init__()
        self.lm = model
        self._recorder = attention
        self._keeps_rows = adapter.keeps_rows(model)

    def forward(self, input_ids: Tensor, positions: Tensor, out_rows: Tensor) -> Tensor:
        """Run the model on a batch of one row, the packed tokens."""
        self._recorder.start(positions)
        rows = out_rows if self._keeps_rows else None
        arguments = adapter.forward_arguments(input_ids.unsqueeze(0), positions.unsqueeze(0), rows)
        output: Any = self.lm(**arguments)
        logits: Tensor = output.logits.squeeze(0)
        return logits if self._keeps_rows else logits.index_select(0, out_rows)
