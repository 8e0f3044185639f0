"""What rounding to nearest loses where a few channels stand out, and how much of it the presets get back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from llmc.compiler.bind import bind_checkpoint
from llmc.compiler.checkpoint import open_checkpoint
from llmc.compiler.trace import trace_config
from llmc.passes.base import PassContext
from llmc.passes.calibration import Calibration
from llmc.passes.manager import run_passes
from llmc.passes.pipeline import canonicalise, fuse, round_both_to_int8, round_calibrated
from llmc.passes.probe import logits_of
from llmc.passes.quantize.round_inputs import RoundInputs
from llmc.passes.quantize.rtn import Rtn
from llmc.passes.quantize.smooth import fold_factors, foldable_sites

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]
MODEL = ROOT / "models" / "stories-1m"
SHARE, FACTOR = 0.01, 30.0


def planted(program):
    """The same function, one channel in a hundred behind each norm `FACTOR` times larger."""
    draw = torch.Generator().manual_seed(0)
    changed = {}
    sites, _ = foldable_sites(program.graph, program)
    for site in sites:
        if "norm" not in site.folds[0].name:
            continue
        width = program.weights[site.folds[0].name].shape[0]
        factors = torch.ones(width)
        factors[torch.randperm(width, generator=draw)[: max(1, round(width * SHARE))]] = 1 / FACTOR
        fold_factors(program, site, factors, changed)
    assert len(changed) == 8
    return program.replace(weights=program.weights.with_entries(changed))


@pytest.fixture(scope="module")
def model():
    checkpoint = open_checkpoint(MODEL)
    program = bind_checkpoint(trace_config(checkpoint.config, dtype=torch.float32), checkpoint)
    return run_passes(program, (*canonicalise(), *fuse()), PassContext())


@pytest.fixture(scope="module")
def text():
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    stories = (ROOT / "tests" / "data" / "stories-heldout.txt").read_text().split("<|endoftext|>")
    encoded = [tuple(tokenizer.encode(story.strip()).ids[:256]) for story in stories]
    ids = [entry for entry in encoded if len(entry) > 32]
    return ids[: len(ids) // 2][:40], ids[len(ids) // 2 :][:24]


def logprobs(program, sequences):
    return torch.log_softmax(logits_of(program, sequences).double(), -1)


def losses(program, sequences, exact):
    """How much likelier the text was before, and the mean divergence."""
    found = logprobs(program, sequences)
    following = torch.tensor([token for ids in sequences for token in (*ids[1:], -1)])
    known = following >= 0
    chosen = [part[known].gather(1, following[known][:, None]).mean() for part in (exact, found)]
    return float(chosen[0] - chosen[1]), float((exact.exp() * (exact - found)).sum(-1).mean())


@pytest.mark.parametrize(
    ("nearest", "preset"),
    [
        ((Rtn(bits=4, group_size=32),), round_calibrated(4, 32, growth=0.03)),
        ((Rtn(bits=8, group_size=0), RoundInputs(scheme="int8_token")), round_both_to_int8()),
    ],
    ids=["int4", "w8a8"],
)
def test_presets_recover_what_outliers_cost(model, text, tmp_path, nearest, preset):
    program = planted(model)
    exact = logprobs(model, text[1])
    assert losses(program, text[1], exact)[1] < 1e-7
    calibration = Calibration(sequences=tuple(text[0]), source="held-out text", folder=tmp_path)
    lost = losses(run_passes(program, nearest, PassContext()), text[1], exact)
    plain = losses(run_passes(model, nearest, PassContext()), text[1], exact)
    assert lost[1] > 1.5 * plain[1]
    left = losses(run_passes(program, preset, PassContext(calibration=calibration)), text[1], exact)
    assert left[0] < 0.2 * lost[0]
    assert left[1] < 0.2 * lost[1]
