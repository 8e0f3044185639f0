"""Every name of transformers that tracing depends on: classes, attributes, keyword arguments, registries.
Knows what a transformers model calls things; knows no graph."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.integrations.moe import ExpertsInterface
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

INTERFACE = "llmc"

# Arguments that reach the attention function and change nothing in a step without HF's own cache: `is_causal`
# and `sliding_window` style arguments that do are handled by name where they arrive.
HARMLESS_ATTENTION_ARGUMENTS = frozenset(
    """
    dropout position_ids use_cache cache_position output_attentions output_hidden_states return_dict
    position_embeddings attention_type logits_to_keep output_router_logits
    """.split()  # noqa: SIM905
)

ATTENTION_LAYER_TYPES = frozenset({"attention", "full_attention", "sliding_attention", "chunked_attention"})
# Mask functions by qualified name, as `masking_utils` builds them: what each adds to a causal mask.
MASK_PARTS = {
    "causal_mask_function": "causal",
    "sliding_window_overlay.<locals>.inner_mask": "window",
    "chunked_overlay.<locals>.inner_mask": "chunk",
    "packed_sequence_mask_function.<locals>.inner_mask": "packed",
    "and_masks.<locals>.and_mask": "all",
    "remap_positions_for_packed_sequence.<locals>.inner_mask": "remapped",
}
MASK_SIZES = {"window": "sliding_window", "chunk": "chunk_size"}


def causal_lm_class(config: Any) -> type[nn.Module] | None:
    """The class of causal language models of `config`, or None when transformers has none."""
    mapping = cast(Any, AutoModelForCausalLM)._model_mapping
    if type(config) not in mapping:
        return None
    found = mapping[type(config)]
    return found[0] if isinstance(found, tuple | list) else found


def takes_positions(model: nn.Module) -> bool:
    """Whether the model computes on the positions it is given, and not on counted ones."""
    return "position_ids" in inspect.signature(model.forward).parameters


def has_tied_head(model: Any) -> bool:
    """Whether logits are made with the very table that embeds tokens."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and head.weight is table.weight


def keeps_rows(model: nn.Module) -> bool:
    """Whether the model can compute logits for chosen rows only."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def is_multimodal(config: Any) -> bool:
    """Whether `config` wraps a language model's config beside others."""
    return config.get_text_config(decoder=True) is not config


def quantization_method(config: Any) -> str | None:
    """How the checkpoint of `config` was quantised by whoever published it, or None."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return str(getattr(method, "value", method) or "unknown")


def other_mixers(config: Any) -> list[str]:
    """Kinds of layers that `config` lists and that are not attention."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    return sorted({str(kind) for kind in kinds} - ATTENTION_LAYER_TYPES)


def num_layers(config: Any) -> int:
    """Number of decoder layers."""
    return int(config.num_hidden_layers)


def hidden_size(config: Any) -> int:
    """Width of the residual stream."""
    return int(config.hidden_size)


def vocab_size(config: Any) -> int:
    """Number of token ids."""
    return int(config.vocab_size)


def token_ids(config: Any, name: str) -> tuple[int, ...]:
    """The ids of special token `name` (`bos`, `eos`, `pad`), however the config writes them."""
    value = getattr(config, f"{name}_token_id", None)
    if value is None:
        return ()
    return tuple(int(item) for item in value) if isinstance(value, list | tuple) else (int(value),)


def max_positions(config: Any) -> int | None:
    """The context length that the config states, in tokens."""
    value = getattr(config, "max_position_embeddings", None)
    return None if value is None else int(value)


def rope_parameter_sets(config: Any) -> list[dict[str, Any]]:
    """The rope parameters of `config`: one set, or one per kind of layer."""
    found = getattr(config, "rope_parameters", None)
    if not isinstance(found, dict):
        return []
    sets = [found] if "rope_type" in found else [entry for entry in found.values() if isinstance(entry, dict)]
    return [entry for entry in sets if "rope_type" in entry]


def build_model(config: Any, dtype: torch.dtype, *, implementation: str) -> nn.Module:
    """An unmodified model of `config` whose attention (and experts, where it can) go to `implementation`.

    The config is copied. Parameters are initialised as transformers does.
    """
    own = copy.deepcopy(config)
    own.use_cache = False
    options = {"attn_implementation": implementation, "dtype": dtype}
    if implementation != INTERFACE:
        return AutoModelForCausalLM.from_config(own, **options).eval()
    try:
        model = AutoModelForCausalLM.from_config(own, **options, experts_implementation=INTERFACE)
    except ValueError as error:
        if "experts" not in str(error):
            raise
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), **options)
    return model.eval()


@contextmanager
def interfaces(
    attention: Callable[..., Any], mask: Callable[..., Any], experts: Callable[..., Any]
) -> Generator[None]:
    """Register the three functions as implementation `INTERFACE` for the time of the block."""
    registries = (AttentionInterface, AttentionMaskInterface, ExpertsInterface)
    for registry, function in zip(registries, (attention, mask, experts), strict=True):
        registry.register(INTERFACE, function)
    try:
        yield
    finally:
        for registry in registries:
            cast(Any, registry)._global_mapping.pop(INTERFACE, None)


