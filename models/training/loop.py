"""One training run: a model, batches, a plan, and, for a draft, the teacher it is distilled from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers import LlamaForCausalLM

from .muon import Muon


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How long and how fast to train. `teacher_share` is the weight of the distillation loss, the rest is
    the text's; it has no effect without a teacher."""

    steps: int
    lr: float = 2.5e-3
    muon_lr: float = 0.012
    weight_decay: float = 0.1
    warmup_steps: int = 50
    final_lr_share: float = 0.02
    teacher_share: float = 0.8
    clip_norm: float = 1.0
    report_every: int = 25

    def validate(self) -> None:
        """Raises ValueError for a plan that cannot be carried out."""
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}")
        if not 0.0 <= self.teacher_share <= 1.0:
            raise ValueError(f"teacher_share must lie between 0 and 1, not {self.teacher_share}")


class Losses(NamedTuple):
    """Mean nats a token: cross entropy with the text, and KL(teacher || model) where there is a teacher."""

    text: Tensor
    teacher: Tensor | None


class Progress(NamedTuple):
    """What a run reports of a step it has done."""

    step: int
    text_loss: float
    teacher_loss: float | None
    lr_share: float
    gradient_norm: float


def lr_share(step: int, plan: Plan) -> float:
    """The share of the peak learning rate at `step`: linear warm-up under a cosine to the final share."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / plan.steps))
    annealed = plan.final_lr_share + (1 - plan.final_lr_share) * cosine
    return annealed * min(1.0, (step + 1) / max(1, plan.warmup_steps))


def losses(logits: Tensor, targets: Tensor, guide: Tensor | None) -> Losses:
    """Losses of `logits` `[batch, width, vocab]` against `targets` `[batch, width]`, in float32."""
    flat = logits.flatten(0, 1).float()
    text = functional.cross_entropy(flat, targets.flatten())
    if guide is None:
        return Losses(text, None)
    wanted = functional.log_softmax(guide.flatten(0, 1).float(), dim=-1)
    have = functional.log_softmax(flat, dim=-1)
    return Losses(text, functional.kl_div(have, wanted, reduction="batchmean", log_target=True))


def optimizers(model: LlamaForCausalLM, plan: Plan) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for embeddings and norms."""
    inner = [p for p in model.model.layers.parameters() if p.dim() == 2]
    chosen = {id(p) for p in inner}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    groups = [
        {"params": [p for p in rest if p.dim() == 2], "weight_decay": plan.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=plan.lr, betas=(0.9, 0.98), eps=1e-9)
    return [adam, Muon(inner, lr=plan.muon_lr, weight_decay=plan.weight_decay)]


def train(
    model: LlamaForCausalLM,
    batches: Iterator[NDArray[np.int64]],
    plan: Plan,
    *,
    teacher: LlamaForCausalLM | None = None,
    report: Callable[[Progress], None],
) -> None:
    """Train `model` in place, where it lies, with matrix products in bfloat16 and everything else in
    float32. `report` is called for the first step, every `plan.report_every`-th, and the last."""
    plan.validate()
    device = model.device
    optimizing = optimizers(model, plan)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizing]
    model.train()
    for step in range(plan.steps):
        share = lr_share(step, plan)
        for optimizer, lrs in zip(optimizing, peaks, strict=True):
            for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr * share
        tokens = torch.from_numpy(next(batches)).to(device)
        found = _forward(model, teacher, tokens)
        total = found.text
        if found.teacher is not None:
            total = plan.teacher_share * found.teacher + (1 - plan.teacher_share) * found.text
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), plan.clip_norm)
        for optimizer in optimizing:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % plan.report_every == 0 or step == plan.steps - 1:
            guided = None if found.teacher is None else found.teacher.item()
            report(Progress(step + 1, found.text.item(), guided, share, norm.item()))
    model.eval()


def _forward(model: LlamaForCausalLM, teacher: LlamaForCausalLM | None, tokens: Tensor) -> Losses:
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
        logits = model(inputs, use_cache=False).logits
        guide = None
        if teacher is not None:
            with torch.no_grad():
                guide = teacher(inputs, use_cache=False).logits
    return losses(logits, targets, guide)
