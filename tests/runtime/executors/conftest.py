"""Paged programs built by hand: what stands after the lay-out stage, without the passes that make it."""

from __future__ import annotations

import json
import operator
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file
from torch import fx

from llmc.compiler.driver import compile_model
from llmc.ir import ops
from llmc.ir.infer import infer
from llmc.ir.paged import paged_inputs
from llmc.ir.program import Program
from llmc.ir.verify import verify
from llmc.ir.weights import Constant, Quantized, WeightStore
from llmc.spec.cache import CODED_DTYPES, CacheGroup, CacheLayout
from llmc.spec.model import AttentionSpec, ModelSpec
from llmc.spec.quant import parse_scheme

assert ops  # importing it registers the operators
llmc_ops = torch.ops.llmc
aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama-like model in its final form. `windows` has one entry a layer, 0 for full attention; layers of
    one window share a cache group. `generic` adds regions in plain ATen: a gate over a softmax, a router."""

    hidden: int = 40
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 10
    ffn: int = 56
    vocab: int = 97
    windows: tuple[int, ...] = (0, 0)
    experts: int = 0
    generic: bool = False
    scheme: str = ""
    tied: bool = True
    dtype: torch.dtype = torch.float32
    page_tokens: int = 8
    max_context: int = 160
    eps: float = 1e-5
    theta: float = 10000.0
    cache_dtype: str = ""


def layout_of(shape: Shape) -> CacheLayout:
    dtype = shape.cache_dtype or str(shape.dtype).removeprefix("torch.")
    return CacheLayout(
        groups=tuple(
            CacheGroup(
                layers=tuple(index for index, each in enumerate(shape.windows) if each == window),
                kind="window" if window else "full",
                window=window,
                num_kv_heads=shape.num_kv_heads,
                k_dim=shape.head_dim,
                v_dim=shape.head_dim,
                dtype=dtype,
                scales=dtype in CODED_DTYPES,
                page_tokens=shape.page_tokens,
            )
            for window in dict.fromkeys(shape.windows)
        )
    )


def spec_of(shape: Shape, num_parameters: int) -> ModelSpec:
    return ModelSpec(
        family="toy", architecture="ToyForCausalLM", num_layers=len(shape.windows),
        hidden_size=shape.hidden, vocab_size=shape.vocab, max_context=shape.max_context,
        compute_dtype=str(shape.dtype).removeprefix("torch."), tied_head=shape.tied,
        num_parameters=num_parameters, eos_token_ids=(0,), bos_token_ids=(0,),
        attention=tuple(
            AttentionSpec(
                layer=layer, num_heads=shape.num_heads, num_kv_heads=shape.num_kv_heads,
                qk_dim=shape.head_dim, v_dim=shape.head_dim, scale=shape.head_dim**-0.5, window=window,
                kv_source=layer,
            )
            for layer, window in enumerate(shape.windows)
        ),
    )  # fmt: skip


class Builder:
    """Builds the graph; weights come from `stored` (names of the Llama architecture) or a generator."""

    def __init__(self, shape: Shape, stored=None, seed=0):
        self.shape, self.stored = shape, stored
        self.layout = layout_of(shape)
        self.graph = fx.Graph()
        self.entries = {}
        self.nodes = {}
        self.random = torch.Generator().manual_seed(seed)
        self.inputs = {e.name: self.graph.placeholder(e.name) for e in paged_inputs(self.layout)}

    def call(self, target, *args):
        return self.graph.call_function(target, args)

    def read(self, name, expr):
        if name not in self.nodes:
            self.entries[name] = expr
            self.nodes[name] = self.graph.create_node("get_attr", name, name=name.replace(".", "_"))
        return self.nodes[name]

    def values(self, name, size, near=0.0):
        if self.stored is not None:
            return self.stored[name].to(self.shape.dtype)
        scale = 0.2 if len(size) < 2 else 1.4 * size[-1] ** -0.5
        return (near + scale * torch.randn(size, generator=self.random)).to(self.shape.dtype)

    def weight(self, name, *size, near=0.0):
        expr = self.entries.get(name) or Constant(self.values(name, size, near))
        return self.read(name, expr)

    def linear(self, x, name, out, width):
        if not self.shape.scheme:
            return self.call(llmc_ops.linear.default, x, self.weight(name, out, width), None)
        stored = self.quantized(name, (out, width))
        return self.call(llmc_ops.quantized_linear.default, x, *stored, None, self.shape.scheme)

    def quantized(self, name, size):
        """Codes, scales and zero points (or None) of one weight."""
        scheme = parse_scheme(self.shape.scheme)
        dense = Constant(self.values(name, size))
        parts = ["codes", "scales"] + ([] if scheme.symmetric else ["zeros"])
        stored = [self.read(f"{name}.{part}", Quantized(dense, scheme, part)) for part in parts]
        return stored + [None] * (3 - len(stored))

    def norm(self, x, name):
        weight = self.weight(name, self.shape.hidden, near=1.0)
        return self.call(llmc_ops.rms_norm.default, x, weight, self.shape.eps, 0.0, "cast_then_scale")

    def heads(self, x, name, count, rotate):
        s = self.shape
        flat = self.linear(x, name, count * s.head_dim, s.hidden)
        split = self.call(aten.view.default, flat, [-1, count, s.head_dim])
        if not rotate:
            return split
        angles = 1.0 / s.theta ** (torch.arange(0, s.head_dim, 2, dtype=torch.int64).float() / s.head_dim)
        freq = self.read("inv_freq", Constant(angles))
        return self.call(llmc_ops.rope.default, split, self.inputs["positions"], freq, 1.0, "half", False)

    def attention(self, x, layer):
        s, prefix = self.shape, f"model.layers.{layer}.self_attn"
        group, _ = self.layout.owner_of(layer)
        q = self.heads(x, f"{prefix}.q_proj.weight", s.num_heads, True)
        k = self.heads(x, f"{prefix}.k_proj.weight", s.num_kv_heads, True)
        v = self.heads(x, f"{prefix}.v_proj.weight", s.num_kv_heads, False)
        caches = (self.inputs[f"k_cache_{layer}"], self.inputs[f"v_cache_{layer}"])
        scales = [
            self.inputs[name] for name in (f"k_scales_{layer}", f"v_scales_{layer}") if name in self.inputs
        ]
        slots = self.inputs[f"slots_{group}"]
        written = self.call(llmc_ops.kv_write.default, k, v, *caches, slots, *scales)
        out = self.call(
            llmc_ops.paged_attention.default, q, *caches, written, self.inputs[f"block_table_{group}"],
            self.inputs["query_starts"], self.inputs["positions"], None, s.head_dim**-0.5,
            s.windows[layer], 0.0, 0, *scales,
        )  # fmt: skip
        flat = self.call(aten.view.default, out, [-1, s.num_heads * s.head_dim])
        return self.linear(flat, f"{prefix}.o_proj.weight", s.hidden, s.num_heads * s.head_dim)

    def feed_forward(self, x, layer):
        s, prefix = self.shape, f"model.layers.{layer}.mlp"
        if s.experts:
            return self.mixture(x, prefix)
        gate = self.linear(x, f"{prefix}.gate_proj.weight", s.ffn, s.hidden)
        up = self.linear(x, f"{prefix}.up_proj.weight", s.ffn, s.hidden)
        gated = self.call(llmc_ops.gated_activation.default, gate, up, "silu")
        return self.linear(gated, f"{prefix}.down_proj.weight", s.hidden, s.ffn)

    def mixture(self, x, prefix):
        """A router in plain ATen, as tracing leaves it, before the experts."""
        s = self.shape
        scores = self.call(aten.mm.default, x, self.weight(f"{prefix}.router", s.hidden, s.experts))
        top = self.call(aten.topk.default, self.call(aten._softmax.default, scores, -1, False), 2)
        chosen, ids = (self.graph.call_function(operator.getitem, (top, index)) for index in range(2))
        total = self.call(aten.sum.dim_IntList, chosen, [-1], True)
        routed = (x, ids, self.call(aten.div.Tensor, chosen, total))
        sizes = {"gate_up": (s.experts, 2 * s.ffn, s.hidden), "down": (s.experts, s.hidden, s.ffn)}
        settings = (None, None, "silu", False, 1.0, 0.0)
        if not s.scheme:
            stored = [self.weight(f"{prefix}.{name}", *size) for name, size in sizes.items()]
            return self.call(llmc_ops.moe.default, *routed, *stored, *settings)
        stored = [part for name, size in sizes.items() for part in self.quantized(f"{prefix}.{name}", size)]
        return self.call(llmc_ops.quantized_moe.default, *routed, *stored, *settings, *[s.scheme] * 2)

    def gate(self, x, layer):
        """Every kind of generic operator whose bits could depend on how many rows there are."""
        s, name = self.shape, f"model.layers.{layer}.gate"
        mean = self.call(aten.mean.dim, x, [-1], True)
        scores = self.call(aten.mm.default, x, self.weight(name, s.hidden, s.hidden))
        soft = self.call(aten._softmax.default, scores, -1, False)
        heads = self.call(aten.view.default, soft, [-1, s.num_heads, s.hidden // s.num_heads])
        mixed = self.call(aten.bmm.default, heads, self.call(aten.permute.default, heads, [0, 2, 1]))
        total = self.call(aten.sum.dim_IntList, mixed, [1, 2], False)
        scale = self.call(aten.tanh.default, self.call(aten.unsqueeze.default, total, -1))
        out = self.call(aten.mul.Tensor, self.call(aten.silu.default, x), scale)
        return self.call(aten.add.Tensor, out, self.call(aten.gelu.default, mean))

    def build(self) -> Program:
        s = self.shape
        table = self.weight("model.embed_tokens.weight", s.vocab, s.hidden)
        x = self.call(llmc_ops.embedding.default, self.inputs["input_ids"], table)
        for layer in range(len(s.windows)):
            normed = self.norm(x, f"model.layers.{layer}.input_layernorm.weight")
            x = self.call(aten.add.Tensor, x, self.attention(normed, layer))
            if s.generic:
                x = self.call(aten.add.Tensor, x, self.gate(x, layer))
            normed = self.norm(x, f"model.layers.{layer}.post_attention_layernorm.weight")
            x = self.call(aten.add.Tensor, x, self.feed_forward(normed, layer))
        x = self.call(
            llmc_ops.gather_rows.default, self.norm(x, "model.norm.weight"), self.inputs["out_rows"]
        )
        head = table if s.tied else self.weight("lm_head.weight", s.vocab, s.hidden)
        self.graph.output(self.call(llmc_ops.linear.default, x, head, None))
        count = sum(torch.Size(expr.shape).numel() for expr in self.entries.values())
        program = Program(
            graph=self.graph, inputs=paged_inputs(self.layout), weights=WeightStore(self.entries),
            spec=spec_of(s, count), cache=self.layout, facts=frozenset({"paged"}),
        )  # fmt: skip
        infer(program)
        verify(program)
        return program


def llama_shape(folder, **changes) -> Shape:
    """The shape of a checkpoint of the Llama architecture."""
    config = json.loads((folder / "config.json").read_text())
    fields = {
        "hidden": config["hidden_size"], "num_heads": config["num_attention_heads"],
        "num_kv_heads": config["num_key_value_heads"], "head_dim": config["head_dim"],
        "ffn": config["intermediate_size"], "vocab": config["vocab_size"],
        "windows": (0,) * config["num_hidden_layers"], "tied": config["tie_word_embeddings"],
        "max_context": config["max_position_embeddings"], "eps": config["rms_norm_eps"],
        "theta": config["rope_theta"], "page_tokens": 16,
    }  # fmt: skip
    return Shape(**(fields | changes))


@pytest.fixture(scope="session")
def build_program():
    """`build_program(**fields of Shape)` gives a paged program with random weights."""
    return lambda seed=0, **fields: Builder(Shape(**fields), seed=seed).build()


@pytest.fixture(scope="session")
def new_builder():
    """`new_builder(**fields of Shape)` gives a builder whose graph has its inputs and nothing else."""
    return lambda seed=0, **fields: Builder(Shape(**fields), seed=seed)


@pytest.fixture(scope="session")
def build_llama():
    """`build_llama(folder, **changes)` gives the paged program of a bundled model."""
    return lambda folder, **changes: Builder(
        llama_shape(folder, **changes), stored=load_file(folder / "model.safetensors")
    ).build()


@pytest.fixture(scope="session")
def cpu_artifact(tmp_path_factory, stories_1m):
    """The bundled draft in float32 with int8 weights: near-ties apart, targets agree on every token."""
    path = tmp_path_factory.mktemp("cpu") / "draft.llmc"
    compile_model(stories_1m, output=path, target="cpu", quant="int8", dtype="float32", verify="off")
    return path
