"""Everything to learn on a machine with an NVIDIA GPU, in one command and in the order that matters: are the
kernels right, what must be known of the device, how fast are kernels, steps and engines, are the bars met.

Needs the tree and the libraries that `tree.py` lists. Writes JSON after every part and skips parts that are
there, so an interrupted run goes on; --seconds ends it in time, --dry-run takes every part without a GPU.

usage: first_run.py [--out FOLDER] [--only PART ...] [--list] [--seconds N] [--dry-run]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from tree import REPOSITORY, NotCarried, missing_libraries, use_tree

Parts = dict[str, Callable[[], object]]


def parts(out: Path, *, rehearses: bool) -> Parts:
    """What is run, by name, in order: what must be right, what section after section must be known, what must
    be fast."""
    named: Parts = {"correctness": lambda: correctness(rehearses=rehearses)}
    if rehearses:
        from rehearsal import Rehearsed, driver_path, rehearse

        rehearse()
        launcher = Rehearsed()
        named["driver"] = driver_path
    else:
        from device import CompiledOnDemand

        launcher = CompiledOnDemand()
    from engines import machine_of, same_tokens
    from graphs import recorded_launches

    named["graphs"] = partial(recorded_launches, launcher)
    named["artifact"] = lambda: artifact(out, rehearses=rehearses)
    for scheme in TOKEN_SCHEMES:
        named[f"tokens {scheme}"] = lambda s=scheme: same_tokens("small", s, machine_of(launcher))
    return named | rates(launcher) | models_parts(launcher, out)


def rates(launcher) -> Parts:
    """The device's limits, and single kernels against them."""
    from limits import machine_limits
    from rates import attention_rates, product_rates

    from llmc.kernels.cuda.operators import CudaOperators

    operators = CudaOperators(launcher)
    named: Parts = {"limits": machine_limits}
    for form in PRODUCT_FORMS:
        named[f"products {form}"] = partial(product_rates, operators, form)
    named["attention"] = partial(attention_rates, operators)
    return named


def models_parts(launcher, out: Path) -> Parts:
    """Whole steps, engines around them, peers, and the start of a process."""
    from engines import engine_rates, machine_of
    from llama_cpp import llama_rates
    from peers import library_mixture, our_mixture, static_rates
    from start import start_times

    from models import step_times

    named: Parts = {}
    for shape, schemes in (("llama-3.2-1b", ("bf16", "int4_g128")), ("llama-3.1-8b", STEP_SCHEMES)):
        for scheme in schemes:
            named[f"steps {shape} {scheme}"] = partial(step_times, shape, scheme, launcher)
            if scheme in ("bf16", "int4_g128"):
                named[f"engine {shape} {scheme}"] = lambda s=shape, p=scheme: engine_rates(
                    s, p, machine_of(launcher)
                )
    named["transformers llama-3.1-8b"] = partial(static_rates, "llama-3.1-8b")
    named["compiled int4 llama-3.1-8b"] = partial(static_rates, "llama-3.1-8b", int4=True)
    named["llama.cpp llama-3.1-8b"] = partial(llama_rates, "llama-3.1-8b", out / "llama.cpp")
    named["mixed llama-3.2-1b bf16"] = partial(our_mixture, "llama-3.2-1b", "bf16", launcher)
    named["transformers mixed llama-3.2-1b"] = partial(library_mixture, "llama-3.2-1b")
    named["start llama-3.1-8b bf16"] = partial(start_times, "llama-3.1-8b", out / "start")
    return named


STEP_SCHEMES = ("bf16", "int4_g128", "fp8", "bf16_library")
# Forms of weights and caches whose tokens are compared.
TOKEN_SCHEMES = ("bf16", "int4_g128", "fp8", "w8a8", "kv_int8", "kv_fp8")
# Forms of weights, and of rows behind a plus, whose products are measured.
CODES = ("int4_g128", "int4_g32", "int8_g32", "fp8_channel")
PRODUCT_FORMS = ("bf16", *CODES, "fp8_channel+fp8_token", "int8_channel+int8_token")


def artifact(out: Path, *, rehearses: bool) -> object:
    """The way of an artifact: the bundled model compiled for this GPU, loaded, held to its oracle, and
    generated from by graphs, by lists and kernel by kernel; loading must compile nothing."""
    from device import architecture

    import llmc
    from llmc.artifact.reader import open_artifact
    from llmc.runtime.config import RuntimeConfig
    from llmc.runtime.load import StartLedger

    folder = out / "stories.llmc"
    shutil.rmtree(folder, ignore_errors=True)
    model = REPOSITORY / "models" / "stories-1m"
    llmc.compile(model, quant="int8", target=f"cuda:{architecture()}", output=folder, verify="structure")
    if rehearses:
        from rehearsal import loaded_by_stub

        return loaded_by_stub(open_artifact(folder))
    texts: dict[str, object] = {}
    ledger = StartLedger()
    for name, (graphs, lists) in WAYS.items():
        config = RuntimeConfig(max_requests=8, max_step_tokens=256, device_graphs=graphs, device_lists=lists)
        with llmc.load(folder, config, ledger=ledger if name == "replayed" else None) as llm:
            settings = llmc.SamplingParams(max_tokens=40, temperature=0.8, seed=3)
            texts[name] = [done.text for done in llm.generate(["Once upon a time", "The dog"], settings)]
    if any(text != texts["replayed"] for text in texts.values()):
        raise AssertionError(f"ways to run a step differ: {texts}")
    return {"same": True, "start": ledger.steps, "texts": texts["replayed"]}


