"""Ropes are found by what they compute, in every form and layout; what is almost a rope is left alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llmc.ir.ops.rope import STYLES, rotate
from llmc.passes.canonical import canonical_passes
from llmc.passes.graph import calls
from llmc.spec.model import AttentionSpec

HEADS, HEAD_DIM, WIDTH = 2, 12, 16


def tables(positions, inv_freq):
    angles = positions.float()[:, None] * inv_freq
    return angles.cos(), angles.sin()


class Sketch(nn.Module):
    """Embeds, projects, rotates q and k by `turn(x[T, H, D], positions, inv_freq)`, attends, projects."""

    def __init__(self, turn, frequencies=HEAD_DIM // 2, finish=None, heads_first=False):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(16, WIDTH))
        self.projections = nn.ModuleList(nn.Linear(WIDTH, HEADS * HEAD_DIM) for _ in range(3))
        self.out = nn.Linear(HEADS * HEAD_DIM, 16)
        inv_freq = 1.0 / 100.0 ** (torch.arange(frequencies) / frequencies)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.turn, self.finish, self.heads_first = turn, finish or (lambda x, _: x), heads_first

    def rotated(self, x, positions):
        if not self.heads_first:
            return self.finish(self.turn(x, positions, self.inv_freq), positions)
        turned = self.turn(x.transpose(0, 1), positions, self.inv_freq)
        return self.finish(turned, positions).transpose(0, 1)

    def forward(self, input_ids, positions, out_rows):
        x = torch.nn.functional.embedding(input_ids, self.table)
        q, k, v = (one(x).reshape(-1, HEADS, HEAD_DIM) for one in self.projections)
        q, k = self.rotated(q, positions), self.rotated(k, positions)
        y = torch.ops.llmc.attention(q, k, v, positions, None, 0, 0, 0.3, 0, 0.0, 0)
        return self.out(y.flatten(1))[out_rows]


ATTENTION = (
    AttentionSpec(
        layer=0, num_heads=HEADS, num_kv_heads=HEADS, qk_dim=HEAD_DIM, v_dim=HEAD_DIM, scale=0.3, kv_source=0
    ),
)


def rotation(style, scale=1.0, tail=False, sign=1.0):
    def turn(x, positions, inv_freq):
        cos, sin = (scale * part[:, None] for part in tables(positions, inv_freq))
        width = 2 * inv_freq.shape[0]
        if width == x.shape[-1]:
            return rotate(x, cos, sign * sin, style)
        if tail:
            return torch.cat([x[..., :-width], rotate(x[..., -width:], cos, sign * sin, style)], -1)
        return torch.cat([rotate(x[..., :width], cos, sign * sin, style), x[..., width:]], -1)

    return turn


def ropes(program):
    return calls(program.graph, torch.ops.llmc.rope.default)


@pytest.fixture
def canonical(export, apply, closeness):
    def run(sketch, max_context=4096):
        traced = export(sketch, ATTENTION, max_context)
        result = apply(traced, *canonical_passes())
        assert closeness(traced, result) <= 1e-5
        return result

    return run


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("frequencies", "tail"), [(6, False), (4, False), (4, True), (1, False)])
@pytest.mark.parametrize("scale", [1.0, 1.1386])
def test_every_form_is_told_by_its_values(canonical, style, frequencies, tail, scale):
    found = ropes(canonical(Sketch(rotation(style, scale, tail), frequencies)))
    assert len(found) == 2
    for node in found:
        if frequencies == 1:  # one pair: the styles are the same function
            assert node.args[3] == scale
            assert node.args[5] == tail
        else:
            assert node.args[3:] == (scale, style, tail)
        assert str(node.args[2].target) == "inv_freq"


def test_rotation_the_other_way_negates_the_frequencies(canonical):
    result = canonical(Sketch(rotation("half", sign=-1.0)))
    assert len(ropes(result)) == 2
    name = str(ropes(result)[0].args[2].target)
    assert (result.weights.evaluate(name) < 0).all()


def test_heads_before_tokens_need_no_permutation(canonical):
    def turn(x_HTD, positions, inv_freq):
        cos, sin = tables(positions, inv_freq)
        return rotate(x_HTD, cos[None], sin[None], "half")

    result = canonical(Sketch(turn, heads_first=True))
    assert len(ropes(result)) == 2
    assert not calls(result.graph, torch.ops.aten.permute.default)


def test_complex_rotation_is_interleaved(canonical):
    def unit(positions, inv_freq):
        angles = positions.float()[:, None] * inv_freq
        return torch.ones_like(angles), angles

    def complex_turn(x, positions, inv_freq):
        turns = torch.polar(*unit(positions, inv_freq))
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turns[:, None]).flatten(2)

    assert [node.args[4] for node in ropes(canonical(Sketch(complex_turn)))] == ["interleaved"] * 2


def test_no_rope_means_no_rope(canonical):
    result = canonical(Sketch(lambda x, positions, inv_freq: x))
    assert not ropes(result)
    assert not [record.misses for record in result.history if record.name == "rope" and record.misses]


def test_a_norm_after_the_rope_stays_after_it(canonical):
    result = canonical(
        Sketch(
            rotation("half"),
            finish=lambda x, _: torch.ops.llmc.rms_norm(x, None, 1e-6, 0.0, "scale_then_cast"),
        )
    )
    (first, _) = ropes(result)
    assert [user.target for user in first.users] == [torch.ops.llmc.rms_norm.default]


def test_a_clamp_that_random_data_never_meets_is_kept(canonical):
    def clamped(x, positions, inv_freq):
        return rotation("half")(x.clamp(-50.0, 50.0), positions, inv_freq)

    result = canonical(Sketch(clamped))
    assert len(ropes(result)) == 2
    assert len(calls(result.graph, torch.ops.aten.clamp.default)) == 2


def test_scaling_by_position_stays_outside(canonical):
    def scaled(x, positions):
        return x * (1 + 0.1 * torch.log1p(torch.floor(positions / 8.0)))[:, None, None]

    result = canonical(Sketch(rotation("half"), finish=scaled))
    assert len(ropes(result)) == 2
    assert len(calls(result.graph, torch.ops.aten.floor.default)) == 1


def almost_half(x, positions, inv_freq):
    cos, sin = (part[:, None] for part in tables(positions, inv_freq))
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + 0.999 * first * sin], -1)


def switching(x, positions, inv_freq):
    far = torch.where(positions[:, None] > 1000, 0.5, 1.0)
    angles = positions.float()[:, None] * inv_freq * far
    return rotate(x, angles.cos()[:, None], angles.sin()[:, None], "half")


def shifted(x, positions, inv_freq):
    return rotation("half")(x, positions + 2, inv_freq)


@pytest.mark.parametrize("turn", [almost_half, switching, shifted])
def test_what_is_almost_a_rope_is_left_alone_with_a_reason(canonical, turn):
    result = canonical(Sketch(turn))
    assert not ropes(result)
    (record,) = [record for record in result.history if record.name == "rope"]
    assert len(record.misses) == 2
    assert "q of layer 0" in record.misses[0]
    assert "k of layer 0" in record.misses[1]


def test_the_report_says_which_rope_was_found(canonical):
    result = canonical(Sketch(rotation("interleaved", 2.0, tail=True), 4))
    (record,) = [record for record in result.history if record.name == "rope"]
    (decision,) = record.decisions
    assert decision.subject == "2 of q and k, first q of layer 0"
    assert decision.choice == "interleaved tail, scale 2, inv_freq"
