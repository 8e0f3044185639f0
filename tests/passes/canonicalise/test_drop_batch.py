"""Without the batch dimension every operator computes what it did; where there is no rule it comes back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from llmc.ir.printer import print_program
from llmc.passes.drop_batch import DropBatch
from llmc.passes.rewrite import is_one, is_tensor, rank_of, shape_of

WIDTH = 8


class Sketch(nn.Module):
    """Embeds to `x[1, T, 8]`, applies `body` to give `[1, T, 8]`, projects the wanted rows."""

    def __init__(self, body):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(16, WIDTH))
        self.matrix = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.vector = nn.Parameter(torch.randn(WIDTH))
        self.head = nn.Linear(WIDTH, 16)
        self.body = body

    def forward(self, input_ids, positions, out_rows):
        x = nn.functional.embedding(input_ids[None], self.table)
        return self.head(self.body(self, x))[0][out_rows]


def last_two(x: Tensor) -> Tensor:
    return x.reshape(1, x.shape[1], 2, WIDTH // 2)


RULED = {
    "arithmetic with a vector": lambda m, x: (x * m.vector + 1.5) / 2 - x.abs().sqrt(),
    "a 2-D operand without the dimension": lambda m, x: x + x[0],
    "comparison and choice": lambda m, x: torch.where(x > 0, x, m.vector).clamp(-1, 1),
    "the smaller of two": lambda m, x: torch.min(x, x * m.vector),
    "masked fill": lambda m, x: x.masked_fill(x < 0, 0.5),
    "softmax along the last": lambda m, x: torch.softmax(x, -1),
    "softmax along tokens": lambda m, x: torch.softmax(x, 1),
    "sum that keeps": lambda m, x: x + x.sum(-1, keepdim=True),
    "mean of two dimensions": lambda m, x: x + last_two(x).mean((2, 3))[..., None],
    "largest": lambda m, x: x - x.amax(-1, keepdim=True),
    "running sum": lambda m, x: x.cumsum(1),
    "the top ones, gathered": lambda m, x: x + x.gather(-1, x.topk(2, dim=-1).indices).sum(-1, keepdim=True),
    "scattered": lambda m, x: torch.zeros_like(x).scatter(-1, x.topk(2, dim=-1).indices, 1.0) * x,
    "sorted": lambda m, x: x.sort(-1, descending=True).values,
    "one-hot": lambda m, x: nn.functional.one_hot(x.argmax(-1), WIDTH) * x,
    "split and joined": lambda m, x: torch.cat(x.split(3, -1)[::-1], -1),
    "chunks": lambda m, x: torch.cat([x.chunk(2, -1)[1], x[..., :4]], -1),
    "unbound and stacked": lambda m, x: torch.stack(last_two(x).unbind(2)[::-1], 2).flatten(2),
    "heads to the front and back": lambda m, x: last_two(x).transpose(1, 2).tanh().transpose(1, 2).flatten(2),
    "permuted": lambda m, x: last_two(x).permute(0, 3, 2, 1).permute(0, 3, 2, 1).reshape(x.shape),
    "a new dimension and none": lambda m, x: x.unsqueeze(2).squeeze(2) + x.unsqueeze(0).squeeze(0),
    "selected": lambda m, x: x * x.select(2, 3)[..., None],
    "stepped": lambda m, x: torch.cat([x[..., ::2], x[..., 1::2]], -1),
    "expanded": lambda m, x: x[..., None].expand(-1, -1, -1, 3).sum(-1),
    "repeated": lambda m, x: x.repeat(1, 1, 2)[..., :WIDTH] + x.repeat_interleave(2, -1)[..., ::2],
    "padded": lambda m, x: torch.constant_pad_nd(x, (1, 0))[..., :WIDTH],
    "product with a weight": lambda m, x: x @ m.matrix,
    "product of its own": lambda m, x: (x @ x.transpose(1, 2)) @ x,
    "batched product": lambda m, x: torch.bmm(x, m.matrix[None].expand(1, -1, -1)),
    "layer norm": lambda m, x: nn.functional.layer_norm(x, (WIDTH,), m.vector),
    "complex numbers": lambda m, x: torch.view_as_real(
        torch.view_as_complex(x.reshape(1, -1, 4, 2)) * torch.polar(m.vector[:4], m.vector[4:])
    ).flatten(2),
    "dropped by a view": lambda m, x: (x.reshape(-1, WIDTH) * m.vector).reshape(x.shape),
    "cast": lambda m, x: x.to(torch.bfloat16).float().type_as(x),
}
UNRULED = {
    "flip": lambda m, x: x.flip(-1),
    "roll": lambda m, x: x.roll(1, -1),
    "index": lambda m, x: x[:, :, [1, 0, 2, 3, 4, 5, 6, 7]].transpose(0, 1).transpose(0, 1),
}


def has_batch(program):
    """Whether a computed value still has the dimension in front."""
    return [
        node.name
        for node in program.graph.nodes
        if node.op == "call_function" and is_tensor(node) and rank_of(node) > 1 and is_one(shape_of(node)[0])
    ]


@pytest.mark.parametrize("name", RULED)
def test_an_operator_with_a_rule_loses_the_dimension(name, export, apply, closeness):
    traced = export(Sketch(RULED[name]))
    flat = apply(traced, DropBatch())
    assert closeness(traced, flat) <= 1e-6
    assert flat.history[-1].misses == ()
    if name not in ("batched product", "a new dimension and none"):  # these make one of their own
        assert not has_batch(flat)


@pytest.mark.parametrize("name", UNRULED)
def test_an_operator_without_a_rule_gets_it_back_for_itself_alone(name, export, apply, closeness):
    traced = export(Sketch(UNRULED[name]))
    flat = apply(traced, DropBatch())
    assert closeness(traced, flat) == 0
    assert len(has_batch(flat)) <= 4


def test_the_report_names_operators_without_a_rule(export, apply):
    flat = apply(export(Sketch(UNRULED["flip"])), DropBatch())
    (miss,) = flat.history[-1].misses
    assert miss == "flip: no rule for a lowered operand; the dimension was put back for 1 calls"


def test_a_flat_program_reads_like_this(export, apply, golden):
    traced = export(Sketch(RULED["heads to the front and back"]))
    golden(print_program(traced) + "\n" + print_program(apply(traced, DropBatch())), "drop_batch.txt")
