"""How much each way to round weights loses on real models, against the bars of the project.

    python bench/quality/schemes.py MODEL --calibration TRAIN.txt --text HELD_OUT.txt [--planted] \\
        [--judge llm_compressor=PYTHON] [--judge auto_round=PYTHON] [--judge nncf=PYTHON]

`rtn` is the fixed baseline: signed maximum on the lowest code, full range, scales in fp16. Recovered is
(rtn - method) / rtn, of the loss in NLL and of the mean KL divergence, at the same scheme. Calibration text
and held-out text must not overlap. A judge is another toolkit, in an environment of its own, at work on the
same tokens. `--planted` measures a copy of the model in which one channel in a hundred between a norm and the
matrices behind it is made 30 times larger, its inverse folded into the matrices.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cases import Case, cases
from common import Record, peak_memory_bytes
from judging import JudgeCase, judge_cases, run_judge

from llmc.compiler.bind import bind_checkpoint
from llmc.compiler.calibration import read_documents, read_sequences
from llmc.compiler.checkpoint import open_checkpoint
from llmc.compiler.evaluate import compare_programs, cut_windows
from llmc.compiler.judgement import Judgement, judge_tokens
from llmc.compiler.trace import trace_config
from llmc.ir.program import Program
from llmc.ir.rounded import round_rows
from llmc.passes.base import PassContext
from llmc.passes.bits import bits_per_weight
from llmc.passes.calibration import Calibration
from llmc.passes.fuse_linears import ATTENTION
from llmc.passes.manager import run_passes
from llmc.passes.pipeline import canonicalise, fuse
from llmc.runtime.tokenizer import Tokenizer
from llmc.spec.quant import ActivationScheme

_JUDGE_MARGIN = 1.02
_OUTLIER_SHARE, _OUTLIER_FACTOR = 0.01, 30.0


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


def with_rounded_cache(program: Program, codes: Literal["int8", "fp8"]) -> Program:
    """The program with K and V rounded as a cache of such codes holds them, a scale a token and head."""
    graph = program.copy_graph()
    scheme = ActivationScheme(codes=codes)
    for node in [node for node in graph.nodes if node.target is ATTENTION]:
        with graph.inserting_before(node):
            rounded = [graph.call_function(round_rows, (value, scheme)) for value in node.args[1:3]]
        node.args = (node.args[0], *rounded, *node.args[3:])
    return program.replace(graph=graph)


def measured(
    case: Case, judged: Judgement, baseline: Judgement | None, judges: Mapping[str, float], planted: bool
) -> dict[str, object]:
    """One row: numbers, and whether the bars hold. `judges` are mean KL divergences by judge's name."""
    ratio, kl, same_top = numbers(judged)
    row: dict[str, object] = dict(judged.as_dict())
    bars: dict[str, bool] = {}
    if case.max_ratio is not None and not planted:
        bars[f"perplexity ratio <= {case.max_ratio}"] = ratio <= case.max_ratio
    if case.min_same_top is not None and not planted:
        bars[f"same top >= {case.min_same_top}"] = same_top >= case.min_same_top
    if baseline is not None:
        base_ratio, base_kl, _ = numbers(baseline)
        recovered = {"nll": 1 - math.log(ratio) / math.log(base_ratio), "kl": 1 - kl / base_kl}
        row["recovered"] = recovered
        least = case.planted if planted else case.min_recovered
        if least is not None:
            bars[f"recovers >= {least}"] = min(recovered.values()) >= least
    for name, judge_kl in judges.items():
        _, method, scheme = name.split(" ", 2)
        if scheme == case.scheme and (not case.rivals or method in case.rivals):
            bars[f"mean KL <= 1.02 x {name}"] = kl <= _JUDGE_MARGIN * judge_kl
    return row | {"bars": bars}


def numbers(judged: Judgement) -> tuple[float, float, float]:
    """Perplexity ratio, mean KL divergence and same-top rate of a judgement against a reference."""
    found = (judged.perplexity_ratio, judged.kl_mean, judged.same_top)
    first, second, third = (entry.value for entry in found if entry is not None)
    return first, second, third