def layer_index(module: Any) -> int | None:
    """The index of the layer that an attention module belongs to."""
    value = getattr(module, "layer_idx", None)
    return None if value is None else int(value)


def is_bidirectional(module: nn.Module) -> bool:
    """Whether an attention module says that it looks ahead."""
    return getattr(module, "is_causal", True) is False


def forward_arguments(input_ids: Tensor, positions: Tensor, rows: Tensor | None) -> dict[str, Any]:
    """Keyword arguments of a causal language model's forward for one packed batch."""
    arguments: dict[str, Any] = {"input_ids": input_ids, "position_ids": positions, "use_cache": False}
    return arguments if rows is None else {**arguments, "logits_to_keep": rows}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLayout:
    """How an experts module stores and joins its weights."""

    gated: bool
    transposed: bool
    concatenated: bool
    biased: bool
    normed: bool


def expert_layout(module: Any) -> ExpertLayout | None:
    """The layout of a module that goes through the experts registry; None for any other module."""
    if not hasattr(module, "_apply_gate") or not hasattr(module, "is_transposed"):
        return None
    return ExpertLayout(
        gated=bool(getattr(module, "has_gate", True)),
        transposed=bool(module.is_transposed),
        concatenated=bool(getattr(module, "is_concatenated", True)),
        biased=bool(getattr(module, "has_bias", False)),
        normed=bool(getattr(module, "has_post_expert_norm", False)),
    )


def expert_activation(module: Any, layout: ExpertLayout) -> Callable[[Tensor], Tensor]:
    """What stands between the two projections of an expert."""
    return module._apply_gate if layout.gated else module.act_fn


def expert_weights(module: Any, layout: ExpertLayout) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """First and second projection, then their biases, of all experts of a module."""
    first = "gate_up_proj" if layout.gated else "up_proj"
    biases = (f"{first}_bias", "down_proj_bias") if layout.biased else ()
    found: list[Any] = [getattr(module, name) for name in (first, "down_proj", *biases)]
    if not biases:
        return found[0], found[1], None, None
    return found[0], found[1], found[2], found[3]


def rope_kinds(module: Any) -> dict[str, str]:
    """Rope kind by buffer prefix (`""`, or `KIND_` per kind of layer) of a rotary module; empty otherwise."""
    kinds: Any = getattr(module, "rope_type", None)
    if isinstance(kinds, str):
        return {"": kinds}
    return {f"{layer}_": str(kind) for layer, kind in kinds.items()} if isinstance(kinds, dict) else {}


def set_longrope(module: Any, prefix: str, num_positions: int) -> None:
    """Give a rotary module the longrope frequencies for sequences of `num_positions`, once and for all."""
    layer = prefix.removesuffix("_") or None
    options = {"seq_len": num_positions} | ({"layer_type": layer} if layer else {})
    frequencies, scaling = ROPE_INIT_FUNCTIONS["longrope"](module.config, torch.device("cpu"), **options)
    getattr(module, f"{prefix}inv_freq").copy_(frequencies)
    setattr(module, f"{prefix}attention_scaling", scaling)
    module.rope_type = "default" if layer is None else {**module.rope_type, layer: "default"}


def longrope_border(module: Any, prefix: str) -> int:
    """The number of positions up to which a longrope module uses its short factors."""
    parameters = module.config.rope_parameters
    layer = prefix.removesuffix("_")
    own = parameters[layer] if layer else parameters
    border = own.get("original_max_position_embeddings") or module.config.original_max_position_embeddings
    return int(border)


def settle_shared_layers(model: nn.Module) -> None:
    """Keep models that share K and V between layers from dropping rows half-way through the layers.

    Gemma 4 skips rows without wanted logits after its last storing layer, which asks whether there is
    one token; the rows that are dropped never change others.
    """
    for module in model.modules():
        if hasattr(module, "_maybe_slice_kv_shared_inputs"):
            cast(Any, module)._maybe_slice_kv_shared_inputs = _keep_all_rows


