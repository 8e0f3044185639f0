"""What tests of backends share: small portable programs of a family, with random weights."""

from __future__ import annotations

import fcntl
import os
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import llmc
from llmc.artifact.reader import open_unchecked
from llmc.compiler.trace import trace_config
from llmc.models.families import FAMILIES
from llmc.passes.base import PassContext
from llmc.passes.manager import run_passes
from llmc.passes.pipeline import canonicalise, fuse
from llmc.passes.probe import logits_of, with_random_weights

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def cuda_artifact(tmp_path_factory, stories_1m):
    """The small bundled model with int4 matrices, for one architecture, compiled once for all processes."""
    pytest.importorskip("triton")
    own = tmp_path_factory.getbasetemp()
    folder = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    path = folder / "cuda" / "model.llmc"
    path.parent.mkdir(exist_ok=True)
    with (folder / "cuda" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            llmc.compile(stories_1m, quant="int4-fast", target="cuda:sm_90", output=path, verify="structure")
    return open_unchecked(path)


@pytest.fixture(scope="session")
def cuda_stub(tmp_path_factory):
    """The stub driver, and the file that it writes launches to."""
    from stub_device import COMPILER, build_stub

    if COMPILER is None:
        pytest.skip("there is no C compiler")
    return build_stub(tmp_path_factory.mktemp("stub"))


@pytest.fixture(scope="session")
def portable_program():
    """`portable_program(family, *quantisers)`: what the lay-out stage would be given."""

    @cache
    def fused(name):
        family = next(family for family in FAMILIES if family.name == name)
        config = getattr(transformers, family.config)(**family.options)
        program = with_random_weights(trace_config(config, dtype=torch.float32), 0)
        return run_passes(program, (*canonicalise(), *fuse()), PassContext())

    def make(name, *quantisers):
        return run_passes(fused(name), quantisers, PassContext())

    return make


class OnnxGraph:
    """The graph of a portable program, written into `folder`, and a session that runs it."""

    def __init__(self, program, folder, *, contrib=True, logits="rows", activations=None):
        import onnxruntime

        from llmc.codegen.onnx.forms import stored_forms, stored_store
        from llmc.codegen.onnx.graph import StoredTensor
        from llmc.codegen.onnx.lowered import Export, lower, serialize
        from llmc.codegen.onnx.stored import StoredWeights
        from llmc.codegen.programs import tensor_bytes

        store = stored_store(program.weights, stored_forms(program, contrib))
        places, data = {}, b""
        for name in program.used_weights():
            data += bytes(-len(data) % 64)
            values = tensor_bytes(store.evaluate(name)).tobytes()
            places[name] = StoredTensor("weights.bin", len(data), len(values))
            data += values
        (folder / "weights.bin").write_bytes(data)
        options = Export(contrib=contrib, logits=logits, activations=activations or {})
        self.path = folder / "model.onnx"
        self.path.write_bytes(serialize(lower(program, StoredWeights(store, places), options, {"a": "b"})))
        session = onnxruntime.SessionOptions()
        session.intra_op_num_threads = 1
        session.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(
            str(self.path), session, providers=["CPUExecutionProvider"]
        )

    def step(self, ids, mask, past):
        """Logits of all rows, and the caches after the step by the names of the inputs."""
        feeds = {"input_ids": ids, "attention_mask": mask, "out_rows": np.arange(ids.size)}
        for entry in self.session.get_inputs():
            if entry.name.startswith("past"):
                empty = np.zeros((ids.shape[0], entry.shape[1], 0, entry.shape[3]), np.float32)
                feeds[entry.name] = past.get(entry.name, empty)
        names = [entry.name for entry in self.session.get_outputs()]
        found = dict(zip(names, self.session.run(None, feeds), strict=True))
        logits = found.pop("logits")
        return logits, {name.replace("present", "past_key_values"): array for name, array in found.items()}


@pytest.fixture(scope="session")
def onnx_graph():
    """`onnx_graph(program, folder, **options)`: an `OnnxGraph`."""
    return OnnxGraph


@pytest.fixture(scope="session")
def relative_error():
    """`relative_error(program, folder, **options)`: the largest difference of a logit of the ONNX graph, run
    in four steps, from the interpreted program's, over the largest logit. The graph passes the checker."""
    import onnx

    def measure(program, folder, **options):
        graph = OnnxGraph(program, folder, **options)
        onnx.checker.check_model(str(graph.path), full_check=True)
        ids = np.random.default_rng(0).integers(3, program.spec.vocab_size, 27)
        expected = logits_of(program, [ids.tolist()]).numpy()
        found, past, start = [], {}, 0
        for stop in (17, 25, 26, 27):
            mask = np.ones((1, stop), np.int64)
            logits, past = graph.step(ids[None, start:stop], mask, past)
            found.append(logits)
            start = stop
        return float(np.abs(np.concatenate(found) - expected).max() / np.abs(expected).max())

    return measure
