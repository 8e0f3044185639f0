"""Steps launched by lists against the same steps launched as their operators are computed: the same kernels
over the same grids on the same numbers, and on memory that nobody else needs meanwhile."""

from __future__ import annotations

from itertools import combinations
from random import Random

import pytest
import torch

from llmc.artifact.cuda import CUDA_UNIT, decode_unit
from llmc.ir.paged import PagedSequence, step_inputs
from llmc.runtime.executors.cuda import Machine, open_model
from llmc.runtime.executors.cuda_device import Device
from llmc.runtime.executors.cuda_driver import CudaDriver
from llmc.runtime.executors.cuda_kernels import CudaKernels
from llmc.spec.errors import InternalError

pytest.importorskip("triton")
# Sequences of a step: (cached tokens, tokens). Few and many rows, one and several tokens of a sequence.
STEPS = [
    [(0, 1)],
    [(5, 1), (70, 1), (0, 1)],
    [(0, 7)],
    [(0, 30), (12, 1), (3, 4)],
    [(0, 100)],
    [(40, 1)] * 20 + [(0, 150)],
    [(64, 90), (0, 33)],
]


@pytest.fixture(scope="module")
def model(cuda_artifact, cuda_stub):
    """The model of an artifact over the stub driver, which carries nothing out."""
    library, _ = cuda_stub
    device, driver = Device("cpu"), CudaDriver(str(library))
    unit = decode_unit(cuda_artifact.read_bytes(CUDA_UNIT))
    kernels = CudaKernels(cuda_artifact, unit, (9, 0), driver, lambda: device.stream)
    machine = Machine(
        device=device, launcher=kernels, recorder=None, free_bytes=0, details={}, pack=kernels.pack
    )
    made = open_model(cuda_artifact, machine, [64], 512)
    yield made
    made.close()


def parts_of(step, *, wanted=True):
    pages, parts = 0, []
    for start, count in step:
        held = -(-(start + count) // 64)
        table = [(pages + index) % 64 for index in range(held)]
        pages += held
        parts.append(
            PagedSequence(
                start=start,
                token_ids=[3 + index % 40 for index in range(count)],
                block_tables=[table],
                wanted=[count - 1] if wanted else [],
            )
        )
    return parts


def launched(log, work):
    """What `work` returns, and the launches in it: name, grid, threads, shared memory, stream, parameters."""
    log.write_text("")
    found = work()
    lines = [line.split() for line in log.read_text().splitlines()]
    assert {line[0] for line in lines} == {"launch"}
    return found, [(tuple(line[1:6]), [int(word) for word in line[6:]]) for line in lines]


def by_operators(model, log, parts):
    """A step's launches as operators make them, all of its tensors kept: bytes by address."""
    kept = []

    def empty(like, shape, dtype):
        kept.append(like.new_empty(shape, dtype=dtype or like.dtype))
        return kept[-1]

    def keep(node, value):
        kept.extend(each for each in (value if isinstance(value, tuple) else (value,)) if each is not None)

    inputs = step_inputs(model.layout, parts)
    graph = model.graph_by(model.operators(empty))
    _, found = launched(log, lambda: model.compute(graph, inputs, keep))
    inner = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in kept}
    outer = {each.data_ptr() for each in inputs.values()}
    return found, {start: size for start, size in inner.items() if start not in outer}


def owner_of(address, memory):
    return next((start for start, size in memory.items() if start <= address < start + size), None)


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_a_list_launches_what_operators_launch_in_memory_of_its_own(model, cuda_stub, cuda_artifact, step):
    log, parts = cuda_stub[1], parts_of(step)
    expected, memory = by_operators(model, log, parts)
    _, found = launched(log, lambda: model.forward(parts, lambda ids: None))
    kinds = {
        kernel.name: kernel.parameters for kernel in decode_unit(cuda_artifact.read_bytes(CUDA_UNIT)).kernels
    }
    assert [head for head, _ in found] == [head for head, _ in expected]
    moved, lives = {}, {}
    for index, ((head, ours), (_, theirs)) in enumerate(zip(found, expected, strict=True)):
        assert len(ours) == len(theirs) > len(kinds[head[0]]) - 3
        for own, other in zip(ours, theirs, strict=True):
            base = owner_of(other, memory)
            if base is None:
                continue
            # A tensor lies in one place as long as it is needed.
            assert moved.setdefault(base, own - other) == own - other
            first, _ = lives.get(base, (index, index))
            lives[base] = (first, index)
    for one, two in combinations(lives, 2):
        begins, others = one + moved[one], two + moved[two]
        if begins < others + memory[two] and others < begins + memory[one]:
            (first, last), (others_first, others_last) = lives[one], lives[two]
            assert last < others_first or others_last < first


def numbers_of(launches, known):
    """Launches but for addresses of what a step makes and is given."""
    return [(head, [word for word in words if word < 1 << 32 or word in known]) for head, words in launches]


def test_steps_of_any_size_in_any_order_write_their_own_numbers(model, cuda_stub):
    log, random = cuda_stub[1], Random(5)
    for _ in range(12):
        sizes = [(random.randrange(90), random.choice((1, 1, 2, 9, 40))) for _ in range(random.randint(1, 9))]
        parts = parts_of(sizes, wanted=random.random() < 0.8)
        inputs = model._sent(step_inputs(model.layout, parts))
        wanted = any(part.wanted for part in parts)
        graph = model._whole if wanted else model._body
        _, expected = launched(log, lambda g=graph, i=inputs: model.compute(g, i))
        logits, found = launched(log, lambda p=parts: model.forward(p, lambda ids: None))
        held = {tensor.data_ptr() for tensor in model._caches.values()}
        assert numbers_of(found, held) == numbers_of(expected, held)
        assert (logits is not None) == wanted
        if wanted:
            assert logits.shape[0] == sum(len(part.wanted) for part in parts)


def test_lists_are_made_once_for_all_steps_of_the_same_kernels(model):
    lists = model._lists[True]
    for step in STEPS:
        model.forward(parts_of(step), lambda ids: None)
    before = lists.num_lists
    for tokens in (101, 117, 200, 131):
        model.forward(parts_of([(0, tokens)]), lambda ids: None)
    assert lists.num_lists == before


def test_a_parameter_that_is_not_aligned_is_an_error(model, monkeypatch):
    sent = model._sent

    def shifted(inputs):
        moved = sent(inputs)
        moved["positions"] = torch.zeros(9, dtype=torch.int64)[1:8]
        return moved

    monkeypatch.setattr(model, "_sent", shifted)
    with pytest.raises(InternalError, match="no multiple of 16"):
        model.forward(parts_of([(0, 7)]), lambda ids: None)


def test_an_error_of_the_driver_in_a_list_is_its_reason(model, cuda_stub):
    import ctypes

    from llmc.spec.errors import DeviceLostError

    library = ctypes.CDLL(str(cuda_stub[0]))
    library.llmc_stub_fail_after(5)
    with pytest.raises(DeviceLostError, match="cuLaunchKernelEx failed with code 700"):
        model.forward(parts_of([(0, 7)]), lambda ids: None)
    library.llmc_stub_fail_after(-1)
    model.forward(parts_of([(0, 7)]), lambda ids: None)


def test_steps_of_different_lengths_share_memory_and_never_outgrow_it(model):
    memory = model._memory
    sizes = []
    for tokens in (130, 300, 512, 140):
        model.forward(parts_of([(0, tokens)]), lambda ids: None)
        sizes.append(memory.of(0).numel())
    assert 0 < sizes[0] <= sizes[1] <= sizes[2] == sizes[3]
