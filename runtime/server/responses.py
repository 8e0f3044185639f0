"""The bodies that the routes answer with, in OpenAI's shapes. Knows no engine."""

from __future__ import annotations

from typing import Literal

import msgspec

from ..params import SamplingParams

Finish = Literal["stop", "length"]
ChatFinish = Literal["stop", "length", "tool_calls"]


class PromptTokensDetails(msgspec.Struct, frozen=True, kw_only=True):
    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct, frozen=True, kw_only=True):
    """Of the tokens that were drafted for the completions, those that are in them and those that are not."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of all prompts, each counted once, and of all completions. `completion_tokens_details` come with
    an engine that speculates."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | msgspec.UnsetType = msgspec.UNSET


class CompletionLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """The legacy shape: lists over tokens. The first token of an echoed prompt has neither value."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    """`stop_reason` is the stop string or token id that was met."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Finish | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class CompletionResponse(msgspec.Struct, frozen=True, kw_only=True):
    """A completion, or one chunk of its stream. `sampling` are the parameters in effect, in the whole and in
    the first chunk."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    sampling: SamplingParams | msgspec.UnsetType = msgspec.UNSET
    object: Literal["text_completion"] = "text_completion"


class TopLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """`bytes` is null for a token that is only a part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(msgspec.Struct, frozen=True, kw_only=True):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    content: list[ChatTokenLogprob]
    refusal: None = None


class CalledFunction(msgspec.Struct, frozen=True, kw_only=True):
    """`arguments` are JSON as text, as the model wrote it."""

    name: str
    arguments: str


class CallMade(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    function: CalledFunction
    type: Literal["function"] = "function"


class AssistantMessage(msgspec.Struct, frozen=True, kw_only=True):
    """`content` is null where the model only made calls."""

    content: str | None
    refusal: None = None
    role: Literal["assistant"] = "assistant"
    tool_calls: list[CallMade] | msgspec.UnsetType = msgspec.UNSET
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET


class FunctionDelta(msgspec.Struct, frozen=True, kw_only=True):
    name: str | msgspec.UnsetType = msgspec.UNSET
    arguments: str = ""


class CallDelta(msgspec.Struct, frozen=True, kw_only=True):
    """The first of a call has its id, type and name."""

    index: int
    function: FunctionDelta
    id: str | msgspec.UnsetType = msgspec.UNSET
    type: Literal["function"] | msgspec.UnsetType = msgspec.UNSET


class Delta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The first of a choice has the role."""

    role: Literal["assistant"] | msgspec.UnsetType = msgspec.UNSET
    content: str | msgspec.UnsetType = msgspec.UNSET
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    tool_calls: list[CallDelta] | msgspec.UnsetType = msgspec.UNSET


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    message: AssistantMessage
    finish_reason: ChatFinish
    logprobs: ChatLogprobs | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None


class ChatDeltaChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    delta: Delta
    finish_reason: ChatFinish | None = None
    logprobs: ChatLogprobs | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None


class ChatResponse(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    sampling: SamplingParams
    prompt_token_ids: list[int] | None = None
    object: Literal["chat.completion"] = "chat.completion"


class ChatChunk(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    created: int
    model: str
    choices: list[ChatDeltaChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    sampling: SamplingParams | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """`root` is the model's own name where `id` is an alias."""

    id: str
    created: int
    max_model_len: int
    root: str
    owned_by: str = "llmc"
    object: Literal["model"] = "model"


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    data: list[ModelCard]
    object: Literal["list"] = "list"


class TokenizeResponse(msgspec.Struct, frozen=True, kw_only=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeResponse(msgspec.Struct, frozen=True, kw_only=True):
    prompt: str


class HealthResponse(msgspec.Struct, frozen=True, kw_only=True):
    """`why` explains what is not ok, or was not."""

    status: Literal["ok", "starting", "draining", "failed"]
    why: str | None = None
