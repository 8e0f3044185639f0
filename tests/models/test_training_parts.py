"""The parts of training, each against an obvious reference."""

from __future__ import annotations

import gzip
import itertools
import lzma

import numpy as np
import pytest
import torch

from llmc.models.training import corpus, evaluate, loop, muon, network


def some_documents(rng, count):
    return [np.concatenate([[0], rng.integers(1, 99, rng.integers(3, 30))]) for _ in range(count)]


@pytest.mark.parametrize(("suffix", "opener"), [("", open), (".xz", lzma.open), (".gz", gzip.open)])
def test_documents_are_read_packed_or_plain(tmp_path, suffix, opener):
    path = tmp_path / f"text.txt{suffix}"
    with opener(path, "wt", encoding="utf-8") as file:
        file.write("One.\nTwo.\n<|endoftext|>\n\n<|endoftext|>\nThree.\n")
    assert corpus.read_documents(path) == ["One.\nTwo.", "Three."]


def test_a_text_without_documents_is_an_error(tmp_path):
    path = tmp_path / "empty.txt"
    path.write_text("<|endoftext|>\n")
    with pytest.raises(ValueError, match="holds no document"):
        corpus.read_documents(path)


def test_packing_predicts_every_token_but_the_first_once():
    encoded = some_documents(np.random.default_rng(0), 20)
    stream = np.concatenate(encoded)
    rows = corpus.pack(encoded, 16)
    targets = rows[:, 1:].ravel()
    np.testing.assert_array_equal(targets, stream[1 : 1 + len(targets)])
    assert len(stream) - 1 - len(targets) < 16


def test_packing_too_little_text_names_both_numbers():
    with pytest.raises(ValueError, match="8 tokens do not fill one row of 9"):
        corpus.pack([np.arange(8)], 8)


def test_batches_are_rows_of_the_text_and_follow_the_seed():
    encoded = some_documents(np.random.default_rng(1), 50)

    def first(seed, count):
        stream = corpus.batches(encoded, 8, 4, np.random.default_rng(seed))
        return [next(stream) for _ in range(count)]

    one, again, other = first(5, 60), first(5, 60), first(6, 60)
    assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    follows = {(a, b) for ids in encoded for a, b in itertools.pairwise(ids)}
    for row in np.concatenate(one):
        assert all(b == 0 or (a, b) in follows for a, b in itertools.pairwise(row))


def test_muon_steps_have_singular_values_near_one():
    matrix = torch.randn(24, 40, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for given in (matrix, matrix.T.contiguous()):
        found = muon.orthogonalize(given)
        assert found.shape == given.shape
        assert found.dtype == given.dtype
        values = torch.linalg.svdvals(found)
        assert values.min() > 0.5
        assert values.max() < 1.5
        assert (found * given).sum() > 0  # uphill stays uphill


def test_muon_without_a_gradient_changes_nothing():
    parameter = torch.nn.Parameter(torch.ones(3, 3))
    muon.Muon([parameter], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(parameter.data, torch.ones(3, 3))


def test_losses_match_float64():
    generator = torch.Generator().manual_seed(3)
    logits, guide = torch.randn(2, 2, 5, 11, generator=generator, dtype=torch.float64)
    targets = torch.randint(11, (2, 5), generator=generator)
    found = loop.losses(logits, targets, guide)
    p, q = guide.softmax(-1), logits.softmax(-1)
    text = -q.log().gather(-1, targets[..., None]).mean()
    teacher = (p * (p.log() - q.log())).sum(-1).mean()
    torch.testing.assert_close(found.text, text.float())
    torch.testing.assert_close(found.teacher, teacher.float())
    assert loop.losses(logits, targets, None).teacher is None


def test_the_learning_rate_warms_up_and_anneals():
    plan = loop.Plan(steps=1000, warmup_steps=10, final_lr_share=0.1)
    shares = [loop.lr_share(step, plan) for step in range(1001)]
    assert shares[0] == pytest.approx(0.1)
    assert max(shares) == pytest.approx(1.0, abs=1e-3)
    assert shares[1000] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(shares[10:]))


@pytest.mark.parametrize(("steps", "share"), [(0, 0.5), (1, 1.5)])
def test_impossible_plans_are_refused(steps, share):
    with pytest.raises(ValueError, match="must"):
        loop.Plan(steps=steps, teacher_share=share).validate()


@pytest.mark.parametrize("sizes", [{"hidden": 60, "heads": 8}, {"heads": 4, "kv_heads": 3}])
def test_impossible_shapes_are_refused(sizes):
    with pytest.raises(ValueError, match="multiple"):
        network.Shape(**sizes).validate()


def test_replay_agrees_with_speculation_step_by_step():
    """Against the plain loop, which asks the draft anew after each step."""
    rng = np.random.default_rng(4)
    for k in (1, 2, 4, 9):
        holds = (rng.random(50) < 0.6).tolist()
        position = calls = accepted = 0
        while position < len(holds):
            calls += 1
            kept = 0
            while kept < k and position < len(holds) and holds[position]:
                kept, accepted, position = kept + 1, accepted + 1, position + 1
            position += 1
        found = evaluate.replay(holds, k)
        assert (found.accepted, found.calls, found.tokens) == (accepted, calls, 50)
        assert found.accepted <= found.proposed <= found.calls * k
    assert evaluate.replay([True] * 10, 4) == evaluate.Acceptance(8, 8, 2, 10)
