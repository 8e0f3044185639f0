"""What form the output must have: OpenAI's and vLLM's names for it become one structured output. Knows no
grammar."""

from __future__ import annotations

from typing import Any

from ..structured import StructuredOutput
from .errors import bad_request
from .requests import GenerationFields, ResponseFormat


def structure_of(request: GenerationFields) -> StructuredOutput | None:
    """The form asked for, if any. A 400 for two of them, RequestError for one that cannot be."""
    asked: dict[str, StructuredOutput] = {}
    if request.response_format is not None and request.response_format.type != "text":
        asked["response_format"] = _of_format(request.response_format)
    if request.structured_outputs is not None:
        given = request.structured_outputs
        asked["structured_outputs"] = StructuredOutput(
            json_schema=_schema_text(given.json),
            json_object=bool(given.json_object),
            regex=given.regex,
            choice=tuple(given.choice or ()),
            grammar=given.grammar,
        )
    if request.guided_json is not None:
        asked["guided_json"] = StructuredOutput(json_schema=_schema_text(request.guided_json))
    if request.guided_regex is not None:
        asked["guided_regex"] = StructuredOutput(regex=request.guided_regex)
    if request.guided_choice is not None:
        asked["guided_choice"] = StructuredOutput(choice=tuple(request.guided_choice))
    if request.guided_grammar is not None:
        asked["guided_grammar"] = StructuredOutput(grammar=request.guided_grammar)
    if len(asked) > 1:
        raise bad_request(
            "request.structured",
            f"{' and '.join(asked)} both say what form the output must have.",
            "Only one form can hold.",
            "Send one of them.",
            next(iter(asked)),
        )
    return next(iter(asked.values()), None)


def _of_format(given: ResponseFormat) -> StructuredOutput:
    if given.type == "json_object":
        return StructuredOutput(json_object=True)
    schema = given.json_schema
    if schema is None or schema.schema is None:
        raise bad_request(
            "request.response_format",
            "response_format is of type json_schema and holds no schema.",
            "The schema stands in json_schema.schema.",
            "Send one, or the type json_object.",
            "response_format",
        )
    return StructuredOutput.from_schema(schema.schema)


def _schema_text(given: dict[str, Any] | str | None) -> str | None:
    if given is None or isinstance(given, str):
        return given
    return StructuredOutput.from_schema(given).json_schema
