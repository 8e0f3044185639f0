"""A folder that shows a broken pass to someone who has neither the model nor the time: a small model of the
same kind with random weights, the recipe up to the pass, and what was found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..ir.printer import print_program
from ..ir.program import Program
from ..ir.weights import Unbound
from ..passes.base import Pass, PassContext
from ..passes.probe import with_random_weights
from ..passes.recipes import Recipe, to_yaml
from ..spec.errors import LlmcError, UsageError
from .bisect import Verdict, bisect_passes
from .bisect_data import probe_calibration
from .checkpoint import Checkpoint
from .hf import adapter
from .shrink import shrink
from .trace import trace_config

MODEL, RECIPE, VERDICT = "model", "recipe.yaml", "verdict.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reproducer:
    """Where the folder is, and whether its small model shows the same pass to be broken."""

    path: Path
    reproduces: bool


def check_folder(folder: Path) -> None:
    """Raises UsageError for a folder that exists and is not empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(
            "usage.reproducer",
            f"The reproducer cannot be written to {str(folder)!r}.",
            "Something stands there already.",
            "Choose another folder with -o.",
        )


def write_reproducer(
    folder: Path, checkpoint: Checkpoint, passes: Sequence[Pass], context: PassContext, verdict: Verdict
) -> Reproducer:
    """Write the folder for a verdict that names a pass; all of `passes` up to it are the recipe."""
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = verdict.before.spec.compute_dtype if verdict.before is not None else "float32"
    small = shrink(checkpoint.config)
    traced = trace_config(small, dtype=getattr(torch, dtype))
    program = with_random_weights(traced, context.seed)
    needed = tuple(passes[: verdict.index + 1])
    reproduces = _same_verdict(program, needed, context, verdict)
    stored = [name for name in traced.weights if isinstance(traced.weights[name], Unbound)]
    tensors = {name: program.weights.evaluate(name).contiguous() for name in stored}
    _write_model(folder / MODEL, checkpoint, small, tensors)
    (folder / RECIPE).write_text(to_yaml(Recipe(name="reproducer", passes=needed)), encoding="utf-8")
    found = json.dumps(verdict.as_dict(), indent=1, default=str)
    (folder / VERDICT).write_text(found + "\n", encoding="utf-8")
    for name, stage in (("before.txt", verdict.before), ("after.txt", verdict.after)):
        if stage is not None:
            (folder / name).write_text(print_program(stage), encoding="utf-8")
    (folder / "README.md").write_text(_readme(verdict, reproduces), encoding="utf-8")
    return Reproducer(path=folder, reproduces=reproduces)


def _same_verdict(program: Program, passes: Sequence[Pass], context: PassContext, verdict: Verdict) -> bool:
    """Whether the small program leads to the same pass; `context` has no calibration yet."""
    own = replace(context, max_model_len=program.spec.max_context)
    try:
        with probe_calibration(own, program.spec) as known:
            return bisect_passes(program, passes, known).pass_name == verdict.pass_name
    except LlmcError:
        return False


def _write_model(folder: Path, checkpoint: Checkpoint, config: object, tensors: Mapping[str, Tensor]) -> None:
    folder.mkdir()
    raw = adapter.config_as_dict(config)
    raw["architectures"] = checkpoint.raw_config.get("architectures")
    (folder / "config.json").write_text(json.dumps(raw, indent=1, default=str) + "\n", encoding="utf-8")
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    for file in checkpoint.tokenizer.files:
        shutil.copyfile(file, folder / file.name)


def _readme(verdict: Verdict, reproduces: bool) -> str:
    found = verdict.suspect.sentence() if verdict.suspect is not None else "no single node was found"
    shows = (
        "The small model shows it:"
        if reproduces
        else "The small model does NOT show it with random weights, so the original's are needed; to try:"
    )
    return "\n".join(
        [
            f"# Pass `{verdict.pass_name}` breaks its contract",
            "",
            verdict.why,
            f"First difference: {found}.",
            "",
            "`model/` is a small model of the same kind with random weights, `recipe.yaml` the passes up to",
            "this one, `before.txt` and `after.txt` the original's program around it.",
            "",
            shows,
            "",
            "```",
            f"llmc bisect {MODEL} --recipe {RECIPE}",
            "```",
            "",
        ]
    )
