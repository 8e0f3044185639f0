"""Small artifacts made by hand for the tests of this room."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from llmc.artifact.schema import Manifest, Provenance, Recipe, RecipeStep
from llmc.artifact.tensors import TensorSpec
from llmc.artifact.writer import ArtifactWriter
from llmc.spec.cache import CacheGroup, CacheLayout
from llmc.spec.history import Decision, PassRecord
from llmc.spec.model import AttentionSpec, ModelSpec
from llmc.spec.plans import BufferSlot, MemoryPlan
from llmc.spec.target import REFERENCE

SPECS = (
    TensorSpec("embed", "bfloat16", (5, 3)),
    TensorSpec("scale", "float32", ()),
    TensorSpec("codes", "uint8", (7, 9)),
    TensorSpec("none", "float16", (0, 4)),
)


def make_manifest(**changes):
    attention = AttentionSpec(layer=0, num_heads=2, num_kv_heads=1, qk_dim=8, v_dim=8, scale=0.5, kv_source=0)
    fields = {
        "provenance": Provenance(model="tiny", llmc_version="0.1.0", tools={"torch": "2.13.0"}),
        "spec": ModelSpec(
            family="llama", architecture="LlamaForCausalLM", num_layers=1, hidden_size=16, vocab_size=32,
            max_context=64, compute_dtype="float32", tied_head=True, num_parameters=79,
            attention=(attention,), eos_token_ids=(0,), choices={"longrope": "short"},
        ),
        "recipe": Recipe(name="int4", steps=(RecipeStep(name="rtn", options={"bits": 4, "keep": "head"}),)),
        "target": REFERENCE,
        "cache": CacheLayout(
            groups=(
                CacheGroup(layers=(0,), num_kv_heads=1, k_dim=8, v_dim=8, dtype="float32", page_tokens=32),
            )
        ),
        "memory": MemoryPlan(
            weight_bytes=10, activation_bytes=20, activation_bytes_unshared=30, max_tokens=4, max_rows=2,
            cache_bytes_per_token=64,
            arena=(BufferSlot(value="x", offset_bytes=0, size_bytes=20, first=0, last=3),),
        ),
        "history": (
            PassRecord(
                name="rtn", options={"bits": 4}, nodes_before=9, nodes_after=9, matches=2, divergence=0.5,
                decisions=(Decision(subject="embed", choice="int4", reason="asked for"),),
                misses=("norm: too small",),
            ),
        ),
    }  # fmt: skip
    return Manifest(**(fields | changes))


def make_values(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "embed": rng.integers(0, 2**16, (5, 3), dtype=np.uint16),
        "scale": np.asarray(rng.standard_normal(), dtype=np.float32),
        "codes": rng.integers(0, 255, (7, 9), dtype=np.uint8),
        "none": np.zeros((0, 4), np.float16),
    }


def fill(writer, seed=0):
    values = make_values(seed)
    writer.write_bytes("program.json", "program", b'{"nodes": []}\n')
    writer.write_tensors("weights-00001.safetensors", "weights", SPECS, values.__getitem__)
    writer.write_bytes("tokenizer/tokenizer.json", "tokenizer", b"{}")
    writer.write_bytes("report.json", "report", b"{}")


def make_artifact(path, seed=0, **options):
    with ArtifactWriter(path, **options) as writer:
        fill(writer, seed)
        return writer.commit(make_manifest())


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def artifacts():
    """The functions above, by name."""
    return SimpleNamespace(make=make_artifact, manifest=make_manifest, fill=fill, contents=contents)


@pytest.fixture
def made(tmp_path):
    """A small artifact at `tmp_path / "made.llmc"`."""
    return make_artifact(tmp_path / "made.llmc")
