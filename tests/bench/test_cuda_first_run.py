"""The GPU bench without a GPU: it says so, and its steps run through the interpreter on a tiny shape."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
BENCH = Path(__file__).resolve().parents[2] / "bench" / "cuda"


def test_without_a_gpu_it_says_what_can_be_run_instead():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, str(BENCH / "first_run.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "pytest tests/kernels/cuda" in done.stdout


@pytest.mark.parametrize("scheme", ["bf16", "int4_g128"])
def test_a_step_of_a_random_model(scheme, monkeypatch):
    import torch

    monkeypatch.syspath_prepend(str(BENCH))
    import models
    from llmc.kernels.cuda.interpreter import correct_interpreter
    from llmc.kernels.cuda.jit import launch_jit

    correct_interpreter()
    tiny = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 8}
    monkeypatch.setattr(models, "DEVICE", "cpu")
    monkeypatch.setattr(models, "VOCABULARY", 128)
    monkeypatch.setitem(models.SHAPES, "tiny", tiny)
    stepper = models.Stepper("tiny", scheme, launch_jit, tokens=512)
    logits = stepper.step(batch=2, context=9)()
    assert logits.shape == (2, 128)
    assert torch.isfinite(logits.float()).all()
    assert stepper.step(batch=1, context=12, new=12)().shape == (1, 128)
