"""How much each way to round weights loses on real models, against the bars of the project.

    python bench/quality/schemes.py MODEL --calibration TRAIN.txt --text HELD_OUT.txt [--planted]

`rtn` is the fixed baseline: signed maximum on the lowest code, full range, scales in fp16. Recovered is
(rtn - method) / rtn, of the loss in NLL and of the mean KL divergence, at the same scheme. Calibration text
and held-out text must not overlap. `--planted` measures a copy of the model in which one channel in a hundred
between a norm and the matrices behind it is made 30 times larger, its inverse folded into the matrices.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import Record, peak_memory_bytes

from llmc.compiler.bind import bind_checkpoint
from llmc.compiler.calibration import read_documents, read_sequences
from llmc.compiler.checkpoint import open_checkpoint
from llmc.compiler.evaluate import compare_programs, cut_windows
from llmc.compiler.judgement import Judgement, judge_tokens
from llmc.compiler.trace import trace_config
from llmc.ir.program import Program
from llmc.passes.base import Pass, PassContext
from llmc.passes.bits import bits_per_weight
from llmc.passes.calibration import Calibration
from llmc.passes.manager import run_passes
from llmc.passes.pipeline import canonicalise, fuse
from llmc.passes.quantize.awq import Awq
from llmc.passes.quantize.gptq import Gptq
from llmc.passes.quantize.rtn import Rtn
from llmc.passes.quantize.scale_search import ScaleSearch
from llmc.runtime.tokenizer import Tokenizer

_OUTLIER_SHARE, _OUTLIER_FACTOR = 0.01, 30.0
_KEEP_TABLES = {"head_bits": 0, "embedding_bits": 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One quantiser, the baseline it is compared with, and what the project asks of it."""

    name: str
    passes: tuple[Pass, ...]
    baseline: str = ""
    max_ratio: float | None = None
    min_same_top: float | None = None
    min_recovered: float | None = None


def cases() -> list[Case]:
    """Baselines first. Bars on recovery leave the table and head as they are, so that only matrices count."""
    whole = {"head_bits": 8, "embedding_bits": 8}
    return [
        Case(name="rtn int4 g128", passes=(Rtn(bits=4, group_size=128, **_KEEP_TABLES),)),
        Case(name="rtn int4 g32", passes=(Rtn(bits=4, group_size=32, **_KEEP_TABLES),)),
        Case(name="rtn int3 g128", passes=(Rtn(bits=3, group_size=128, **_KEEP_TABLES),)),
        Case(name="int8", passes=(Rtn(bits=8, group_size=32, **whole),), max_ratio=1.002, min_same_top=0.99),
        Case(
            name="int4-fast",
            passes=(ScaleSearch(bits=4, group_size=32, data=False, **_KEEP_TABLES),),
            baseline="rtn int4 g32",
        ),
        Case(
            name="scale_search g128",
            passes=(ScaleSearch(bits=4, group_size=128, **_KEEP_TABLES),),
            baseline="rtn int4 g128",
        ),
        Case(
            name="awq gptq g128",
            passes=(Awq(bits=4, group_size=128), Gptq(bits=4, group_size=128, **_KEEP_TABLES)),
            baseline="rtn int4 g128",
        ),
        Case(
            name="int4-small",
            passes=(Gptq(bits=4, group_size=128, **_KEEP_TABLES),),
            baseline="rtn int4 g128",
            min_recovered=0.6,
        ),
        Case(
            name="int4",
            passes=(Gptq(bits=4, group_size=32, **whole),),
            baseline="rtn int4 g32",
            max_ratio=1.006,
        ),
        Case(
            name="int4-max",
            passes=(Gptq(bits=4, group_size=32, symmetric=False, rounds=6, **whole),),
            baseline="rtn int4 g32",
            max_ratio=1.003,
        ),
        Case(
            name="int3",
            passes=(Gptq(bits=3, group_size=128, rounds=6, **_KEEP_TABLES),),
            baseline="rtn int3 g128",
            min_recovered=0.65,
        ),
    ]


