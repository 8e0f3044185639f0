"""In-place operators are replaced where that is safe, and left where it is not."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from llmc.compiler.functional import functionalise, join_slices, writes


class Program(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, y):
        return self.function(x, y)


def exported(function):
    inputs = (torch.randn(4, 6), torch.randn(4, 6))
    return torch.export.export(Program(function), inputs).graph


def run(graph, x, y):
    return fx.GraphModule(nn.Module(), graph)(x, y)[0]


def on_a_result(x, y):
    z = x * 2
    z.add_(y)
    return z


def on_one_of_several_results(x, y):
    values, _ = torch.topk(x, 3, dim=-1)
    values /= values.sum(-1, keepdim=True)
    return values


def twice(x, y):
    z = x + y
    total = z.sum()
    z.mul_(3).sub_(total)
    return z * total


def scatter_into_zeros(x, y):
    return torch.zeros_like(x).scatter_(1, x.argmax(-1, keepdim=True), 1.0)


def through_a_permutation(x, y):
    z = (x @ y.t()).permute(1, 0)
    z += 1
    return z


def slice_by_slice(x, y):
    out = x.new_empty(4, 12)
    out[:, :6] = x
    out[:, 6:] = y
    return out


def part_of_a_result(x, y):
    z = x + 1
    z[1:] += y[1:]
    return z * 2


def one_row(x, y):
    z = x + 1
    z[2] = y[0]
    return z


SAFE = [
    on_a_result,
    on_one_of_several_results,
    twice,
    scatter_into_zeros,
    through_a_permutation,
    slice_by_slice,
    part_of_a_result,
    one_row,
]


@pytest.mark.parametrize("function", SAFE, ids=lambda function: function.__name__)
def test_safe_writes_become_functional(function):
    graph = exported(function)
    assert any(writes(node) for node in graph.nodes)
    result = functionalise(graph)
    assert result is not None
    join_slices(result)
    assert not any(writes(node) for node in result.nodes)
    x, y = torch.randn(4, 6), torch.randn(4, 6)
    assert torch.equal(run(result, x.clone(), y.clone()), function(x.clone(), y.clone()))


def test_filling_an_empty_tensor_becomes_one_cat():
    result = functionalise(exported(slice_by_slice))
    join_slices(result)
    result.eliminate_dead_code()
    targets = [str(node.target) for node in result.nodes if node.op == "call_function"]
    assert targets == ["aten.cat.default"]


def on_an_input(x, y):
    x.add_(1)
    return x * y


def seen_through_a_view(x, y):
    z = x + 1
    view = z.view(6, 4)
    z.add_(y)
    return view * 2


def seen_through_a_slice(x, y):
    z = x + 1
    tail = z[2:]
    z[2:] += 5
    return tail * 2


def base_read_after_its_view_changed(x, y):
    z = x + 1
    z.t().add_(2)
    return z


@pytest.mark.parametrize(
    "function",
    [on_an_input, seen_through_a_view, seen_through_a_slice, base_read_after_its_view_changed],
    ids=lambda function: function.__name__,
)
def test_writes_that_others_see_are_left_to_the_exporter(function):
    graph = exported(function)
    result = functionalise(graph)
    if result is not None:
        x, y = torch.randn(4, 6), torch.randn(4, 6)
        assert torch.equal(run(result, x.clone(), y.clone()), function(x.clone(), y.clone()))
    else:
        assert any(writes(node) for node in graph.nodes)


def test_an_incomplete_filling_is_no_cat():
    def half(x, y):
        out = x.new_empty(4, 12)
        out[:, 6:] = y
        return out[:, 6:] * 1

    result = functionalise(exported(half))
    join_slices(result)
    assert "aten.cat.default" not in {str(node.target) for node in result.nodes}
