"""A whole training run, from a text file to a Hugging Face folder with a record of how it came about."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from . import corpus, evaluate, loop, network, vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What to train on what. `valid` is measured when training ends; `teacher` distils, `grow_from` starts
    from a shallower model. `batch` is in rows of one context each."""

    text: Path
    valid: Path
    tokenizer: Path
    output: Path
    shape: network.Shape
    plan: loop.Plan
    batch: int = 6
    teacher: Path | None = None
    grow_from: Path | None = None
    device: str = "cpu"
    seed: int = 1

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.shape.context


def execute(
    run: Run, clock: Callable[[], float], report: Callable[[loop.Progress], None]
) -> evaluate.TextLoss:
    """Train, measure and save; returns the loss on `run.valid`.

    Raises ValueError for sizes or steps that make no sense and for texts too short to fill one row, before
    anything is trained.
    """
    run.plan.validate()
    words = vocabulary.load_tokenizer(run.tokenizer)
    encoded = vocabulary.encode(words, corpus.read_documents(run.text))
    corpus.pack(encoded, run.shape.context)
    valid = corpus.pack(vocabulary.encode(words, corpus.read_documents(run.valid)), run.shape.context)
    student = network.build(run.shape, words.get_vocab_size(), run.seed)
    if run.grow_from is not None:
        network.grow(student, network.load(run.grow_from))
    teacher = None if run.teacher is None else network.load(run.teacher)
    for model in (student, teacher):
        if model is not None:
            network.move(model, torch.device(run.device))
    stream = corpus.batches(encoded, run.shape.context, run.batch, np.random.default_rng(run.seed))
    started = clock()
    loop.train(student, stream, run.plan, teacher=teacher, report=report)
    minutes = (clock() - started) / 60
    measured = evaluate.text_loss(student, valid)
    record = {
        **dataclasses.asdict(run.shape),
        **dataclasses.asdict(run.plan),
        "parameters": student.num_parameters(),
        "batch": run.batch,
        "seed": run.seed,
        "tokens_seen": run.plan.steps * run.tokens_per_step,
        "train_tokens": sum(map(len, encoded)),
        "distilled_from": run.teacher and run.teacher.name,
        "grown_from": run.grow_from and run.grow_from.name,
        "valid_loss": round(measured.loss, 4),
        "valid_perplexity": round(measured.perplexity, 3),
        "minutes": round(minutes, 1),
    }
    network.save(student, run.tokenizer, run.output, record)
    return measured
