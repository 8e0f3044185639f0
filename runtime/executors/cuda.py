"""The CUDA executor: an artifact's compiled kernels on one GPU. Steps of few tokens are replayed, others
launched kernel by kernel; both sample on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ...artifact.cuda import CUDA_UNIT, ArenaPlan, CudaUnit, decode_unit
from ...artifact.reader import Artifact
from ...artifact.schema import PROGRAM
from ...ir.document import ProgramDocument, decode_program
from ...ir.weights import Source, WeightStore
from ...kernels.cuda.launch import Launcher
from ...kernels.cuda.sampler import DeviceSampler, make_space, space_bytes, table_bytes
from ...kernels.cuda.variants import Choose, ProductClass, Variant, modelled
from ...spec.cache import CacheLayout
from ...spec.errors import TargetError
from ...spec.history import is_invariant
from ...spec.plans import CapturePlan
from ..config import RuntimeConfig
from ..page_budget import CacheDemand, bytes_of, demand_of, num_pages
from ..protocol import ExecutorCaps
from .cuda_device import Device
from .cuda_driver import CudaDriver
from .cuda_executor import GRAPHS, LISTS, CudaExecutor
from .cuda_graphs import record
from .cuda_kernels import CudaKernels
from .cuda_lists import Pack
from .cuda_model import CudaModel
from .cuda_rows import DeviceRows
from .cuda_steps import Recorder, StepGraphs

_DEVICE = "cuda:0"
# Of the device's memory beside weights, tables and arenas, what the cache takes at most: launched steps take
# theirs from torch.
_CACHE_SHARE = 0.85
# Of the free memory, what recorded steps may take to replay more prompt tokens than requests.
_PROMPT_SHARE = 1 / 32
# Steps enqueued at a time: while one runs, the next is planned.
_IN_FLIGHT = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What an executor runs on: a device, what carries launches out, what records them and what makes lists
    of them ready (None: nothing does), and the bytes that are free on it."""

    device: Device
    launcher: Launcher
    recorder: Recorder | None
    free_bytes: int
    details: dict[str, str]
    pack: Pack | None = None


def open_executor(artifact: Artifact, config: RuntimeConfig) -> CudaExecutor:
    """The executor of an artifact of target kind `cuda`; its weights are copied to the device.

    Raises TargetError where there is no GPU, none that its kernels run on, or too little of its memory free.
    """
    return make_executor(artifact, config, open_machine(artifact, overlaps=config.device_overlap))


