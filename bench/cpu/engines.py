"""One inference engine as a process: commands on stdin, one JSON object a line on stdout.

python engines.py KIND MODEL THREADS, with KIND llmc, openvino or onnxruntime. Each engine may live in an
environment of its own: nothing else is imported.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from concurrent.futures import ThreadPoolExecutor
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


KINDS = {"llmc": Llmc, "openvino": OpenVino, "onnxruntime": OnnxRuntime}


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
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"tokens": tokens, "seconds": seconds, "peak_memory_bytes": peak}), flush=True)


if __name__ == "__main__":
    main()
