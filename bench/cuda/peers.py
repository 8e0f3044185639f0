"""What users run today, on the same shapes in the same run: transformers with a static cache and compiled
steps, in bfloat16 and over int4 weights, and its continuous batching beside our engine."""

from __future__ import annotations

import random
import statistics
import time

import torch
from device import DEVICE, CompiledOnDemand, settled
from engines import SAMPLINGS, Served, generated, machine_of
from int4_peer import use_int4

import models
from llmc.runtime.config import RuntimeConfig

# How steps are compiled.
COMPILED = {"mode": "reduce-overhead"}
# (batch, context) of decode steps.
DECODE = ((1, 256), (64, 1024))
# Requests of a mixture, with `least` to `most` tokens in and out.
MIXED = {"requests": 256, "least": 100, "most": 1024}


def library_model(shape: str):
    """transformers' model of a shape with random weights, bfloat16."""
    from transformers import AutoModelForCausalLM

    config = models.config_of(shape)
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def static_rates(shape: str, *, int4: bool = False) -> dict:
    """Seconds a decode step of transformers with a static cache, compiled as its documentation says; with
    `int4`, over the weights of gpt-fast and torchao."""
    from transformers import StaticCache

    model = library_model(shape)
    found: dict = {"weights": use_int4(model) if int4 else "bfloat16"}
    forward = torch.compile(model.forward, fullgraph=True, **COMPILED)
    for batch, context in DECODE:
        cache = StaticCache(config=model.config, max_cache_len=context)
        ids = torch.randint(2, models.VOCABULARY, (batch, context - 40), device=DEVICE)
        with torch.inference_mode():
            model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token, seconds = ids[:, -1:].clone(), []
            for position in range(context - 40, context - 2 if DEVICE != "cpu" else context - 38):
                at = torch.tensor([position], device=DEVICE)
                settled()
                began = time.perf_counter()
                logits = forward(
                    token, past_key_values=cache, position_ids=at[None].expand(batch, 1), use_cache=True
                ).logits
                token = logits[:, -1:].argmax(-1).clone()
                settled()
                seconds.append(time.perf_counter() - began)
        median = statistics.median(seconds[len(seconds) // 2 :])
        found[f"decode b{batch} ctx{context}"] = {"ms": median * 1e3, "tok_s": batch / median}
    return found


def mixture() -> tuple[list[list[int]], list[int]]:
    """Prompts, and how many tokens each asks for."""
    draw = random.Random(0)
    lengths = [
        (draw.randint(MIXED["least"], MIXED["most"]), draw.randint(MIXED["least"], MIXED["most"]))
        for _ in range(MIXED["requests"])
    ]
    prompts = [[draw.randrange(2, models.VOCABULARY) for _ in range(size)] for size, _ in lengths]
    return prompts, [count for _, count in lengths]


def our_mixture(shape: str, scheme: str, launcher: CompiledOnDemand) -> dict:
    """Output tokens a second of our engine over all requests at once."""
    prompts, counts = mixture()
    most = 2 * MIXED["most"]
    config = RuntimeConfig(
        max_requests=MIXED["requests"],
        max_step_tokens=max(2048, MIXED["requests"]),
        max_model_len=most,
        prefix_cache=False,
        draft_tokens=4,
    )
    pages = MIXED["requests"] * (-(-most // models.PAGE) + 1)
    served = Served(shape, scheme, machine_of(launcher), config, pages=pages)
    executor = served.executor(graphs=True)
    samplings = [SAMPLINGS[0]] * len(prompts)
    generated(executor, config, [prompt[:8] for prompt in prompts], samplings, 2)
    settled()
    began = time.perf_counter()
    tokens, _ = generated(executor, config, prompts, samplings, counts)
    seconds = time.perf_counter() - began
    executor.close()
    return {"seconds": seconds, "output_tok_s": sum(map(len, tokens.values())) / seconds}


def library_mixture(shape: str) -> dict:
    """The same requests by transformers' continuous batching, each with its own number of tokens."""
    from transformers import GenerationConfig

    model, (prompts, counts) = library_model(shape), mixture()
    if DEVICE == "cpu":
        return {"rehearsed": "the library sizes its cache by a GPU's memory"}
    settings = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, use_cache=True)
    made = 0
    with model.continuous_batching_context_manager(generation_config=settings) as manager:
        began = time.perf_counter()
        for prompt, count in zip(prompts, counts, strict=True):
            manager.add_request(prompt, max_new_tokens=count)
        waiting = len(prompts)
        while waiting:
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                made, waiting = made + len(result.generated_tokens), waiting - 1
            elif result is None and not manager.is_running():
                raise RuntimeError(f"the library stopped with {waiting} requests left")
        seconds = time.perf_counter() - began
    return {"seconds": seconds, "output_tok_s": made / seconds, "tokens": made}
