"""Runs steps of an emitted library through its C ABI, in a process of its own: under sanitizers, or counted.

usage: abi_driver.py FOLDER LIBRARY valid|hostile|allocations|forked|engines|ahead STEPS SEED THREADS
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np

from llmc.artifact.cpu import CPU_UNIT, decode_unit
from llmc.runtime.config import RuntimeConfig
from llmc.runtime.engine import Engine
from llmc.runtime.executors import drafting
from llmc.runtime.executors.cpu_library import NO_JOBS, SAMPLE_JOB, Jobs
from llmc.runtime.executors.cpu_model import CpuModel, step_inputs
from llmc.runtime.executors.cpu_sampling import CpuSampled
from llmc.runtime.executors.drafting import Drafter
from llmc.runtime.executors.stepped import SteppedExecutor
from llmc.runtime.executors.tiles import SequencePart
from llmc.runtime.protocol import ExecutorCaps, SamplingState
from llmc.runtime.request import Request
from llmc.spec.cache import CacheLayout
from llmc.spec.errors import InternalError

PAGES = 6
SEQUENCES = 3
HOSTILE = (-(2**63), -(2**31), -2, -1, 0, 1, 7, 2**31, 2**32, 2**62, 2**63 - 1)


def open_model(folder, library, threads):
    unit = decode_unit((folder / Path(CPU_UNIT).name).read_bytes())
    layout = msgspec.json.decode((folder / "layout.json").read_bytes(), type=CacheLayout)
    stored = np.load(folder / "weights.npz")
    pages = tuple(PAGES * SEQUENCES for _ in layout.groups)
    weights = [stored[f"w{index}"] for index in range(len(stored.files))]
    vocab = int((folder / "vocab").read_text())
    return CpuModel(library, unit, weights, layout, pages, vocab, threads), layout, unit, vocab


class Batches:
    """Random steps that go on with a few sequences, each in pages of its own."""

    def __init__(self, rng, layout, unit, vocab):
        self.rng, self.layout, self.unit, self.vocab = rng, layout, unit, vocab
        self.done = [0] * SEQUENCES
        self.alive = []

    def parts(self):
        parts = []
        for index in range(SEQUENCES):
            capacity = PAGES * self.layout.groups[0].page_tokens
            if self.done[index] > capacity - 24:
                self.done[index] = 0
            count = int(self.rng.choice([0, 1, 1, 5, 19]))
            if count:
                table = [index * PAGES + page for page in range(PAGES)]
                parts.append(SequencePart(
                    start=self.done[index], token_ids=self.rng.integers(0, self.vocab, count).tolist(),
                    block_tables=[table] * len(self.layout.groups),
                    wanted=sorted(set(self.rng.integers(0, count, 2).tolist())),
                ))  # fmt: skip
                self.done[index] += count
        return parts or self.parts()

    def jobs(self, rows):
        rng, count = self.rng, int(self.rng.integers(0, 2 * rows + 1))
        jobs = np.zeros(count, SAMPLE_JOB)
        tokens = rng.integers(0, self.vocab, 30)
        top, top_logprobs = np.zeros((count, 5), np.int32), np.zeros((count, 5))
        mask = rng.integers(0, 2**32, -(-self.vocab // 32), dtype=np.uint64).astype(np.uint32)
        biases = rng.standard_normal(30).astype(np.float32)
        self.alive = [tokens, top, top_logprobs, mask, biases]
        for place, job in enumerate(jobs):
            job["temperature"], job["repetition_penalty"] = rng.choice([0.0, 0.8]), rng.choice([1.0, 1.3])
            job["frequency_penalty"] = rng.choice([0.0, 0.4])
            job["min_p"], job["top_p"] = rng.choice([0.0, 0.1]), rng.choice([1.0, 0.7])
            job["top_k"], job["seed"] = rng.choice([0, 5]), rng.integers(0, 2**62)
            job["tokens"], job["num_tokens"], job["num_prompt_tokens"] = tokens.ctypes.data, 30, 11
            job["banned"], job["num_banned"] = tokens.ctypes.data, rng.integers(0, 4)
            job["bias_ids"], job["biases"], job["num_biases"] = (
                tokens.ctypes.data, biases.ctypes.data, rng.integers(0, 4),
            )  # fmt: skip
            job["min_tokens"] = rng.choice([0, 25])
            job["mask"] = rng.choice([0, mask.ctypes.data])
            job["logits_row"], job["known"] = rng.integers(0, rows), rng.choice([-1, -1, 3])
            job["wants_logprob"], job["num_top"] = rng.integers(0, 2), rng.integers(0, 6)
            job["top"] = top.ctypes.data + place * 20
            job["top_logprobs"] = top_logprobs.ctypes.data + place * 40
        return Jobs(jobs, jobs.ctypes.data, count)

    def drawing(self, sequences):
        """A job for each sequence that draws its next token, with room for more."""
        self.jobs(1)
        jobs, kept = np.zeros(sequences, SAMPLE_JOB), np.zeros((sequences, 40), np.int64)
        self.alive.append(kept)
        for place, job in enumerate(jobs):
            job["logits_row"], job["known"], job["top_p"] = place, -1, 1.0
            job["repetition_penalty"] = self.rng.choice([1.0, 1.3])
            job["temperature"], job["seed"] = self.rng.choice([0.0, 0.8]), self.rng.integers(0, 2**62)
            job["tokens"], job["num_tokens"] = kept[place].ctypes.data, 30
        return Jobs(jobs, jobs.ctypes.data, sequences)

    def next(self):
        """The inputs of a step, and its rounds."""
        parts = self.parts()
        rounds = int(self.rng.choice([1, 1, 2, 3]))
        if rounds > 1:
            parts = [msgspec.structs.replace(part, wanted=[len(part.token_ids) - 1]) for part in parts]
        rows = sum(len(part.wanted) for part in parts)
        self.logits = np.zeros((rows, self.vocab), np.float32)
        logits = self.logits.ctypes.data
        if rounds > 1:
            return step_inputs(self.layout, parts, logits, self.drawing(rows)), rounds
        return step_inputs(self.layout, parts, logits, self.jobs(rows) if rows else NO_JOBS), 1


def spoil(rng, arrays):
    """Puts values into a step that no caller should send. Addresses are left as they are."""
    targets = np.split(np.frombuffer(arrays.values, np.int64), arrays.offsets[1:])
    for _ in range(int(rng.integers(1, 4))):
        target = targets[int(rng.integers(0, len(targets)))]
        if rng.random() < 0.3 and arrays.jobs.length:
            # counts of the caller's own arrays are its word, like their addresses
            names = (
                "temperature",
                "top_p",
                "min_p",
                "top_k",
                "min_tokens",
                "num_prompt_tokens",
                "logits_row",
            )
            name = str(rng.choice([*names, "known", "repetition_penalty", "frequency_penalty"]))
            job = arrays.jobs.memory[int(rng.integers(0, arrays.jobs.length))]
            is_float = SAMPLE_JOB[name].kind == "f"
            job[name] = (
                rng.choice([np.nan, np.inf, -np.inf, -1.0, 1e-40]) if is_float else int(rng.choice(HOSTILE))
            )
        elif len(target):
            value = int(rng.choice(HOSTILE)) if rng.random() < 0.6 else int(rng.integers(-3, 40))
            target[int(rng.integers(0, len(target)))] = value


class Stream:
    """An engine of its own that runs random steps, the same for the same seed."""

    def __init__(self, folder, library, seed, threads):
        self.model, layout, unit, vocab = open_model(folder, library, threads)
        self.batches = Batches(np.random.default_rng(seed), layout, unit, vocab)

    def digest(self, steps):
        """Of all that the next steps give."""
        digest = hashlib.sha256()
        for _ in range(steps):
            arrays, rounds = self.batches.next()
            digest.update(self.model._library.step(arrays, rounds).tobytes())
            digest.update(self.batches.logits.tobytes())
        return digest.hexdigest()


def forked(stream, steps):
    """Both sides of a fork go on from the same caches: the child without the parent's threads."""
    before, (reader, writer) = stream.digest(steps), os.pipe()
    child = os.fork()
    after = stream.digest(steps)
    if child == 0:
        os.write(writer, after.encode())
        stream.model.close()
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0:
        raise SystemExit("the child did not end well")
    told = os.read(reader, 1000).decode()
    stream.model.close()
    print(before, after, told)


