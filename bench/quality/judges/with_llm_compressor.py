"""llm-compressor as a judge: GPTQ (static act-order, its default) and AWQ. Runs where it is installed."""

from __future__ import annotations

from typing import Any

import torch
from checkpoint import Quantised, Work, drive
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache


def quantise(work: Work, model: Any) -> Quantised:
    """Dequantised weights of every linear but the head; with AWQ the model's norms change as well."""
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(
            num_bits=work.bits, symmetric=True, strategy="group", group_size=work.group_size
        ),
    )
    options: dict[str, Any] = {"config_groups": {"group_0": scheme}, "ignore": ["lm_head"]}
    recipe = (
        [GPTQModifier(**options)]
        if work.method == "gptq"
        else [AWQModifier(), QuantizationModifier(**options)]
    )
    if not torch.accelerator.is_available():
        # it pins pages for copies to a device, which torch refuses where there is none; values stay the same
        IntermediatesCache.pin_memory = lambda *_, **__: None
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in work.tokens]
    loader = torch.utils.data.DataLoader(rows, batch_size=1)
    oneshot(
        model=model,
        dataset=loader,
        recipe=recipe,
        num_calibration_samples=len(rows),
        max_seq_length=work.tokens.shape[1],
    )
    with torch.no_grad():
        weights = {
            name: fake_quantize(
                module.weight,
                module.weight_scale,
                module.weight_zero_point,
                module.quantization_scheme.weights,
            )
            for name, module in model.named_modules()
            if getattr(module, "quantization_scheme", None) is not None
        }
    return model, weights


if __name__ == "__main__":
    drive(("gptq", "awq"), quantise)
