"""Which model types transformers knows, and a config object from what a config.json says."""

from __future__ import annotations

from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


def known_model_types() -> tuple[str, ...]:
    """Every `model_type` of the installed transformers."""
    return tuple(CONFIG_MAPPING.keys())


def config_from_json(raw: dict[str, Any]) -> Any:
    """The config object that `raw`, the content of a config.json, describes. No remote code is run.

    Raises ValueError, TypeError, KeyError or AttributeError when the fields do not fit the model type.
    """
    try:
        return CONFIG_MAPPING[raw["model_type"]].from_dict(dict(raw))
    except StrictDataclassError as error:
        raise ValueError(str(error.__cause__ or error)) from error
