"""Whole decode and prefill steps of real shapes with random weights made on the device, eager and as one
graph."""

from __future__ import annotations

import time

import torch
from device import DEVICE, CompiledOnDemand, captured, replay_seconds, settled

from llmc.codegen.cuda.dry_walk import needs_of
from llmc.codegen.cuda.words import stored_weights, word_weights
from llmc.compiler.trace import trace_config
from llmc.ir.interpret import interpret
from llmc.ir.paged import allocate_caches, step_inputs
from llmc.ir.program import Program
from llmc.ir.weights import Expr
from llmc.kernels.cuda.launch import Specialisation
from llmc.kernels.cuda.operators import CudaOperators
from llmc.kernels.cuda.substitution import substitute
from llmc.passes.base import PassContext
from llmc.passes.manager import run_passes
from llmc.passes.recipes import override, preset_recipe
from llmc.runtime.executors.tiles import SequencePart
from llmc.spec.history import is_invariant
from llmc.spec.target import parse_target

SHAPES = {
    "small": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 16,
    },
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
    },
}
# Recipes that need no data, as a preset and changes to it.
RECIPES = {
    "bf16": ("none", ()),
    "bf16_library": ("none", ("select_kernels.invariant=false",)),
    "int4_g128": ("int4-fast", ("scale_search.group_size=128",)),
    "fp8": ("fp8", ()),
    "w8a8": ("w8a8", ()),
    "kv_int8": ("none", ("kv_layout.dtype=int8",)),
    "kv_fp8": ("none", ("kv_layout.dtype=fp8",)),
}
PAGE = 64
VOCABULARY = 128256
MAX_CONTEXT = 16384
# (batch, context) of decode steps, and the tokens of a prefill.
STEPS = ((1, 256), (1, 8192), (8, 1024), (64, 1024))
PREFILL = 2048


def config_of(shape: str):
    """transformers' configuration of a shape."""
    from transformers import LlamaConfig

    tied = shape == "llama-3.2-1b"
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=MAX_CONTEXT,
        tie_word_embeddings=tied,
        **{"num_key_value_heads": 8} | SHAPES[shape],
    )
    config.architectures = ["LlamaForCausalLM"]
    return config


def program_of(shape: str, scheme: str) -> Program:
    """The final program of a shape, weights unbound."""
    program = trace_config(config_of(shape), dtype=torch.bfloat16, max_context=MAX_CONTEXT)
    context = PassContext(target=parse_target("cuda:sm_90"), max_model_len=MAX_CONTEXT, planning=True)
    preset, changes = RECIPES[scheme]
    return run_passes(program, override(preset_recipe(preset), changes).passes, context, [])


def read_weights(program: Program) -> dict[str, Expr]:
    """Shapes and dtypes by the name that the program reads, in the form that kernels read."""
    words = word_weights(program)
    stored = stored_weights({name: program.weights[name] for name in program.used_weights()}, words)
    return stored | {word.codes: stored[word.stored] for word in words}


def random_weights(program: Program) -> dict[str, torch.Tensor]:
    """Tensors by the name that the program reads, in the form that kernels read."""
    read = read_weights(program)
    return {name: _random(read[name].shape, read[name].dtype) for name in program.used_weights()}


def _random(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    if dtype.is_floating_point:
        return (torch.randn(shape, device=DEVICE, dtype=torch.float32) * 0.02).to(dtype)
    limits = torch.iinfo(dtype)
    return torch.randint(limits.min, limits.max, shape, device=DEVICE, dtype=dtype)


class Stepper:
    """One program on the device: steps of given batch and context, eager or captured."""

    def __init__(self, shape: str, scheme: str, launcher: CompiledOnDemand, tokens: int) -> None:
        self.program = program_of(shape, scheme)
        assert self.program.cache is not None
        self.layout = self.program.cache
        self.weights = random_weights(self.program)
        self.weight_bytes = sum(t.nbytes for t in {t.data_ptr(): t for t in self.weights.values()}.values())
        pages = [-(-tokens // PAGE) + 64 for _ in self.layout.groups]
        self.caches = {name: t.to(DEVICE) for name, t in allocate_caches(self.layout, pages).items()}
        operators = CudaOperators(launcher, invariant=is_invariant(self.program.history))
        self.graph = substitute(self.program.graph, operators)

    @property
    def kernels(self) -> list[Specialisation]:
        """Those that its steps may launch."""
        return needs_of(self.program, read_weights(self.program)).kernels

    def step(self, batch: int, context: int, new: int = 1):
        """A callable that runs a step of `batch` sequences with `new` tokens each behind `context - new`
        others."""
        per_sequence = -(-context // PAGE)
        parts = [
            SequencePart(
                start=context - new,
                token_ids=[7] * new,
                block_tables=[
                    list(range(index * per_sequence, (index + 1) * per_sequence)) for _ in self.layout.groups
                ],
                wanted=[new - 1],
            )
            for index in range(batch)
        ]
        inputs = {
            name: value.to(DEVICE) for name, value in step_inputs(self.layout, parts).items()
        } | self.caches
        return lambda: interpret(self.graph, inputs, self.weights.__getitem__)


def step_times(shape: str, scheme: str, launcher: CompiledOnDemand) -> dict:
    """Milliseconds and share of the bytes' bandwidth: decode at batch 1, 8 and 64, a prefill."""
    most = max(batch * (context + PAGE) for batch, context in STEPS)
    stepper = Stepper(shape, scheme, launcher, tokens=max(most, PREFILL) + 4096)
    launcher.prepare(stepper.kernels)
    found: dict = {"weight_gb": stepper.weight_bytes / 1e9}
    for batch, context in STEPS:
        began = time.perf_counter()
        step = stepper.step(batch, context)
        graph = captured(step)
        capture_s = time.perf_counter() - began
        seconds = replay_seconds(graph)
        cache = stepper.layout.bytes_per_token * batch * context
        found[f"decode b{batch} ctx{context}"] = {
            "ms": seconds * 1e3,
            "tok_s": batch / seconds,
            "gb_s": (stepper.weight_bytes + cache) / seconds / 1e9,
            "capture_s": capture_s,
        }
    prefill = stepper.step(1, PREFILL, new=PREFILL)
    prefill()
    settled()
    seconds = replay_seconds(captured(prefill), repeats=3)
    parameters = sum(w.numel() for w in stepper.weights.values() if w.dim() > 1)
    found["prefill"] = {"ms": seconds * 1e3, "tok_s": PREFILL / seconds, "stored_parameters": parameters}
    return found
