"""Everything to learn on a machine with an NVIDIA GPU, in the order that matters, in one command: are the
kernels right, are they as fast as their bytes allow, how fast are whole steps. Writes JSON after every part
and skips parts that are there, so an interrupted run goes on.

usage: first_run.py [--out FOLDER] [--only PART ...] [--list]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def use_tree() -> None:
    """Import the package from the tree where it is not installed: the root is the package `llmc`."""
    try:
        import llmc  # noqa: F401
    except ModuleNotFoundError:
        from importlib.util import module_from_spec, spec_from_file_location

        place = [str(REPOSITORY)]
        spec = spec_from_file_location("llmc", REPOSITORY / "__init__.py", submodule_search_locations=place)
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        sys.modules["llmc"] = module
        spec.loader.exec_module(module)


def parts() -> dict[str, Callable[[], object]]:
    """What is run, by name, in order: what must be right, what section after section must be known, what must
    be fast."""
    from device import CompiledOnDemand
    from engines import engine_rates, machine_of, same_tokens
    from limits import machine_limits
    from rates import attention_rates, product_rates

    from llmc.kernels.cuda.operators import CudaOperators
    from models import step_times

    launcher = CompiledOnDemand()
    operators = CudaOperators(launcher)
    named: dict[str, Callable[[], object]] = {"correctness": correctness, "artifact": artifact}
    for scheme in TOKEN_SCHEMES:
        named[f"tokens {scheme}"] = lambda s=scheme: same_tokens("small", s, machine_of(launcher))
    named["limits"] = machine_limits
    for form in ("bf16", "int4_g128", "int4_g32", "int8_g32", "fp8_channel"):
        named[f"products {form}"] = lambda form=form: product_rates(operators, form)
    named["attention"] = lambda: attention_rates(operators)
    for shape in ("llama-3.2-1b", "llama-3.1-8b"):
        for scheme in ("bf16", "int4_g128"):
            named[f"steps {shape} {scheme}"] = lambda s=shape, p=scheme: step_times(s, p, launcher)
            named[f"engine {shape} {scheme}"] = lambda s=shape, p=scheme: engine_rates(
                s, p, machine_of(launcher)
            )
    return named


# Forms of weights and caches whose tokens are compared.
TOKEN_SCHEMES = ("bf16", "int4_g128", "fp8", "kv_int8", "kv_fp8")


def artifact() -> object:
    """The way of an artifact: the bundled model compiled for this GPU, loaded, held to its oracle, and
    generated from with and without graphs; loading must compile nothing."""
    import shutil

    from device import architecture

    import llmc
    from llmc.runtime.config import RuntimeConfig
    from llmc.runtime.load import StartLedger

    folder = REPOSITORY / "build" / "cuda_first_run" / "stories.llmc"
    shutil.rmtree(folder, ignore_errors=True)
    model = REPOSITORY / "models" / "stories-1m"
    llmc.compile(model, quant="int4", target=f"cuda:{architecture()}", output=folder)
    texts: dict[str, object] = {}
    ledger = StartLedger()
    for graphs in (True, False):
        config = RuntimeConfig(max_requests=8, max_step_tokens=256, device_graphs=graphs)
        with llmc.load(folder, config, ledger=ledger if graphs else None) as llm:
            settings = llmc.SamplingParams(max_tokens=40, temperature=0.8, seed=3)
            texts[str(graphs)] = [
                done.text for done in llm.generate(["Once upon a time", "The dog"], settings)
            ]
    if texts["True"] != texts["False"]:
        raise AssertionError(f"replayed and launched steps differ: {texts}")
    return {"same": True, "start": ledger.steps, "texts": texts["True"]}


def correctness() -> object:
    """The operators' tests, every kernel compiled ahead of time and run on the device."""
    command = [sys.executable, "-m", "pytest", str(REPOSITORY / "tests" / "kernels" / "cuda"), "-q", "-x"]
    command += ["--import-mode=importlib", "-p", "no:cacheprovider"]
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, check=False, env=device_environment()
    )
    lines = done.stdout.strip().splitlines()
    return {"passed": done.returncode == 0, "summary": lines[-1] if lines else done.stderr[-500:]}


def device_environment() -> dict[str, str]:
    """The environment of tests on the device."""
    import os

    return {**os.environ, "LLMC_TEST_DEVICE": "cuda", "TRITON_INTERPRET": "0"}


def main() -> int:
    """Run what is missing; the exit status says whether every part ran."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=REPOSITORY / "build" / "cuda_first_run")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    use_tree()
    import torch

    if not torch.cuda.is_available():
        print(
            "There is no NVIDIA GPU here. The kernels can be checked without one: pytest tests/kernels/cuda"
        )
        return 3
    options.out.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name, work in parts().items():
        file = options.out / (name.replace(" ", "_") + ".json")
        if options.list:
            print(name, "(done)" if file.exists() else "")
        elif (not options.only or name in options.only) and not file.exists():
            began = time.perf_counter()
            try:
                found = work()
            except Exception as error:  # noqa: BLE001 - one part's failure must not keep the others from running
                print(f"{name}: {type(error).__name__}: {error}", flush=True)
                failed += 1
                continue
            seconds = time.perf_counter() - began
            file.write_text(json.dumps({"part": name, "seconds": seconds, "found": found}, indent=1))
            print(f"{name} ({seconds:.0f} s): {json.dumps(found)}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
