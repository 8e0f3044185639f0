"""How `llmc generate` runs prompts through a loaded model and shows what comes out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..spec.errors import InternalError
from .output import Output

if TYPE_CHECKING:
    from ..runtime.llm import LLM
    from ..runtime.outputs import GenerationOutput
    from ..runtime.params import SamplingParams


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A loaded model and how long loading took."""

    llm: LLM
    load_s: float


@contextmanager
def open_model(artifact: Path, draft: Path | None = None) -> Generator[OpenedModel]:
    """The model at `artifact`, with its draft model if any, closed when the block ends."""
    from ..runtime.load import load

    started = time.perf_counter()
    with load(artifact, draft=draft) as llm:
        yield OpenedModel(llm, time.perf_counter() - started)


def generate_all(
    output: Output, opened: OpenedModel, texts: Sequence[str], params: SamplingParams, *, chat: bool
) -> None:
    """Run all prompts together and print them when all are done."""
    llm = opened.llm
    prompts = [prompt_of(llm, text, chat=chat) for text in texts]
    results = llm.generate(prompts, params)
    for result in results:
        if result.completions[0].error is not None:
            raise failed(result.completions[0].error)
    records = [_record(opened, result) for result in results]
    if len(records) == 1:
        output.result(records[0], results[0].text)
        return
    shown = [f"== {text}\n{result.text}" for text, result in zip(texts, results, strict=True)]
    common = {"load_s": opened.load_s, "executor": llm.executor_name}
    output.result({"results": records, **common}, "\n".join(shown))


def generate_streaming(
    output: Output, opened: OpenedModel, text: str, params: SamplingParams, *, chat: bool
) -> None:
    """Print the text of one prompt as it comes; the prompt itself goes before it unless `chat` or quiet."""
    prompt = prompt_of(opened.llm, text, chat=chat)
    if not chat and not output.quiet:
        click.echo(text, nl=False)
    asyncio.run(_stream(opened.llm, prompt, params))
    click.echo()


async def _stream(llm: LLM, prompt: Any, params: SamplingParams) -> None:
    async for chunk in llm.stream(prompt, params):
        click.echo(chunk.text, nl=False)
        if chunk.error is not None:
            raise failed(chunk.error)


def prompt_of(llm: LLM, text: str, *, chat: bool) -> Any:
    """What the model is given: the text, or the ids of a conversation that it begins."""
    return llm.encode_chat([{"role": "user", "content": text}]) if chat else text


def failed(reason: str) -> InternalError:
    """The error for a request that the engine gave up."""
    return InternalError(
        "generate.failed",
        "The generation ended with an error.",
        f"{reason}",
        "Check the artifact with `llmc verify`.",
    )


def _record(opened: OpenedModel, result: GenerationOutput) -> dict[str, Any]:
    return {
        "prompt_token_ids": list(result.prompt_token_ids),
        "token_ids": list(result.token_ids),
        "text": result.text,
        "finish_reason": result.finish_reason.value,
        "ttft_s": result.ttft_s,
        "tpot_s": result.tpot_s,
        "load_s": opened.load_s,
        "executor": opened.llm.executor_name,
        **_acceptance(opened.llm),
    }


def _acceptance(llm: LLM) -> dict[str, Any]:
    """Drafts verified and accepted by place, since the model was loaded; nothing without speculation."""
    stats = llm.engine.stats
    if llm.engine.config.speculation == "none":
        return {}
    return {"drafted_at": list(stats.drafted_at), "accepted_at": list(stats.accepted_at)}
