"""Decode and prefill in ONNX Runtime GenAI, models in turn, and their sizes.

usage: speed.py --model HF_FOLDER --builder-python PYTHON --folder FOLDER [--prompt N ...] [--tokens N]
                [--loads N] [--rounds N] [--threads N] [--huge-pages]

Each model has a process of its own: of several in one process the first one loaded was slower by a seventh,
whichever it was. `--loads` starts them anew, since a load also decides where in memory weights lie.

Makes what is missing in FOLDER: the model by llmc (recipe bench/onnx/int4.yaml), and by the own builder of
onnxruntime-genai, run by PYTHON, at the same settings: everything in 4 bits with a scale for 32, inputs of
products rounded to 8 bits; once as the builder does it, once with its option `prune_lm_head`. A ratio is the
other's median time by that of llmc, of one load of both: above 1 llmc is faster. Of the loads' ratios the
median is told, with its interval. With --huge-pages every process asks for pages of 2 MB (by glibc's setting
for allocations), which some systems give without being asked.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import onnxruntime_genai as genai

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))
from common import Record, median_interval, percentiles  # noqa: E402 - the folder above must be on the path first

BUILDER = "onnxruntime_genai.models.builder"
SETTINGS = ("int4_block_size=32", "int4_accuracy_level=4")
# Tokens that a model decodes before it is another's turn, and how many of them are not counted.
RUN, LEFT_OUT = 8, 2
OURS, *OTHERS = NAMES = ("llmc", "builder", "builder-pruned")


def make(name: str, model: Path, python: str, folder: Path) -> None:
    """Make the model folder `folder` by what `name` says."""
    if name == OURS:
        command = [
            sys.executable, "-m", "llmc.cli", "compile", str(model), "--target", "onnx", "--recipe",
            str(ROOT / "bench" / "onnx" / "int4.yaml"), "-o", str(folder), "--verify", "off",
        ]  # fmt: skip
    else:
        extra = ["prune_lm_head=true"] if name == "builder-pruned" else []
        command = [
            python, "-m", BUILDER, "-i", str(model), "-o", str(folder), "-p", "int4", "-e", "cpu",
            "--extra_options", *SETTINGS, *extra,
        ]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)


def open_model(folder: Path, threads: int, scratch: Path) -> Any:
    """The model of `folder` with a fixed number of threads: settings are copied, other files linked."""
    copy = scratch / folder.name
    shutil.copytree(folder, copy, copy_function=lambda old, new: Path(new).hardlink_to(old))
    settings = json.loads((folder / "genai_config.json").read_text())
    settings["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
    (copy / "genai_config.json").unlink()
    (copy / "genai_config.json").write_text(json.dumps(settings))
    return genai.Model(str(copy))


def begin(model: Any, prompt: int, tokens: int) -> tuple[Any, float]:
    """A text after its first new token, and the seconds that took."""
    params = genai.GeneratorParams(model)
    length = prompt + tokens + 1
    params.set_search_options(max_length=length, min_length=length, do_sample=False, top_k=1)
    generator = genai.Generator(model, params)
    started = time.perf_counter()
    generator.append_tokens([100 + index % 900 for index in range(prompt)])
    generator.generate_next_token()
    return generator, time.perf_counter() - started


def play(folder: Path, threads: int, scratch: Path, pipe: Connection) -> None:
    """Serve one model: `(prompt, tokens)` begins a text, a number decodes as many tokens of it. Answers with
    the seconds of each."""
    model = open_model(folder, threads, scratch)
    text, _ = begin(model, 8, 4)
    pipe.send([])
    while (asked := pipe.recv()) is not None:
        if isinstance(asked, tuple):
            text, seconds = begin(model, *asked)
            pipe.send([seconds])
            continue
        times: list[float] = []
        for _ in range(asked):
            started = time.perf_counter()
            text.generate_next_token()
            times.append(time.perf_counter() - started)
        pipe.send(times)


@contextmanager
def players(folders: dict[str, Path], threads: int, scratch: Path) -> Generator[dict[str, Connection]]:
    """A process for each folder, started in an order drawn anew, and the end of a pipe to each."""
    spawn = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes: list[Any] = []
    with tempfile.TemporaryDirectory(dir=scratch) as work:
        for name in random.sample(list(folders), len(folders)):
            pipes[name], theirs = spawn.Pipe()
            processes.append(spawn.Process(target=play, args=(folders[name], threads, Path(work), theirs)))
            processes[-1].start()
            theirs.close()
            pipes[name].recv()
        try:
            yield pipes
        finally:
            for pipe in pipes.values():
                pipe.send(None)
            for process in processes:
                process.join()


def measure(
    pipes: dict[str, Connection], prompt: int, tokens: int, rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Seconds of prefills and of single tokens of each model, in an order drawn anew for each run of tokens.
    The first tokens of a run are left out: threads of the model before it may still wait awake."""
    found: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in pipes}

    def ask(name: str, what: object) -> list[float]:
        pipes[name].send(what)
        return pipes[name].recv()

    order = list(pipes)
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            found[name]["prefill"] += ask(name, (prompt, tokens))
        for _ in range((tokens - 1) // RUN):
            random.shuffle(order)
            for name in order:
                found[name]["decode"] += ask(name, RUN)[LEFT_OUT:]
    return found


def summary(loads: list[dict[str, dict[str, list[float]]]]) -> dict[str, Any]:
    """Percentiles of every model's milliseconds over all loads, and ratios of the others' medians to ours."""
    kinds = ("prefill", "decode")
    rows = {
        name: {kind: percentiles([1e3 * one for load in loads for one in load[name][kind]]) for kind in kinds}
        for name in NAMES
    }
    median = statistics.median
    ratios = {
        other: {
            kind: median_interval([median(load[other][kind]) / median(load[OURS][kind]) for load in loads])
            for kind in kinds
        }
        for other in OTHERS
    }
    return {"milliseconds": rows, "ratios": ratios}


def main() -> None:
    """Make the folders, measure them and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--builder-python", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--prompt", type=int, nargs="+", default=[32, 512])
    for name, default in (("threads", 2), ("tokens", 33), ("rounds", 1), ("loads", 9)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--huge-pages", action="store_true")
    arguments = parser.parse_args()
    if arguments.huge_pages:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    folders = {name: arguments.folder / name for name in NAMES}
    for name, folder in folders.items():
        if not folder.exists():
            make(name, arguments.model, arguments.builder_python, folder)
    record = Record("onnx_speed_huge_pages" if arguments.huge_pages else "onnx_speed")
    loads: dict[int, list[Any]] = {prompt: [] for prompt in arguments.prompt}
    for _ in range(arguments.loads):
        with players(folders, arguments.threads, arguments.folder) as pipes:
            for prompt in arguments.prompt:
                loads[prompt].append(measure(pipes, prompt, arguments.tokens, arguments.rounds))
    rows = {f"prompt {prompt}": summary(found) for prompt, found in loads.items()}
    sizes = {
        name: sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        for name, folder in folders.items()
    }
    result = {"settings": {"threads": arguments.threads, "onnxruntime-genai": genai.__version__}, **rows}
    print(json.dumps(result | {"bytes": sizes}, indent=1))
    record.write(result | {"bytes": sizes})


if __name__ == "__main__":
    main()