class Bench:
    """One model, its windows of held-out text and its calibration; measures case after case."""

    def __init__(self, arguments: argparse.Namespace, scratch: Path) -> None:
        tokenizer = Tokenizer.from_folder(arguments.model)
        self.planted: bool = arguments.planted
        self.folder: Path = arguments.model.absolute()
        if self.planted:
            self.folder = planted_copy(self.folder, scratch / "planted")
        self.program = fused_program(self.folder)
        documents = [tokenizer.encode(one.text) for one in read_documents(arguments.text, tokenizer)]
        windows = [part for ids in documents for part in cut_windows(ids, self.program.spec.max_context)]
        self.windows = windows[: arguments.most_windows or None]
        sequences = read_sequences(arguments.calibration, tokenizer, self.program.spec)
        self.calibration = Calibration(
            # judges take sequences of one length, so ours see no others
            sequences=tuple(ids for ids in sequences if len(ids) == len(sequences[0])),
            source=arguments.calibration.name,
            folder=scratch / "results",
        )
        self.scratch = scratch
        self.rows: dict[str, dict[str, object]] = {}
        self.judged: dict[str, Judgement] = {}
        self.judges: dict[str, float] = {}

    def measure_judge(self, case: JudgeCase) -> None:
        """Let a judge quantise, on the very tokens of the calibration, and add its row."""
        tokens = self.scratch / "tokens.json"
        tokens.write_text(json.dumps([list(ids) for ids in self.calibration.sequences]), encoding="utf-8")
        output = self.scratch / case.name.replace(" ", "-")
        took = run_judge(case, self.folder, tokens, output)
        judged = self._judge(case.name, fused_program(output))
        self.judges[case.name] = numbers(judged)[1]
        self._add(case.name, dict(judged.as_dict()) | {"bars": {}}, took.wall_s)

    def measure(self, case: Case) -> None:
        """Quantise by the passes of the case and add its row; baselines and judges come before."""
        started = time.perf_counter()
        done = run_passes(self.program, case.passes, PassContext(calibration=self.calibration))
        seconds = time.perf_counter() - started
        bits = bits_per_weight(done)
        judged = self._judge(case.name, with_rounded_cache(done, case.kv_dtype) if case.kv_dtype else done)
        row = measured(case, judged, self.judged.get(case.baseline), self.judges, self.planted)
        self._add(case.name, row | {"bits_per_weight": bits}, seconds)

    def _judge(self, name: str, program: Program) -> Judgement:
        values = compare_programs(program, self.program, self.windows, lambda *_: None)
        self.judged[name] = judge_tokens(values)
        return self.judged[name]

    def _add(self, name: str, row: dict[str, object], seconds: float) -> None:
        when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        about = {"date": when, "calibration_sequences": len(self.calibration.sequences)}
        self.rows[name] = row | {"quantise_s": seconds} | about
        ratio, kl, same_top = numbers(self.judged[name])
        found = f"ratio {ratio:.5f}  kl {kl:.5f}  same top {same_top:.4f}  {seconds:6.1f} s"
        print(f"{name:46} {found}  {row.get('recovered', '')}  {row['bars']}", flush=True)


def earlier_rows(record: Record) -> dict[str, dict[str, object]]:
    """The rows of the record that is to be replaced, each with the date it was measured on."""
    path = record.folder / f"{record.name}.json"
    if not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    about = {
        "date": found["date"],
        "calibration_sequences": found["results"].get("calibration_sequences"),
    }
    return {name: about | row for name, row in found["results"]["cases"].items()}


def main() -> None:
    """Measure all cases and write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--planted", action="store_true")
    parser.add_argument("--judge", action="append", default=[], metavar="TOOLKIT=PYTHON")
    parser.add_argument(
        "--only",
        default="",
        help="Names of cases, separated by commas; baselines always run, of others earlier rows stay.",
    )
    parser.add_argument("--skip", default="", help="Names of cases to leave out, separated by commas.")
    parser.add_argument("--most-windows", type=int, default=0, help="Use only so many windows of the text.")
    arguments = parser.parse_args()
    rivals = judge_cases(arguments.judge, 128)
    known = {case.name for case in (*cases(), *rivals)}
    wanted = {name for name in arguments.only.split(",") if name}
    skipped = {name for name in arguments.skip.split(",") if name}
    unknown = (wanted | skipped) - known
    if unknown:
        parser.error(f"no such case: {', '.join(sorted(unknown))}")

    def chosen(name: str) -> bool:
        asked = not wanted or name in wanted or name.startswith("rtn")
        return asked and name not in skipped

    kinds = ("_planted" if arguments.planted else "") + ("_judges" if rivals else "")
    record = Record(f"quality_{arguments.model.name}{kinds}")
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(arguments, Path(scratch))
        if wanted:
            bench.rows = earlier_rows(record)
        works = [partial(bench.measure_judge, rival) for rival in rivals if chosen(rival.name)]
        works += [partial(bench.measure, case) for case in cases() if chosen(case.name)]
        for number, work in enumerate(works, 1):
            work()
            # each time anew, so that an interrupted run leaves what it measured
            record.write(
                {
                    "model": arguments.model.name,
                    "complete": number == len(works),
                    "cases": bench.rows,
                    "peak_memory_bytes": peak_memory_bytes(),
                }
            )


if __name__ == "__main__":
    main()
