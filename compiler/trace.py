"""From a transformers config to a Program: the unmodified model, exported once for batches of any size.
Knows the order of steps; the names of transformers are `hf`'s business, what graphs hold is `lowering`'s."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from ..ir.infer import infer
from ..ir.program import TRACE_INPUTS, Program
from ..ir.verify import verify
from ..spec.errors import LlmcError, ModelError
from .facts import check_attention, context_limit, model_spec
from .hf import adapter
from .hf.attention import AttentionRecorder
from .hf.experts import ExpertRecorder
from .hf.masks import mask_spec
from .hf.norms import use_norm_operators
from .hf.parameters import use_fake_parameters, weightless_construction
from .hf.quiet import quiet
from .hf.ragged import Ragged
from .hf.refusals import attention_error, refuse_config, refuse_model
from .hf.rotary import settle_longrope
from .lowering import lower

TRACED = "traced"
# Sizes of the example batch: distinct and above 1, so that no size is taken for a constant.
_TOKENS, _ROWS = 13, 5


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedModel:
    """A model ready for export, and the compile-time choices made for it."""

    model: nn.Module
    ties: dict[str, str]
    tied_head: bool
    max_context: int
    choices: dict[str, str]


def trace_config(config: Any, *, dtype: torch.dtype, max_context: int | None = None) -> Program:
    """The program of a transformers `config`, before any pass.

    Weights are `Unbound` under their HF state-dict names, buffers that no checkpoint holds are
    `Constant`. `max_context` (tokens) is the longest sequence to compile for, the config's own by
    default. The graph computes in `dtype`. Raises ModelError for a model that cannot be compiled
    right.
    """
    model_class = refuse_config(config)
    attention, experts = AttentionRecorder(), ExpertRecorder()
    with quiet(), torch.no_grad(), adapter.interfaces(attention, mask_spec, experts):
        prepared = prepare_model(config, dtype, max_context)
        experts.study(prepared.model)
        exported = _export(Ragged(prepared.model, attention).eval(), str(config.model_type))
        check_attention(config, attention.calls)
        lowered = lower(exported, prepared.ties)
    program = Program(
        graph=lowered.graph,
        inputs=TRACE_INPUTS,
        weights=lowered.weights,
        spec=model_spec(
            config,
            architecture=model_class.__name__,
            program=lowered,
            attention=attention.calls,
            dtype=dtype,
            max_context=prepared.max_context,
            tied_head=prepared.tied_head,
            choices=prepared.choices,
        ),
        facts=frozenset({TRACED}),
    )
    infer(program)
    verify(program)
    return program


def prepare_model(config: Any, dtype: torch.dtype, max_context: int | None) -> TracedModel:
    """The model of `config` without weights, its norms and batch-dependent parts settled."""
    name = str(config.model_type)
    with weightless_construction():
        model = _construct(config, dtype, name)
    refuse_model(model, name)
    context = context_limit(config, max_context)
    choices = settle_longrope(model, context)
    adapter.settle_shared_layers(model)
    use_norm_operators(model)
    return TracedModel(
        model=model,
        tied_head=adapter.has_tied_head(model),
        ties=use_fake_parameters(model),
        max_context=context,
        choices=choices,
    )


def _construct(config: Any, dtype: torch.dtype, name: str) -> nn.Module:
    try:
        return adapter.build_model(config, dtype, implementation=adapter.INTERFACE)
    except LlmcError:
        raise
    except KeyError as error:
        if adapter.INTERFACE in str(error):
            raise attention_error(name) from error
        raise _construction_error(name, error) from error
    except Exception as error:
        raise _construction_error(name, error) from error


def _export(wrapper: Ragged, name: str) -> ExportedProgram:
    tokens, rows = Dim("T", min=1), Dim("L", min=1)
    inputs = (torch.zeros(_TOKENS, dtype=torch.int64), torch.arange(_TOKENS), torch.arange(_ROWS))
    try:
        return torch.export.export(
            wrapper, inputs, dynamic_shapes=({0: tokens}, {0: tokens}, {0: rows}), strict=False
        )
    except LlmcError:
        raise
    except Exception as error:
        raise ModelError(
            "model.trace",
            f"{name} cannot be traced as one graph for any number of tokens.",
            f"torch.export says: {_first_line(error)}.",
            "Choose a model family that `llmc models` lists as supported.",
        ) from error


def _construction_error(name: str, error: Exception) -> ModelError:
    return ModelError(
        "model.construct",
        f"A {name} model cannot be made from this config.",
        f"transformers says: {_first_line(error)}.",
        "Check config.json against the model's published one.",
    )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")
