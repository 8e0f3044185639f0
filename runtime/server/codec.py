"""Text to token ids and back as the routes need it, and how single tokens are shown. Knows one model's
tokenizer and its limits; no requests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from ...spec.errors import RequestError
from ..admission import EngineLimits, check_prompt
from ..tokenizer import Tokenizer
from .errors import bad_request
from .requests import ChatMessage, ToolCall
from .tools import Dialect

_RESERVED = ("messages", "tools", "add_generation_prompt")
_REPLACEMENT = "\ufffd"


class EncodedChat(NamedTuple):
    """A conversation as the model reads it, in both forms."""

    token_ids: tuple[int, ...]
    text: str


class Codec:
    """Tokens of one model, and its dialect. Without a tokenizer everything in text is a 400."""

    def __init__(
        self, tokenizer: Tokenizer | None, limits: EngineLimits, dialect: Dialect | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self.limits = limits
        self.dialect = dialect or Dialect()
        self._shown: dict[int, str] = {}
        self._anchor: tuple[int, ...] = ()
        self._anchor_text = ""
        if tokenizer is not None:
            self._anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
            self._anchor_text = tokenizer.decode(self._anchor, skip_special_tokens=False)

    def encode(self, text: str, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of a prompt. RequestError when it is empty, or too long for the model."""
        if not text:
            check_prompt((), self.limits)
        token_ids = self._need().encode(text, add_special_tokens)
        check_prompt(token_ids, self.limits)
        return token_ids

    def encode_chat(
        self,
        messages: Sequence[ChatMessage],
        add_generation_prompt: bool = True,
        template_values: dict[str, Any] | None = None,
        tools: Sequence[dict[str, Any]] | None = None,
    ) -> EncodedChat:
        """A conversation under the model's template."""
        values = template_values or {}
        for name in _RESERVED:
            if name in values:
                raise bad_request(
                    "request.chat_template_kwargs",
                    f"chat_template_kwargs has {name}.",
                    "That value comes from the request itself.",
                    f"Leave {name} out of it.",
                    "chat_template_kwargs",
                )
        tokenizer = self._need()
        text = tokenizer.render_chat(
            [as_template_message(message, index) for index, message in enumerate(messages)],
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            **values,
        )
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        check_prompt(token_ids, self.limits)
        return EncodedChat(token_ids, text)

    def check_ids(self, token_ids: Sequence[int]) -> tuple[int, ...]:
        """A prompt of token ids. RequestError when empty, too long, or out of the vocabulary."""
        checked = tuple(token_ids)
        check_prompt(checked, self.limits)
        return checked

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of ids, special tokens included. RequestError for ids out of the vocabulary."""
        for index, token_id in enumerate(token_ids):
            if not 0 <= token_id < self.limits.vocab_size:
                raise RequestError(
                    "request.token_out_of_range",
                    f"Token {index} is {token_id}.",
                    f"The model's vocabulary has the ids 0 to {self.limits.vocab_size - 1}.",
                    "Use token ids of this model's tokenizer.",
                )
        return self._need().decode(token_ids, skip_special_tokens=False)

    def show(self, token_id: int) -> str:
        """One token as text, with its leading space; U+FFFD stands for a part of a character."""
        shown = self._shown.get(token_id)
        if shown is None:
            shown = self._shown[token_id] = self._show(token_id)
        return shown

    def bytes_of(self, token_id: int) -> list[int] | None:
        """UTF-8 of one token; None where it is only a part of a character."""
        text = self.show(token_id)
        return None if _REPLACEMENT in text else list(text.encode())

    def _show(self, token_id: int) -> str:
        """Decoders treat the start of a text specially: the token is decoded behind another one."""
        if self._tokenizer is None:
            return f"token_id:{token_id}"
        text = self._tokenizer.decode((*self._anchor, token_id), skip_special_tokens=False)
        if text.startswith(self._anchor_text):
            return text[len(self._anchor_text) :]
        return self._tokenizer.decode((token_id,), skip_special_tokens=False)

    def _need(self) -> Tokenizer:
        if self._tokenizer is None:
            raise bad_request(
                "request.no_tokenizer",
                "The request holds text, and this model has no tokenizer.",
                "The artifact was compiled from a model without one.",
                "Send /v1/completions with token ids.",
            )
        return self._tokenizer


def as_template_message(message: ChatMessage, index: int) -> dict[str, Any]:
    """A message in the form that templates read: text as one string, arguments of calls as objects."""
    content = message.content
    if isinstance(content, list):
        content = "\n".join(part.text for part in content)
    if content is None and not message.tool_calls:
        raise bad_request(
            "request.messages",
            f"Message {index} has no content.",
            "Only an assistant's message with tool calls may come without.",
            "Send its content as text.",
            "messages",
        )
    shown: dict[str, Any] = {"role": message.role, "content": content or ""}
    thought = message.reasoning_content if message.reasoning_content is not None else message.reasoning
    given = {"name": message.name, "tool_call_id": message.tool_call_id, "reasoning_content": thought}
    shown.update({name: value for name, value in given.items() if value is not None})
    if message.tool_calls:
        shown["tool_calls"] = [_as_template_call(call, index) for call in message.tool_calls]
    return shown


def _as_template_call(call: ToolCall, index: int) -> dict[str, Any]:
    try:
        arguments: object = json.loads(call.function.arguments)
    except ValueError as error:
        raise bad_request(
            "request.messages",
            f"The arguments of a tool call in message {index} are not JSON.",
            f"{error}.",
            "Send the arguments as one JSON object in a string.",
            "messages",
        ) from error
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.function.name, "arguments": arguments},
    }
