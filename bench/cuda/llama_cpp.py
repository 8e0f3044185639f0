"""llama.cpp's own benchmark over a file of random 4-bit codes of a shape, where its program was carried
along. Knows GGUF as far as such a file needs it."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from device import DEVICE
from tree import NotCarried

import models

# Tokens of the prompt that is read and of the text that is generated behind none.
PROMPT, GENERATED = 2048, 128
# GGUF's numbers (github.com/ggml-org/ggml, docs/gguf.md): types of values, types of tensors, alignment.
_UINT32, _FLOAT32, _STRING = 4, 6, 8
_F32, _Q4_0 = 0, 2
_ALIGNMENT = 32
# A block of Q4_0: a float16 scale and 32 codes.
_BLOCK_CODES, _BLOCK_BYTES = 32, 18


@dataclass(frozen=True, slots=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]

    @property
    def kind(self) -> int:
        """Vectors are float32, matrices codes."""
        return _F32 if len(self.shape) == 1 else _Q4_0

    @property
    def num_bytes(self) -> int:
        count = prod(self.shape)
        return 4 * count if self.kind == _F32 else count // _BLOCK_CODES * _BLOCK_BYTES


def llama_rates(shape: str, folder: Path) -> dict:
    """Tokens a second of a prompt and of a text at batch 1, as llama-bench reports them. Raises NotCarried
    where there is no such program."""
    program = os.environ.get("LLAMA_BENCH") or shutil.which("llama-bench")
    if not program:
        raise NotCarried(
            "llama-bench is not on the PATH, and LLAMA_BENCH names none. Build llama.cpp with "
            "-DGGML_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=90 and name its llama-bench there."
        )
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{shape}-q4_0.gguf"
    write_gguf(models.config_of(shape), file)
    layers = "0" if DEVICE == "cpu" else "99"
    command = [
        program,
        "-m",
        str(file),
        "-ngl",
        layers,
        "-p",
        str(PROMPT),
        "-n",
        str(GENERATED),
        "-o",
        "json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    file.unlink()
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: dict[str, Any] = {"weights": "Q4_0"}
    for test in json.loads(done.stdout):
        found["prefill" if test["n_prompt"] else "decode b1"] = {"tok_s": test["avg_ts"]}
        found["build"] = f"{test['build_commit']}, {test['backends']}"
    return found


def write_gguf(config: Any, file: Path) -> None:
    """A model of a Llama configuration with random codes, without a vocabulary's texts."""
    tensors = _tensors(config)
    heads = config.num_attention_heads
    values: dict[str, int | float | str] = {
        "general.architecture": "llama",
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.block_count": config.num_hidden_layers,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.dimension_count": config.hidden_size // heads,
        "llama.vocab_size": config.vocab_size,
        "tokenizer.ggml.model": "no_vocab",
    }
    with file.open("wb") as out:
        out.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values)))
        for key, value in values.items():
            out.write(_text(key) + _value(value))
        offset = 0
        for tensor in tensors:
            sizes = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
            out.write(_text(tensor.name) + sizes + struct.pack("<IQ", tensor.kind, offset))
            offset += -(-tensor.num_bytes // _ALIGNMENT) * _ALIGNMENT
        draw = np.random.default_rng(0)
        for tensor in tensors:
            out.write(bytes(-out.tell() % _ALIGNMENT))
            _write_data(tensor, draw, out)


def _tensors(config: Any) -> list[_Tensor]:
    """In the order of their data."""
    width, inner = config.hidden_size, config.intermediate_size
    kv = width // config.num_attention_heads * config.num_key_value_heads
    found = [
        _Tensor("token_embd.weight", (config.vocab_size, width)),
        _Tensor("output_norm.weight", (width,)),
    ]
    if not config.tie_word_embeddings:
        found.append(_Tensor("output.weight", (config.vocab_size, width)))
    matrices = {"attn_q": (width, width), "attn_k": (kv, width), "attn_v": (kv, width)}
    matrices |= {"attn_output": (width, width), "ffn_gate": (inner, width), "ffn_up": (inner, width)}
    matrices["ffn_down"] = (width, inner)
    for layer in range(config.num_hidden_layers):
        for name, shape in {"attn_norm": (width,), "ffn_norm": (width,), **matrices}.items():
            found.append(_Tensor(f"blk.{layer}.{name}.weight", shape))
    return found


def _write_data(tensor: _Tensor, draw: np.random.Generator, out: BinaryIO) -> None:
    if tensor.kind == _F32:
        out.write(np.ones(tensor.shape, np.float32).tobytes())
        return
    blocks = draw.integers(0, 256, (tensor.num_bytes // _BLOCK_BYTES, _BLOCK_BYTES), np.uint8)
    blocks[:, :2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    out.write(blocks.tobytes())


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _value(value: int | float | str) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    return struct.pack("<II", _UINT32, value)
