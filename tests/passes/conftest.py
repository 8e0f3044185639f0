"""Tiny canonical programs, built by hand: what the passes after canonicalisation start from."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

import pytest
import torch
from torch import fx

from llmc.ir import ops
from llmc.ir.infer import infer
from llmc.ir.program import TRACE_INPUTS, Program
from llmc.ir.verify import verify
from llmc.ir.weights import Constant, WeightStore
from llmc.passes.rewrite import insert
from llmc.spec.model import AttentionSpec, ModelSpec

assert ops, "importing it registers the operators"
llmc_ops = torch.ops.llmc
aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Toy:
    """A Llama-like model. Per-layer values are given as one entry a layer."""

    num_layers: int = 2
    hidden: int = 32
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 8
    ffn: int = 48
    vocab: int = 61
    bias: bool = False
    tied: bool = False
    norm: str = "rms_norm"
    activation: str = "silu"
    up_first: bool = False
    rope: bool = True
    experts: int = 0
    expert_bias: bool = False
    dtype: torch.dtype = torch.float32
    windows: tuple[int, ...] = (0, 0)
    chunks: tuple[int, ...] = (0, 0)
    kv_sources: tuple[int, ...] = ()
    sinks: bool = False
    seed: int = 0
    facts: frozenset[str] = field(default=frozenset({"traced", "canonical"}))


class _Builder:
    def __init__(self, toy: Toy) -> None:
        self.toy = toy
        self.graph = fx.Graph()
        self.entries: dict[str, Constant] = {}
        self.readers: dict[str, fx.Node] = {}
        self.random = torch.Generator().manual_seed(toy.seed)
        self.ids, self.positions, self.rows = (self.graph.placeholder(entry.name) for entry in TRACE_INPUTS)

    def weight(self, name: str, *shape: int, near: float = 0.0, dtype: torch.dtype | None = None) -> fx.Node:
        if name not in self.readers:
            scale = 0.2 if len(shape) < 2 else shape[-1] ** -0.5
            value = near + scale * torch.randn(shape, generator=self.random)
            self.entries[name] = Constant(value.to(dtype or self.toy.dtype))
            self.readers[name] = self.graph.create_node("get_attr", name, name=name.replace(".", "_"))
        return self.readers[name]

    def call(self, operator, *args) -> fx.Node:
        return insert(self.graph, operator, args)

    def linear(self, x: fx.Node, name: str, out: int, width: int, bias: bool = False) -> fx.Node:
        weight = self.weight(f"{name}.weight", out, width)
        added = self.weight(f"{name}.bias", out) if bias else None
        return self.call(llmc_ops.linear.default, x, weight, added)

    def norm(self, x: fx.Node, name: str) -> fx.Node:
        weight = self.weight(f"{name}.weight", self.toy.hidden, near=1.0)
        if self.toy.norm == "rms_norm":
            return self.call(llmc_ops.rms_norm.default, x, weight, 1e-5, 0.0, "cast_then_scale")
        bias = self.weight(f"{name}.bias", self.toy.hidden)
        return self.call(llmc_ops.layer_norm.default, x, weight, bias, 1e-5, 0.0, "scale_then_cast")

    def heads(self, x: fx.Node, name: str, heads: int) -> fx.Node:
        toy = self.toy
        flat = self.linear(x, name, heads * toy.head_dim, toy.hidden, toy.bias)
        return self.call(aten.view.default, flat, [-1, heads, toy.head_dim])

    def rotated(self, x: fx.Node) -> fx.Node:
        if not self.toy.rope:
            return x
        if "inv_freq" not in self.readers:
            angles = 10000.0 ** (-torch.arange(0, self.toy.head_dim, 2) / self.toy.head_dim)
            self.entries["inv_freq"] = Constant(angles)
            self.readers["inv_freq"] = self.graph.create_node("get_attr", "inv_freq", name="inv_freq")
        freq = self.readers["inv_freq"]
        return self.call(llmc_ops.rope.default, x, self.positions, freq, 1.0, "half", False)

    def attention(self, x: fx.Node, layer: int) -> fx.Node:
        toy, prefix = self.toy, f"layers.{layer}.attn"
        q = self.rotated(self.heads(x, f"{prefix}.q", toy.num_heads))
        k = self.rotated(self.heads(x, f"{prefix}.k", toy.num_kv_heads))
        v = self.heads(x, f"{prefix}.v", toy.num_kv_heads)
        source = toy.kv_sources[layer] if toy.kv_sources else layer
        if source != layer:
            k, v = self.shared[source]
        self.shared[layer] = (k, v)
        sinks = self.weight(f"{prefix}.sinks", toy.num_heads) if toy.sinks else None
        out = self.call(
            llmc_ops.attention.default,
            *(q, k, v, self.positions, sinks, layer, source, toy.head_dim**-0.5),
            *(toy.windows[layer], 0.0, toy.chunks[layer]),
        )
        width = toy.num_heads * toy.head_dim
        flat = self.call(aten.view.default, out, [-1, width])
        return self.linear(flat, f"{prefix}.o", toy.hidden, width, toy.bias)

    def feed_forward(self, x: fx.Node, layer: int) -> fx.Node:
        toy, prefix = self.toy, f"layers.{layer}.mlp"
        if toy.experts:
            return self.mixture(x, prefix)
        parts = {
            name: self.linear(x, f"{prefix}.{name}", toy.ffn, toy.hidden, toy.bias)
            for name in (("up", "gate") if toy.up_first else ("gate", "up"))
        }
        gated = self.call(llmc_ops.gated_activation.default, parts["gate"], parts["up"], toy.activation)
        return self.linear(gated, f"{prefix}.down", toy.hidden, toy.ffn, toy.bias)

    def mixture(self, x: fx.Node, prefix: str) -> fx.Node:
        toy = self.toy
        scores = self.linear(x, f"{prefix}.router", toy.experts, toy.hidden)
        top = self.call(aten.topk.default, self.call(aten._softmax.default, scores, -1, False), 2)
        weights, chosen = (self.graph.call_function(operator.getitem, (top, index)) for index in range(2))
        gate_up = self.weight(f"{prefix}.gate_up", toy.experts, 2 * toy.ffn, toy.hidden)
        down = self.weight(f"{prefix}.down", toy.experts, toy.hidden, toy.ffn)
        biases = (None, None)
        if toy.expert_bias:
            biases = (
                self.weight(f"{prefix}.gate_up_bias", toy.experts, 2 * toy.ffn),
                self.weight(f"{prefix}.down_bias", toy.experts, toy.hidden),
            )
        return self.call(
            llmc_ops.moe.default, x, chosen, weights, gate_up, down, *biases, toy.activation, False, 1.0, 0.0
        )

    def build(self) -> Program:
        toy = self.toy
        self.shared: dict[int, tuple[fx.Node, fx.Node]] = {}
        table = self.weight("embed.weight", toy.vocab, toy.hidden)
        x = self.call(llmc_ops.embedding.default, self.ids, table)
        for layer in range(toy.num_layers):
            normed = self.norm(x, f"layers.{layer}.norm1")
            x = self.call(aten.add.Tensor, x, self.attention(normed, layer))
            normed = self.norm(x, f"layers.{layer}.norm2")
            x = self.call(aten.add.Tensor, x, self.feed_forward(normed, layer))
        last = self.call(llmc_ops.gather_rows.default, self.norm(x, "norm"), self.rows)
        head = table if toy.tied else self.weight("head.weight", toy.vocab, toy.hidden)
        self.graph.output(self.call(llmc_ops.linear.default, last, head, None))
        ties = {"head.weight": "embed.weight"} if toy.tied else {}
        store = WeightStore(self.entries, ties)
        program = Program(
            graph=self.graph, inputs=TRACE_INPUTS, weights=store, spec=_spec(toy), facts=toy.facts
        )
        infer(program)
        verify(program)
        return program


def _spec(toy: Toy) -> ModelSpec:
    layers = tuple(
        AttentionSpec(
            layer=layer,
            num_heads=toy.num_heads,
            num_kv_heads=toy.num_kv_heads,
            qk_dim=toy.head_dim,
            v_dim=toy.head_dim,
            scale=toy.head_dim**-0.5,
            window=toy.windows[layer],
            chunk=toy.chunks[layer],
            has_sinks=toy.sinks,
            kv_source=toy.kv_sources[layer] if toy.kv_sources else layer,
        )
        for layer in range(toy.num_layers)
    )
    return ModelSpec(
        family="toy",
        architecture="ToyForCausalLM",
        num_layers=toy.num_layers,
        hidden_size=toy.hidden,
        vocab_size=toy.vocab,
        max_context=128,
        compute_dtype=str(toy.dtype).removeprefix("torch."),
        tied_head=toy.tied,
        num_parameters=0,
        attention=layers,
    )


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Programs this small are slower on several threads, far more so on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture
def toy():
    """`toy(**fields of Toy)` builds one canonical program."""
    return lambda **fields: _Builder(Toy(**fields)).build()
