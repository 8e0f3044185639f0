"""Linears, embeddings, caps, gathers and activations get the operator of their name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llmc.passes.canonical import canonical_passes
from llmc.passes.graph import calls
from llmc.passes.rewrite import operator_of

WIDTH = 12
llmc = torch.ops.llmc


class Sketch(nn.Module):
    """Embeds to `x[T, 12]`, applies `body` to give `[T, 12]`, projects to logits, picks the wanted rows."""

    def __init__(self, body, finish=None):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(16, WIDTH))
        self.gate_up = nn.Linear(WIDTH, 2 * WIDTH)
        self.matrix = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.vector = nn.Parameter(torch.randn(WIDTH))
        self.head = nn.Linear(WIDTH, 16, bias=False)
        self.body, self.finish = body, finish or (lambda x: x)

    def forward(self, input_ids, positions, out_rows):
        x = nn.functional.embedding(input_ids, self.table)
        return self.finish(self.head(self.body(self, x)))[out_rows]


@pytest.fixture
def canonical(export, apply, closeness):
    def run(body, finish=None):
        traced = export(Sketch(body, finish))
        result = apply(traced, *canonical_passes())
        assert closeness(traced, result) <= 2e-6
        return result

    return run


def operators(program):
    return [operator_of(node) for node in program.graph.nodes if node.op == "call_function"]


PRODUCTS = {
    "addmm": lambda m, x: torch.addmm(m.vector, x, m.matrix),
    "mm": lambda m, x: torch.mm(x, m.matrix),
    "matmul": lambda m, x: x @ m.matrix,
    "matmul and bias": lambda m, x: x @ m.matrix + m.vector,
    "bias first": lambda m, x: m.vector + nn.functional.linear(x, m.matrix),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_every_product_with_a_weight_is_a_linear(name, canonical):
    result = canonical(PRODUCTS[name])
    assert operators(result) == ["llmc.embedding", "llmc.gather_rows", "llmc.linear", "llmc.linear"]
    biased = calls(result.graph, llmc.linear.default)[0].args[2] is not None
    assert biased == (name in ("addmm", "matmul and bias", "bias first"))


def test_a_product_of_activations_stays_with_a_reason(canonical):
    result = canonical(lambda m, x: (x @ x.transpose(0, 1)) @ x)
    assert operators(result).count("matmul") == 2
    misses = [miss for record in result.history for miss in record.misses if record.name == "normalize"]
    assert misses == ["aten.matmul by a computed matrix (2 times)"]


def test_rows_are_gathered_before_the_head_and_what_follows(canonical):
    result = canonical(lambda m, x: x, lambda y: torch.tanh(y / 30.0) * 30.0)
    assert operators(result) == ["llmc.embedding", "llmc.gather_rows", "llmc.linear", "llmc.softcap"]


@pytest.mark.parametrize(
    "spelling", [lambda y: torch.tanh(y * 0.25) * 4.0, lambda y: 4.0 * torch.tanh(y / 4.0)]
)
def test_both_spellings_of_a_soft_cap(canonical, spelling):
    result = canonical(lambda m, x: x, spelling)
    (cap,) = calls(result.graph, llmc.softcap.default)
    assert cap.args[1] == 4.0


def test_another_factor_is_no_soft_cap(canonical):
    assert "llmc.softcap" not in operators(canonical(lambda m, x: x, lambda y: torch.tanh(y / 4.0) * 3.9))


ACTIVATIONS = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda g: nn.functional.gelu(g, approximate="tanh"),
    "relu": nn.functional.relu,
    "relu2": lambda g: nn.functional.relu(g).square(),
    "sigmoid": torch.sigmoid,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("up_first", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_gated_activations_in_both_orders_and_packings(name, up_first, packed, canonical):
    def body(m, x):
        gate, up = m.gate_up(x).chunk(2, -1) if packed else (x @ m.matrix, x * m.vector)
        return up * ACTIVATIONS[name](gate) if up_first else ACTIVATIONS[name](gate) * up

    result = canonical(body)
    (gated,) = calls(result.graph, llmc.gated_activation.default, llmc.gated_activation_packed.default)
    assert gated.args[-1] == name
    assert (gated.target is llmc.gated_activation_packed.default) == packed


def test_up_before_gate_in_one_matrix_is_not_packed(canonical):
    def body(m, x):
        up, gate = m.gate_up(x).chunk(2, -1)
        return nn.functional.silu(gate) * up

    (gated,) = calls(canonical(body).graph, llmc.gated_activation.default)
    assert gated.args[2] == "silu"


def test_a_gate_of_another_shape_stays_with_a_reason(canonical):
    result = canonical(lambda m, x: torch.sigmoid((x * m.vector).sum(-1, keepdim=True)) * x)
    misses = [miss for record in result.history for miss in record.misses]
    assert any("have different shapes" in miss for miss in misses)


SPELLED = {
    "gelu": lambda x: x * 0.5 * (1.0 + torch.erf(x / 2**0.5)),
    "gelu tanh": lambda x: 0.5 * x * (1.0 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x.pow(3)))),
    "silu": lambda x: x * torch.sigmoid(x),
    "silu by exp": lambda x: x * (1 / (1 + torch.exp(-x))),
}


@pytest.mark.parametrize("name", SPELLED)
def test_activations_written_out_get_their_name(name, canonical):
    result = canonical(lambda m, x: SPELLED[name](x))
    (found,) = calls(result.graph, torch.ops.aten.gelu.default, torch.ops.aten.silu.default)
    assert operator_of(found) == name.split()[0]
    assert (found.kwargs.get("approximate") == "tanh") == (name == "gelu tanh")


@pytest.mark.parametrize(
    "nearly", [lambda x: x * torch.sigmoid(1.702 * x), lambda x: x * torch.sigmoid(x) * 1.0001]
)
def test_what_is_nearly_an_activation_keeps_its_values(nearly, canonical):
    result = canonical(lambda m, x: nearly(x))
    assert "sigmoid" in operators(result) or "mul" in operators(result)


def spelled_rms(x, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def spelled_layer(x, eps):
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
@pytest.mark.parametrize("spelled", [spelled_rms, spelled_layer])
def test_norms_written_out_get_their_name_and_eps(spelled, eps, canonical):
    result = canonical(lambda m, x: (spelled(x.reshape(-1, 3, 4), eps) * m.matrix[:3, :4]).flatten(1))
    (norm,) = calls(result.graph, llmc.rms_norm.default, llmc.layer_norm.default)
    assert (norm.target is llmc.layer_norm.default) == (spelled is spelled_layer)
    assert norm.args[-3] == eps
    assert "rsqrt" not in operators(result)
    assert "mean" not in operators(result)


def test_a_norm_over_other_values_stays_with_a_reason(canonical):
    result = canonical(lambda m, x: x * torch.rsqrt(x.abs().mean(-1, keepdim=True) + 1e-6))
    assert "rsqrt" in operators(result)
    misses = [miss for record in result.history for miss in record.misses if record.name == "name_norms"]
    assert misses == ["rsqrt: no norm without a weight gives the values of its products"]
