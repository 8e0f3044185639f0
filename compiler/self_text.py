"""Text that a model writes itself, to calibrate it on: what it finds likely is what it will be asked to tell.

Sampled with the reference operators at temperature 1, many sequences at a time, the same for a seed (as in
data-free calibration: LLM-QAT, Liu et al. 2023). Knows programs and tokens; knows no files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..ir.paged import QUERY_STARTS, PagedSequence, allocate_caches, scatter_pages, step_inputs
from ..ir.program import Program
from ..passes.quantize.walk import raised, run_nodes

PAGED_ATTENTION = torch.ops.llmc.paged_attention.default
_KEPT_BYTES = 1 << 30


def write_sequences(
    program: Program,
    openings: Sequence[Sequence[int]],
    length: int,
    *,
    seed: int,
    watch: Callable[[int, int, str], None],
) -> tuple[tuple[int, ...], ...]:
    """One sequence of `length` tokens for each of `openings` (token ids, at least one each), by the paged
    `program`; a token that ends a text is followed by whatever the model finds likely then."""
    assert program.cache is not None
    draw = torch.Generator().manual_seed(seed)
    read = _weights(program)
    pages = scatter_pages(program.cache, [length] * len(openings), seed)
    caches = allocate_caches(program.cache, pages.num_pages)
    written = [list(opening) for opening in openings]
    done = 0
    while done < length:
        stop = min(len(tokens) for tokens in written)
        parts = [
            PagedSequence(
                start=done,
                token_ids=tokens[done:stop],
                block_tables=table,
                wanted=(stop - done - 1,),
            )
            for tokens, table in zip(written, pages.tables, strict=True)
        ]
        logits = _run(program, {**step_inputs(program.cache, parts), **caches}, read)
        done = stop
        chances = torch.softmax(logits.float(), dim=-1)
        drawn = torch.multinomial(chances, 1, generator=draw)[:, 0].tolist()
        for tokens, token in zip(written, drawn, strict=True):
            if len(tokens) == done:
                tokens.append(token)
        watch(done, length, "text of the model's own")
    return tuple(tuple(tokens[:length]) for tokens in written)


def _run(program: Program, inputs: dict[str, Tensor], read: Callable[[str], Tensor]) -> Tensor:
    """The logits of one step. Where each sequence has one token, all attend at once."""
    together = inputs[QUERY_STARTS].shape[0] == inputs["input_ids"].shape[0] + 1
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    output = next(node for node in program.graph.nodes if node.op == "output")
    faster = {PAGED_ATTENTION: attend_together} if together else {}
    values = run_nodes(nodes, {}, inputs, read, faster)
    return values[output.args[0]]


def attend_together(
    q_SHD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    written: Tensor,
    block_table: Tensor,
    query_starts: Tensor,
    positions: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    chunk: int,
    *cache_scales: Tensor | None,
) -> Tensor:
    """`llmc.paged_attention` for one token of each of S sequences, in one go over their padded keys.

    Caches of codes go the operator's own way.
    """
    if any(scales is not None for scales in cache_scales):
        before = (q_SHD, k_cache, v_cache, written, block_table, query_starts, positions)
        return PAGED_ATTENTION(*before, sinks, scale, window, softcap, chunk, *cache_scales)
    used = int(positions.max()) // k_cache.shape[1] + 1
    pages = block_table[:, :used].clamp(min=0)
    num_kv_heads = k_cache.shape[2]
    # [S, G, D, K] and [S, G, K, V]
    keys = k_cache[pages].flatten(1, 2).permute(0, 2, 3, 1).to(q_SHD.dtype)
    values = v_cache[pages].flatten(1, 2).transpose(1, 2).to(q_SHD.dtype)
    queries = q_SHD.unflatten(1, (num_kv_heads, -1))
    scores = (queries @ keys).float() * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    places, now = torch.arange(scores.shape[-1])[None], positions[:, None]
    hidden = places > now
    if window:
        hidden |= places <= now - window
    if chunk:
        hidden |= places < now // chunk * chunk
    scores = scores.masked_fill(hidden[:, None, None], float("-inf"))
    if sinks is not None:
        rest = sinks.float().reshape(1, num_kv_heads, -1, 1).expand(scores.shape[0], -1, -1, 1)
        scores = torch.cat([scores, rest], dim=-1)
    chances = torch.softmax(scores, dim=-1)[..., : places.shape[1]]
    return (chances.to(q_SHD.dtype) @ values).flatten(1, 2)


def _weights(program: Program) -> Callable[[str], Tensor]:
    """Weights by name, in float32, kept where they are few."""
    if program.weights.total_bytes > _KEPT_BYTES:
        return lambda name: raised(program.weights.evaluate(name))
    kept: dict[str, Tensor] = {}

    def read(name: str) -> Tensor:
        if name not in kept:
            kept[name] = raised(program.weights.evaluate(name))
        return kept[name]

    return read
