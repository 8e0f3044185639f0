"""How far the kernels' logits are from float32 arithmetic over the same quantised weights.

python bench/cpu/accuracy.py [MODEL] [--quant PRESET] [--tokens N]
Two limbs, one, and one where the compiler finds it enough; the model and a copy with planted outlier
channels. Writes results/cpu_accuracy.json.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE.parent), str(HERE), str(HERE.parent / "quality")]

from common import Record  # noqa: E402
from schemes import planted_copy  # noqa: E402

from llmc.artifact.cpu import CPU_UNIT, decode_unit  # noqa: E402
from llmc.artifact.reader import Artifact, open_artifact  # noqa: E402
from llmc.compiler.compare.quality import portable_program  # noqa: E402
from llmc.compiler.driver import compile_model  # noqa: E402
from llmc.passes.probe import logits_of  # noqa: E402
from llmc.runtime.config import RuntimeConfig  # noqa: E402
from llmc.runtime.executors.cpu import choose_level, open_model, processor_features  # noqa: E402
from llmc.runtime.executors.tiles import SequencePart  # noqa: E402
from llmc.runtime.tokenizer import Tokenizer  # noqa: E402

TEXT = ROOT / "tests" / "data" / "stories-heldout.txt"
LENGTH = 128
# Of each choice of select_kernels: the greatest error over the greatest logit, and the mean KL divergence.
BARS = {"accurate": (5e-3, 1e-5), "auto": (float("inf"), 4e-4), "fast": (float("inf"), 4e-4)}


def cpu_logits(artifact: Artifact, sequences: Sequence[Sequence[int]]) -> Tensor:
    """Logits of every token, by the generated code of the best level here."""
    unit = decode_unit(artifact.read_bytes(CPU_UNIT))
    config = RuntimeConfig(max_requests=1, max_model_len=LENGTH)
    model, caps = open_model(artifact, unit, choose_level(unit, processor_features()), config)
    tables = [list(range(count)) for count in caps.num_blocks]
    size, found = min(unit.max_tokens, unit.max_logit_rows), list[Tensor]()
    for sequence in sequences:
        for start in range(0, len(sequence), size):
            ids = sequence[start : start + size]
            part = SequencePart(start=start, token_ids=ids, block_tables=tables, wanted=range(len(ids)))
            found += [torch.from_numpy(tile.logits.copy()) for tile in model.run([part])]
    model.close()
    return torch.cat(found)


def errors(found: Tensor, expected: Tensor) -> dict[str, float]:
    """Of logits `[tokens, vocab]`: the greatest error over the greatest logit, and KL(expected || found)."""
    log_p, log_q = (torch.log_softmax(one.double(), -1) for one in (expected, found))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    worst = (found.double() - expected.double()).abs().max() / expected.double().abs().max()
    return {"max_error": float(worst), "kl_mean": float(kl.mean()), "kl_max": float(kl.max())}


def measure(model: Path, quant: str, sequences: Sequence[Sequence[int]], folder: Path) -> dict[str, object]:
    """Errors of each mode. The accurate program leaves inputs as they are: it is the reference in float32."""
    expected: Tensor | None = None
    results: dict[str, object] = {}
    for mode, (most_error, most_kl) in BARS.items():
        output = folder / f"{model.name}-{mode}.llmc"
        options = (f"select_kernels.inputs={mode}",)
        compile_model(
            model, output=output, quant=quant, target="cpu", dtype="float32", overrides=options, verify="off"
        )
        artifact = open_artifact(output)
        if expected is None:
            expected = logits_of(portable_program(artifact), sequences)
        found = errors(cpu_logits(artifact, sequences), expected)
        holds = found["max_error"] <= most_error and found["kl_mean"] <= most_kl
        results[mode] = {**found, "bar_holds": holds}
        print(f"{model.name:24} {mode:9}", {name: f"{value:.2e}" for name, value in found.items()}, holds)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", type=Path, default=ROOT / "models" / "stories-7m")
    parser.add_argument("--quant", default="int4-fast")
    parser.add_argument("--tokens", type=int, default=2048)
    asked = parser.parse_args()
    tokenizer = Tokenizer.from_folder(asked.model)
    ids = tokenizer.encode(TEXT.read_text(encoding="utf-8"))[: asked.tokens]
    sequences = [ids[start : start + LENGTH] for start in range(0, len(ids), LENGTH)]
    bench = Record("cpu_accuracy")
    with tempfile.TemporaryDirectory() as folder:
        planted = planted_copy(asked.model, Path(folder) / f"{asked.model.name}-outliers")
        results: dict[str, object] = {
            model.name: measure(model, asked.quant, sequences, Path(folder))
            for model in (asked.model, planted)
        }
    print(bench.write({"quant": asked.quant, "tokens": len(ids), "models": results}))


if __name__ == "__main__":
    main()
