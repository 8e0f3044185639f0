"""The reference executor on the bundled models computes what transformers computes, in float32."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmc.runtime.config import RuntimeConfig
from llmc.runtime.engine import Engine
from llmc.runtime.executors.reference import make_executor, source_of_program
from llmc.runtime.oracle import measure_prompts
from llmc.runtime.protocol import SamplingState
from llmc.runtime.tokenizer import Tokenizer

CONFIG = RuntimeConfig(max_requests=4, max_step_tokens=128, num_threads=1)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small products are done before a second thread has woken up on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["stories_1m", "stories_7m"])
def pair(request, build_llama):
    """The folder, our program and transformers' model."""
    folder = request.getfixturevalue(request.param)
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return folder, source_of_program(build_llama(folder)), hf


def prompts_of(folder, stories, num_tokens):
    encode = Tokenizer.from_folder(folder).encode
    return [encode(story)[:num_tokens] for story in stories[:3]]


def test_teacher_forced_logprobs_agree(pair, heldout_stories):
    folder, source, hf = pair
    prompts = prompts_of(folder, heldout_stories, 90)
    for prompt, measured in zip(
        prompts, measure_prompts(make_executor(source, CONFIG), prompts), strict=True
    ):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            logprobs = hf(ids).logits[0].double().log_softmax(-1)
        expected = logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0]
        assert torch.allclose(torch.tensor(measured.logprobs).double(), expected, atol=2e-4)
        top = logprobs[:-1].topk(2, -1)
        assert torch.allclose(
            torch.tensor(measured.margins).double(), top.values[:, 0] - top.values[:, 1], atol=4e-4
        )


def test_greedy_tokens_agree(pair, heldout_stories, request_of, drained):
    folder, source, hf = pair
    prompts = prompts_of(folder, heldout_stories, 12)
    engine = Engine(make_executor(source, CONFIG), CONFIG)
    for number, prompt in enumerate(prompts):
        engine.add_request(request_of(number, prompt, 64, SamplingState()))
    ended = drained(engine)
    for number, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None}
        expected = hf.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert list(ended[number].output_token_ids) == expected[0, len(prompt) :].tolist()
