"""What 8-bit caches, floats and integers cost on a bundled model, on text that it has not seen."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from llmc.compiler.bind import bind_checkpoint
from llmc.compiler.checkpoint import open_checkpoint
from llmc.compiler.trace import trace_config
from llmc.passes.base import PassContext
from llmc.passes.calibration import Calibration
from llmc.passes.kv_layout import KvLayout
from llmc.passes.manager import run_passes
from llmc.passes.paged_attention import PagedAttention
from llmc.passes.pipeline import canonicalise, fuse, round_both_to_int8, round_to_fp8
from llmc.passes.probe import logits_of

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]
MODEL = ROOT / "models" / "stories-1m"


def token_ids():
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    stories = (ROOT / "tests" / "data" / "stories-heldout.txt").read_text().split("<|endoftext|>")
    encoded = [tuple(tokenizer.encode(story.strip()).ids[:256]) for story in stories]
    return [ids for ids in encoded if len(ids) > 32]


@pytest.fixture(scope="module")
def model():
    checkpoint = open_checkpoint(MODEL)
    program = bind_checkpoint(trace_config(checkpoint.config, dtype=torch.float32), checkpoint)
    return run_passes(program, (*canonicalise(), *fuse()), PassContext())


@pytest.fixture(scope="module")
def text():
    ids = token_ids()
    return ids[: len(ids) // 2][:40], ids[len(ids) // 2 :][:40]


def nll(program, sequences):
    total, count = 0.0, 0
    for start in range(0, len(sequences), 8):
        batch = sequences[start : start + 8]
        logits = logits_of(program, batch).split([len(ids) for ids in batch])
        for ids, rows in zip(batch, logits, strict=True):
            chosen = torch.log_softmax(rows[:-1].double(), -1).gather(1, torch.tensor(ids[1:])[:, None])
            total, count = total - float(chosen.sum()), count + len(chosen)
    return total / count


@pytest.fixture(scope="module")
def reference(model, text):
    return nll(model, text[1])


@pytest.mark.parametrize(("dtype", "bar"), [("int8", 1.002), ("fp8", 1.005)])
def test_caches(model, text, reference, dtype, bar):
    done = run_passes(model, (KvLayout(dtype=dtype), PagedAttention()), PassContext())
    assert 0 < abs(nll(done, text[1]) - reference) < math.log(bar)


@pytest.mark.parametrize(("passes", "bar"), [(round_to_fp8, 1.010), (round_both_to_int8, 1.02)])
def test_weights_and_inputs(model, text, reference, passes, bar):
    calibration = Calibration(sequences=tuple(text[0]), source="held-out text", folder=Path("unused"))
    done = run_passes(model, passes(), PassContext(calibration=calibration))
    assert 0 < abs(nll(done, text[1]) - reference) < math.log(bar)
