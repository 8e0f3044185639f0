"""The CUDA executor: an artifact's compiled kernels on one GPU, launched one by one, sampled by the oracle
sampler."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...artifact.cuda import CUDA_UNIT, CudaUnit, decode_unit
from ...artifact.reader import Artifact
from ...artifact.schema import PROGRAM
from ...ir.document import decode_program
from ...ir.weights import Source, WeightStore
from ...kernels.cuda.launch import Launcher
from ...spec.errors import TargetError
from ..config import RuntimeConfig
from ..page_budget import demand_of, num_pages
from ..protocol import ExecutorCaps
from .cuda_driver import CudaDriver
from .cuda_kernels import CudaKernels
from .cuda_model import CudaModel
from .stepped import OracleSampled, SteppedExecutor

_DEVICE = "cuda:0"


def open_executor(artifact: Artifact, config: RuntimeConfig) -> SteppedExecutor:
    """The executor of an artifact of target kind `cuda`; its weights are copied to the device.

    Raises TargetError where there is no GPU, none that its kernels run on, or too little of its memory free.
    """
    if not torch.cuda.is_available():
        raise TargetError(
            "cuda.no_device",
            "The artifact needs an NVIDIA GPU.",
            "torch finds none on this machine.",
            "Run it where there is one, or compile the model with --target cpu.",
        )
    torch.cuda.init()
    unit = decode_unit(artifact.read_bytes(CUDA_UNIT))
    free_bytes, _ = torch.cuda.mem_get_info(_DEVICE)
    capability = torch.cuda.get_device_capability(_DEVICE)
    torch.zeros(1, device=_DEVICE)  # makes torch's context the current one
    stream: Callable[[], int] = lambda: torch.cuda.current_stream(_DEVICE).cuda_stream  # noqa: E731
    kernels = CudaKernels(artifact, unit, capability, CudaDriver(), stream)
    details = {"device": torch.cuda.get_device_name(_DEVICE), "kernels": kernels.architecture}
    return make_executor(artifact, config, kernels, _DEVICE, free_bytes, details)


def make_executor(
    artifact: Artifact,
    config: RuntimeConfig,
    launcher: Launcher,
    device: str,
    free_bytes: int,
    details: dict[str, str],
) -> SteppedExecutor:
    """An executor over any launcher. Raises TargetError when weights and cache need more than
    `free_bytes`."""
    spec, layout = artifact.manifest.spec, artifact.manifest.cache
    unit = decode_unit(artifact.read_bytes(CUDA_UNIT))
    document = decode_program(artifact.read_bytes(PROGRAM))
    names = {str(node.target) for node in document.graph.nodes if node.op == "get_attr"}
    store = _stored(artifact, unit, names)
    if store.total_bytes > free_bytes:
        raise TargetError(
            "cuda.memory",
            "The model does not fit into the GPU's memory.",
            f"Its weights take {store.total_bytes} bytes, and {free_bytes} are free.",
            "Compile it with fewer bits, or free the device of other processes.",
        )
    weights = {name: store.evaluate(name).to(device) for name in names}
    demand = demand_of(config, spec.max_context)
    pages = num_pages(layout, demand, config.cache_bytes, free_bytes - store.total_bytes)
    model = CudaModel(
        document.graph,
        weights.__getitem__,
        layout,
        pages,
        launcher=launcher,
        device=device,
        max_tokens=config.max_step_tokens,
    )
    caps = ExecutorCaps(
        name="cuda",
        vocab_size=spec.vocab_size,
        max_context=spec.max_context,
        max_rows=config.max_requests,
        max_tokens=config.max_step_tokens,
        max_in_flight=1,
        cache=layout,
        num_blocks=pages,
        details=details,
    )
    return SteppedExecutor(OracleSampled(model), caps)


def _stored(artifact: Artifact, unit: CudaUnit, names: set[str]) -> WeightStore:
    """The tensors of the files by the names that the program reads; codes as words."""
    words = {word.codes: word.stored for word in unit.words}
    files = {name: (file, view) for file, views in artifact.weight_files() for name, view in views.items()}
    entries: dict[str, Source] = {}
    for name in sorted(names):
        stored = words.get(name, name)
        file, view = files[stored]
        entries[name] = Source(str(artifact.path / file), stored, view.shape, getattr(torch, view.dtype))
    return WeightStore(entries)
