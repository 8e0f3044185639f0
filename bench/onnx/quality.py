"""Mean KL of ONNX model folders from one that was not quantised, on held-out stories.

usage: quality.py --reference FOLDER [--stories N] NAME=FOLDER ...

A folder is llmc's (`engine.onnx` gives every token's logits) or that of another builder (`model.onnx` does).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from tokenizers import Tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "bench"))
from common import Record  # noqa: E402 - the folder above must be on the path first

MODEL = REPOSITORY / "models" / "stories-7m"
TEXT = REPOSITORY / "tests" / "data" / "stories-heldout.txt"
MOST_TOKENS = 256


def logprobs(session: Any, cache: tuple[int, ...], ids: list[int]) -> NDArray[np.float64]:
    """Log-probabilities `[tokens, vocab]` of one text; `cache` are the dimensions of an empty cache, for
    graphs that do not say them."""
    feeds: dict[str, NDArray[Any]] = {
        "input_ids": np.asarray([ids]),
        "attention_mask": np.ones((1, len(ids)), np.int64),
    }
    for entry in session.get_inputs():
        if entry.name == "out_rows":
            feeds["out_rows"] = np.arange(len(ids))
        elif entry.name.startswith("past"):
            dims = [
                size if isinstance(size, int) else default
                for size, default in zip(entry.shape, cache, strict=True)
            ]
            feeds[entry.name] = np.zeros((1, dims[1], 0, dims[3]), np.float32)
    logits = session.run(["logits"], feeds)[0].reshape(len(ids), -1).astype(np.float64)
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def open_graph(folder: Path) -> tuple[Any, tuple[int, ...]]:
    """The graph of a folder that gives the logits of every token, and the dimensions of an empty cache."""
    decoder = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    name = "engine.onnx" if (folder / "engine.onnx").exists() else "model.onnx"
    session = onnxruntime.InferenceSession(str(folder / name), options, providers=["CPUExecutionProvider"])
    return session, (1, decoder["num_key_value_heads"], 0, decoder["head_size"])


def main() -> None:
    """Measure every folder on the same stories and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--stories", type=int, default=8)
    arguments = parser.parse_args()
    folders = {name: Path(path) for name, _, path in (text.partition("=") for text in arguments.folders)}
    record = Record("onnx_quality")
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    stories = [story.strip("\n") for story in TEXT.read_text().split("<|endoftext|>") if story.strip()]
    texts = [tokenizer.encode(story).ids[:MOST_TOKENS] for story in stories[: arguments.stories]]
    reference = open_graph(arguments.reference)
    told = [logprobs(*reference, ids) for ids in texts]
    rows: dict[str, dict[str, float]] = {}
    for name, folder in folders.items():
        graph = open_graph(folder)
        found = [logprobs(*graph, ids) for ids in texts]
        pairs = list(zip(told, found, strict=True))
        kl = np.concatenate([(np.exp(a) * (a - b)).sum(-1) for a, b in pairs])
        same = np.concatenate([a.argmax(-1) == b.argmax(-1) for a, b in pairs])
        rows[name] = {
            "kl_mean": float(kl.mean()),
            "kl_p99": float(np.quantile(kl, 0.99)),
            "same_top": float(same.mean()),
            "tokens": len(kl),
            "bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        }
    print(json.dumps(rows, indent=1))
    record.write(rows)


if __name__ == "__main__":
    main()
