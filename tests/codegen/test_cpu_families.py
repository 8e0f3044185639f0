"""Generated C++ against the interpreted program: every supported family, over a mixed schedule."""

from __future__ import annotations

import random
import shutil

import numpy as np
import pytest
import torch
import transformers

from llmc.artifact.cpu import CpuLevel, CpuUnit
from llmc.codegen.cpu.backend import cpu_weights
from llmc.codegen.cpu.source import MAX_THREADS, generate
from llmc.codegen.cpu.toolchain import compile_library, find_compiler
from llmc.compiler.trace import trace_config
from llmc.ir.interpret import interpret
from llmc.ir.paged import allocate_caches, scatter_pages, step_inputs
from llmc.kernels.levels import LEVELS
from llmc.models.families import FAMILIES
from llmc.passes.base import PassContext
from llmc.passes.canonical import canonical_passes
from llmc.passes.fuse_add_norm import FuseAddNorm
from llmc.passes.fuse_gate_up import FuseGateUp
from llmc.passes.fuse_qkv import FuseQkv
from llmc.passes.fuse_rope_cache import FuseRopeCache
from llmc.passes.kv_layout import KvLayout
from llmc.passes.manager import run_passes
from llmc.passes.narrow_rows import NarrowRows
from llmc.passes.paged_attention import PagedAttention
from llmc.passes.probe import with_random_weights
from llmc.runtime.executors.cpu import processor_features
from llmc.runtime.executors.cpu_model import CpuModel
from llmc.runtime.executors.tiles import SequencePart

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="no C++ compiler"
)
LENGTHS = (5, 23, 1, 40)
FAST = (
    *("llama3", "qwen2", "qwen3_moe", "gemma2", "gemma3n", "phi3", "gpt2", "gpt_neox", "gpt_oss"),
    *("deepseek_v3", "cohere", "apertus"),
)
SUPPORTED = [family.name for family in FAMILIES if family.refused is None]


def final_program(family):
    config = getattr(transformers, family.config)(**family.options)
    program = with_random_weights(trace_config(config, dtype=torch.float32), 0)
    fuse = (FuseQkv(), FuseGateUp(), FuseAddNorm())
    layout = (KvLayout(), PagedAttention(), FuseRopeCache())
    return run_passes(program, (*canonical_passes(), *fuse, *layout), PassContext())


def cpu_model(program, folder, pages, num_threads=1):
    """The generated code of `program`, compiled for the best level of this machine."""
    source = generate(program, max_tokens=96, max_logit_rows=96)
    best = [level for level in LEVELS if level.features <= processor_features()][-1]
    library = folder / "model.so"
    library.write_bytes(compile_library(find_compiler(), source.text, best))
    store = cpu_weights(program.weights, source)
    weights = [
        store.evaluate(slot.stored_name).contiguous().reshape(-1).view(torch.uint8).numpy()
        for slot in source.weight_slots
    ]
    unit = CpuUnit(
        abi_version=1,
        max_tokens=source.max_tokens,
        max_logit_rows=source.max_logit_rows,
        max_threads=MAX_THREADS,
        arena_bytes=source.arena_bytes,
        weights=(),
        packed=(),
        levels=(CpuLevel(name=best.name, features=()),),
        compiler="",
    )
    return CpuModel(
        library, unit, weights, program.cache, pages, program.spec.vocab_size, num_threads=num_threads
    )


def check(name, folder):
    """Code for the wanted rows alone against the program that computes all of them."""
    program = final_program(next(family for family in FAMILIES if family.name == name))
    narrow = run_passes(program, (NarrowRows(),), PassContext())
    rng = random.Random(name)
    texts = [[rng.randrange(3, program.spec.vocab_size) for _ in range(n)] for n in LENGTHS]
    pages = scatter_pages(program.cache, LENGTHS, 3)
    model = cpu_model(narrow, folder, pages.num_pages)
    caches, values = allocate_caches(program.cache, pages.num_pages), {}

    def weight(key):
        if key not in values:
            values[key] = program.weights.evaluate(key)
        return values[key]

    done, worst, scale = [0] * len(LENGTHS), 0.0, 0.0
    while any(count < length for count, length in zip(done, LENGTHS, strict=True)):
        parts, step_wants = [], rng.choice(("all", "any", "any", "none"))
        for index, text in enumerate(texts):
            count = min(rng.choice((1, 1, 4, 11)), len(text) - done[index])
            if count:
                ids = text[done[index] : done[index] + count]
                chosen = {"all": count, "any": rng.randint(0, count), "none": 0}[step_wants]
                part = SequencePart(
                    start=done[index],
                    token_ids=ids,
                    block_tables=pages.tables[index],
                    wanted=sorted(rng.sample(range(count), chosen)),
                )
                parts.append(part)
                done[index] += count
        want = interpret(program.graph, step_inputs(program.cache, parts) | caches, weight).numpy()
        tiles = list(model.run(parts))
        assert sum(len(tile.logits) for tile in tiles) == len(want)
        for tile in tiles:
            assert np.isfinite(tile.logits).all()
            worst = max(worst, float(np.abs(tile.logits - want).max()))
            scale = max(scale, float(np.abs(want).max()))
    model.close()
    assert scale > 0
    assert worst <= 5e-5 * scale


@needs_compiler
@pytest.mark.parametrize("name", FAST)
def test_generated_code_computes_what_the_program_says(name, tmp_path):
    check(name, tmp_path)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SUPPORTED if name not in FAST])
def test_generated_code_of_every_other_family(name, tmp_path):
    check(name, tmp_path)
