"""Decode and prefill in ONNX Runtime GenAI, models in turn in one process, and their sizes.

usage: speed.py --model HF_FOLDER --builder-python PYTHON --folder FOLDER [--prompt N ...] [--tokens N]
                [--rounds N] [--threads N]

Makes what is missing in FOLDER: the model by llmc (recipe bench/onnx/int4.yaml), and by the own builder of
onnxruntime-genai, run by PYTHON, at the same settings: everything in 4 bits with a scale for 32, inputs of
products rounded to 8 bits; once as the builder does it, once with its option `prune_lm_head`. Ratios are the
other's median time by that of llmc: above 1 llmc is faster.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import onnxruntime_genai as genai

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))
from common import Record, percentiles  # noqa: E402 - the folder above must be on the path first

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


def measure(
    models: dict[str, Any], prompt: int, tokens: int, rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Seconds of prefills and of single tokens of each model, in an order drawn anew for each run of tokens.

    The first tokens of a run are left out: threads of the model before it still wait for work then, awake.
    """
    found: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in models}
    order, rng = list(models), random.Random(0)
    for _ in range(rounds):
        texts: dict[str, Any] = {}
        rng.shuffle(order)
        for name in order:
            texts[name], seconds = begin(models[name], prompt, tokens)
            found[name]["prefill"].append(seconds)
        for _ in range((tokens - 1) // RUN):
            rng.shuffle(order)
            for name in order:
                for step in range(RUN):
                    started = time.perf_counter()
                    texts[name].generate_next_token()
                    if step >= LEFT_OUT:
                        found[name]["decode"].append(time.perf_counter() - started)
    return found


def summary(found: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Percentiles of every model's milliseconds, and the others' medians by ours."""
    rows = {
        name: {kind: percentiles([1e3 * one for one in samples]) for kind, samples in kinds.items()}
        for name, kinds in found.items()
    }
    ratios = {
        other: {
            kind: statistics.median(found[other][kind]) / statistics.median(found[OURS][kind])
            for kind in ("prefill", "decode")
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
    for name, default in (("threads", 2), ("tokens", 33), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    folders = {name: arguments.folder / name for name in NAMES}
    for name, folder in folders.items():
        if not folder.exists():
            make(name, arguments.model, arguments.builder_python, folder)
    record = Record("onnx_speed")
    scratch = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        models = {name: open_model(folder, arguments.threads, scratch) for name, folder in folders.items()}
        for model in models.values():
            begin(model, 8, 4)
        rows = {
            f"prompt {prompt}": summary(measure(models, prompt, arguments.tokens, arguments.rounds))
            for prompt in arguments.prompt
        }
    finally:
        shutil.rmtree(scratch)
    sizes = {
        name: sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        for name, folder in folders.items()
    }
    result = {"settings": {"threads": arguments.threads, "onnxruntime-genai": genai.__version__}, **rows}
    print(json.dumps(result | {"bytes": sizes}, indent=1))
    record.write(result | {"bytes": sizes})


if __name__ == "__main__":
    main()
