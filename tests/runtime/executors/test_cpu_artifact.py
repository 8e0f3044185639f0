"""A CPU artifact from end to end: built, served without torch, the same tokens in any company."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from llmc.artifact.cpu import CPU_UNIT, decode_unit, library_path
from llmc.artifact.reader import open_artifact
from llmc.compiler.driver import compile_model
from llmc.runtime.config import RuntimeConfig
from llmc.runtime.executors.cpu import choose_level, open_level, processor_features, runnable_levels
from llmc.runtime.load import load
from llmc.runtime.oracle import oracle_problems
from llmc.runtime.params import SamplingParams
from llmc.spec.errors import ArtifactError, TargetError

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(
        not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="no C++ compiler"
    ),
]
CONFIG = RuntimeConfig(max_requests=8, max_step_tokens=64, num_threads=2)
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def artifact(cpu_artifact, stories_1m):
    """The artifact, and beside it the same for the reference target."""
    options = {"quant": "int8", "dtype": "float32", "verify": "off"}
    compile_model(stories_1m, output=cpu_artifact.with_name("reference.llmc"), target="reference", **options)
    return cpu_artifact


def tokens(llm, prompts, params):
    return [output.completions[0].token_ids for output in llm.generate(prompts, params)]


def test_generated_tokens_are_those_of_the_reference(artifact, heldout_stories):
    prompts = [story[:60] for story in heldout_stories[:4]]
    with load(artifact, CONFIG) as ours, load(artifact.with_name("reference.llmc"), CONFIG) as reference:
        assert tokens(ours, prompts, GREEDY) == tokens(reference, prompts, GREEDY)


@pytest.mark.slow
def test_8_bit_weights_and_inputs_compute_what_the_reference_does(stories_1m, heldout_stories, tmp_path):
    """By integer kernels: loading checks the oracle, which the reference made of the same rounded inputs."""
    text = tmp_path / "stories.txt"
    text.write_text("<|endoftext|>".join(heldout_stories[:40]), encoding="utf-8")
    made = compile_model(
        stories_1m, output=tmp_path / "a.llmc", quant="w8a8", target="cpu", calibration=text, verify="off"
    )
    assert made.quality.kl_mean < 0.01
    program = json.loads((tmp_path / "a.llmc" / "program.json").read_text())
    assert json.dumps(program).count("int8_token") == 8
    with load(tmp_path / "a.llmc", CONFIG) as llm:
        found = tokens(llm, [story[:60] for story in heldout_stories[40:44]], GREEDY)
    assert all(len(ids) == GREEDY.max_tokens for ids in found)


def test_tokens_do_not_depend_on_company_or_threads(artifact, heldout_stories):
    prompts = [story[:90] for story in heldout_stories[:6]]
    seeded = SamplingParams(temperature=0.9, top_p=0.95, seed=7, max_tokens=24, ignore_eos=True)
    for params in (GREEDY, seeded):
        with load(artifact, CONFIG) as llm:
            together = tokens(llm, prompts, params)
        alone = []
        with load(artifact, RuntimeConfig(max_requests=1, max_step_tokens=7, num_threads=1)) as llm:
            alone = [tokens(llm, [prompt], params)[0] for prompt in prompts]
        assert together == alone


def test_serving_imports_no_torch(artifact):
    script = (
        "import sys, json; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from llmc.runtime.load import load; from llmc.runtime.params import SamplingParams\n"
        f"llm = load({str(artifact)!r})\n"
        "out = llm.generate(['Once upon a time'], SamplingParams(temperature=0.0, max_tokens=8))\n"
        "print(json.dumps(list(out[0].completions[0].token_ids))); llm.close()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)) == 8


def test_every_level_of_this_processor_reproduces_the_oracle(artifact):
    from llmc.artifact.oracle import read_oracle

    opened = open_artifact(artifact)
    unit = decode_unit(opened.read_bytes(CPU_UNIT))
    levels = runnable_levels(unit, processor_features())
    assert levels[-1] == "generic"
    for level in levels:
        executor = open_level(opened, unit, level, CONFIG)
        try:
            assert oracle_problems(executor, read_oracle(opened)) == []
        finally:
            executor.close()


def test_a_processor_below_every_level_is_told_what_it_lacks(artifact):
    unit = decode_unit(open_artifact(artifact).read_bytes(CPU_UNIT))
    assert choose_level(unit, frozenset()) == "generic"
    named = type(unit)(**{**{key: getattr(unit, key) for key in unit.__slots__}, "levels": unit.levels[:1]})
    with pytest.raises(TargetError, match="avx512"):
        choose_level(named, frozenset({"avx2"}))


def test_a_tampered_library_is_refused_before_it_is_opened(artifact, tmp_path):
    copy = tmp_path / "tampered.llmc"
    shutil.copytree(artifact, copy)
    for level in ("generic", "avx2", "avx512vnni"):
        library = copy / library_path(level)
        data = bytearray(library.read_bytes())
        data[len(data) // 2] ^= 1
        library.write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match=r"model-.*\.so"):
        load(copy, CONFIG)
