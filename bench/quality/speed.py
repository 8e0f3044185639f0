"""How long int4 takes beside another toolkit's GPTQ on the same work: same weights, tokens, scheme and cores.

    python bench/quality/speed.py MODEL --judge llm_compressor=PYTHON [--layers 2] [--sequences 64]

Both quantise the linears of the first `--layers` layers in groups of 128, on random tokens, in turns; table
and head stay. Ours is the preset `int4-small`. Seconds are by the clock and of all threads on a core, which
other work on the machine changes less; they grow with the layers, so what holds for a few holds for all.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cases import without_tables
from common import Record
from judging import JudgeCase, Took, run_judge

from llmc.compiler.bind import bind_checkpoint
from llmc.compiler.checkpoint import open_checkpoint
from llmc.compiler.trace import trace_config
from llmc.passes.base import Pass, PassContext
from llmc.passes.calibration import Calibration
from llmc.passes.manager import run_passes
from llmc.passes.pipeline import canonicalise, fuse
from llmc.passes.quantize.gptq import Gptq

_PRESET, _GROUP = "int4-small", 128
_LENGTH = 512
_ROWS = 4096
_TABLES = ("model.embed_tokens.weight", "lm_head.weight")


def first_layers(folder: Path, target: Path, layers: int) -> Path:
    """A copy of the model at `folder` with its first layers alone, and the first rows of its tables: they are
    no part of the work."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors*", "*.bin"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["num_hidden_layers"] = layers
    config["vocab_size"] = _ROWS
    config.pop("layer_types", None)
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as stored:
            for name in list(stored.keys()):
                parts = name.split(".")
                if "layers" in parts and int(parts[parts.index("layers") + 1]) >= layers:
                    continue
                tensor = stored.get_tensor(name)
                tensors[name] = tensor[:_ROWS].clone() if name in _TABLES else tensor
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def own_passes(num_parameters: int, num_tokens: int) -> tuple[Pass, ...]:
    """The passes of the preset as they work on the whole model: it may be too large to learn from logits."""
    found: list[Pass] = []
    for pass_ in without_tables(_PRESET):
        if isinstance(pass_, Gptq) and pass_.tuning is not None:
            pass_ = replace(pass_, epochs=pass_.tuning.affordable(num_parameters, num_tokens))
        found.append(pass_)
    return tuple(found)


def own_seconds(folder: Path, sequences: list[list[int]], passes: Sequence[Pass], results: Path) -> Took:
    """What `passes` take; tracing is left out, as loading is for judges."""
    checkpoint = open_checkpoint(folder)
    traced = trace_config(checkpoint.config, dtype=checkpoint.dtype, max_context=_LENGTH)
    program = run_passes(bind_checkpoint(traced, checkpoint), (*canonicalise(), *fuse()), PassContext())
    calibration = Calibration(sequences=tuple(map(tuple, sequences)), source="random tokens", folder=results)
    started, own_started = time.perf_counter(), time.process_time()
    run_passes(program, passes, PassContext(calibration=calibration))
    return Took(time.perf_counter() - started, time.process_time() - own_started)


def take_turns(arguments: argparse.Namespace, case: JudgeCase, scratch: Path) -> dict[str, list[Took]]:
    """What both sides take, round by round."""
    model = first_layers(arguments.model, scratch / "model", arguments.layers)
    draw = torch.Generator().manual_seed(0)
    sequences = torch.randint(_ROWS, (arguments.sequences, _LENGTH), generator=draw).tolist()
    tokens = scratch / "tokens.json"
    tokens.write_text(json.dumps(sequences), encoding="utf-8")
    whole = open_checkpoint(arguments.model)
    size = sum(math.prod(tensor.shape) for tensor in whole.tensors.values())
    passes = own_passes(size, arguments.sequences * _LENGTH)
    found: dict[str, list[Took]] = {case.name: [], f"llmc {_PRESET}": []}
    for turn in range(arguments.rounds):
        found[case.name].append(run_judge(case, model, tokens, scratch / f"judge-{turn}"))
        shutil.rmtree(scratch / f"judge-{turn}")
        found[f"llmc {_PRESET}"].append(own_seconds(model, sequences, passes, scratch / f"results-{turn}"))
        for side, took in found.items():
            print(f"{side:36} {took[-1].wall_s:7.1f} s  {took[-1].cpu_s:7.1f} s on a core", flush=True)
    return found


def main() -> None:
    """Take turns and write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--judge", required=True, metavar="TOOLKIT=PYTHON")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    toolkit, _, python = arguments.judge.partition("=")
    case = JudgeCase(
        toolkit=toolkit, method="gptq", bits=4, group_size=_GROUP, python=Path(python).absolute()
    )
    record = Record("quantise_speed")
    with tempfile.TemporaryDirectory() as name:
        found = take_turns(arguments, case, Path(name))
    ours, theirs = found[f"llmc {_PRESET}"], found[case.name]
    least = {
        kind: [min(getattr(took, kind) for took in side) for side in (ours, theirs)] for kind in Took._fields
    }
    record.write(
        {
            "model": arguments.model.name,
            "layers": arguments.layers,
            "tokens": arguments.sequences * _LENGTH,
            "torch_threads": torch.get_num_threads(),
            "case": asdict(case) | {"python": ""},
            "took": {side: [entry._asdict() for entry in took] for side, took in found.items()},
            "bars": {f"{kind} below the judge's": own < other for kind, (own, other) in least.items()},
        }
    )


if __name__ == "__main__":
    main()
