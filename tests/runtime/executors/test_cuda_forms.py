"""What nodes launch for arguments of given shapes, found on tensors without memory: launches with their
numbers and where their pointers point; what is but a view; and what torch has to carry out."""

from __future__ import annotations

import operator

import pytest

torch = pytest.importorskip("torch")

from torch import fx  # noqa: E402

from llmc.kernels.cuda.operators import CudaOperators  # noqa: E402
from llmc.runtime.executors.cuda_forms import NOTHING, RESULTS, Call, Forms, Layout  # noqa: E402

EPS = 1e-6


@pytest.fixture
def forms():
    def never(launch):
        raise AssertionError("nothing may be launched")

    return Forms(CudaOperators(never, arrived=torch.zeros(4, dtype=torch.int32)))


def form_of(forms, target, values, *constants):
    """The form of `target(*values, *constants)`, `values` by layout."""
    graph = fx.Graph()
    inputs = [graph.placeholder(f"x{index}") for index in range(len(values))]
    node = graph.call_function(target, (*inputs, *constants))
    places = tuple(range(len(values)))
    call = Call(9, forms.kind_of(node, {}), node, places, places, {})
    return forms.form_of(
        call, {place: forms.number_of(value) for place, value in zip(places, values, strict=True)}
    )


def rows(count, width=64, **changes):
    return Layout((count, width), (width, 1), torch.float32)._replace(**changes)


def test_a_launch_is_its_grid_its_numbers_and_where_its_pointers_point(forms):
    norm = (None, EPS, 0.5, "scale_then_cast")
    form = form_of(forms, forms.operators.rms_norm, [rows(7, offset=64)], *norm)
    assert not form.by_torch
    assert form.grids == ((7, 1, 1),)
    assert form.sizes == (7 * 64 * 4,)
    # Of x, result, eps, offset and two scratch pointers: x is the argument, from its 65th element on.
    assert form.sources == (0, 1, NOTHING, NOTHING, NOTHING, NOTHING)
    assert form.words[:2] == (64 * 4, 0)
    assert form.words[3] == int.from_bytes(b"\0\0\0\x3f", "little")
    assert (form.value, form.outputs) == (rows(7), (1,))
    longer = form_of(forms, forms.operators.rms_norm, [rows(9)], *norm)
    assert longer.skeleton == form.skeleton
    assert longer.grids == ((9, 1, 1),)
    wider = form_of(forms, forms.operators.rms_norm, [rows(9, 128)], *norm)
    assert wider.skeleton != form.skeleton


def test_views_launch_nothing_and_stay_in_the_memory_of_their_argument(forms):
    halves = form_of(forms, torch.ops.aten.split.Tensor, [rows(5)], 32, 1)
    assert not halves.by_torch
    assert halves.outputs == (0, 0)
    second = form_of(forms, operator.getitem, [halves.value], 1)
    assert (second.value, second.outputs) == (Layout((5, 32), (64, 1), torch.float32, 32), (1,))
    assert second.specialisations == ()


def test_what_torch_computes_is_a_result_of_its_own(forms):
    added = form_of(forms, torch.ops.aten.add.Tensor, [rows(3), rows(3)])
    assert (added.by_torch, added.outputs, added.value) == (True, (RESULTS,), rows(3))


def test_an_operator_that_has_to_copy_is_carried_out_as_a_whole(forms):
    """Rows whose elements do not lie side by side are copied by torch before a kernel reads them."""
    turned = Layout((6, 64), (1, 6), torch.float32)
    found = form_of(forms, forms.operators.rms_norm, [turned], None, EPS, 0.0, "scale_then_cast")
    assert found.by_torch
    assert (found.specialisations, found.sources, found.sizes) == ((), (), ())
    assert found.outputs == (RESULTS,)


def test_equal_calls_of_equal_layouts_have_one_form(forms):
    again = [form_of(forms, forms.operators.gated_activation_packed, [rows(4)], "silu") for _ in range(2)]
    assert again[0] is again[1]
    other = form_of(forms, forms.operators.gated_activation_packed, [rows(4)], "gelu_tanh")
    assert other.skeleton != again[0].skeleton
    forms.forget()
    assert form_of(forms, forms.operators.gated_activation_packed, [rows(4)], "silu") is not again[0]
