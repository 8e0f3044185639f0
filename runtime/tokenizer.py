"""A model's tokenizer folder: text to ids and back, special tokens, chat template, generation defaults. The
one place that knows Hugging Face's file names and the `tokenizers` library."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import tokenizers

from ..spec.errors import ArtifactError, RequestError
from .chat import ChatTemplate
from .params import SamplingParams

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """What `generation_config.json` asks for. Without `do_sample` a model decodes greedily."""

    eos_token_ids: tuple[int, ...] = ()
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def params(self, max_tokens: int | None = None, seed: int | None = None) -> SamplingParams:
        """Sampling parameters with these defaults."""
        return SamplingParams(
            max_tokens=max_tokens,
            seed=seed,
            temperature=self.temperature if self.do_sample else 0.0,
            top_k=self.top_k if self.do_sample else 0,
            top_p=self.top_p if self.do_sample else 1.0,
            min_p=self.min_p if self.do_sample else 0.0,
            repetition_penalty=self.repetition_penalty,
        )


class Tokenizer:
    """Text to token ids and back, as Hugging Face's fast tokenizer does it.

    Whether a beginning-of-text token is added is decided by the post-processor of `tokenizer.json` alone:
    where that file exists, Hugging Face does not look at `add_bos_token` of `tokenizer_config.json` either.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str],
        defaults: GenerationDefaults | None = None,
        chat: ChatTemplate | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.special_tokens = dict(special_tokens)
        self.defaults = defaults or GenerationDefaults()
        self._chat = chat
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        added = cast("dict[int, Any]", backend.get_added_tokens_decoder())
        self.special_ids = frozenset(index for index, token in added.items() if token.special)

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Reads an artifact's tokenizer folder. ArtifactError when `tokenizer.json` is missing, or one of
        the files cannot be read."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ArtifactError(
                "artifact.no_tokenizer",
                f"{path} does not exist.",
                "Without a tokenizer.json text cannot be turned into tokens.",
                "Compile the model again with its tokenizer.json, or give prompts as token ids.",
            )
        try:
            backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:
            raise _unreadable(path, error) from error
        config = _read_json(folder / "tokenizer_config.json")
        special = _special_tokens(_read_json(folder / "special_tokens_map.json"), config)
        source = _chat_source(folder, config)
        return cls(
            backend,
            special,
            _generation_defaults(_read_json(folder / "generation_config.json")),
            ChatTemplate(source, special) if source is not None else None,
        )

    @property
    def bos_token_id(self) -> int | None:
        return self.token_to_id(self.special_tokens.get("bos_token"))

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a text: those of the generation defaults, else the tokenizer's own."""
        if self.defaults.eos_token_ids:
            return self.defaults.eos_token_ids
        own = self.token_to_id(self.special_tokens.get("eos_token"))
        return () if own is None else (own,)

    @property
    def chat_source(self) -> str | None:
        """The chat template as it is written, if there is one."""
        return None if self._chat is None else self._chat.source

    @property
    def has_chat_template(self) -> bool:
        return self._chat is not None

    def token_to_id(self, token: str | None) -> int | None:
        return None if token is None else self._backend.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        """The vocabulary entry, in the tokenizer's own alphabet; None for an id without one."""
        return self._backend.id_to_token(token_id)

    def encode(self, text: str, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of `text`. RequestError for text that is not valid Unicode (lone surrogates)."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError(
                "request.invalid_text",
                "The text is not valid Unicode.",
                f"Character {error.start} is half of a surrogate pair.",
                "Send well-formed UTF-8.",
            ) from error
        return tuple(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def as_json(self) -> str:
        """The tokenizer as the text of a `tokenizer.json`."""
        return str(self._backend.to_str())

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`. Bytes that are no UTF-8 become U+FFFD."""
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **extra: Any,
    ) -> str:
        """The text of a conversation under the model's template; encode it without special tokens."""
        if self._chat is None:
            raise RequestError(
                "request.no_chat_template",
                "This model has no chat template.",
                "Neither chat_template.jinja nor tokenizer_config.json of the model holds one.",
                "Send a plain prompt instead of messages.",
            )
        return self._chat.render(messages, tools, add_generation_prompt, **extra)


def _read_json(path: Path) -> dict[str, Any]:
    """The object in `path`, empty when there is no such file."""
    if not path.is_file():
        return {}
    try:
        content: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if not isinstance(content, dict):
        raise _unreadable(path, TypeError("it is not a JSON object"))
    return cast("dict[str, Any]", content)


def _special_tokens(*sources: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by role; later sources win."""
    found: dict[str, str] = {}
    for source in sources:
        for role in SPECIAL_TOKENS:
            value = source.get(role)
            if isinstance(value, Mapping):
                value = cast("Mapping[str, Any]", value).get("content")
            if isinstance(value, str):
                found[role] = value
    return found


def _chat_source(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The default chat template: its own file before the configuration."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    entry = config.get("chat_template")
    if isinstance(entry, list):
        named = cast("list[Mapping[str, str]]", entry)
        return next((each["template"] for each in named if each["name"] == "default"), None)
    return entry if isinstance(entry, str) else None


def _generation_defaults(config: Mapping[str, Any]) -> GenerationDefaults:
    eos = config.get("eos_token_id")
    ids: Iterable[int] = () if eos is None else cast("list[int]", eos) if isinstance(eos, list) else (eos,)

    def number(name: str, default: float) -> float:
        value = config.get(name)
        return default if value is None else value

    return GenerationDefaults(
        eos_token_ids=tuple(ids),
        do_sample=bool(config.get("do_sample", False)),
        temperature=float(number("temperature", 1.0)),
        top_k=int(number("top_k", 0)),
        top_p=float(number("top_p", 1.0)),
        min_p=float(number("min_p", 0.0)),
        repetition_penalty=float(number("repetition_penalty", 1.0)),
    )


def _unreadable(path: Path, error: Exception) -> ArtifactError:
    return ArtifactError(
        "artifact.tokenizer_unreadable",
        f"{path} cannot be read.",
        f"{type(error).__name__}: {error}.",
        "Copy the tokenizer files of the model again.",
    )
