"""Trains a tokenizer and a pair of story models, as the bundled ones were: `python -m llmc.models.train`.

A command line over `training/`: it reads options and prints, and knows nothing of how training works.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import click
import torch

from .training import corpus, evaluate, loop, network, vocabulary
from .training.run import Run, execute

OUTPUT = click.Path(path_type=Path, file_okay=False)
FOLDER = click.Path(path_type=Path, file_okay=False, exists=True)
FILE = click.Path(path_type=Path, dir_okay=False, exists=True)
PLAN = loop.Plan(steps=1)


@click.group()
def main() -> None:
    """Train story models on a file of documents, each ended by a line <|endoftext|>.

    The file may be packed as .xz or .gz.
    """


@main.command()
@click.argument("text", type=FILE)
@click.option("-o", "--output", type=OUTPUT, required=True)
@click.option("--vocab-size", default=4096, show_default=True)
@click.option("--context", default=network.TARGET.context, show_default=True)
def tokenizer(text: Path, output: Path, vocab_size: int, context: int) -> None:
    """Train the tokenizer on TEXT."""
    documents = corpus.read_documents(text)
    trained = vocabulary.train_tokenizer(documents, vocab_size)
    vocabulary.save_tokenizer(trained, output, context)
    num_tokens = sum(len(ids) for ids in vocabulary.encode(trained, documents))
    characters = sum(map(len, documents)) / num_tokens
    click.echo(
        f"{trained.get_vocab_size()} entries, {num_tokens} tokens, {characters:.3f} characters a token"
    )


@main.command()
@click.argument("text", type=FILE)
@click.option("-o", "--output", type=OUTPUT, required=True)
@click.option("--tokenizer", type=FOLDER, required=True)
@click.option("--valid", type=FILE, required=True, help="Text to measure on when training ends.")
@click.option("--steps", type=int, required=True)
@click.option("--batch", default=6, show_default=True, help="Rows a step, each of one context.")
@click.option("--shape", type=click.Choice(["target", "draft"]), default="target", show_default=True)
@click.option("--layers", type=int, help="Another depth than the shape's.")
@click.option("--context", type=int, help="Another context than the shape's.")
@click.option("--teacher", type=FOLDER, help="Distil from this model.")
@click.option("--grow-from", type=FOLDER, help="Start from this model, repeating its layers.")
@click.option("--lr", default=PLAN.lr, show_default=True, help="Peak rate of AdamW.")
@click.option("--muon-lr", default=PLAN.muon_lr, show_default=True, help="Peak rate of Muon.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", type=int, help="CPU threads; torch's own choice unless given.")
@click.option("--seed", default=1, show_default=True)
def model(
    *,
    shape: str,
    layers: int | None,
    context: int | None,
    steps: int,
    lr: float,
    muon_lr: float,
    threads: int | None,
    **options: Any,
) -> None:
    """Train one model on TEXT; with --teacher, distil it."""
    if threads is not None:
        torch.set_num_threads(threads)
    chosen = network.TARGET if shape == "target" else network.DRAFT
    chosen = dataclasses.replace(chosen, layers=layers or chosen.layers, context=context or chosen.context)
    plan = loop.Plan(steps=steps, lr=lr, muon_lr=muon_lr)
    run = Run(shape=chosen, plan=plan, **options)
    started = time.monotonic()

    def report(progress: loop.Progress) -> None:
        guided = "" if progress.teacher_loss is None else f"  teacher {progress.teacher_loss:.4f}"
        rate = progress.step * run.tokens_per_step / max(time.monotonic() - started, 1e-9)
        click.echo(
            f"step {progress.step}/{steps}  text {progress.text_loss:.4f}{guided}  "
            f"lr x{progress.lr_share:.3f}  gradient {progress.gradient_norm:.2f}  {rate:.0f} tokens/s"
        )

    try:
        measured = execute(run, time.monotonic, report)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{run.output}: loss {measured.loss:.4f}, perplexity {measured.perplexity:.3f}")


@main.command("evaluate")
@click.argument("model_folder", type=FOLDER)
@click.argument("text", type=FILE)
@click.option("--draft", type=FOLDER, help="Measure this draft against the model, too.")
@click.option("--k", default=4, show_default=True, help="Draft tokens a step.")
@click.option("--prompts", default=50, show_default=True)
@click.option("--prompt-tokens", default=32, show_default=True)
@click.option("--new-tokens", default=64, show_default=True)
def evaluate_command(
    model_folder: Path,
    text: Path,
    draft: Path | None,
    k: int,
    prompts: int,
    prompt_tokens: int,
    new_tokens: int,
) -> None:
    """Perplexity of a model on TEXT, in float32; with --draft, how far greedy speculation would get."""
    words = vocabulary.load_tokenizer(model_folder)
    target = network.load(model_folder)
    encoded = vocabulary.encode(words, corpus.read_documents(text))
    measured = evaluate.text_loss(target, corpus.pack(encoded, target.config.max_position_embeddings))
    click.echo(f"loss {measured.loss:.4f}  perplexity {measured.perplexity:.3f}  ({measured.tokens} tokens)")
    if draft is None:
        return
    openings = [ids[:prompt_tokens] for ids in encoded[:prompts]]
    found = evaluate.acceptance(target, network.load(draft), openings, num_tokens=new_tokens, k=k)
    share = found.accepted / found.proposed
    click.echo(f"accepted {share:.3f} of proposed, {found.tokens / found.calls:.3f} tokens a target call")


if __name__ == "__main__":
    main()