def open_machine(artifact: Artifact, *, overlaps: bool = False) -> Machine:
    """This machine's GPU, with the kernels of an artifact of target kind `cuda` loaded; with `overlaps` they
    may begin before the launch ahead of them has ended.

    Raises TargetError where there is none, or none that the kernels run on.
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
    device, driver = Device(_DEVICE), CudaDriver()
    kernels = CudaKernels(artifact, unit, capability, driver, lambda: device.stream, overlaps=overlaps)
    return Machine(
        device=device,
        launcher=kernels,
        recorder=lambda work: record(driver, device.stream, work),
        free_bytes=free_bytes,
        details={"device": torch.cuda.get_device_name(_DEVICE), "kernels": kernels.origin},
        pack=kernels.pack,
    )


def make_executor(artifact: Artifact, config: RuntimeConfig, machine: Machine) -> CudaExecutor:
    """An executor on any machine. Raises TargetError when what it needs is more than there is, before
    anything is loaded."""
    spec, layout = artifact.manifest.spec, artifact.manifest.cache
    unit = decode_unit(artifact.read_bytes(CUDA_UNIT))
    stored = stored_program(artifact, unit)
    demand = demand_of(config, spec.max_context)
    replays = machine.recorder is not None and config.device_graphs != "off"
    pack = None if config.device_lists == "off" else machine.pack
    plans = step_plans(unit.arenas, config, machine.free_bytes) if replays else ()
    lengths = tuple(group.pages_for(demand.max_model_len) for group in layout.groups)
    fixed = {
        "weights": stored.weights.total_bytes,
        "rows of requests": table_bytes(config.max_requests, spec.vocab_size, lengths)
        + space_bytes(max([config.max_requests, *(plan.rows for plan in plans)]), spec.vocab_size),
        "recorded steps": max((plan.num_bytes for plan in plans), default=0),
    }
    free_bytes = machine.free_bytes - sum(fixed.values())
    pages = _pages(layout, demand, config, fixed, free_bytes)
    model = _model(stored, layout, pages, replace(machine, pack=pack), config.max_step_tokens)
    caps = ExecutorCaps(
        name="cuda",
        vocab_size=spec.vocab_size,
        max_context=spec.max_context,
        max_rows=config.max_requests,
        max_tokens=config.max_step_tokens,
        max_in_flight=_IN_FLIGHT,
        cache=layout,
        num_blocks=pages,
        details=machine.details,
    )
    capture = artifact.manifest.capture or CapturePlan(decode_rows=())
    return executor_around(model, caps, config, machine, demand.max_model_len, plans, capture)


def open_model(artifact: Artifact, machine: Machine, num_pages: Sequence[int], max_tokens: int) -> CudaModel:
    """The model of an artifact alone, over caches of `num_pages` a group, without rows and samplers."""
    unit = decode_unit(artifact.read_bytes(CUDA_UNIT))
    return _model(stored_program(artifact, unit), artifact.manifest.cache, num_pages, machine, max_tokens)


def executor_around(
    model: CudaModel,
    caps: ExecutorCaps,
    config: RuntimeConfig,
    machine: Machine,
    max_length: int,
    plans: tuple[ArenaPlan, ...],
    capture: CapturePlan,
) -> CudaExecutor:
    """Rows, space and graphs around a model; graphs are recorded as `capture` says, of `plans`."""
    device, sampler = machine.device, DeviceSampler(machine.launcher)
    rows = DeviceRows(
        device,
        sampler,
        caps.cache,
        num_rows=config.max_requests,
        vocab_size=caps.vocab_size,
        max_length=max_length,
    )
    most = max([config.max_requests, *(plan.rows for plan in plans)])
    space = make_space(device.zeros, most, caps.vocab_size)
    results = device.zeros((most, 2 + config.draft_tokens), "int32")
    device.settle()
    executor = CudaExecutor(
        model,
        rows,
        caps,
        device,
        sampler=sampler,
        space=space,
        results=results,
        demanded=[name for name, switch in _switches(config).items() if switch == "on"],
    )
    if plans and (recorder := machine.recorder) is not None:
        executor.add_graphs(
            lambda: StepGraphs(
                model,
                rows.tables,
                space,
                results,
                device=device,
                launcher=machine.launcher,
                recorder=recorder,
                plans=plans,
                capture=capture,
            )
        )
    return executor


def _switches(config: RuntimeConfig) -> dict[str, str]:
    """What the settings say of ways to run a step, by name."""
    return {GRAPHS: config.device_graphs, LISTS: config.device_lists}


def step_plans(arenas: Sequence[ArenaPlan], config: RuntimeConfig, free_bytes: int) -> tuple[ArenaPlan, ...]:
    """Of the steps that may be recorded, fewest tokens first, those for an engine with such settings: up to
    the first that holds a token and the drafts of every request, and beyond it, for prompts, as long as a
    step may have so many tokens and little of the memory is taken."""
    drafted = config.draft_tokens if config.speculation != "none" else 0
    least = min(config.max_requests * (1 + drafted), config.max_step_tokens)
    needed = sum(plan.rows < least for plan in arenas) + 1
    most_bytes = free_bytes * _PROMPT_SHARE
    more = (
        plan
        for plan in arenas[needed:]
        if plan.rows <= config.max_step_tokens and plan.num_bytes <= most_bytes
    )
    return (*arenas[:needed], *more)


def _pages(
    layout: CacheLayout,
    demand: CacheDemand,
    config: RuntimeConfig,
    fixed: dict[str, int],
    free_bytes: int,
) -> tuple[int, ...]:
    """Pages of the cache in what is left. Raises TargetError with a table of what needs how much."""
    least = bytes_of(layout, demand.pages_per_sequence(layout))
    wanted = config.cache_bytes or least
    if wanted <= free_bytes:
        return num_pages(layout, demand, config.cache_bytes, free_bytes, _CACHE_SHARE)
    needs = fixed | {"cache": wanted}
    listed = ", ".join(f"{name} {size:,}" for name, size in needs.items())
    raise TargetError(
        "cuda.memory",
        "The model does not fit into the GPU's memory.",
        f"It needs {sum(needs.values()):,} bytes ({listed}), "
        f"and {free_bytes + sum(fixed.values()):,} are free.",
        "Lower cache_bytes, max_model_len or max_requests, compile with fewer bits, or end other processes.",
    )


@dataclass(frozen=True, slots=True)
class StoredProgram:
    """A program, the tensors of the files by the names that it reads, which variants its products take, and
    whether all of them are `invariant`."""

    document: ProgramDocument
    weights: WeightStore
    choose: Choose
    invariant: bool


def stored_program(artifact: Artifact, unit: CudaUnit) -> StoredProgram:
    """The final program of an artifact; its codes are words."""
    document = decode_program(artifact.read_bytes(PROGRAM))
    names = {str(node.target) for node in document.graph.nodes if node.op == "get_attr"}
    words = {word.codes: word.stored for word in unit.words}
    files = {name: (file, view) for file, views in artifact.weight_files() for name, view in views.items()}
    entries: dict[str, Source] = {}
    for name in sorted(names):
        stored = words.get(name, name)
        file, view = files[stored]
        entries[name] = Source(str(artifact.path / file), stored, view.shape, getattr(torch, view.dtype))
    return StoredProgram(
        document, WeightStore(entries), stored_choice(unit), is_invariant(artifact.manifest.history)
    )


def stored_choice(unit: CudaUnit) -> Choose:
    """The variants that an artifact's kernels were compiled in."""
    stored = {
        each.product: Variant(columns=each.columns, warps=each.warps, stages=each.stages)
        for each in unit.variants
    }

    def choose(product: ProductClass) -> Variant:
        return stored.get(product.name) or modelled(product)

    return choose


def _model(
    stored: StoredProgram, layout: CacheLayout, num_pages: Sequence[int], machine: Machine, max_tokens: int
) -> CudaModel:
    device = machine.device
    try:
        weights = {name: stored.weights.evaluate(name).to(device.name) for name in stored.weights}
        return CudaModel(
            stored.document.graph,
            weights.__getitem__,
            layout,
            num_pages,
            launcher=machine.launcher,
            device=device,
            max_tokens=max_tokens,
            choose=stored.choose,
            invariant=stored.invariant,
            pack=machine.pack,
        )
    except torch.OutOfMemoryError as error:
        raise TargetError(
            "cuda.memory_taken",
            "The GPU's memory ran out while the model was loaded.",
            f"Enough was free before: something else on it took memory meanwhile. "
            f"{str(error).splitlines()[0]}",
            "End the other processes (nvidia-smi names them) or wait for them, or lower cache_bytes.",
        ) from error