def planted_copy(folder: Path, target: Path) -> Path:
    """A copy of a Llama-like model with outlier channels behind its norms; its function is the same."""
    shutil.copytree(folder, target)
    path = target / "model.safetensors"
    tensors = {name: value.float() for name, value in load_file(path).items()}
    draw = torch.Generator().manual_seed(0)
    readers = {
        "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    }
    for name in [name for name in tensors if name.endswith("layernorm.weight")]:
        layer, norm = name.removesuffix(".weight").rsplit(".", 1)
        width = tensors[name].shape[0]
        chosen = torch.randperm(width, generator=draw)[: max(1, round(width * _OUTLIER_SHARE))]
        tensors[name][chosen] *= _OUTLIER_FACTOR
        for reader in readers[norm]:
            tensors[f"{layer}.{reader}.weight"][:, chosen] /= _OUTLIER_FACTOR
    save_file(tensors, path, metadata={"format": "pt"})
    return target


def fused_program(folder: Path) -> Program:
    """The model before quantisation, in the form that quantisers see."""
    checkpoint = open_checkpoint(folder)
    bound = bind_checkpoint(
        trace_config(checkpoint.config, dtype=checkpoint.dtype, max_context=None), checkpoint
    )
    return run_passes(bound, (*canonicalise(), *fuse()), PassContext())


def measured(case: Case, judged: Judgement, baseline: Judgement | None) -> dict[str, object]:
    """One row: numbers, and whether the bars hold."""
    ratio, kl, same_top = _numbers(judged)
    row: dict[str, object] = dict(judged.as_dict())
    bars: dict[str, bool] = {}
    if case.max_ratio is not None:
        bars[f"perplexity ratio <= {case.max_ratio}"] = ratio <= case.max_ratio
    if case.min_same_top is not None:
        bars[f"same top >= {case.min_same_top}"] = same_top >= case.min_same_top
    if baseline is not None:
        base_ratio, base_kl, _ = _numbers(baseline)
        recovered = {"nll": 1 - math.log(ratio) / math.log(base_ratio), "kl": 1 - kl / base_kl}
        row["recovered"] = recovered
        if case.min_recovered is not None:
            bars[f"recovers >= {case.min_recovered}"] = min(recovered.values()) >= case.min_recovered
    return row | {"bars": bars}


def _numbers(judged: Judgement) -> tuple[float, float, float]:
    """Perplexity ratio, mean KL divergence and same-top rate of a judgement against a reference."""
    found = (judged.perplexity_ratio, judged.kl_mean, judged.same_top)
    first, second, third = (entry.value for entry in found if entry is not None)
    return first, second, third


def main() -> None:
    """Measure all cases and write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--planted", action="store_true")
    parser.add_argument(
        "--only", default="", help="Names of cases, separated by commas; baselines always run."
    )
    parser.add_argument("--most-windows", type=int, default=0, help="Use only so many windows of the text.")
    arguments = parser.parse_args()
    record = Record("quality_planted" if arguments.planted else f"quality_{arguments.model.name}")
    tokenizer = Tokenizer.from_folder(arguments.model)
    rows: dict[str, dict[str, object]] = {}
    judged: dict[str, Judgement] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = (
            planted_copy(arguments.model, Path(scratch) / "planted") if arguments.planted else arguments.model
        )
        program = fused_program(folder)
        documents = [
            tokenizer.encode(document.text) for document in read_documents(arguments.text, tokenizer)
        ]
        windows = [part for ids in documents for part in cut_windows(ids, program.spec.max_context)]
        windows = windows[: arguments.most_windows or None]
        calibration = Calibration(
            sequences=read_sequences(arguments.calibration, tokenizer, program.spec),
            source=arguments.calibration.name,
            folder=Path(scratch) / "results",
        )
        wanted = [name for name in arguments.only.split(",") if name]
        for case in cases():
            if wanted and case.name not in wanted and not case.name.startswith("rtn"):
                continue
            started = time.perf_counter()
            done = run_passes(program, case.passes, PassContext(calibration=calibration))
            seconds = time.perf_counter() - started
            judged[case.name] = judge_tokens(compare_programs(done, program, windows, lambda *_: None))
            row = measured(case, judged[case.name], judged.get(case.baseline))
            rows[case.name] = row | {"bits_per_weight": bits_per_weight(done), "quantise_s": seconds}
            ratio, kl, _ = _numbers(judged[case.name])
            recovered = row.get("recovered", "")
            print(f"{case.name:20} ratio {ratio:.5f}  kl {kl:.5f}  {recovered}  {row['bars']}", flush=True)
    record.write({"model": arguments.model.name, "cases": rows, "peak_memory_bytes": peak_memory_bytes()})


if __name__ == "__main__":
    main()
