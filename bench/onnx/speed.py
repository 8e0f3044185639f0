"""Decode and prefill in ONNX Runtime GenAI, model folders in turn in one process, and their sizes.

usage: speed.py [--threads N] [--prompt N] [--tokens N] [--rounds N] NAME=FOLDER NAME=FOLDER ...

The first folder is compared with each other: above 1 it is faster.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import onnxruntime_genai as genai

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import Record


def open_model(folder: Path, threads: int, scratch: Path) -> Any:
    """The model of `folder` with a fixed number of threads: its settings are copied, its files linked."""
    copy = scratch / folder.name
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).symlink_to(file.resolve())
    settings = json.loads((folder / "genai_config.json").read_text())
    settings["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
    (copy / "genai_config.json").unlink()
    (copy / "genai_config.json").write_text(json.dumps(settings))
    for name in ("model.onnx", *(path.name for path in folder.glob("*.safetensors")), "model.onnx.data"):
        if (folder / name).exists():  # external data must lie in the folder itself, not behind a link
            (copy / name).unlink()
            (copy / name).hardlink_to((folder / name).resolve())
    return genai.Model(str(copy))


def run(model: Any, prompt: int, tokens: int) -> dict[str, float]:
    """Seconds of one prefill and of each decoded token."""
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=prompt + tokens + 1, min_length=prompt + tokens + 1, do_sample=False)
    generator = genai.Generator(model, params)
    started = time.perf_counter()
    generator.append_tokens([100 + index % 900 for index in range(prompt)])
    generator.generate_next_token()
    prefill = time.perf_counter() - started
    times: list[float] = []
    for _ in range(tokens - 1):
        started = time.perf_counter()
        generator.generate_next_token()
        times.append(time.perf_counter() - started)
    return {"prefill_s": prefill, "decode_s": statistics.median(times)}


def main() -> None:
    """Measure the folders in turn and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="NAME=FOLDER")
    for name, default in (("threads", 2), ("prompt", 128), ("tokens", 24), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    folders = {name: Path(path) for name, _, path in (text.partition("=") for text in arguments.folders)}
    record = Record("onnx_speed")
    scratch = Path(tempfile.mkdtemp(dir=next(iter(folders.values())).resolve().parent))
    try:
        models = {name: open_model(path, arguments.threads, scratch) for name, path in folders.items()}
        for model in models.values():
            run(model, 8, 4)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in models}
        for _ in range(arguments.rounds):
            for name, model in models.items():
                found[name].append(run(model, arguments.prompt, arguments.tokens))
    finally:
        shutil.rmtree(scratch)
    rows = {
        name: {key: statistics.median(sample[key] for sample in samples) for key in samples[0]}
        | {"bytes": sum(path.stat().st_size for path in folders[name].rglob("*") if path.is_file())}
        for name, samples in found.items()
    }
    first, *others = rows
    ratios = {other: {key: rows[other][key] / rows[first][key] for key in rows[first]} for other in others}
    result = {"settings": vars(arguments) | {"folders": list(folders)}, "rows": rows, "ratios": ratios}
    print(json.dumps(result, indent=1))
    record.write(result)


if __name__ == "__main__":
    main()
