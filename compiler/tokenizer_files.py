"""The tokenizer files of a model folder: which there are, and what they say. Tokenises nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..spec.errors import ModelError
from .json_files import read_object

_TOKENIZER = "tokenizer.json"
# Carried into the artifact unchanged where the model has them.
_COMPANIONS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
# What older models have in place of tokenizer.json.
_SLOW_FORMS = ("vocab.json", "merges.txt", "tokenizer.model", "vocab.txt", "spiece.model")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerFiles:
    """`files` are to be copied as they are (tokenizer.json first); `chat_template` is the Jinja source,
    or None; `generation` holds the generation defaults ({} when the model has none)."""

    files: tuple[Path, ...]
    chat_template: str | None
    generation: dict[str, Any]


def find_tokenizer(folder: Path) -> TokenizerFiles:
    """The tokenizer of the model in `folder`.

    Raises ModelError when there is none in the format of the tokenizers library, or when a file of
    it is unreadable.
    """
    if not (folder / _TOKENIZER).is_file():
        raise _no_tokenizer(folder)
    read_object(folder / _TOKENIZER)
    files = tuple(folder / name for name in (_TOKENIZER, *_COMPANIONS) if (folder / name).is_file())
    generation = folder / "generation_config.json"
    return TokenizerFiles(
        files=files,
        chat_template=_chat_template(folder),
        generation=read_object(generation) if generation.is_file() else {},
    )


def _chat_template(folder: Path) -> str | None:
    """chat_template.jinja, which wins, or what tokenizer_config.json holds (the default of several)."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"
    template = read_object(config).get("chat_template") if config.is_file() else None
    if isinstance(template, list):
        named: dict[str, str] = {entry["name"]: entry["template"] for entry in template}
        return named.get("default")
    return template if isinstance(template, str) else None


def _no_tokenizer(folder: Path) -> ModelError:
    slow = [name for name in _SLOW_FORMS if (folder / name).is_file()]
    if slow:
        return ModelError(
            "model.slow_tokenizer",
            f"{folder.name} has no {_TOKENIZER}.",
            f"Its tokenizer is stored in an older form ({', '.join(slow)}).",
            "Load it with transformers' AutoTokenizer and save_pretrained it into the folder.",
        )
    return ModelError(
        "model.no_tokenizer",
        f"{folder.name} has no tokenizer.",
        f"There is no {_TOKENIZER} in the folder.",
        "Download the model's tokenizer files into the folder.",
    )
