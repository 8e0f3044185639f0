"""Shared means of the runtime tests: requests, and an engine driven until all of them ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from llmc.runtime.chat import ChatTemplate
from llmc.runtime.engine import Engine
from llmc.runtime.protocol import SamplingState
from llmc.runtime.request import FinishedRequest, Request
from llmc.runtime.tokenizer import GenerationDefaults, Tokenizer


def make_request(
    request_id: int,
    prompt: Sequence[int],
    max_tokens: int = 12,
    sampling: SamplingState | None = None,
    **fields: object,
) -> Request:
    return Request(
        request_id=request_id,
        prompt_token_ids=tuple(prompt),
        max_tokens=max_tokens,
        sampling=sampling or SamplingState(),
        **fields,
    )


def drain(engine: Engine, max_steps: int = 5000) -> dict[int, FinishedRequest]:
    """Steps until nothing is left. Every request must end exactly once, and its tokens must be those
    that were told on the way."""
    ended: dict[int, FinishedRequest] = {}
    told: dict[int, list[int]] = {}
    for _ in range(max_steps):
        if not engine.has_work():
            break
        for output in engine.step():
            assert output.request_id not in ended, "a request said something after its ending"
            told.setdefault(output.request_id, []).extend(output.token_ids)
            if output.finished is not None:
                ended[output.request_id] = output.finished
    assert not engine.has_work()
    for request_id, finished in ended.items():
        assert (
            finished.output_token_ids[-len(told[request_id]) :] == tuple(told[request_id])
            or not told[request_id]
        )
    engine.blocks.check()
    assert engine.blocks.used() == [0] * len(engine.blocks.groups)
    assert engine.blocks.available() == list(engine._executor.caps.num_blocks)
    return ended


def make_letters(template: str | None = None) -> Tokenizer:
    """Ids 0 to 27 are a to z, space and newline; 28 ends a text."""
    symbols = [*"abcdefghijklmnopqrstuvwxyz", "Ġ", "Ċ"]
    backend = tokenizers.Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(symbols)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<eos>"])
    chat = ChatTemplate(template, {}) if template else None
    return Tokenizer(backend, {"eos_token": "<eos>"}, GenerationDefaults(eos_token_ids=(28,)), chat)


@pytest.fixture(scope="session")
def letters() -> Callable[..., Tokenizer]:
    return make_letters


@pytest.fixture
def request_of() -> Callable[..., Request]:
    return make_request


@pytest.fixture
def drained() -> Callable[..., dict[int, FinishedRequest]]:
    return drain
