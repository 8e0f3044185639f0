"""Seconds of code generation and of the C++ compiler, all ISA levels, as `llmc compile` runs them.

python bench/cpu/build.py [ARTIFACT ...] [--rounds N]; the stored programs are generated and compiled again,
without artifacts those of prepare.py. Writes results/cpu_build.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from common import Record, percentiles  # noqa: E402
from prepare import SHAPES, artifact_path  # noqa: E402

from llmc.artifact.reader import open_unchecked  # noqa: E402
from llmc.codegen.cpu.backend import MAX_LOGIT_ROWS, MAX_TOKENS  # noqa: E402
from llmc.codegen.cpu.source import generate  # noqa: E402
from llmc.codegen.cpu.toolchain import compile_library, find_compiler  # noqa: E402
from llmc.compiler.compare.quality import stored_program  # noqa: E402
from llmc.ir.infer import infer  # noqa: E402
from llmc.ir.program import Program  # noqa: E402
from llmc.kernels.levels import LEVELS, Level  # noqa: E402


def build(program: Program) -> dict[str, float]:
    """Seconds of each part; `total` is what a user waits for, levels being compiled two at a time."""
    began = time.perf_counter()
    source = generate(program, max_tokens=MAX_TOKENS, max_logit_rows=MAX_LOGIT_ROWS)
    seconds = {"generate": time.perf_counter() - began}
    compiler = find_compiler()

    def compile_level(level: Level) -> None:
        start = time.perf_counter()
        compile_library(compiler, source.text, level)
        seconds[level.name] = time.perf_counter() - start

    with ThreadPoolExecutor(max_workers=2) as pool:
        list(pool.map(compile_level, LEVELS))
    return seconds | {"total": time.perf_counter() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifacts", nargs="*", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    asked = parser.parse_args()
    artifacts: list[Path] = asked.artifacts or [artifact_path(shape, "accurate") for shape in SHAPES]
    bench = Record("cpu_build")
    results: dict[str, object] = {}
    for artifact in artifacts:
        program = stored_program(open_unchecked(artifact))
        infer(program)
        rounds = [build(program) for _ in range(asked.rounds)]
        medians = {part: percentiles([one[part] for one in rounds]) for part in rounds[0]}
        results[artifact.stem] = {"seconds": medians, "nodes": len(program.graph.nodes)}
        print(artifact.stem, {part: round(found["p50"], 2) for part, found in medians.items()})
    print(bench.write(results))


if __name__ == "__main__":
    main()