def engines(streams, steps):
    """All at once, each called from a thread of its own; one is closed while others go on."""
    with ThreadPoolExecutor(len(streams)) as pool:
        found = list(pool.map(lambda stream: stream.digest(steps), streams))
        streams.pop(0).model.close()
        found += pool.map(lambda stream: stream.digest(steps), streams)
    for stream in streams:
        stream.model.close()
    print(*found)


def ahead(folder, library, requests, seed, threads):
    """Requests with a draft model of disturbed weights, whose drafts are drawn behind steps and when asked
    for: both must be the same drafts."""
    drafting._Worth.pays = property(lambda self: True, lambda self, pays: None)
    found, num_taken = [], []
    for is_ahead in (True, False):
        rng = np.random.default_rng(seed)
        target, layout, unit, vocab = open_model(folder, library, threads)
        draft = open_model(folder, library, threads)[0]
        for weight in draft._open.keywords["weights"]:
            weight ^= (rng.random(weight.shape) < 0.002).astype(np.uint8)
        caps = ExecutorCaps(
            name="driven", vocab_size=vocab, max_context=160, max_rows=SEQUENCES, max_tokens=unit.max_tokens,
            max_in_flight=1, cache=layout, num_blocks=tuple(PAGES * SEQUENCES for _ in layout.groups),
        )  # fmt: skip
        sampled, other = CpuSampled(target), CpuSampled(draft)
        drafter = Drafter(other, caps, sampled.ahead(other) if is_ahead else None)
        executor = SteppedExecutor(sampled, caps)
        executor.attach(drafter)
        config = RuntimeConfig(
            max_requests=SEQUENCES, max_step_tokens=unit.max_tokens, speculation="draft", draft_tokens=3
        )
        engine, ended = Engine(executor, config), {}
        for number in range(requests):
            engine.add_request(Request(
                request_id=number, max_tokens=40,
                prompt_token_ids=tuple(rng.integers(0, vocab, int(rng.integers(1, 50))).tolist()),
                sampling=SamplingState(
                    temperature=float(rng.choice([0.0, 0.9])), seed=number,
                    repetition_penalty=float(rng.choice([1.0, 1.2])),
                ),
            ))  # fmt: skip
            while engine.num_running + engine.num_waiting > number % 2:  # alone, or with the one before
                ended |= {each.request_id: each.finished for each in engine.step() if each.finished}
        engine.close()
        stats = engine.stats
        tokens = sorted((number, each.output_token_ids) for number, each in ended.items())
        found.append((tokens, stats.drafted_at, stats.accepted_at))
        num_taken.append(drafter.num_taken)
    if found[0] != found[1] or not all(found[0][1:]):
        raise SystemExit(f"drafts differ: {found}")
    print(num_taken[0], num_taken[1], hashlib.sha256(repr(found[0]).encode()).hexdigest())


