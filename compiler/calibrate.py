"""What a compile calibrates on: the file it was given, else text that the model writes itself, else the
built-in text. Decides; reading and writing text are done elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..ir.program import Program
from ..passes.base import PassContext, Stage, needs_calibration
from ..passes.calibration import Calibration
from ..passes.manager import run_passes
from ..runtime.tokenizer import Tokenizer
from ..spec.errors import UsageError
from .cache.passes import MANAGER, program_content
from .cache.sequences import RecalledSequences, Sequences, recall_sequences
from .cache.session import CompileCache
from .calibration import built_in_sequences, read_sequences
from .calibration_text import built_in_documents
from .ledger import Progress
from .pipeline import Pipeline
from .tokenizer_files import find_tokenizer

# Beyond this size a model takes long to write text, and has read so much that any text does.
_WRITES_ITSELF_BYTES = 4 << 30
_NUM_WRITTEN, _WRITTEN_TOKENS = 32, 256
_OPENING_TOKENS = 4
_READING = ("compiler/calibration.py",)
_WRITING = ("compiler/calibrate.py", "compiler/self_text.py", *MANAGER)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """The calibration of one compile, and whether its tokens were known from an earlier one."""

    calibration: Calibration
    cached: bool = False


def calibration_of(
    path: Path | None,
    pipeline: Pipeline,
    bound: Program,
    context: PassContext,
    model_folder: Path,
    results: Path,
    progress: Progress,
    check: Callable[[int], None],
    cache: CompileCache,
) -> Prepared:
    """The calibration of one compile; without tokens when no pass of `pipeline` needs them. `check` is told
    how many there will be, before time is spent on writing them.

    Raises UsageError when `path` is given and nobody needs it, or the file cannot be used, and what `check`
    raises.
    """
    if not any(needs_calibration(pass_) for pass_ in pipeline.passes):
        if path is not None:
            raise UsageError(
                "calibration.unused",
                f"Recipe {pipeline.name!r} has no pass that calibrates.",
                "The file given with --calibration would be ignored.",
                "Leave it out, or choose a recipe with gptq or scale_search, such as --quant int4.",
            )
        unneeded = Calibration(sequences=(), source="", folder=results, watch=progress.advance)
        return Prepared(calibration=unneeded)
    tokenizer = Tokenizer.from_folder(model_folder)
    if path is not None:
        found, source = _of_file(path, tokenizer, bound, model_folder, cache), path.name
        check(sum(map(len, found.sequences)))
    elif bound.weights.total_bytes <= _WRITES_ITSELF_BYTES:
        check(_NUM_WRITTEN * _written_tokens(bound))
        found, source = _own_text(pipeline, bound, context, tokenizer, progress, cache), "text of its own"
    else:
        found = RecalledSequences(built_in_sequences(tokenizer, bound.spec), False)
        source = "the built-in text"
        check(sum(map(len, found.sequences)))
    calibration = Calibration(
        sequences=found.sequences, source=source, folder=results, watch=progress.advance
    )
    return Prepared(calibration=calibration, cached=found.cached)


def _of_file(
    path: Path, tokenizer: Tokenizer, bound: Program, model_folder: Path, cache: CompileCache
) -> RecalledSequences:
    def inputs() -> tuple[object, ...]:
        files = find_tokenizer(model_folder).files
        digests = tuple((file.name, cache.file_digest(file)) for file in files)
        return ("file", path.suffix, cache.file_digest(path), digests, bound.spec)

    return recall_sequences(
        cache, _READING, inputs, path.name, lambda: read_sequences(path, tokenizer, bound.spec)
    )


def _own_text(
    pipeline: Pipeline,
    bound: Program,
    context: PassContext,
    tokenizer: Tokenizer,
    progress: Progress,
    cache: CompileCache,
) -> RecalledSequences:
    unquantised = [pass_ for pass_ in pipeline.passes if pass_.stage not in (Stage.quantise, Stage.plan)]
    length = _written_tokens(bound)
    openings = _openings(tokenizer, bound.spec.vocab_size)

    def compute() -> Sequences:
        from .self_text import write_sequences

        program = run_passes(bound, unquantised, context)
        return write_sequences(program, openings, length, seed=context.seed, watch=progress.advance)

    def inputs() -> tuple[object, ...]:
        return ("own", *program_content(bound), context, tuple(unquantised), openings, length)

    label = f"text of {bound.spec.architecture}, {bound.spec.num_layers} layers"
    return recall_sequences(cache, _WRITING, inputs, label, compute)


def _written_tokens(bound: Program) -> int:
    """Of each sequence that a model writes."""
    return min(_WRITTEN_TOKENS, bound.spec.max_context)


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
