"""What a request wants from the engine, worked out before anything is queued: prompts as token ids, and the
sampling parameters in effect. Pure but for the seed it is handed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from ..params import SamplingParams
from .codec import Codec
from .config import ServerConfig
from .errors import bad_request
from .requests import ChatRequest, CompletionRequest, GenerationFields
from .speech import SHOWS_SPECIAL, THINK, SpeechStyle
from .structure import structure_of
from .tools import ToolUse, tool_use

DEFAULT_COMPLETION_TOKENS = 16
MAX_DRAWN_SEED = 2**53 - 1  # every JSON reader holds these exactly

_DIRECT = (
    "temperature",
    "top_p",
    "min_p",
    "n",
    "seed",
    "min_tokens",
    "ignore_eos",
    "skip_special_tokens",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """`prompts[i]` is generated with `params[i]`. Choice number i * n + j is completion j of prompt i.
    `hides_output`: one token is computed for the sake of the prompt's logprobs, and not shown. `style` is
    how the answer is read. `seed_is_drawn`: the request brought no seed."""

    prompts: tuple[tuple[int, ...], ...]
    params: tuple[SamplingParams, ...]
    priority: int = 0
    timeout_s: float | None = None
    hides_output: bool = False
    style: SpeechStyle = field(default_factory=SpeechStyle)
    seed_is_drawn: bool = False

    @property
    def n(self) -> int:
        return self.params[0].n

    @property
    def num_sequences(self) -> int:
        return len(self.prompts) * self.n


def split_prompts(prompt: str | Sequence[str | int | list[int]]) -> list[str | list[int]]:
    """The prompts of a request, whichever of the four forms they came in. A 400 for a mixture or none."""
    if isinstance(prompt, str):
        return [prompt]
    kinds = {type(each) for each in prompt}
    if kinds == {int}:
        return [cast("list[int]", list(prompt))]
    if kinds in ({str}, {list}):
        return cast("list[str | list[int]]", list(prompt))
    raise bad_request(
        "request.prompt",
        "The prompt is an empty list." if not kinds else "The prompt mixes texts, token ids or lists.",
        "A prompt is a text, a list of texts, a list of token ids, or a list of such lists.",
        "Send one of these.",
        "prompt",
    )


def count_sequences(request: GenerationFields, num_prompts: int, config: ServerConfig) -> int:
    """Prompts times completions, known before any tokenising. A 400 beyond the bound."""
    count = num_prompts * (request.n or 1)
    if count > config.max_sequences:
        raise bad_request(
            "request.too_many_sequences",
            f"The request asks for {count} sequences: {num_prompts} prompts, {request.n or 1} each.",
            f"This server takes at most {config.max_sequences} in one request.",
            "Send several smaller requests.",
            "n",
        )
    return count


def plan_completion(
    request: CompletionRequest,
    codec: Codec,
    defaults: SamplingParams,
    config: ServerConfig,
    draw_seed: Callable[[], int],
) -> Plan:
    """Prompts and parameters of /v1/completions. RequestError or a 400 for what cannot be served."""
    prompts = [
        codec.encode(prompt, request.add_special_tokens)
        if isinstance(prompt, str)
        else codec.check_ids(prompt)
        for prompt in split_prompts(request.prompt)
    ]
    hides_output = request.echo and request.max_tokens == 0
    common = replace(
        _common(request, defaults),
        logprobs=request.logprobs,
        prompt_logprobs=request.echo and request.logprobs is not None,
    )
    if hides_output:
        common = replace(common, min_tokens=0)
    given = 1 if hides_output else request.max_tokens
    return _plan(
        request, prompts, common, given, DEFAULT_COMPLETION_TOKENS, codec, config, draw_seed, hides_output
    )


def plan_chat(
    request: ChatRequest,
    codec: Codec,
    defaults: SamplingParams,
    config: ServerConfig,
    draw_seed: Callable[[], int],
) -> Plan:
    """The conversation and the parameters of /v1/chat/completions. RequestError or a 400."""
    use = tool_use(request, codec.dialect)
    chat = codec.encode_chat(
        request.messages, request.add_generation_prompt, request.chat_template_kwargs, use.shown
    )
    if request.top_logprobs is not None and not request.logprobs:
        raise bad_request(
            "request.top_logprobs",
            "top_logprobs is given and logprobs is not true.",
            "Alternatives come with the logprobs of tokens.",
            "Set logprobs to true, or leave top_logprobs out.",
            "top_logprobs",
        )
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    common = replace(_common(request, defaults), logprobs=logprobs)
    common, style = _held(common, use, chat.text)
    given = request.max_completion_tokens
    if given is None:
        given = request.max_tokens
    elif request.max_tokens not in (None, given):
        raise bad_request(
            "request.max_completion_tokens",
            f"max_completion_tokens is {given} and max_tokens is {request.max_tokens}.",
            "They are two names of one limit.",
            "Send one of them.",
            "max_completion_tokens",
        )
    made = _plan(request, [chat.token_ids], common, given, None, codec, config, draw_seed, False)
    return replace(made, style=style)


def _held(common: SamplingParams, use: ToolUse, prompt: str) -> tuple[SamplingParams, SpeechStyle]:
    """The parameters with what the tools demand, and how to read what comes. A form leaves no room for
    thoughts. A 400 for a form besides tools that the model may call."""
    style = use.style
    if common.structured is not None and style.tools:
        raise bad_request(
            "request.tools",
            "The request has tools and a form that the output must have.",
            "A call has a form of its own.",
            "Send tools or a form, or set tool_choice to none.",
            "tools",
        )
    if use.structure is not None:
        return replace(common, structured=use.structure), style
    if common.structured is not None:
        return common, SpeechStyle()
    if style.thinks and prompt.rstrip().endswith(THINK):
        style = replace(style, starts_thinking=True)
    if style.tool_format in SHOWS_SPECIAL:
        common = replace(common, skip_special_tokens=False)
    return common, style


def _common(request: GenerationFields, defaults: SamplingParams) -> SamplingParams:
    """The model's defaults with what was asked for. RequestError naming a value out of its range."""
    given: dict[str, Any] = {
        name: getattr(request, name) for name in _DIRECT if getattr(request, name) is not None
    }
    if request.top_k is not None:
        given["top_k"] = max(request.top_k, 0)
    if request.stop is not None:
        given["stop"] = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop)
    if request.stop_token_ids is not None:
        given["stop_token_ids"] = tuple(request.stop_token_ids)
    if request.logit_bias is not None:
        given["logit_bias"] = {_bias_id(name): bias for name, bias in request.logit_bias.items()}
    given["structured"] = structure_of(request)
    return replace(defaults, max_tokens=None, **given)


