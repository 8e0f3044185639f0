"""Statistics of two models on text: against plain formulas, and intervals that hold what they should."""

from __future__ import annotations

import math

import pytest
import torch

from llmc.compiler.evaluate import cut_windows
from llmc.compiler.judgement import judge_tokens, token_values


def logits(tokens, vocab, seed):
    return torch.randn(tokens, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def test_values_are_those_of_the_formulas():
    ids = [3, 1, 4, 1, 5, 9, 2, 6]
    own, reference = logits(8, 10, 0), logits(8, 10, 1)
    values = token_values(own, ids, reference, 2)
    p, q = torch.softmax(reference.double(), -1), torch.softmax(own.double(), -1)
    divergence = (p * (p / q).log()).sum(-1)[2:]
    assert torch.allclose(values.divergence, divergence)
    assert torch.allclose(values.nll[:-1], torch.stack([-q[i, ids[i + 1]].log() for i in range(2, 7)]))
    assert math.isnan(values.nll[-1])
    assert values.same_top.tolist() == (p.argmax(-1) == q.argmax(-1))[2:].tolist()


def test_a_model_is_no_distance_from_itself():
    windows = [token_values(logits(20, 7, seed), [1] * 20, logits(20, 7, seed), 0) for seed in range(5)]
    found = judge_tokens(windows)
    assert found.kl_mean.value == 0
    assert found.same_top == (1, 1, 1)
    assert found.perplexity_ratio == pytest.approx((1, 1, 1))
    assert found.greedy_match == 20
    assert found.tokens == 100


def test_intervals_hold_the_mean_and_shrink_with_more_windows():
    def width(count):
        windows = [token_values(logits(30, 7, s), [2] * 30, logits(30, 7, s + 999), 0) for s in range(count)]
        found = judge_tokens(windows)
        for entry in (found.perplexity, found.kl_mean, found.same_top, found.perplexity_ratio):
            assert entry.low <= entry.value <= entry.high
        return found.kl_mean.high - found.kl_mean.low

    assert width(200) < 0.5 * width(12)


def test_without_a_reference_there_is_perplexity_alone():
    found = judge_tokens([token_values(torch.zeros(9, 16), [0] * 9, None, 0)]).as_dict()
    assert found["perplexity"] == pytest.approx(16)
    assert "kl_mean" not in found


@pytest.mark.parametrize("window", [2, 5, 64])
@pytest.mark.parametrize("stride", [None, 1, 2])
@pytest.mark.parametrize("length", [2, 3, 5, 17])
def test_windows_count_every_token_that_follows_another_once(window, stride, length):
    if stride is not None and stride > window:
        pytest.skip("strides are no longer than windows")
    ids = tuple(range(length))
    counted = []
    for part in cut_windows(ids, window, stride):
        assert len(part.token_ids) <= window
        counted += [part.token_ids[i + 1] for i in range(part.first_counted, len(part.token_ids) - 1)]
    assert len(counted) == len(set(counted))
    if stride is not None and stride < window:
        assert counted == list(range(1, length))
