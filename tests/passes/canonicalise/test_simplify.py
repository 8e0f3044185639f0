"""Simplified views compute the same, in few forms, and undone permutations are gone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llmc.ir.printer import print_program
from llmc.passes.drop_batch import DropBatch
from llmc.passes.merge_common import MergeCommon
from llmc.passes.rewrite import operator_of
from llmc.passes.simplify import Simplify

HEADS, HEAD_DIM = 2, 6
WIDTH = HEADS * HEAD_DIM
VIEWS = ["reshape", "reshape"]


class Sketch(nn.Module):
    """Embeds to `x[T, 12]`, applies `body` to give `[T, 12]`, projects the wanted rows."""

    def __init__(self, body):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(16, WIDTH))
        self.scale = nn.Parameter(torch.randn(HEAD_DIM))
        self.head = nn.Linear(WIDTH, 16)
        self.body = body

    def forward(self, input_ids, positions, out_rows):
        x = nn.functional.embedding(input_ids, self.table)
        return self.head(self.body(self, x, positions)[out_rows])


def heads(x):
    """`[H, T, D]`, as models like it."""
    return x.view(-1, HEADS, HEAD_DIM).transpose(0, 1)


def tokens(x):
    return x.transpose(0, 1).reshape(-1, WIDTH)


def table(positions):
    return positions.float()[:, None] * torch.arange(1.0, HEAD_DIM + 1)


def doubled(x):
    """Adjacent pairs swapped, by stack and flatten."""
    return torch.stack([x[..., 1::2], x[..., ::2]], -1).flatten(-2)


def reshaped_back_and_forth(m, x, p):
    return x.view(-1, 2, 6).flatten(1).unsqueeze(1).squeeze(1).reshape(-1, 12)


def normed(m, x, p):
    return tokens(torch.ops.llmc.rms_norm(heads(x), m.scale, 1e-6, 0.0, "cast_then_scale"))


def tabled(m, x, p):
    return tokens(heads(x) * table(p))


def halved(m, x, p):
    return tokens(torch.cat([-heads(x)[..., 3:], heads(x)[..., :3]], -1))


def broadcast(m, x, p):
    return tokens(torch.cat([heads(x), x[None, :, :2].expand(HEADS, -1, -1)], -1)[..., :6])


# name -> (body, operators that are left beside embedding, linear and the gather)
BODIES = {
    "reshapes join": (reshaped_back_and_forth, []),
    "copies go": (lambda m, x, p: x.clone().contiguous().detach() * 1.0 + 0, []),
    "lossless casts go": (lambda m, x, p: x.double().to(torch.float32), []),
    "a lossy cast stays": (lambda m, x, p: x.to(torch.bfloat16).float(), ["_to_copy"] * 2),
    "split parts": (lambda m, x, p: torch.cat(x.split([4, 8], 1)[::-1], 1), ["cat", *["slice"] * 2]),
    "a slice of a slice": (lambda m, x, p: x[:, 2:][:, 1:3].repeat(1, 6), ["repeat", "slice"]),
    "a whole slice": (lambda m, x, p: x[:, 0:100][:, :], []),
    "transposed twice": (lambda m, x, p: x.transpose(0, 1).exp().permute(1, 0), ["exp"]),
    "through elementwise": (lambda m, x, p: tokens(heads(x).tanh() * m.scale), ["mul", *VIEWS, "tanh"]),
    "through a norm": (normed, ["llmc.rms_norm", *VIEWS]),
    "through a table": (tabled, ["_to_copy", "arange", "mul", "mul", "reshape", "reshape", *VIEWS]),
    "through halves": (halved, ["cat", "neg", *VIEWS, "slice", "slice"]),
    "through pairs": (lambda m, x, p: tokens(doubled(heads(x))), [*VIEWS, "slice", "slice", "stack"]),
    "through a broadcast": (broadcast, ["cat", "expand", "reshape", *VIEWS, "slice", "slice"]),
}


def left(program):
    found = sorted(operator_of(node) for node in program.graph.nodes if node.op == "call_function")
    for name in ("embedding", "linear", "index"):
        found.remove(name)
    return found


@pytest.mark.parametrize("name", BODIES)
def test_the_same_values_in_fewer_forms(name, export, apply, closeness):
    body, expected = BODIES[name]
    traced = export(Sketch(body))
    simple = apply(traced, DropBatch(), MergeCommon(), Simplify())
    assert closeness(traced, simple) == 0
    assert left(simple) == expected


def test_a_permutation_that_nothing_undoes_stays_with_a_reason(export, apply, closeness):
    def body(m, x, p):
        return heads(x).reshape(-1, HEAD_DIM).repeat(1, 2)[: x.shape[0]]

    traced = export(Sketch(body))
    simple = apply(traced, DropBatch(), MergeCommon(), Simplify())
    assert closeness(traced, simple) == 0
    (miss,) = simple.history[-1].misses
    assert miss.endswith("is computed in one order only")


def test_nothing_is_computed_twice_for_another_layout(export, apply, closeness):
    def body(m, x, p):
        y = heads(x).tanh()
        return tokens(y) + y.sum(0).repeat(1, 2)

    traced = export(Sketch(body))
    simple = apply(traced, DropBatch(), MergeCommon(), Simplify())
    assert closeness(traced, simple) == 0
    assert left(simple).count("tanh") == 1


def test_a_simplified_program_reads_like_this(export, apply, golden):
    traced = export(Sketch(BODIES["through halves"][0]))
    simple = apply(traced, DropBatch(), MergeCommon(), Simplify())
    golden(print_program(traced) + "\n" + print_program(simple), "simplify.txt")
