"""Whole engines over random weights: the same tokens whichever way a step runs, and what a token costs with
everything around the step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from device import CompiledOnDemand, settled

import models
from llmc.codegen.cuda.dry_walk import needs_of
from llmc.runtime.config import RuntimeConfig
from llmc.runtime.draft_policy import DraftPolicy
from llmc.runtime.engine import Engine
from llmc.runtime.executors.cuda import Machine, executor_around, step_plans
from llmc.runtime.executors.cuda_device import Device
from llmc.runtime.executors.cuda_executor import CudaExecutor
from llmc.runtime.executors.cuda_model import CudaModel
from llmc.runtime.executors.stepped import SteppedExecutor
from llmc.runtime.executors.tiles import SequencePart
from llmc.runtime.protocol import ExecutorCaps, RowDiff, SamplingState
from llmc.runtime.request import FinishReason, Request, RunningRequest
from llmc.runtime.speculation import Speculator
from llmc.spec.history import is_invariant

SAMPLINGS = (
    SamplingState(),
    SamplingState(temperature=0.8, top_p=0.9, top_k=50, seed=11),
    SamplingState(temperature=1.2, min_p=0.05, repetition_penalty=1.1, presence_penalty=0.4, seed=2**63 + 1),
)


# Tokens that ways of running a step are compared over; (batch, tokens) that are timed; an engine's settings.
TOKENS = 24
RATES = ((1, 200), (64, 100))
SHORT = 96  # tokens of a short prompt
LENGTHS = 6  # of prompts whose launching is timed
CONFIG = {"max_requests": 64, "max_step_tokens": 2048, "max_model_len": 2048}


def machine_of(launcher: CompiledOnDemand) -> Machine:
    """The GPU; launches go to one stream, where they can be recorded."""
    device = Device(models.DEVICE)
    free_bytes = torch.cuda.mem_get_info(models.DEVICE)[0] if device.is_cuda else 1 << 30
    return Machine(
        device=device,
        launcher=launcher,
        recorder=launcher.recorder(device),
        free_bytes=free_bytes,
        details={},
        pack=launcher.pack,
    )


class Served:
    """A random model with an executor around it, as an artifact's. `pages` are its cache's."""

    def __init__(self, shape: str, scheme: str, machine: Machine, config: RuntimeConfig, pages: int) -> None:
        self.program, self.config = models.program_of(shape, scheme), config
        assert self.program.cache is not None
        needs = needs_of(self.program, models.read_weights(self.program))
        machine.launcher.prepare(needs.kernels)
        self._arenas = needs.arenas
        self._weights = models.random_weights(self.program)
        self._machine, self._pages = machine, pages

    def executor(self, *, graphs: bool, lists: bool = True) -> CudaExecutor:
        """One over the weights, with caches of its own."""
        layout, machine, config = self.program.cache, self._machine, self.config
        assert layout is not None
        assert self.program.capture is not None
        pages = [self._pages for _ in layout.groups]
        with machine.device.scope():
            model = CudaModel(
                self.program.graph,
                self._weights.__getitem__,
                layout,
                pages,
                launcher=machine.launcher,
                device=machine.device,
                max_tokens=config.max_step_tokens,
                invariant=is_invariant(self.program.history),
                pack=machine.pack if lists else None,
            )
            caps = ExecutorCaps(
                name="cuda",
                vocab_size=self.program.spec.vocab_size,
                max_context=config.max_model_len or self.program.spec.max_context,
                max_rows=config.max_requests,
                max_tokens=config.max_step_tokens,
                max_in_flight=2,
                cache=layout,
                num_blocks=tuple(pages),
            )
            plans = step_plans(self._arenas, config, machine.free_bytes) if graphs else ()
            length = config.max_model_len or self.program.spec.max_context
            return executor_around(model, caps, config, machine, length, plans, self.program.capture)


class KnownDrafts:
    """Drafts what `answers` say by request; where `errs`, of a text of even length the second is wrong."""

    is_free = True

    def __init__(self, answers: dict[int, list[int]], *, errs: bool) -> None:
        self._answers, self._errs = answers, errs

    def propose(self, requests: Sequence[RunningRequest], k: int) -> dict[RunningRequest, tuple[int, ...]]:
        drafts: dict[RunningRequest, tuple[int, ...]] = {}
        for request in requests:
            done = len(request.token_ids) - len(request.request.prompt_token_ids)
            draft = self._answers[request.request.request_id][done : done + k]
            if self._errs and len(request.token_ids) % 2 == 0 and len(draft) > 1:
                draft[1] ^= 1
            drafts[request] = tuple(draft)
        return drafts

    def forget(self, request_id: int) -> None:
        """Nothing is remembered."""


def generated(
    executor,
    config: RuntimeConfig,
    prompts,
    samplings,
    count: int | list[int],
    drafts: KnownDrafts | None = None,
) -> tuple[dict, list[float]]:
    """Tokens by request, `count` of each or by request, and the seconds between ends of steps."""
    speculator = None if drafts is None else Speculator(drafts, DraftPolicy(config.draft_tokens))
    engine = Engine(executor, config, speculator=speculator)
    counts = [count] * len(prompts) if isinstance(count, int) else count
    for number, (prompt, sampling, most) in enumerate(zip(prompts, samplings, counts, strict=True)):
        request = Request(
            request_id=number, prompt_token_ids=tuple(prompt), max_tokens=most, sampling=sampling
        )
        engine.add_request(request)
    tokens: dict[int, list[int]] = {number: [] for number in range(len(prompts))}
    ends = [time.perf_counter()]
    while engine.has_work():
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
            if output.finished is not None and output.finished.reason is not FinishReason.LENGTH:
                raise AssertionError(f"request {output.request_id} ended: {output.finished}")
        ends.append(time.perf_counter())
    executor.apply(RowDiff(leave=tuple(range(config.max_requests))))
    return tokens, [later - sooner for sooner, later in pairwise(ends)]


def same_tokens(shape: str, scheme: str, machine: Machine) -> dict:
    """Replayed, launched and oracle-sampled steps, in a batch and alone, with drafts, and with kernels that
    begin early: which of them give the same tokens."""
    config = RuntimeConfig(
        max_requests=4, max_step_tokens=64, max_model_len=128, prefix_cache=False, draft_tokens=4
    )
    drafting = replace(config, speculation="ngram")  # as many tokens a step as drafts make
    served, count = Served(shape, scheme, machine, drafting, pages=16), TOKENS
    prompts = [(3, 5, 7, 9, 11), (2, 4), (1, 8, 6)]
    tokens: dict[str, object] = {}
    with_graphs = served.executor(graphs=True)
    first, _ = generated(with_graphs, config, prompts, SAMPLINGS, count)
    tokens["replayed"], drafts = first, KnownDrafts(first, errs=True)
    tokens["verified"], _ = generated(with_graphs, config, prompts, SAMPLINGS, count, drafts)
    alone: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        found, _ = generated(with_graphs, config, [prompt], SAMPLINGS[index : index + 1], count)
        alone[index] = found[0]
    tokens["alone"] = alone
    steps = {"replayed_steps": with_graphs.num_replayed, "launched_steps": with_graphs.num_launched}
    with_graphs.close()
    machine.launcher.overlaps = True
    early = served.executor(graphs=True)
    tokens["early"], _ = generated(early, config, prompts, SAMPLINGS, count)
    early.close()
    machine.launcher.overlaps = False
    if machine.pack is not None:
        listing = served.executor(graphs=False)
        tokens["by lists"], _ = generated(listing, config, prompts, SAMPLINGS, count)
        listing.close()
    launching = served.executor(graphs=False, lists=False)
    tokens["launched"], _ = generated(launching, config, prompts, SAMPLINGS, count)
    tokens["verified, launched"], _ = generated(launching, config, prompts, SAMPLINGS, count, drafts)
    caps = replace(launching.caps, max_in_flight=1)
    stepped = SteppedExecutor(launching.model, caps)
    tokens["oracle sampled"], _ = generated(stepped, config, prompts, SAMPLINGS, count)
    launching.close()
    same = {name: found == tokens["replayed"] for name, found in tokens.items()}
    if not all(same.values()):
        raise AssertionError(f"tokens differ: {tokens}")
    return {"same": same, "tokens": count, **steps}


def engine_rates(shape: str, scheme: str, machine: Machine) -> dict:
    """Seconds a token with engine, sampling and results around it, and how long graphs took to record."""
    config = RuntimeConfig(prefix_cache=False, draft_tokens=4, **CONFIG)
    pages = config.max_requests * (config.max_model_len // models.PAGE + 1)
    served = Served(shape, scheme, machine, config, pages=pages)
    began = time.perf_counter()
    executor = served.executor(graphs=True)
    found: dict = {
        "load_graphs_s": time.perf_counter() - began,
        "launches": served.program.capture.num_launches,
    }
    for batch, count in RATES:
        prompts = [(1 + index, 2, 3, 4) for index in range(batch)]
        sampling = [SAMPLINGS[0]] * batch
        generated(executor, config, prompts, sampling, min(8, count))
        cpu = time.process_time()
        _, seconds = generated(executor, config, prompts, sampling, count)
        cpu = time.process_time() - cpu
        steady = seconds[8:-2] or seconds
        found[f"decode b{batch}"] = {
            "ms_step": statistics.median(steady) * 1e3,
            "tok_s": batch / statistics.median(steady),
            "cpu_share": cpu / sum(seconds),
        }
    found |= _verification(executor, config)
    found["first token of a short prompt, ms"] = {"replayed": _first_token_ms(executor, config)}
    executor.close()
    for name, lists in (("by operators", False), ("by lists", True)):
        if lists and machine.pack is None:
            continue
        launching = served.executor(graphs=False, lists=lists)
        found["first token of a short prompt, ms"][name] = _first_token_ms(launching, config)
        with machine.device.scope():
            found[f"launching {name}, ms"] = _launching_ms(launching)
        launching.close()
    return found


def _launching_ms(executor: CudaExecutor) -> dict[str, float]:
    """Milliseconds of the CPU until steps of one prompt were enqueued: of lengths that are new each time, and
    the same one again."""
    model, page = executor.launched, models.PAGE
    times: dict[str, list[float]] = {"new": [], "again": []}
    for tokens in range(SHORT, SHORT + LENGTHS):
        ids = [1 + index % 50 for index in range(tokens)]
        part = SequencePart(
            start=0, token_ids=ids, block_tables=[list(range(-(-tokens // page)))], wanted=[tokens - 1]
        )
        for name in times:
            settled()
            began = time.perf_counter()
            model.forward([part], lambda _: None)
            times[name].append((time.perf_counter() - began) * 1e3)
    settled()
    return {name: statistics.median(found) for name, found in times.items()}


def _verification(executor: CudaExecutor, config: RuntimeConfig) -> dict:
    """Milliseconds of a step of one request whose drafts are all accepted, and tokens a second."""
    prompts, sampling, count = [(1, 2, 3, 4)], SAMPLINGS[:1], RATES[0][1]
    answers, _ = generated(executor, config, prompts, sampling, count)
    drafts = KnownDrafts(answers, errs=False)
    generated(executor, config, prompts, sampling, count, drafts)
    _, seconds = generated(executor, config, prompts, sampling, count, drafts)
    step = {"ms_step": statistics.median(seconds[1:] or seconds) * 1e3, "tok_s": count / sum(seconds)}
    return {f"verify b1 with {config.draft_tokens} drafts": step}


def _first_token_ms(executor: CudaExecutor, config: RuntimeConfig) -> float:
    """Milliseconds to the first token of a prompt that a recorded step holds."""
    prompt = [1 + index % 50 for index in range(SHORT)]
    times = [generated(executor, config, [prompt], SAMPLINGS[:1], 1)[1] for _ in range(4)]
    return min(sum(seconds) for seconds in times) * 1e3