def _keep_all_rows(hidden: Any, per_layer: Any, positions: Any, masks: Any, *_: Any, **__: Any) -> Any:
    return hidden, per_layer, positions, masks


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The parameters that `module` itself registers, to be replaced in place."""
    return module._parameters  # pyright: ignore[reportPrivateUsage]


# Sizes that carry no meaning, with what they may be at most in a small model of the same kind.
SIZE_CAPS = {
    "vocab_size": 128, "vocab_size_per_layer_input": 128,
    "intermediate_size": 96, "ffn_dim": 96, "n_inner": 96, "intermediate_size_mlp": 96,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48, "shared_intermediate_size": 96,
    "hidden_size_per_layer_input": 16, "laurel_rank": 16, "q_lora_rank": 48, "kv_lora_rank": 32,
    "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "moe_num_experts": 8,
    "num_experts_per_tok": 2, "moe_k": 2, "moe_num_shared_experts": 2, "n_shared_experts": 2,
    "decoder_sparse_step": 2, "moe_layer_interval": 2, "interleave_moe_layer_step": 2,
    "sliding_window": 8, "attention_chunk_size": 8,
}  # fmt: skip
EXPERT_COUNTS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
EXPERT_GROUPS = ("n_group", "topk_group")
LAYER_INDEX_LISTS = ("mlp_only_layers", "moe_layers")
FIRST_LAYERS = ("first_k_dense_replace", "max_window_layers", "moe_layer_start_index")
LAST_LAYERS = ("num_kv_shared_layers",)
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "pad_token_id_per_layer_input")
# Where set, tables outside of the layers have a part for each layer.
_PARTS_PER_LAYER = "hidden_size_per_layer_input"
_PERIODS = ("decoder_sparse_step", "moe_layer_interval", "interleave_moe_layer_step", "moe_layer_freq")


def has_parts_per_layer(config: Any) -> bool:
    """Whether weights outside of the layers grow with their number."""
    return bool(getattr(config, _PARTS_PER_LAYER, None))


def config_of(class_name: str, options: dict[str, Any]) -> Any:
    """A config object of the named class of transformers."""
    return getattr(transformers, class_name)(**copy.deepcopy(options))


def config_as_dict(config: Any) -> dict[str, Any]:
    """What config.json says of `config`."""
    return config.to_dict()


def per_layer_lists(config: Any) -> list[str]:
    """Attributes of `config` that hold one value a layer."""
    count = num_layers(config)
    return [
        name
        for name, value in vars(config).items()
        if isinstance(value, list) and len(value) == count and name not in (*TOKEN_IDS, *LAYER_INDEX_LISTS)
    ]


def layer_kind(config: Any, index: int) -> tuple[Any, ...]:
    """What the config says about layer `index`: layers of equal kind are made alike."""
    count = num_layers(config)
    lists = [str(getattr(config, name)[index]) for name in per_layer_lists(config)]
    chosen = [index in (getattr(config, name, None) or ()) for name in LAYER_INDEX_LISTS]
    first = [index < (getattr(config, name, None) or 0) for name in FIRST_LAYERS]
    last = [index >= count - (getattr(config, name, None) or 0) for name in LAST_LAYERS]
    periods = [getattr(config, name, None) for name in _PERIODS]
    turns = [(index + 1) % period == 0 for period in periods if isinstance(period, int) and period > 1]
    own = str(sorted(_overrides(config).get(index, {}).items(), key=lambda item: item[0]))
    return (*lists, *chosen, *first, *last, *turns, own)


def readable_copy(config: Any) -> Any:
    """A copy of `config` whose attributes can all be read, those that layers override included."""
    own = copy.deepcopy(config)
    if _overrides(own):
        own.allow_global_per_layer_attribute_access = True
    return own


def _overrides(config: Any) -> dict[int, dict[str, Any]]:
    """What single layers set otherwise than the config at large, by layer index."""
    spec = getattr(config, "_heterogeneity_spec", None)
    return {} if spec is None else spec.per_layer_overrides


def num_heads(config: Any) -> int:
    """Query heads of a layer."""
    return int(config.num_attention_heads)


def num_kv_heads(config: Any) -> int:
    """K and V heads of a layer."""
    if getattr(config, "multi_query", False):
        return 1
    found = getattr(config, "num_key_value_heads", None)
    return num_heads(config) if found is None else int(found)


def head_width(config: Any) -> int:
    """Elements of one query head."""
    stated = getattr(config, "head_dim", None)
    return hidden_size(config) // num_heads(config) if stated is None else int(stated)


def set_heads(config: Any, heads: int, kv_heads: int, hidden: int) -> None:
    """Change the number of heads and the width of the residual stream, head widths as they are."""
    if getattr(config, "word_embed_proj_dim", None) == hidden_size(config):
        config.word_embed_proj_dim = hidden
    config.num_attention_heads = heads
    if getattr(config, "num_key_value_heads", None) is not None:
        config.num_key_value_heads = kv_heads
    if getattr(config, "num_global_key_value_heads", None) is not None:
        config.num_global_key_value_heads = kv_heads
    config.hidden_size = hidden


def set_layers(config: Any, kept: list[int]) -> None:
    """Have as many layers as `kept` names; the new layer i overrides what the old layer `kept[i]` did.

    Lists of one value a layer must fit already.
    """
    old = _overrides(config)
    config.num_hidden_layers = len(kept)
    if old:
        heads = num_kv_heads(config)
        own = {new: dict(old[index]) for new, index in enumerate(kept) if index in old}
        for values in own.values():
            if "num_key_value_heads" in values:
                values["num_key_value_heads"] = min(values["num_key_value_heads"], heads)
        config.per_layer_config = own
