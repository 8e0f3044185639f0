"""What a compile calibrates on: the file it was given, else text that the model writes itself, else the
built-in text. Decides; reading and writing text are done elsewhere."""

from __future__ import annotations

from pathlib import Path

from ..ir.program import Program
from ..passes.base import PassContext, Stage, needs_calibration
from ..passes.calibration import Calibration
from ..passes.manager import run_passes
from ..runtime.tokenizer import Tokenizer
from ..spec.errors import UsageError
from .calibration import built_in_sequences, read_sequences
from .calibration_text import built_in_documents
from .ledger import Progress
from .pipeline import Pipeline

# Beyond this size a model takes long to write text, and has read so much that any text does.
_WRITES_ITSELF_BYTES = 4 << 30
_NUM_WRITTEN, _WRITTEN_TOKENS = 32, 256
_OPENING_TOKENS = 4


def calibration_of(
    path: Path | None,
    pipeline: Pipeline,
    bound: Program,
    context: PassContext,
    model_folder: Path,
    results: Path,
    progress: Progress,
) -> Calibration:
    """The calibration of one compile; without tokens when no pass of `pipeline` needs them.

    Raises UsageError when `path` is given and nobody needs it, or the file cannot be used.
    """
    if not any(needs_calibration(pass_) for pass_ in pipeline.passes):
        if path is not None:
            raise UsageError(
                "calibration.unused",
                f"Recipe {pipeline.name!r} has no pass that calibrates.",
                "The file given with --calibration would be ignored.",
                "Leave it out, or choose a recipe with gptq or scale_search, such as --quant int4.",
            )
        return Calibration(sequences=(), source="", folder=results, watch=progress.advance)
    tokenizer = Tokenizer.from_folder(model_folder)
    if path is not None:
        sequences, source = read_sequences(path, tokenizer, bound.spec), path.name
    elif bound.weights.total_bytes <= _WRITES_ITSELF_BYTES:
        sequences, source = _own_text(pipeline, bound, context, tokenizer, progress), "text of its own"
    else:
        sequences, source = built_in_sequences(tokenizer, bound.spec), "the built-in text"
    return Calibration(sequences=sequences, source=source, folder=results, watch=progress.advance)


def _own_text(
    pipeline: Pipeline, bound: Program, context: PassContext, tokenizer: Tokenizer, progress: Progress
) -> tuple[tuple[int, ...], ...]:
    from .self_text import write_sequences

    unquantised = [pass_ for pass_ in pipeline.passes if pass_.stage not in (Stage.quantise, Stage.plan)]
    program = run_passes(bound, unquantised, context)
    length = min(_WRITTEN_TOKENS, bound.spec.max_context)
    openings = _openings(tokenizer, bound.spec.vocab_size)
    return write_sequences(program, openings, length, seed=context.seed, watch=progress.advance)


def _openings(tokenizer: Tokenizer, vocab_size: int) -> list[tuple[int, ...]]:
    """Every other one is the start of a text and nothing more; the others are led by a few words."""
    start = tokenizer.bos_token_id
    first = (start,) if start is not None else tokenizer.eos_token_ids[:1]
    documents = built_in_documents()
    openings: list[tuple[int, ...]] = []
    for index in range(_NUM_WRITTEN):
        words = tokenizer.encode(documents[index % len(documents)], add_special_tokens=False)
        led = index % 2 == 1 or not first
        opening = (*first, *words[:_OPENING_TOKENS]) if led else first
        openings.append(tuple(token for token in opening if token < vocab_size) or (0,))
    return openings
