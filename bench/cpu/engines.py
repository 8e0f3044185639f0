"""One inference engine as a process: commands on stdin, one JSON object a line on stdout.

python engines.py KIND MODEL THREADS, with KIND one of KINDS. Each engine may live in an environment of its
own: nothing else is imported. `llamacpp` starts what LLAMA_SERVER names, or `llama-server` on the path.
"""

from __future__ import annotations

import atexit
import json
import os
import resource
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any


class Llmc:
    """`LLM.generate` over an artifact; requests of different lengths come from threads of their own."""

    def __init__(self, model: str, threads: int) -> None:
        from llmc.runtime.config import RuntimeConfig
        from llmc.runtime.load import load
        from llmc.runtime.params import SamplingParams

        self._params = SamplingParams
        config = RuntimeConfig(max_requests=32, max_model_len=2048, num_threads=threads)
        self._llm = load(model, config)

    def generate(self, prompts: list[list[int]], lengths: list[int]) -> int:
        """All prompts together; tokens produced."""
        if len(set(lengths)) == 1:
            done = self._llm.generate(prompts, self._params_of(lengths[0]))
            return sum(len(one.token_ids) for one in done)
        with ThreadPoolExecutor(len(prompts)) as pool:
            calls = [
                pool.submit(self._llm.generate, [prompt], self._params_of(length))
                for prompt, length in zip(prompts, lengths, strict=True)
            ]
            return sum(len(call.result()[0].token_ids) for call in calls)

    def _params_of(self, length: int) -> Any:
        return self._params(max_tokens=length, ignore_eos=True, temperature=0.0)


class OpenVino:
    """OpenVINO GenAI's continuous batching; its LLMPipeline for single requests."""

    def __init__(self, model: str, threads: int) -> None:
        import openvino
        import openvino_genai

        self._api, self._tensor = openvino_genai, openvino.Tensor
        properties = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.max_num_seqs = 32
        scheduler.max_num_batched_tokens = 512
        scheduler.cache_size = 1
        scheduler.dynamic_split_fuse = True
        self._one = openvino_genai.LLMPipeline(model, "CPU", **properties)
        self._many = openvino_genai.ContinuousBatchingPipeline(model, scheduler, "CPU", properties)

    def generate(self, prompts: list[list[int]], lengths: list[int]) -> int:
        """All prompts together; tokens produced."""
        import numpy as np

        rows = [np.array([prompt], dtype=np.int64) for prompt in prompts]
        if len(rows) == 1:
            inputs = self._api.TokenizedInputs(self._tensor(rows[0]), self._tensor(np.ones_like(rows[0])))
            return len(self._one.generate(inputs, self._config(lengths[0])).tokens[0])
        done = self._many.generate(
            [self._tensor(row) for row in rows], [self._config(length) for length in lengths]
        )
        return sum(len(one.m_generation_ids[0]) for one in done)

    def _config(self, length: int) -> Any:
        config = self._api.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = length
        config.ignore_eos, config.do_sample = True, False
        return config


class OnnxRuntime:
    """ONNX Runtime GenAI's generator; several prompts as one batch, padded on the left to the longest."""

    def __init__(self, model: str, threads: int) -> None:
        import onnxruntime_genai

        self._api = onnxruntime_genai
        config = onnxruntime_genai.Config(model)
        config.overlay(
            json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}})
        )
        self._model = onnxruntime_genai.Model(config)

    def generate(self, prompts: list[list[int]], lengths: list[int]) -> int:
        """All prompts together; the tokens that were asked for, though shorter rows run on to the longest."""
        import numpy as np

        width, longest = max(map(len, prompts)), max(lengths)
        rows = np.array([[prompt[0]] * (width - len(prompt)) + prompt for prompt in prompts], dtype=np.int32)
        params = self._api.GeneratorParams(self._model)
        total = width + longest
        params.set_search_options(
            max_length=total, min_length=total, do_sample=False, batch_size=len(prompts)
        )
        generator = self._api.Generator(self._model, params)
        generator.append_tokens(rows)
        for _ in range(longest):
            generator.generate_next_token()
        return sum(lengths)


class Transformers:
    """Hugging Face transformers, eager, in bfloat16: one request after the other."""

    def __init__(self, model: str, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self._torch = torch
        self._model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()

    def generate(self, prompts: list[list[int]], lengths: list[int]) -> int:
        """All prompts in turn; tokens produced."""
        made = 0
        for prompt, length in zip(prompts, lengths, strict=True):
            ids = self._torch.tensor([prompt])
            done = self._model.generate(
                ids,
                attention_mask=self._torch.ones_like(ids),
                max_new_tokens=length,
                min_new_tokens=length,
                do_sample=False,
                pad_token_id=0,
            )
            made += int(done.shape[1]) - len(prompt)
        return made


class LlamaCpp:
    """llama.cpp's own server, as many slots as requests; prompts are sent as tokens, all at once."""

    SLOTS = 32

    def __init__(self, model: str, threads: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._url = f"http://127.0.0.1:{port}"
        command = [os.environ.get("LLAMA_SERVER", "llama-server"), "-m", model, "--port", str(port)]
        command += [
            "-t",
            str(threads),
            "-tb",
            str(threads),
            "-np",
            str(self.SLOTS),
            "-c",
            str(512 * self.SLOTS),
        ]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        atexit.register(self._process.terminate)
        while not self._is_ready():
            if self._process.poll() is not None:
                raise RuntimeError(f"{command[0]} ended with {self._process.returncode}")
            time.sleep(0.05)

    def generate(self, prompts: list[list[int]], lengths: list[int]) -> int:
        """All prompts together; tokens produced."""
        with ThreadPoolExecutor(len(prompts)) as pool:
            return sum(pool.map(self._complete, prompts, lengths))

    def _complete(self, prompt: list[int], length: int) -> int:
        asked = {"prompt": prompt, "n_predict": length, "temperature": 0, "ignore_eos": True}
        body = json.dumps({**asked, "cache_prompt": False}).encode()
        request = urllib.request.Request(
            self._url + "/completion", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return int(json.load(answer)["timings"]["predicted_n"])

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(self._url + "/health", timeout=2) as answer:
                return answer.status == 200
        except OSError:
            return False


KINDS: dict[str, Any] = {
    "llmc": Llmc,
    "openvino": OpenVino,
    "onnxruntime": OnnxRuntime,
    "transformers": Transformers,
    "llamacpp": LlamaCpp,
}


def peak_memory_bytes() -> int:
    """Of this process, and of each that it has started and that still runs."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        except OSError:
            continue  # it has ended
        if fields.get("PPid", "").strip() == str(os.getpid()) and "VmHWM" in fields:
            peak += int(fields["VmHWM"].split()[0]) * 1024
    return peak


def main() -> None:
    kind, model, threads = sys.argv[1:4]
    started = time.perf_counter()
    engine = KINDS[kind](model, int(threads))
    print(json.dumps({"load_s": time.perf_counter() - started}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        began = time.perf_counter()
        tokens = engine.generate(asked["prompts"], asked["lengths"])
        seconds = time.perf_counter() - began
        told = {"tokens": tokens, "seconds": seconds, "peak_memory_bytes": peak_memory_bytes()}
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
