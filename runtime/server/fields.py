"""Every documented request field of OpenAI and vLLM, and what becomes of it. The one table that decides
between honouring, ignoring a value that changes nothing, and refusing."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

import msgspec

from .errors import ServingError, bad_request


class Use(Enum):
    """HONOURED: done as asked. NEUTRAL: accepted where the value changes nothing, else a 400. REFUSED: a 400
    with any value but null."""

    HONOURED = "honoured"
    NEUTRAL = "accepted when it changes nothing"
    REFUSED = "refused"


class Field(msgspec.Struct, frozen=True):
    """`neutral` are the values that change nothing, `ANY` for all; `why` is said when it is refused."""

    use: Use
    why: str = ""
    neutral: tuple[Any, ...] = ()


ANY: tuple[Any, ...] = ("any value",)
_HONOURED = Field(Use.HONOURED)


def _refused(why: str) -> Field:
    return Field(Use.REFUSED, why)


def _neutral(why: str, *values: Any) -> Field:
    return Field(Use.NEUTRAL, why, values)


def _label() -> Field:
    return Field(Use.NEUTRAL, "It only labels the request.", ANY)


_OWN_GRAMMAR = _refused("Grammars are compiled in one way only; leave this to the server.")
_OLD_TOOLS = "Use tools and tool_choice."
_NO_LOOPS = "This server does not look for repetitions; use a penalty."
_NO_TRANSFER = _refused("This server hands no cache to another one.")

_COMMON: dict[str, Field] = {
    **dict.fromkeys(
        (
            "model",
            "max_tokens",
            "temperature",
            "top_p",
            "n",
            "stream",
            "stream_options",
            "stop",
            "seed",
            "presence_penalty",
            "frequency_penalty",
            "logit_bias",
            "logprobs",
            "top_k",
            "min_p",
            "repetition_penalty",
            "stop_token_ids",
            "min_tokens",
            "ignore_eos",
            "skip_special_tokens",
            "priority",
            "request_id",
            "timeout_s",
            "return_token_ids",
            "response_format",
            "structured_outputs",
            "guided_json",
            "guided_regex",
            "guided_choice",
            "guided_grammar",
        ),
        _HONOURED,
    ),
    "user": _label(),
    "best_of": _neutral("Completions are not ranked; ask for n.", 1),
    "use_beam_search": _neutral("This server samples, it does not search.", False),
    "length_penalty": _neutral("It belongs to beam search, which this server does not do.", 1, 1.0),
    "include_stop_str_in_output": _neutral("Stop strings never appear in the output.", False),
    "spaces_between_special_tokens": _neutral("Text is what the tokenizer decodes.", True),
    "truncate_prompt_tokens": _refused("Nothing is ever truncated; shorten the prompt."),
    "truncation_side": _refused("Nothing is ever truncated; shorten the prompt."),
    "allowed_token_ids": _refused("The output cannot be limited to listed tokens; use logit_bias."),
    "bad_words": _neutral("Words cannot be forbidden; use logit_bias.", []),
    "logits_processors": _refused("Code is never taken from a request."),
    "prompt_logprobs": _refused("Use /v1/completions with echo and logprobs."),
    "return_tokens_as_token_ids": _neutral("Use return_token_ids.", False),
    "structural_tag": _refused("Send a grammar in structured_outputs."),
    "guided_decoding_backend": _OWN_GRAMMAR,
    "guided_whitespace_pattern": _OWN_GRAMMAR,
    "cache_salt": _refused("The prefix cache is shared by all callers and cannot be salted."),
    "kv_transfer_params": _NO_TRANSFER,
    "ec_transfer_params": _NO_TRANSFER,
    "vllm_xargs": _neutral("Nothing here takes extra arguments.", {}),
    "repetition_detection": _refused(_NO_LOOPS),
    "max_repetition_pattern_size": _neutral(_NO_LOOPS, 0),
    "min_repetition_pattern_size": _neutral(_NO_LOOPS, 0),
    "repetition_min_count": _neutral(_NO_LOOPS, 0),
}

COMPLETION_FIELDS: dict[str, Field] = {
    **_COMMON,
    **dict.fromkeys(("prompt", "echo", "add_special_tokens"), _HONOURED),
    "suffix": _neutral("This server continues a text, it does not fill one in.", ""),
    "prompt_embeds": _refused("Prompts are text or token ids."),
}

CHAT_FIELDS: dict[str, Field] = {
    **_COMMON,
    **dict.fromkeys(
        (
            "messages",
            "max_completion_tokens",
            "top_logprobs",
            "add_generation_prompt",
            "chat_template_kwargs",
            "tools",
            "tool_choice",
            "parallel_tool_calls",
            "include_reasoning",
        ),
        _HONOURED,
    ),
    "metadata": _label(),
    "safety_identifier": _label(),
    "prompt_cache_key": Field(Use.NEUTRAL, "Prefixes are found by their tokens.", ANY),
    "prompt_cache_retention": Field(Use.NEUTRAL, "Prefixes stay while there is room.", ANY),
    "prompt_cache_options": Field(Use.NEUTRAL, "Prefixes stay while there is room.", ANY),
    "store": _neutral("This server stores nothing.", False),
    "service_tier": _neutral("There is one tier.", "auto", "default"),
    "moderation": _refused("This server does not moderate."),
    "modalities": _neutral("Only text is generated.", ["text"]),
    "audio": _refused("Only text is generated."),
    "prediction": _refused("Predicted output is not used."),
    "verbosity": _neutral("How much a model says cannot be set.", "medium"),
    "reasoning_effort": _refused("Pass what the model's template knows in chat_template_kwargs."),
    "web_search_options": _refused("This server does not search the web."),
    "functions": _neutral(_OLD_TOOLS, []),
    "function_call": _neutral(_OLD_TOOLS, "none", "auto"),
    "echo": _neutral("Use /v1/completions for echo.", False),
    "add_special_tokens": _neutral("The template places the special tokens.", False),
    "continue_final_message": _neutral("The last message is never continued.", False),
    "documents": _neutral("Documents are not passed to templates.", []),
    "chat_template": _refused("The template is the model's own."),
    "mm_processor_kwargs": _refused("Only text is read."),
    "media_io_kwargs": _refused("Only text is read."),
    "thinking_token_budget": _refused("Thoughts have no limit of their own; use max_completion_tokens."),
}

RESPONSES_FIELDS: dict[str, Field] = {
    **dict.fromkeys(
        (
            "model",
            "input",
            "instructions",
            "max_output_tokens",
            "temperature",
            "top_p",
            "top_k",
            "seed",
            "stream",
            "text",
            "tools",
            "tool_choice",
            "parallel_tool_calls",
            "priority",
            "request_id",
            "timeout_s",
        ),
        _HONOURED,
    ),
    **{
        name: CHAT_FIELDS[name]
        for name in (
            *("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
            *("prompt_cache_options", "store", "service_tier", "moderation", "cache_salt"),
            *("mm_processor_kwargs", "logits_processors", "kv_transfer_params"),
        )
    },
    "background": _neutral("An answer is sent while its client waits.", False),
    "include": _neutral("An answer holds all there is.", []),
    "stream_options": _neutral("Events are not padded.", {}, {"include_obfuscation": False}),
    "top_logprobs": _neutral("Use /v1/chat/completions for logprobs.", 0),
    "truncation": _neutral("Nothing is ever truncated; shorten the input.", "disabled"),
    **dict.fromkeys(
        ("previous_response_id", "conversation", "prompt", "background_options"),
        _refused("This server stores nothing; send the whole conversation as input."),
    ),
    "reasoning": _refused("How much a model thinks is a matter of its template."),
    "max_tool_calls": _refused("The model calls nothing by itself."),
    "context_management": _refused("Nothing is ever truncated; shorten the input."),
    "access_programs": _refused("The model calls nothing by itself."),
    "image": _refused("Only text is generated."),
}

EMBEDDING_FIELDS: dict[str, Field] = {
    "model": _HONOURED,
    "input": _HONOURED,
    "encoding_format": _neutral("No embeddings are made.", "float", "base64"),
    "dimensions": _refused("No embeddings are made."),
    "user": _label(),
}

TOKENIZE_FIELDS: dict[str, Field] = {
    **dict.fromkeys(
        (
            "model",
            "prompt",
            "messages",
            "add_special_tokens",
            "add_generation_prompt",
            "return_token_strs",
            "chat_template_kwargs",
            "tools",
        ),
        _HONOURED,
    ),
    "continue_final_message": _neutral("The last message is never continued.", False),
    "chat_template": _refused("The template is the model's own."),
    "mm_processor_kwargs": _refused("Only text is read."),
}

DETOKENIZE_FIELDS: dict[str, Field] = dict.fromkeys(("model", "tokens"), _HONOURED)


def select_fields(given: Mapping[str, Any], table: Mapping[str, Field]) -> dict[str, Any]:
    """The honoured fields of a request, nulls left out. A 400 naming the first field that is unknown, or
    whose value this server would have to ignore."""
    return dict(_selected(given, table))


def _selected(given: Mapping[str, Any], table: Mapping[str, Field]) -> Iterator[tuple[str, Any]]:
    for name, value in given.items():
        field = table.get(name)
        if field is None:
            raise _unknown(name, table)
        if value is None:
            continue
        if field.use is Use.HONOURED:
            yield name, value
        elif field.neutral is not ANY and not any(_same(value, each) for each in field.neutral):
            raise _unsupported(name, field)


def _same(value: Any, neutral: Any) -> bool:
    """Equal, and not merely as True equals 1."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _unknown(name: str, table: Mapping[str, Field]) -> ServingError:
    close = difflib.get_close_matches(name, table, n=2)
    return bad_request(
        "request.unknown_field",
        f"The request has a field {name[:100]!r}.",
        "This route knows no such field, and ignores none.",
        f"Did you mean {' or '.join(close)}?" if close else "Leave it out.",
        name[:100],
    )


def _unsupported(name: str, field: Field) -> ServingError:
    allowed = " or ".join(msgspec.json.encode(each).decode() for each in field.neutral)
    return bad_request(
        "request.unsupported_field",
        f"The field {name} is not supported as it was sent.",
        field.why,
        f"Send {allowed}, or leave it out." if allowed else "Leave it out.",
        name,
    )
