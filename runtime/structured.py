"""What form an answer must have, as a caller states it. Knows no grammar engine and no tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from ..spec.errors import RequestError

MAX_SOURCE_BYTES = 1 << 20
MAX_CHOICES = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutput:
    """The form an answer must have: exactly one of the fields is given.

    `json_schema` is a JSON Schema as JSON text; `json_object` any JSON object; `regex` must match the whole
    answer; `choice` lists the possible answers; `grammar` is a context-free grammar in Lark's notation whose
    rule `start` is the answer. Construction raises RequestError for none or several of them, for one of the
    wrong type or size, and for text that is no JSON. Whether it compiles is known when a request is made.
    """

    json_schema: str | None = None
    json_object: bool = False
    regex: str | None = None
    choice: tuple[str, ...] = ()
    grammar: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.choice, list):
            object.__setattr__(self, "choice", tuple(self.choice))
        given = [item.name for item in fields(self) if getattr(self, item.name) not in (None, False, ())]
        if len(given) != 1:
            raise RequestError(
                "request.structured",
                f"{' and '.join(given) if given else 'None'} of the forms of structured output "
                f"{'are' if given else 'is'} given.",
                f"Exactly one can hold: {', '.join(item.name for item in fields(self))}.",
                "Send one of them.",
            )
        self._check_values()

    @classmethod
    def from_schema(cls, schema: Mapping[str, Any] | bool) -> Self:
        """Of a JSON Schema that has been parsed already."""
        return cls(json_schema=json.dumps(schema))

    @property
    def kind(self) -> str:
        """The name of the field that is given."""
        return next(item.name for item in fields(self) if getattr(self, item.name) not in (None, False, ()))

    @property
    def num_bytes(self) -> int:
        """The size of the form as it was sent."""
        texts = (self.json_schema, self.regex, self.grammar, *self.choice)
        return sum(len(text.encode(errors="replace")) for text in texts if text is not None)

    def _check_values(self) -> None:
        for name in ("json_schema", "regex", "grammar"):
            value: object = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, str) or not value:
                raise _invalid(name, "It must be a text of at least one character")
            if len(value.encode(errors="replace")) > MAX_SOURCE_BYTES:
                raise _invalid(name, f"It has more than {MAX_SOURCE_BYTES} bytes")
        if not isinstance(self.json_object, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise _invalid("json_object", "It must be true or false")
        if len(self.choice) > MAX_CHOICES:
            raise _invalid("choice", f"It lists {len(self.choice)} answers, and at most {MAX_CHOICES} may be")
        if not all(isinstance(each, str) and each for each in self.choice):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise _invalid("choice", "Each answer must be a text of at least one character")
        if self.json_schema is not None:
            self._check_schema(self.json_schema)

    @staticmethod
    def _check_schema(text: str) -> None:
        try:
            schema: object = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _invalid("json_schema", f"It is no JSON: {error}") from error
        if not isinstance(schema, dict | bool):
            raise _invalid("json_schema", "A schema is a JSON object, or true or false")


def _invalid(name: str, why: str) -> RequestError:
    return RequestError(
        f"request.structured.{name}",
        f"The {name} of structured output cannot be used.",
        f"{why}.",
        "Correct it, or leave structured output out.",
    )
