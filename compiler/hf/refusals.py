"""What cannot be right is refused before or while it is traced, each case with its own error."""

from __future__ import annotations

import difflib
from typing import Any

from torch import nn

from ...spec.errors import ModelError
from . import adapter

_OTHER_MODEL = "Choose a model family that `llmc models` lists as supported."
_MIXERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.RNNBase)


def refuse_config(config: Any) -> type[nn.Module]:
    """The model class of `config`. Raises ModelError for what its config or class already rule out."""
    name = str(getattr(config, "model_type", type(config).__name__))
    found = adapter.causal_lm_class(config)
    if found is None:
        raise _unknown_type(name)
    if adapter.is_multimodal(config):
        raise ModelError(
            "model.multimodal",
            f"{name} wraps a language model in a multimodal one.",
            "llmc compiles decoder-only text models.",
            "Use the text-only checkpoint of this family.",
        )
    method = adapter.quantization_method(config)
    if method is not None:
        raise ModelError(
            "model.quantized_checkpoint",
            f"The checkpoint of this {name} model is already quantised ({method}).",
            "llmc quantises from full-precision weights and does not read this format.",
            "Use the unquantised checkpoint and choose a preset with --quant.",
        )
    mixers = adapter.other_mixers(config)
    if mixers:
        raise mixer_error(name, f"layers of kind {', '.join(mixers)}")
    for rope in adapter.rope_parameter_sets(config):
        if "dynamic" in str(rope["rope_type"]):
            raise dynamic_rope_error(name)
    return found


def refuse_model(model: nn.Module, name: str) -> None:
    """Raises ModelError when part of `model` works across tokens without being attention, or counts them."""
    for path, module in model.named_modules():
        if isinstance(module, _MIXERS):
            raise mixer_error(name, f"a {type(module).__name__} at {path}")
        if any("dynamic" in kind for kind in adapter.rope_kinds(module).values()):
            raise dynamic_rope_error(name)
    if not adapter.takes_positions(model):
        raise attention_error(name)


def mixer_error(name: str, what: str) -> ModelError:
    """A layer that carries state other than K and V from token to token."""
    return ModelError(
        "model.mixer",
        f"{name} has {what}.",
        "Convolution and recurrent mixers keep state between tokens that no KV cache holds.",
        _OTHER_MODEL,
    )


def attention_error(name: str) -> ModelError:
    """A class whose attention is its own affair."""
    return ModelError(
        "model.no_attention_interface",
        f"{name} computes attention in a way of its own.",
        "Its transformers class does not use the attention interface, so llmc cannot see or page it.",
        _OTHER_MODEL,
    )


def dynamic_rope_error(name: str) -> ModelError:
    """Rotary frequencies that follow the longest sequence in the batch."""
    return ModelError(
        "model.rope_dynamic",
        f"{name} uses NTK-dynamic rope scaling.",
        "Its frequencies change with the longest sequence of a batch, and a token would depend on others.",
        "Set a static rope_type (for example yarn or linear) in config.json.",
    )


def _unknown_type(name: str) -> ModelError:
    from .configs import known_model_types

    closest = difflib.get_close_matches(name, known_model_types(), n=3)
    hint = f" The closest known types are {', '.join(closest)}." if closest else ""
    return ModelError(
        "model.unknown_type",
        f"There is no causal language model of type {name!r}.",
        f"The installed transformers has no such class.{hint}",
        "Check model_type in config.json, or install a newer transformers.",
    )
