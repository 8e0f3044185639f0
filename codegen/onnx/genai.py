"""`genai_config.json`: what ONNX Runtime GenAI reads of a model's folder beside the graph."""

from __future__ import annotations

import json
from typing import Any

from ...artifact.onnx import ONNX_MODEL, OnnxUnit
from ...artifact.schema import TOKENIZER_FOLDER
from ...spec.model import ModelSpec
from .frame import PAST_KEY, PAST_VALUE, PRESENT_KEY, PRESENT_VALUE

# A text decoder of any architecture: GenAI takes what it needs from names and shapes.
_TYPE = "decoder"


def genai_problem(spec: ModelSpec) -> str:
    """Why ONNX Runtime GenAI cannot generate from the model; empty where it can. llmc's own engine can
    anyway."""
    if not spec.eos_token_ids:
        return (
            "the model names no end-of-text token (eos_token_id), which GenAI needs to know where a text ends"
        )
    return ""


def genai_config(spec: ModelSpec, unit: OnnxUnit) -> bytes:
    """The bytes of the file, for a model without a `genai_problem`: greedy by default, with the model's own
    special tokens."""
    eos = list(spec.eos_token_ids)
    config: dict[str, Any] = {
        "model": {
            "type": _TYPE,
            "vocab_size": spec.vocab_size,
            "context_length": spec.max_context,
            "bos_token_id": spec.bos_token_ids[0] if spec.bos_token_ids else eos[0],
            "eos_token_id": eos if len(eos) > 1 else eos[0],
            "pad_token_id": eos[0] if spec.pad_token_id is None else spec.pad_token_id,
            "tokenizer_dir": TOKENIZER_FOLDER,
            "decoder": _decoder(spec, unit),
        },
        "search": {
            "do_sample": False,
            "early_stopping": True,
            "max_length": spec.max_context,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": unit.in_place,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }
    return json.dumps(config, indent=1, sort_keys=True).encode() + b"\n"


def _decoder(spec: ModelSpec, unit: OnnxUnit) -> dict[str, Any]:
    first = spec.attention[0]
    return {
        "filename": ONNX_MODEL,
        "hidden_size": spec.hidden_size,
        "head_size": unit.caches[0].k_dim,
        "num_attention_heads": first.num_heads,
        "num_hidden_layers": len(unit.caches),
        "num_key_value_heads": unit.caches[0].num_kv_heads,
        "session_options": {"log_id": "llmc", "provider_options": []},
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": PAST_KEY.format("%d"),
            "past_value_names": PAST_VALUE.format("%d"),
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": PRESENT_KEY.format("%d"),
            "present_value_names": PRESENT_VALUE.format("%d"),
        },
    }
