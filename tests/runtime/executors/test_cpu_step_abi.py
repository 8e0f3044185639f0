"""The C ABI of an emitted library: hostile steps are refused, nothing is touched out of bounds, no two
threads race, and no step allocates."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from llmc.artifact.cpu import CPU_UNIT, CpuUnit, encode_unit
from llmc.codegen.cpu.backend import cpu_weights
from llmc.codegen.cpu.source import ABI_VERSION, MAX_THREADS, generate
from llmc.codegen.cpu.toolchain import HEADERS, compile_flags
from llmc.kernels.levels import supported_levels
from llmc.runtime.executors.cpu import processor_features

HERE = Path(__file__).parent
COMPILER = shutil.which("g++")
pytestmark = [pytest.mark.cpu, pytest.mark.skipif(COMPILER is None, reason="no g++")]


@pytest.fixture(scope="module")
def emitted(build_program, tmp_path_factory):
    """A folder with the source, weights and description of a small model: windows, experts, int8 caches."""
    program = build_program(
        scheme="int4_g32", experts=3, windows=(0, 24), page_tokens=16, cache_dtype="int8", generic=True
    )
    folder = tmp_path_factory.mktemp("abi")
    source = generate(program, max_tokens=64, max_logit_rows=16)
    (folder / "model.cpp").write_text(source.text)
    store = cpu_weights(program.weights, source)
    names = [slot.stored_name for slot in source.weight_slots]
    arrays = [store.evaluate(name).contiguous().reshape(-1).view(torch.uint8).numpy() for name in names]
    np.savez(folder / "weights.npz", **{f"w{index}": array for index, array in enumerate(arrays)})
    unit = CpuUnit(
        abi_version=ABI_VERSION, max_tokens=64, max_logit_rows=16, max_threads=MAX_THREADS,
        arena_bytes=source.arena_bytes, weights=(), packed=(), levels=(), compiler="",
    )  # fmt: skip
    (folder / Path(CPU_UNIT).name).write_bytes(encode_unit(unit))
    (folder / "layout.json").write_bytes(msgspec.json.encode(program.cache))
    (folder / "vocab").write_text(str(program.spec.vocab_size))
    return folder


def build(folder, level, name, *extra):
    library = folder / f"{name}-{level.name}.so"
    if not library.exists():
        command = [COMPILER, *compile_flags(level), *extra, f"-I{HEADERS}", str(folder / "model.cpp")]
        subprocess.run([*command, "-o", str(library)], check=True)
    return library


def drive(folder, library, mode, steps, seed, threads, **environment):
    command = [sys.executable, str(HERE / "abi_driver.py"), str(folder), str(library), mode]
    command += [str(steps), str(seed), str(threads)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    assert done.returncode == 0, (mode, seed, (done.stdout + done.stderr)[-5000:])
    return done.stdout.split()


def runtime_library(name):
    done = subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=False)
    if not os.path.isabs(done.stdout.strip()):
        pytest.skip(f"g++ has no {name}")
    return done.stdout.strip()


def best_level():
    return supported_levels(processor_features())[-1]


def fresh_seed():
    return int(np.random.SeedSequence().generate_state(1)[0])


def test_a_step_allocates_nothing_and_hostile_ones_are_refused(emitted):
    library, counter = build(emitted, best_level(), "plain"), emitted / "count.so"
    source = str(HERE / "count_allocations.c")
    subprocess.run(
        [COMPILER.replace("g++", "gcc"), "-O1", "-fPIC", "-shared", source, "-o", str(counter)], check=True
    )
    drive(emitted, library, "allocations", 30, fresh_seed(), 3, LD_PRELOAD=str(counter))
    refused, _ = drive(emitted, library, "hostile", 200, fresh_seed(), 2)
    assert 50 < int(refused) < 200


def test_steps_give_the_same_bits_on_any_number_of_threads(emitted):
    library, seed = build(emitted, best_level(), "plain"), fresh_seed()
    results = {tuple(drive(emitted, library, "valid", 25, seed, threads)) for threads in (1, 2, 5)}
    assert len(results) == 1


def test_a_forked_child_goes_on_with_the_same_bits(emitted):
    library = build(emitted, best_level(), "plain")
    before, after, childs = drive(emitted, library, "forked", 12, fresh_seed(), 3)
    assert childs == after != before


def test_engines_of_one_process_do_not_meet(emitted):
    """Four of one library, with other numbers of threads each, called at once; one ends before the others."""
    library, seed = build(emitted, best_level(), "plain"), fresh_seed()
    alone, again, _ = drive(emitted, library, "forked", 12, seed, 1)
    found = drive(emitted, library, "engines", 12, seed, 3)
    assert found[:4] == [alone] * 4
    assert found[4:] == [again] * 3


def test_drafts_drawn_ahead_are_those_drawn_when_asked_for_on_any_number_of_threads(emitted):
    library, seed = build(emitted, best_level(), "plain"), fresh_seed()
    digests = set()
    for threads in (1, 3):
        ahead, asked, digest = drive(emitted, library, "ahead", 6, seed, threads)
        assert int(ahead) >= 8, "the first request is alone: 40 tokens, at most 4 a step"
        assert asked == "0"
        digests.add(digest)
    assert len(digests) == 1


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["valid", "hostile", "ahead"])
@pytest.mark.parametrize("which", [0, -1])
def test_no_step_leaves_its_bounds(emitted, mode, which):
    level = supported_levels(processor_features())[which]
    library = build(
        emitted, level, "watched", "-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"
    )
    environment = {"LD_PRELOAD": runtime_library("libasan.so"), "ASAN_OPTIONS": "detect_leaks=0"}
    drive(emitted, library, mode, 8 if mode == "ahead" else 400, fresh_seed(), 2, **environment)


@pytest.mark.slow
def test_no_two_threads_of_a_step_race(emitted):
    library = build(emitted, best_level(), "raced", "-O1", "-g1", "-fsanitize=thread")
    environment = {
        "LD_PRELOAD": runtime_library("libtsan.so"),
        "TSAN_OPTIONS": "halt_on_error=1 report_signal_unsafe=0 ignore_noninstrumented_modules=1",
    }
    drive(emitted, library, "valid", 60, fresh_seed(), 3, **environment)
    drive(emitted, library, "ahead", 6, fresh_seed(), 3, **environment)
