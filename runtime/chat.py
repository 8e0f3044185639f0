"""Chat templates: messages to the text a model was trained on, in a sandbox. Knows no token ids."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, cast

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from ..spec.errors import RequestError

Message = Mapping[str, Any]


class ChatTemplate:
    """A model's Jinja template as Hugging Face renders it: trimmed blocks, `raise_exception`,
    `strftime_now`, a `tojson` that escapes nothing, loop controls, and `generation` blocks.

    `special_tokens` (`bos_token`, …) are visible to the template; `now` is the clock it may read.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson

        def strftime_now(form: str) -> str:
            return now().strftime(form)

        names = cast("dict[str, Any]", environment.globals)
        names.update(raise_exception=_raise_exception, strftime_now=strftime_now)
        self.source = source
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise RequestError(
                "request.chat_template",
                "The model's chat template cannot be compiled.",
                f"Jinja says: {error}.",
                "Use plain prompts, or repair the template in the model's tokenizer folder.",
            ) from error

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **extra: Any,
    ) -> str:
        """The text of a conversation. RequestError with the template's own words when it refuses."""
        if not messages:
            raise RequestError(
                "request.messages",
                "There are no messages.",
                "A chat needs at least one.",
                'Send for example [{"role": "user", "content": "Hello"}].',
            )
        values = {**self._special_tokens, **extra}
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None if tools is None else [dict(tool) for tool in tools],
                add_generation_prompt=add_generation_prompt,
                **values,
            )
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise RequestError(
                "request.chat_template",
                "The model's chat template refused these messages.",
                f"It says: {error}.",
                "Send roles and contents in the form this model expects.",
            ) from error


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant says, for training: here it is just its content."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