def _bias_id(name: str) -> int:
    if name.isascii() and name.isdigit() and len(name) < 20:
        return int(name)
    raise bad_request(
        "request.logit_bias",
        f"logit_bias has the key {name[:40]!r}.",
        "Its keys are token ids in decimal digits.",
        "Correct it.",
        "logit_bias",
    )


def _plan(
    request: GenerationFields,
    prompts: Sequence[tuple[int, ...]],
    common: SamplingParams,
    given: int | None,
    default: int | None,
    codec: Codec,
    config: ServerConfig,
    draw_seed: Callable[[], int],
    hides_output: bool,
) -> Plan:
    """One set of parameters per prompt: `max_tokens` filled in, and a seed where none was given (the drawn
    one for the first prompt, the next number for each further one)."""
    drawn = draw_seed() if common.seed is None else None
    params: list[SamplingParams] = []
    for index, prompt in enumerate(prompts):
        room = codec.limits.max_model_len - len(prompt)
        max_tokens = given if given is not None else room if default is None else min(default, room)
        _check_size(prompt, max_tokens, room, codec, config)
        seed = common.seed if drawn is None else (drawn + index) & MAX_DRAWN_SEED
        params.append(replace(common, max_tokens=max_tokens, seed=seed))
    _check_output(params, config)
    return Plan(
        prompts=tuple(prompts),
        params=tuple(params),
        priority=request.priority,
        timeout_s=request.timeout_s,
        hides_output=hides_output,
        seed_is_drawn=drawn is not None,
    )


def _check_size(
    prompt: tuple[int, ...], max_tokens: int, room: int, codec: Codec, config: ServerConfig
) -> None:
    if config.max_prompt_tokens is not None and len(prompt) > config.max_prompt_tokens:
        raise bad_request(
            "request.prompt_too_long",
            f"The prompt has {len(prompt)} tokens, and this server takes {config.max_prompt_tokens}.",
            "Its operator has set that limit.",
            "Shorten the prompt.",
            "prompt",
        )
    if max_tokens > room:
        raise bad_request(
            "request.max_tokens",
            f"max_tokens is {max_tokens} behind a prompt of {len(prompt)} tokens.",
            f"Together they exceed the context of {codec.limits.max_model_len} tokens.",
            f"Ask for at most {room} tokens, or leave it out.",
            "max_tokens",
        )


def _check_output(params: Sequence[SamplingParams], config: ServerConfig) -> None:
    total = sum((each.max_tokens or 0) * each.n for each in params)
    if config.max_output_tokens is not None and total > config.max_output_tokens:
        raise bad_request(
            "request.output_too_long",
            f"The request may generate {total} tokens over all its completions.",
            f"This server generates at most {config.max_output_tokens} for one request.",
            "Lower max_tokens, n, or the number of prompts.",
            "max_tokens",
        )
