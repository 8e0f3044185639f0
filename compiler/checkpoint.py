"""A Hugging Face model folder, opened: config, precision, tokenizer files, tensors by header alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..spec.errors import ModelError, UsageError
from .json_files import read_object
from .quantised.stored import QuantisedForm, quantised_form, without_quantisation
from .shards import StoredTensor, list_tensors
from .tokenizer_files import TokenizerFiles, find_tokenizer

COMPUTE_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_COMPUTED = tuple(COMPUTE_DTYPES.values())


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One model folder. `config` is the transformers config object, `tensors` what is stored by name;
    no tensor is loaded. `form` says how its quantised weights are stored, None where it has none."""

    folder: Path
    config: Any
    raw_config: dict[str, Any]
    tensors: Mapping[str, StoredTensor]
    tokenizer: TokenizerFiles
    form: QuantisedForm | None = None

    @cached_property
    def dtype(self) -> torch.dtype:
        """The checkpoint's own precision: what most of its values, codes aside, are stored in.

        Raises ModelError when that is no dtype a program can compute in.
        """
        return precision_of(
            self.folder.name, Described(self.raw_config, self.config, self.form), self.tensors
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())


class Described(NamedTuple):
    """A model by its config.json: the JSON object, the transformers config object made of it, and how its
    quantised weights are stored (None where it has none)."""

    raw: dict[str, Any]
    config: Any
    form: QuantisedForm | None

    @property
    def declared_dtype(self) -> torch.dtype | None:
        """The precision that it states; None where it states none that a program can compute in."""
        return declared_dtype(self.raw)


def declared_dtype(raw: Mapping[str, Any]) -> torch.dtype | None:
    """The precision that the content of a config.json states, if a program can compute in it."""
    return COMPUTE_DTYPES.get(str(raw.get("dtype") or raw.get("torch_dtype")).removeprefix("torch."))


def precision_of(name: str, described: Described, tensors: Mapping[str, StoredTensor]) -> torch.dtype:
    """The precision of the checkpoint called `name`: what most of its values, codes aside, are stored in.

    Raises ModelError when that is no dtype a program can compute in.
    """
    values: Counter[torch.dtype] = Counter()
    for tensor in tensors.values():
        if tensor.dtype.is_floating_point and (described.form is None or tensor.dtype in _COMPUTED):
            values[tensor.dtype] += tensor.num_bytes // tensor.dtype.itemsize
    stored = values.most_common(1)[0][0] if values else None
    if described.form is not None and described.declared_dtype is not None:
        stored = described.declared_dtype  # what is left beside the codes may be scales alone
    if stored not in COMPUTE_DTYPES.values():
        raise ModelError(
            "model.precision",
            f"Most weights of {name} are stored as {_dtype_name(stored)}.",
            f"Programs compute in {', '.join(COMPUTE_DTYPES)}.",
            "Choose one of these with --dtype, or convert the checkpoint.",
        )
    assert stored is not None
    return stored


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open the model in `folder` without loading a tensor.

    Raises ModelError for a folder that is empty or no model, an unknown `model_type`, a form of
    quantisation that cannot be read, weights that are pickled, missing, truncated or damaged, and a
    missing tokenizer.
    """
    described = read_config(folder)
    tensors = list_tensors(folder)
    return Checkpoint(
        folder=folder,
        config=described.config,
        raw_config=described.raw,
        tensors=tensors,
        tokenizer=find_tokenizer(folder),
        form=described.form,
    )


def read_config(folder: Path) -> Described:
    """What config.json in `folder` says; nothing else is read.

    Raises ModelError for a folder that is empty or no model, an unknown `model_type`, and a form of
    quantisation that cannot be read.
    """
    raw = _read_config(folder)
    return Described(raw=raw, config=_config_object(folder, raw), form=quantised_form(raw))


def parse_dtype(name: str) -> torch.dtype:
    """The compute dtype called `name`. Raises UsageError naming those that exist."""
    if name in COMPUTE_DTYPES:
        return COMPUTE_DTYPES[name]
    close = get_close_matches(name, COMPUTE_DTYPES, n=1)
    raise UsageError(
        "usage.dtype",
        f"There is no compute dtype {name!r}.",
        f"Programs compute in {', '.join(COMPUTE_DTYPES)}.",
        f"Did you mean {close[0]}?" if close else "Choose one of these.",
    )


def _read_config(folder: Path) -> dict[str, Any]:
    if not any(folder.iterdir()):
        raise ModelError(
            "model.empty_folder",
            f"{folder} is empty.",
            "A model is a folder with config.json, safetensors weights and a tokenizer.",
            "Download the model into it, or name another folder.",
        )
    if not (folder / "config.json").is_file():
        raise _no_config(folder)
    return read_object(folder / "config.json")


def _no_config(folder: Path) -> ModelError:
    if (folder / "manifest.json").is_file():
        return ModelError(
            "model.is_artifact",
            f"{folder.name} is a compiled artifact.",
            "It has a manifest.json and no config.json.",
            "Run it with `llmc generate`, or name the model it was compiled from.",
        )
    if (folder / "adapter_config.json").is_file():
        return ModelError(
            "model.is_adapter",
            f"{folder.name} is an adapter, not a model.",
            "It has adapter_config.json and no config.json of its own.",
            "Merge the adapter into its base model, then compile that.",
        )
    return ModelError(
        "model.no_config",
        f"{folder.name} is no model folder.",
        "There is no config.json in it.",
        "Name a folder in the Hugging Face format.",
    )


def _config_object(folder: Path, raw: dict[str, Any]) -> Any:
    from .hf.configs import config_from_json, known_model_types

    kind = raw.get("model_type")
    if not isinstance(kind, str):
        raise ModelError(
            "model.no_model_type",
            f"config.json of {folder.name} has no model_type.",
            "Without it nobody can tell which architecture the weights belong to.",
            "Add the model_type the model was trained as.",
        )
    known = known_model_types()
    if kind not in known:
        close = get_close_matches(kind, known, n=3, cutoff=0.5)
        raise ModelError(
            "model.unknown_type",
            f"The model type {kind!r} is unknown.",
            "The installed transformers has no such architecture"
            + (f"; the closest are {', '.join(close)}." if close else "."),
            "Check model_type in config.json, or install a newer transformers.",
        )
    try:
        return config_from_json(without_quantisation(raw))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(
            "model.bad_config",
            f"config.json of {folder.name} does not describe a {kind} model.",
            f"transformers refuses it: {error}.",
            "Restore config.json from where the model came from.",
        ) from error


def _dtype_name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.") if dtype is not None else "integers"
