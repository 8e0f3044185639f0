"""The facts of a model, from its config and from the attention that was seen while tracing it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch

from ..ir.weights import Unbound
from ..spec.errors import ModelError
from ..spec.model import AttentionSpec, ModelSpec
from .hf import adapter
from .hf.refusals import attention_error
from .lowering import Lowered

# Static rope scalings whose factor extends the original context.
_EXTENDING = frozenset({"linear", "yarn"})


def context_limit(config: Any, wanted: int | None) -> int:
    """The longest sequence to compile for, in tokens: `wanted`, or what the config states.

    Raises ModelError when the config states nothing and nothing is wanted, or when more is wanted than
    the model's positions reach.
    """
    stated = adapter.max_positions(config)
    if stated is None:
        if wanted is None:
            raise ModelError(
                "model.context",
                "The context length of this model is unknown.",
                "config.json has no max_position_embeddings.",
                "Give it with --max-model-len.",
            )
        return wanted
    if wanted is None:
        return stated
    limit = max([stated, *(_extended(rope) for rope in adapter.rope_parameter_sets(config))])
    if not 0 < wanted <= limit:
        raise ModelError(
            "model.context",
            f"A context of {wanted} tokens is not possible with this model.",
            f"Its positions reach from 1 to {limit} tokens.",
            f"Ask for at most {limit} with --max-model-len.",
        )
    return wanted


def _extended(rope: Mapping[str, Any]) -> int:
    original = rope.get("original_max_position_embeddings")
    if original is None or rope["rope_type"] not in _EXTENDING:
        return 0
    return int(original * float(rope.get("factor") or 1.0))


def check_attention(config: Any, calls: Sequence[AttentionSpec]) -> None:
    """Raises ModelError unless attention was seen exactly once in every layer of `config`."""
    name, expected = str(config.model_type), adapter.num_layers(config)
    if not calls:
        raise attention_error(name)
    counts = Counter(call.layer for call in calls)
    if sorted(counts) == list(range(expected)) and max(counts.values()) == 1:
        return
    raise ModelError(
        "model.attention_count",
        f"{name} has {expected} layers and computes attention {len(calls)} times.",
        f"Attention was seen in layers {sorted(counts.elements())}, so some of it is something else.",
        "Choose a model family that `llmc models` lists as supported.",
    )


def model_spec(
    config: Any,
    *,
    architecture: str,
    program: Lowered,
    attention: Sequence[AttentionSpec],
    dtype: torch.dtype,
    max_context: int,
    tied_head: bool,
    choices: dict[str, str],
) -> ModelSpec:
    """The spec of a traced program; `attention` is in layer order, parameters are counted once each."""
    weights = program.weights
    parameters = [weights[name] for name in weights if isinstance(weights[name], Unbound)]
    output = next(node for node in program.graph.nodes if node.op == "output").args[0]
    pad = adapter.token_ids(config, "pad")
    return ModelSpec(
        family=str(config.model_type),
        architecture=architecture,
        num_layers=adapter.num_layers(config),
        hidden_size=adapter.hidden_size(config),
        vocab_size=int(output.meta["val"].shape[-1]),
        max_context=max_context,
        compute_dtype=str(dtype).removeprefix("torch."),
        tied_head=tied_head,
        num_parameters=sum(prod(entry.shape) for entry in parameters),
        attention=tuple(sorted(attention, key=lambda call: call.layer)),
        bos_token_ids=adapter.token_ids(config, "bos"),
        eos_token_ids=adapter.token_ids(config, "eos"),
        pad_token_id=pad[0] if pad else None,
        choices=choices,
    )