# Settings for graphs and lists.
WAYS = {"replayed": ("on", "on"), "by lists": ("off", "on"), "kernel by kernel": ("off", "off")}


def correctness(*, rehearses: bool) -> object:
    """The operators' tests, every kernel compiled ahead of time and run on the device; in a rehearsal, one of
    them, interpreted."""
    command = [sys.executable, "-m", "pytest", str(REPOSITORY / "tests" / "kernels" / "cuda"), "-q"]
    command += ["--import-mode=importlib", "-p", "no:cacheprovider", "-m", "not slow"]
    command += ["-k", "test_linear and 64-128"] if rehearses else ["--deselect", ISSUE_BUDGET]
    if not rehearses and find_spec("xdist") is not None:
        command += ["-n", "8"]  # what takes time is compiling kernels, each in the test that launches it
    on_device = {} if rehearses else {"LLMC_TEST_DEVICE": "cuda", "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, check=False, env={**os.environ, **on_device}
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode:
        raise AssertionError("\n".join([*lines[-60:], done.stderr[-500:]]))
    return {"passed": True, "summary": lines[-1]}


# It disassembles, which needs no GPU.
ISSUE_BUDGET = "tests/kernels/cuda/test_issue_budget.py"


def main() -> int:
    """Run what is missing; the exit status says whether every part ran."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=REPOSITORY / "build" / "cuda_first_run")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--seconds", type=float, default=1200.0, help="no part begins later than this")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    if missing := missing_libraries():
        print(f"Not installed here: {', '.join(missing)}. The bench needs them and the tree, nothing else.")
        return 4
    out = options.out / "rehearsal" if options.dry_run else options.out
    use_tree(out / "path")
    if not options.dry_run and (reason := no_device()):
        print(reason)
        return 3
    named = parts(out, rehearses=options.dry_run)
    if options.list:
        for name in named:
            print(name, "(done)" if file_of(out, name).exists() else "")
        return 0
    if unknown := set(options.only) - set(named):
        print(f"There are no parts named {', '.join(sorted(unknown))}: see --list.")
        return 2
    wanted = {name: work for name, work in named.items() if not options.only or name in options.only}
    left = run(wanted, out, time.perf_counter() + options.seconds)
    from bars import judged

    (out / "bars.json").write_text(json.dumps({"part": "bars", "found": judged(out)}, indent=1))
    for name, line in judged(out).items():
        print(f"{name}: {json.dumps(line)}")
    return 1 if left else 0


def no_device() -> str:
    """Why nothing can be run here; empty where it can."""
    import torch

    if torch.cuda.is_available():
        return ""
    return (
        "There is no NVIDIA GPU here. The kernels can be checked without one: pytest tests/kernels/cuda; and "
        "this command, with --dry-run."
    )


def run(named: Parts, out: Path, until: float) -> list[str]:
    """Run the parts that have no file yet, while there is time; what failed or is left."""
    import torch

    left: list[str] = []
    for name, work in named.items():
        torch.manual_seed(0)  # random weights are the same in every run
        if file_of(out, name).exists():
            continue
        if time.perf_counter() > until:
            print(f"{name}: no time left; run the command again")
            left.append(name)
            continue
        began = time.perf_counter()
        try:
            found = work()
        except NotCarried as missing:
            print(f"{name}: not run. {missing}", flush=True)
            continue
        except Exception as error:  # noqa: BLE001 - one part's failure must not keep the others from running
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
            left.append(name)
            continue
        finally:
            release()
        seconds = time.perf_counter() - began
        text = json.dumps({"part": name, "seconds": seconds, "found": found}, indent=1)
        partial_file = file_of(out, name).with_suffix(".partial")
        partial_file.write_text(text)
        partial_file.rename(file_of(out, name))
        print(f"{name} ({seconds:.0f} s): {json.dumps(found)}", flush=True)
    return left


def release() -> None:
    """Give a part's memory back to the device before the next."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def file_of(out: Path, name: str) -> Path:
    """Where a part's findings are."""
    return out / (name.replace(" ", "_") + ".json")


if __name__ == "__main__":
    sys.exit(main())
