"""From files to text: load verifies every byte and the oracle, and says what is wrong."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

from llmc.artifact.checksums import ChunkHasher
from llmc.artifact.oracle import Oracle, read_oracle, write_oracle
from llmc.artifact.reader import open_artifact
from llmc.artifact.schema import Manifest, Provenance, Recipe, encode_manifest
from llmc.artifact.writer import ArtifactWriter
from llmc.codegen.base import backend_for
from llmc.compiler.oracle import make_oracle, oracle_prompts
from llmc.ir.document import decode_program
from llmc.runtime.config import RuntimeConfig
from llmc.runtime.executors.registry import open_executor
from llmc.runtime.load import StartLedger, load
from llmc.runtime.oracle import check_oracle, measure_prompts
from llmc.runtime.params import SamplingParams
from llmc.runtime.tokenizer import Tokenizer
from llmc.runtime.verify import verify_artifact
from llmc.spec.errors import ArtifactError, TargetError
from llmc.spec.target import REFERENCE, Target

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
)
SMALL = RuntimeConfig(max_requests=4, max_step_tokens=64, num_threads=1)


def write_artifact(path, program, folder=None, target=REFERENCE):
    """An artifact as the compiler writes it, from a finished program."""
    manifest = Manifest(
        provenance=Provenance(model="toy", llmc_version="0"), spec=program.spec, recipe=Recipe(name="none"),
        target=target, cache=program.cache, history=program.history,
    )  # fmt: skip
    with ArtifactWriter(path) as writer:
        backend_for(REFERENCE).emit(program, program, writer)
        encode = None
        if folder is not None:
            for name in TOKENIZER_FILES:
                writer.copy_file(f"tokenizer/{name}", "tokenizer", folder / name)
            encode = Tokenizer.from_folder(folder).encode
        write_oracle(writer, make_oracle(program, encode))
        return writer.commit(manifest)


@pytest.fixture(scope="module")
def made(tmp_path_factory, build_program, stories_1m):
    """A small artifact with every kind of file; tests that damage it work on a copy."""
    path = tmp_path_factory.mktemp("made") / "toy.llmc"
    return write_artifact(path, build_program(windows=(0, 12), scheme="int4_g32"), stories_1m)


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made.path, tmp_path / "copy.llmc")


def test_a_real_model_tells_a_story(tmp_path, build_llama, stories_1m):
    write_artifact(tmp_path / "m.llmc", build_llama(stories_1m), stories_1m)
    ledger = StartLedger()
    with load(tmp_path / "m.llmc", SMALL, ledger=ledger) as llm:
        (output,) = llm.generate(["Once upon a time"], SamplingParams(temperature=0.0, max_tokens=24))
    assert len(output.completions[0].text.split()) > 10
    assert set(ledger.steps) == {"open", "load", "verify", "oracle", "tokenizer", "engine"}
    assert ledger.total_s == pytest.approx(sum(ledger.steps.values()))


def test_the_same_program_gives_the_same_bytes(made, tmp_path, build_program, stories_1m):
    program = build_program(windows=(0, 12), scheme="int4_g32")
    again = write_artifact(tmp_path / "again.llmc", program, stories_1m)
    for entry in made.manifest.files:
        assert again.read_bytes(entry.path) == made.read_bytes(entry.path), entry.path
    assert again.manifest == made.manifest


def test_the_oracle_holds_and_covers_every_token(made):
    oracle = read_oracle(made)
    assert [len(prompt.logprobs) for prompt in oracle.prompts] == [20, 20, 20]
    assert verify_artifact(made.path) == []


def test_oracle_prompts_are_cut_to_a_cache_that_is_too_small(made):
    config = RuntimeConfig(
        max_requests=1,
        max_step_tokens=5,
        max_model_len=16,
        cache_bytes=made.manifest.cache.bytes_per_token * 16,
    )
    executor = open_executor(made, config)
    oracle = read_oracle(made)
    measured = measure_prompts(executor, [prompt.token_ids for prompt in oracle.prompts])
    assert 8 <= len(measured[0].logprobs) < 20
    check_oracle(executor, oracle)


@pytest.mark.parametrize("field", ["logprobs", "best_ids"])
def test_an_oracle_that_does_not_hold_is_an_error(made, field):
    oracle = read_oracle(made)
    prompt = oracle.prompts[1]
    clear = max(range(20), key=lambda i: prompt.margins[i])
    changed = list(getattr(prompt, field))
    changed[clear] += 1
    wrong = replace(prompt, **{field: tuple(changed)})
    executor = open_executor(made, SMALL)
    with pytest.raises(ArtifactError, match=f"at token {clear + 1} of prompt 1"):
        check_oracle(executor, Oracle(prompts=(oracle.prompts[0], wrong), tolerance=oracle.tolerance))


def test_a_near_tie_may_fall_to_either_side(made):
    oracle = read_oracle(made)
    prompt = oracle.prompts[0]
    close = min(range(20), key=lambda i: prompt.margins[i])
    best = list(prompt.best_ids)
    best[close] += 1
    wrong = replace(prompt, best_ids=tuple(best))
    check_oracle(
        open_executor(made, SMALL), Oracle(prompts=(wrong,), tolerance=prompt.margins[close] + 0.001)
    )


def test_oracle_prompts_stay_within_the_vocabulary():
    prompts = oracle_prompts(lambda text: range(1000), 7)
    assert {len(prompt) for prompt in prompts} == {21}
    assert all(0 <= token < 7 for prompt in prompts for token in prompt)
    assert prompts == oracle_prompts(lambda text: range(1000), 7)
    assert oracle_prompts(None, 7) != oracle_prompts(None, 8)


def test_a_flipped_bit_in_any_file_is_named_at_load(made, tmp_path):
    for entry in (*made.manifest.files, None):
        name = entry.path if entry else "manifest.json"
        folder = shutil.copytree(made.path, tmp_path / name.replace("/", "_"))
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 0x10
        (folder / name).write_bytes(data)
        with pytest.raises(ArtifactError, match=name.replace(".", r"\.")):
            load(folder, SMALL)


@pytest.mark.parametrize("where", [0, 9, 200])
def test_damage_is_told_even_when_it_stops_the_loading_first(copy, where):
    path = copy / "weights-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[where] ^= 0x80
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"weights-00001\.safetensors is damaged in chunk 0"):
        load(copy, SMALL)


def test_an_artifact_without_a_tokenizer_takes_token_ids(tmp_path, build_program):
    made = write_artifact(tmp_path / "ids.llmc", build_program())
    with load(made.path, SMALL) as llm:
        (output,) = llm.generate([[3, 1, 4]], SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True))
    assert len(output.completions[0].token_ids) == 5


def test_a_weight_that_no_checksum_guards_is_caught_by_the_oracle(copy, made):
    """An artifact signed anew over changed weights: whole by its checksums, and wrong."""
    name = "weights-00001.safetensors"
    data = bytearray((copy / name).read_bytes())
    for index in range(len(data) // 2, len(data) // 2 + 400):
        data[index] ^= 0x35
    (copy / name).write_bytes(data)
    hasher = ChunkHasher()
    hasher.update(bytes(data))
    files = tuple(
        replace(entry, chunks=hasher.finish()) if entry.path == name else entry
        for entry in made.manifest.files
    )
    (copy / "manifest.json").write_bytes(encode_manifest(replace(made.manifest, files=files)))
    open_artifact(copy)
    with pytest.raises(ArtifactError, match="does not compute on this machine"):
        load(copy, SMALL)
    assert "does not hold" in str(verify_artifact(copy)[0])


def test_an_unknown_operator_is_named(copy, made):
    data = made.read_bytes("program.json").replace(b"llmc.rope.default", b"llmc.warp.default", 1)
    with pytest.raises(ArtifactError, match=r"llmc\.warp\.default"):
        decode_program(data)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["nodes"].pop(0),
        lambda d: d["nodes"].append({"name": "x"}),
        lambda d: d["inputs"].pop(),
        lambda d: d.pop("facts"),
        lambda d: d["nodes"][-1]["args"].__setitem__(0, {"node": "nowhere"}),
        lambda d: d["nodes"].pop(),
    ],
)
def test_a_program_that_makes_no_sense_is_an_artifact_error(made, change):
    document = json.loads(made.read_bytes("program.json"))
    change(document)
    with pytest.raises(ArtifactError):
        decode_program(json.dumps(document).encode())


def test_a_target_without_an_executor_is_a_target_error(tmp_path, build_program):
    made = write_artifact(tmp_path / "m.llmc", build_program(), target=Target(kind="abacus"))
    with pytest.raises(TargetError, match="abacus"):
        load(made.path, SMALL)
