"""The executor of ONNX artifacts: ONNX Runtime and numpy, no torch."""

from __future__ import annotations

from importlib import metadata

from ...artifact.onnx import ONNX_ENGINE, ONNX_UNIT, decode_onnx_unit
from ...artifact.reader import Artifact
from ..config import RuntimeConfig
from ..memory import available_memory_bytes
from ..page_budget import demand_of, num_pages
from ..protocol import ExecutorCaps
from .onnx_model import OnnxModel
from .processors import usable_processors
from .stepped import OracleSampled, SteppedExecutor


def open_executor(artifact: Artifact, config: RuntimeConfig) -> SteppedExecutor:
    """The executor of an artifact of target kind `onnx`."""
    model, caps = open_model(artifact, config)
    return SteppedExecutor(OracleSampled(model), caps)


def open_model(artifact: Artifact, config: RuntimeConfig) -> tuple[OnnxModel, ExecutorCaps]:
    """What computes the executor's steps, and what the executor says of itself."""
    spec, layout = artifact.manifest.spec, artifact.manifest.cache
    unit = decode_onnx_unit(artifact.read_bytes(ONNX_UNIT))
    demand = demand_of(config, spec.max_context)
    pages = num_pages(layout, demand, config.cache_bytes, available_memory_bytes())
    threads = config.num_threads or usable_processors()
    model = OnnxModel(
        artifact.path / ONNX_ENGINE,
        unit,
        layout,
        pages,
        config.max_requests,
        demand.max_model_len,
        spec.vocab_size,
        threads,
    )
    caps = ExecutorCaps(
        name="onnxruntime",
        vocab_size=spec.vocab_size,
        max_context=spec.max_context,
        max_rows=config.max_requests,
        max_tokens=config.max_step_tokens,
        max_in_flight=1,
        cache=layout,
        num_blocks=pages,
        details={
            "onnxruntime": metadata.version("onnxruntime"),
            "providers": ", ".join(model.providers),
            "threads": str(threads),
        },
    )
    return model, caps
