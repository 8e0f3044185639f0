"""`llmc bisect` from a model folder to a verdict: opens, traces, runs the recipe, writes the reproducer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..ir.bands import one_thread
from ..passes.base import PassContext
from ..passes.manager import check_order
from ..passes.recipes import Recipe, override, preset_recipe, read_recipe
from ..runtime.tokenizer import Tokenizer
from ..spec.errors import UsageError
from ..spec.target import parse_target
from .bind import bind_checkpoint
from .bisect import Verdict, bisect_passes
from .bisect_data import probe_calibration
from .checkpoint import open_checkpoint, parse_dtype
from .ledger import Progress, Silent
from .reproducer import Reproducer, check_folder, write_reproducer
from .source import find_model
from .trace import trace_config

_PROBE_TOKENS = 96


@dataclass(frozen=True, slots=True, kw_only=True)
class BisectResult:
    """The verdict, and the folder that shows it (None where every pass is sound, or none was asked for)."""

    verdict: Verdict
    reproducer: Reproducer | None


def bisect_model(
    model: str | Path,
    *,
    quant: str | None = None,
    recipe: str | Path | None = None,
    overrides: Sequence[str] = (),
    target: str = "reference",
    dtype: str | None = None,
    prompts: Sequence[str] = (),
    output: str | Path | None = None,
    progress: Progress | None = None,
) -> BisectResult:
    """Run the passes of a recipe on `model` and name the first that breaks its contract on `prompts` (random
    tokens where none are given).

    The recipe may stop anywhere. With `output`, a reproducer is written there when a pass is named. Raises
    what `compile_model` raises for the model and the recipe.
    """
    told = progress or Silent()
    chosen = _recipe(quant, recipe, overrides)
    check_order(chosen.passes)
    if output is not None:
        check_folder(Path(output))
    told.begin("trace")
    checkpoint = open_checkpoint(find_model(model))
    compute = checkpoint.dtype if dtype is None else parse_dtype(dtype)
    program = bind_checkpoint(trace_config(checkpoint.config, dtype=compute), checkpoint)
    plain = PassContext(target=parse_target(target), max_model_len=program.spec.max_context)
    sequences = _token_ids(prompts, checkpoint.folder, program.spec.vocab_size, program.spec.max_context)
    told.begin("bisect")
    with one_thread(), probe_calibration(plain, program.spec) as context:
        verdict = bisect_passes(program, chosen.passes, context, sequences)
        if verdict.is_clean or output is None:
            return BisectResult(verdict=verdict, reproducer=None)
        made = write_reproducer(Path(output), checkpoint, chosen.passes, plain, verdict)
    return BisectResult(verdict=verdict, reproducer=made)


def _recipe(quant: str | None, recipe: str | Path | None, overrides: Sequence[str]) -> Recipe:
    if quant is not None and recipe is not None:
        raise UsageError(
            "usage.quant_and_recipe",
            "Both a preset and a recipe file were given.",
            "A preset is a recipe of its own, so only one of --quant and --recipe can hold.",
            "Leave one of them out.",
        )
    found = read_recipe(Path(recipe)) if recipe is not None else preset_recipe(quant or "none")
    return override(found, overrides)


def _token_ids(
    prompts: Sequence[str], folder: Path, vocab_size: int, max_context: int
) -> tuple[tuple[int, ...], ...] | None:
    if not prompts:
        return None
    tokenizer = Tokenizer.from_folder(folder)
    found = [
        tuple(token for token in tokenizer.encode(prompt) if token < vocab_size)[
            : min(max_context, _PROBE_TOKENS)
        ]
        for prompt in prompts
    ]
    for prompt, ids in zip(prompts, found, strict=True):
        if not ids:
            raise UsageError(
                "usage.prompt",
                f"The prompt {prompt!r} has no tokens.",
                "A probe needs at least one token that the model knows.",
                "Write another --prompt.",
            )
    return tuple(found)