def main():
    folder, library, mode = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    steps, seed, threads = (int(text) for text in sys.argv[4:7])
    if mode == "forked":
        return forked(Stream(folder, library, seed, threads), steps)
    if mode == "engines":
        return engines([Stream(folder, library, seed, 1 + count % threads) for count in range(4)], steps)
    if mode == "ahead":
        return ahead(folder, library, steps, seed, threads)
    rng = np.random.default_rng(seed)
    model, layout, unit, vocab = open_model(folder, library, threads)
    run = model._library.step
    batches, refused, digest = Batches(rng, layout, unit, vocab), 0, hashlib.sha256()
    counter = ctypes.CDLL(None) if mode == "allocations" else None
    if counter is not None:
        counter.watch_step.restype = ctypes.c_long
        step = model._library._library.llmc_step
        model._library._library.llmc_step = lambda *a: counted(counter, step, a)
    for _ in range(steps):
        arrays, rounds = batches.next()
        if mode == "hostile":
            spoil(rng, arrays)
            rounds = rounds if rng.random() < 0.7 else int(rng.choice([-1, 0, 2, 5, 400]))
        try:
            digest.update(run(arrays, rounds).tobytes())
            digest.update(batches.logits.tobytes())
        except InternalError:
            refused += 1
    model.close()
    return print(refused, digest.hexdigest())


def counted(counter, step, arguments):
    engine, fields, count = arguments
    found = counter.watch_step(
        ctypes.cast(step, ctypes.c_void_p), ctypes.c_void_p(engine), fields, ctypes.c_int64(count)
    )
    if found:
        raise SystemExit(f"{found} allocations in a step")
    return 0


if __name__ == "__main__":
    main()
