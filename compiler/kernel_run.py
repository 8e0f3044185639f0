"""A CUDA artifact's launches, carried out one after the other with the value of every node read between them:
by its machine code on a GPU, or from the kernels' source by triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from ..artifact.cuda import CUDA_UNIT, decode_unit
from ..artifact.reader import Artifact, open_unchecked
from ..ir.interpret import Observer
from ..ir.paged import PagedSequence, scatter_pages
from ..kernels.cuda.launch import Launch, Launcher, Specialisation
from ..spec.errors import ArtifactError, TargetError
from .node_values import NodeRun, run_steps

if TYPE_CHECKING:
    from ..runtime.executors.cuda import Machine


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelRun:
    """What the nodes computed, and what each launched, by its name, in order."""

    nodes: NodeRun
    launches: dict[str, tuple[Specialisation, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sent:
    """A `KernelRun` on its way out of a process, which torch's tensors do not survive."""

    rows: dict[str, NDArray[Any]]
    logits: NDArray[Any]
    launches: dict[str, tuple[Specialisation, ...]]


class _Noted:
    """A launcher that also remembers what was launched since it was last asked."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self._launched: list[Specialisation] = []

    def __call__(self, launch: Launch) -> None:
        self._launched.append(launch.specialisation)
        self._launcher(launch)

    def taken(self) -> list[Specialisation]:
        """Since the last call."""
        launched, self._launched = self._launched, []
        return launched


def run_on_gpu(artifact: Artifact, prompts: Sequence[tuple[int, ...]]) -> tuple[KernelRun, str]:
    """The run of the stored machine code, and the name of the GPU. Raises TargetError where it does not
    run."""
    from ..runtime.executors.cuda import open_machine

    machine = open_machine(artifact)
    return run_launches(artifact, machine, prompts), machine.details["device"]


def run_interpreted(path: Path, prompts: Sequence[tuple[int, ...]]) -> KernelRun:
    """The run of the kernels' source, in a process of its own: triton reads whether it is to interpret when
    kernels are imported, and its corrections are for all of a process.

    Raises ArtifactError where a launch has no entry in the artifact's launch table, and TargetError where the
    process ended.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_interpret) as pool:
        try:
            sent = pool.submit(_run_in_process, path, tuple(prompts)).result()
        except BrokenProcessPool as error:
            raise TargetError(
                "cuda.interpreter",
                "The process that interpreted the kernels ended.",
                "It gave no reason; most often memory ran out.",
                "Trace a shorter --prompt, or on a machine with a GPU.",
            ) from error
    rows = {name: torch.from_numpy(values) for name, values in sent.rows.items()}
    nodes = NodeRun(rows=rows, logits=torch.from_numpy(sent.logits))
    return KernelRun(nodes=nodes, launches=sent.launches)


def interpret_launches(
    artifact: Artifact, prompts: Sequence[tuple[int, ...]], launcher: Launcher | None = None
) -> KernelRun:
    """`run_interpreted` in this process, where TRITON_INTERPRET was set before triton was imported."""
    from ..kernels.cuda.interpreter import correct_interpreter
    from ..kernels.cuda.jit import launch_jit
    from ..runtime.executors.cuda import Machine
    from ..runtime.executors.cuda_device import Device

    correct_interpreter()
    machine = Machine(
        device=Device("cpu"), launcher=launcher or launch_jit, recorder=None, free_bytes=0, details={}
    )
    keys = {kernel.key for kernel in decode_unit(artifact.read_bytes(CUDA_UNIT)).kernels}

    def launch_known(launch: Launch) -> None:
        if 0 not in launch.grid and launch.specialisation.key not in keys:
            raise ArtifactError(
                "artifact.cuda_kernels",
                "The launch table of this artifact is not that of its program.",
                f"This llmc launches kernel {launch.specialisation.kernel!r} in a form that is not there.",
                "Compile the model again with this version of llmc, then trace it.",
            )
        machine.launcher(launch)

    return run_launches(artifact, replace(machine, launcher=launch_known), prompts)


def run_launches(artifact: Artifact, machine: Machine, prompts: Sequence[tuple[int, ...]]) -> KernelRun:
    """Run `prompts` (token ids, at least two each) on a machine: all their tokens but the last in one step of
    prefill, the last ones in a step of decode."""
    from ..runtime.executors.cuda import open_model

    noted = _Noted(machine.launcher)
    lengths = [len(prompt) for prompt in prompts]
    pages = scatter_pages(artifact.manifest.cache, lengths, seed=0)
    own = replace(machine, launcher=noted)
    model = open_model(artifact, own, pages.num_pages, sum(lengths))
    launches: dict[str, list[Specialisation]] = {}

    def forward(parts: Sequence[PagedSequence], observe: Observer) -> Tensor:
        def see(node: fx.Node, value: Any) -> None:
            launched = noted.taken()
            if launched:
                launches.setdefault(node.name, []).extend(launched)
            observe(node, value)

        with machine.device.scope():
            logits = model.forward(parts, lambda ids: None, see)
        assert logits is not None, "the logits of all tokens are wanted"
        return logits

    try:
        ends = [(length - 1, length) for length in lengths]
        nodes = run_steps(prompts, pages.tables, ends, forward)
    finally:
        model.close()
    return KernelRun(nodes=nodes, launches={name: tuple(found) for name, found in launches.items()})


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"


def _run_in_process(path: Path, prompts: tuple[tuple[int, ...], ...]) -> _Sent:
    run = interpret_launches(open_unchecked(path), prompts)
    rows = {name: values.numpy() for name, values in run.nodes.rows.items()}
    return _Sent(rows=rows, logits=run.nodes.logits.float().numpy(), launches=run.launches)
