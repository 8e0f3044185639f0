"""From the start of a process to a model that generates: a folder of random weights, compiled here, loaded by
a process of its own that must compile nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from device import DEVICE, architecture
from tree import REPOSITORY

import models

_CHILD = """
import json, sys, time
began = float(sys.argv[2])
import llmc
from llmc.runtime.config import RuntimeConfig
from llmc.runtime.load import StartLedger
ledger = StartLedger()
config = RuntimeConfig(max_requests=8, max_step_tokens=512, max_model_len=1024)
llm = llmc.load(sys.argv[1], config, ledger=ledger)
ready = time.time() - began
compilers = [name for name in ("triton",) if name in sys.modules]
llm.close()
print(json.dumps({"seconds": ready, "steps": ledger.steps, "compilers": compilers}))
"""


def start_times(shape: str, folder: Path) -> dict:
    """Seconds until ready, by step; the second of two starts, whose files are in the page cache."""
    import llmc

    model, artifact = folder / f"{shape}-hf", folder / f"{shape}.llmc"
    if not artifact.exists():
        write_model(shape, model)
        llmc.compile(model, target=f"cuda:{architecture()}", output=artifact, verify="off", cache=False)
        shutil.rmtree(model)
    if DEVICE == "cpu":
        return {"rehearsed": "compiled; no device to load it"}
    for _ in range(2):
        child = subprocess.run(
            [sys.executable, "-c", _CHILD, str(artifact), repr(time.time())],
            capture_output=True,
            text=True,
            check=False,
            cwd=REPOSITORY,
        )
        if child.returncode:
            raise RuntimeError(child.stderr[-2000:])
    found = json.loads(child.stdout.splitlines()[-1])
    if found["compilers"]:
        raise AssertionError(f"starting imported {found['compilers']}")
    return found


def write_model(shape: str, folder: Path) -> None:
    """A Hugging Face folder of random weights, with the tokenizer of the bundled model."""
    from transformers import AutoModelForCausalLM

    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(models.config_of(shape), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(REPOSITORY / "models" / "stories-1m" / name, folder / name)
