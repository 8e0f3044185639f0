"""The weights of a checkpoint by the names of a model, whether they are stored as values or as codes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from ...ir.coded import Dequantized
from ...ir.weights import Expr, Source
from ...spec.errors import ModelError
from ..shards import StoredTensor
from .awq import read_awq
from .compressed import read_compressed
from .fp8 import read_fp8
from .gptq import read_gptq
from .module import QuantisedModule, Shared, unsupported

_READERS = {"gptq": read_gptq, "awq": read_awq, "compressed-tensors": read_compressed, "fp8": read_fp8}
# What a quantised weight may be stored as, and the tensors that only quantised modules have.
_PARTS = (
    *("qweight", "qzeros", "scales", "g_idx"),
    *("weight", "weight_packed", "weight_shape", "weight_scale", "weight_scale_inv"),
    *("weight_zero_point", "weight_g_idx", "input_scale", "input_zero_point"),
)
_MARKS = ("qweight", "weight_packed", "weight_scale", "weight_scale_inv")


class QuantisedForm(Protocol):
    """How a checkpoint's quantised weights are stored."""

    def weight(self, module: QuantisedModule) -> Dequantized:
        """The weight `[N, K]` of one module. Raises ModelError where its tensors cannot be read."""
        ...


def quantised_form(config: Mapping[str, Any]) -> QuantisedForm | None:
    """What config.json says about codes; None for a checkpoint of values.

    Raises ModelError naming a method or setting that cannot be read.
    """
    quantisation = quantisation_config(config)
    if quantisation is None:
        return None
    method = str(quantisation.get("quant_method", "")) or "an unnamed method"
    if method not in _READERS:
        raise unsupported(
            f"The checkpoint is already quantised ({method}).",
            f"Of quantised checkpoints, those made with {', '.join(_READERS)} are read.",
        )
    try:
        return _READERS[method](quantisation)
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise ModelError(
            "model.bad_config",
            f"The quantization_config of this {method} checkpoint cannot be understood.",
            f"A setting has an unexpected form ({type(error).__name__}: {error}).",
            "Restore config.json from where the model came from.",
        ) from error


def quantisation_config(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The part of config.json that describes codes; None where there is none."""
    for holder in (config, config.get("text_config") or {}):
        for key in ("quantization_config", "compression_config"):
            if holder.get(key):
                return holder[key]
    return None


def without_quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the same model, unquantised."""
    keys = ("quantization_config", "compression_config")
    plain = {key: value for key, value in config.items() if key not in keys}
    if isinstance(plain.get("text_config"), dict):
        plain["text_config"] = {k: v for k, v in plain["text_config"].items() if k not in keys}
    return plain


def stored_weights(tensors: Mapping[str, StoredTensor], form: QuantisedForm | None) -> dict[str, Expr]:
    """Each stored tensor as an expression by name; those of a quantised weight as one, called `….weight`.

    Raises ModelError for a quantised weight whose tensors cannot be read.
    """
    modules = {} if form is None else _modules(tensors)
    taken = {f"{name}.{part}" for name, parts in modules.items() for part in parts}
    found: dict[str, Expr] = {
        name: Source(str(stored.path), stored.key, stored.shape, stored.dtype)
        for name, stored in tensors.items()
        if name not in taken
    }
    shared = Shared()
    for name, parts in modules.items():
        assert form is not None
        found[f"{name}.weight"] = form.weight(QuantisedModule(name=name, tensors=parts, shared=shared))
    shared.reader.close()
    return found


def _modules(tensors: Mapping[str, StoredTensor]) -> dict[str, dict[str, StoredTensor]]:
    """The tensors of each quantised module by short name."""
    by_module: dict[str, dict[str, StoredTensor]] = {}
    for name, stored in tensors.items():
        module, _, part = name.rpartition(".")
        if part in _PARTS:
            by_module.setdefault(module, {})[part] = stored
    marked = {module: parts for module, parts in by_module.items() if any(mark in parts for mark in _MARKS)}
    stray = [
        module
        for module, parts in by_module.items()
        if module not in marked and "weight" in parts and parts["weight"].dtype in _CODE_DTYPES
    ]
    if stray:
        raise ModelError(
            "model.code_parts",
            f"The weight '{stray[0]}.weight' is stored as codes without scales.",
            "Codes mean nothing without them.",
            "Restore the checkpoint from where it came from.",
        )
    return marked


_CODE_DTYPES = (torch.int8, torch.float8_e4m3fn)
