"""Variants of products chosen by a timer, and artifacts that get other kernels without their model."""

from __future__ import annotations

import pytest
import torch

from llmc.artifact.cuda import CUDA_UNIT, decode_unit
from llmc.codegen.cuda.tuning import Measured, choices, measure, sites_of
from llmc.kernels.cuda.variants import ProductClass, Variant, modelled, variants_of
from llmc.spec.errors import TargetError

pytest.importorskip("triton")
FIRST, OTHER, THIRD = (
    Variant(columns=c, warps=w, stages=s) for c, w, s in ((64, 4, 4), (128, 4, 4), (64, 8, 3))
)


def product(kernel="linear.linear_words", scheme="int4_g32", n=4096, k=4096, rows=16):
    return ProductClass(kernel=kernel, scheme=scheme, n=n, k=k, rows=rows)


def measured(first, other):
    return Measured(name="a product", seconds={FIRST: first, OTHER: other, THIRD: 9.0}, num_differing=0)


def test_noise_does_not_replace_the_shipped_variant():
    assert measured(1.0, 0.99).chosen == FIRST
    assert measured(1.0, 0.9).chosen == OTHER
    assert choices([measured(1.0, 0.99)]) == {}
    assert choices([measured(1.0, 0.9)]) == {"a product": OTHER}


@pytest.mark.parametrize("rows", [16, 32, 64, 128])
@pytest.mark.parametrize("kernel", ["linear.linear", "linear.linear_words"])
def test_variants_are_few_and_begin_with_the_shipped_one(kernel, rows):
    first = modelled(product(kernel, rows=rows))
    found = variants_of(product(kernel, rows=rows), first)
    assert found[0] == first
    assert len(set(found)) == len(found) <= 12
    # Fewer columns would use other matrix instructions, which sum in another order.
    assert min(each.columns for each in found) == 64


def test_classes_tell_apart_what_may_be_chosen_differently():
    names = {
        product(kernel, scheme, n, 64, rows).name
        for kernel in ("a", "b")
        for scheme in ("int4_g32", "int4_g128")
        for n in (64, 128)
        for rows in (16, 32)
    }
    assert len(names) == 16


@pytest.fixture(scope="module")
def program(portable_program):
    """A tiny model, laid out for a GPU."""
    from llmc.passes.base import PassContext
    from llmc.passes.manager import run_passes
    from llmc.passes.pipeline import layout, plan
    from llmc.spec.target import parse_target

    context = PassContext(target=parse_target("cuda:sm_90"), max_model_len=32)
    return run_passes(portable_program("llama"), (*layout(), *plan()), context, [])


@pytest.fixture
def launch():
    from llmc.kernels.cuda.interpreter import correct_interpreter
    from llmc.kernels.cuda.jit import launch_jit

    correct_interpreter()
    return launch_jit


def test_every_product_of_a_program_is_measured_once(program):
    weights = {name: program.weights[name] for name in program.used_weights()}
    sites = sites_of(program, weights)
    assert {site.gate for site in sites} == {"", "silu"}
    assert any(site.norm for site in sites)
    assert len({(weights[site.weight[0].name].shape, site.gate, site.norm is None) for site in sites}) == len(
        sites
    )


def test_the_timer_decides_and_other_bits_are_refused(program, launch):
    weights = {name: program.weights[name] for name in program.used_weights()}
    site = next(site for site in sites_of(program, weights) if site.gate)
    launches = []

    def launcher(each):
        launches.append(each)
        launch(each)
        if "y_ptr" in each.values and each.specialisation.stages == 5:
            each.values["y_ptr"].view(-1)[0] += 1  # a variant that is wrong

    def timer(work):
        launches.clear()
        work()
        product = launches[-1].specialisation
        return 1.0 if (dict(product.constants)["BN"], product.warps) == (64, 8) else 2.0

    prepared = []
    (found,) = measure([site], program.weights.evaluate, launcher, timer, prepared.extend, rows=(1,))
    assert found.num_differing > 0
    assert all(each.stages != 5 for each in found.seconds)
    assert (found.chosen.columns, found.chosen.warps) == (64, 8)
    assert len(set(prepared)) == len(found.seconds) + found.num_differing
    name, chosen = next(iter(choices([found]).items()))
    assert name.endswith(" 16")
    assert chosen == found.chosen


def test_an_artifact_says_which_variants_it_took_and_why(cuda_artifact):
    from llmc.cli.explaining import describe_kernels

    unit = decode_unit(cuda_artifact.read_bytes(CUDA_UNIT))
    kernels = {each.product.split()[0] for each in unit.variants}
    assert kernels == {"linear.linear_words", "linear_bytes.linear_bytes"}
    assert {each.product.split()[-1] for each in unit.variants} == {"16", "32", "64", "128"}
    said = describe_kernels(cuda_artifact.path)
    assert [each["product"] for each in said.data["variants"]] == [each.product for each in unit.variants]
    assert "table: by the budget of instructions, not measured on a device" in said.text


def test_without_a_gpu_nothing_is_tuned(cuda_artifact, tmp_path):
    from llmc.compiler.retarget import retarget_artifact

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(TargetError, match="torch finds no NVIDIA GPU"):
        retarget_artifact(cuda_artifact.path, tmp_path / "out.llmc", tune=True)
    with pytest.raises(TargetError, match="Compile the original model with --target cpu"):
        retarget_artifact(cuda_artifact.path, tmp_path / "out.llmc", target="cpu")
    assert not (tmp_path / "out.llmc").exists()


@pytest.mark.slow
def test_a_retargeted_artifact_has_the_measured_kernels(cuda_artifact, tmp_path):
    from llmc.compiler.retarget import retarget_artifact
    from llmc.runtime.executors.cuda import stored_program

    seen, wide = [], product(n=256, k=128)

    def tuner(sites, weights):
        seen.extend(sites)
        seconds = {modelled(wide): 2.0, OTHER: 1.0}
        return [Measured(name=wide.name, seconds=seconds, num_differing=0)], "a GPU"

    made = retarget_artifact(
        cuda_artifact.path, tmp_path / "out.llmc", target="cuda:sm_89", tune=True, tuner=tuner
    )
    assert seen
    unit = decode_unit(made.artifact.read_bytes(CUDA_UNIT))
    before = decode_unit(cuda_artifact.read_bytes(CUDA_UNIT))
    assert unit.architectures == ("sm_89",)
    assert made.artifact.manifest.target.name == "cuda:sm_89"
    assert unit.tuned_on == "a GPU"
    assert stored_program(made.artifact, unit).choose(wide) == OTHER
    reasons = {each.product: each.reason for each in unit.variants}
    assert reasons.pop(wide.name) == "measured on a GPU"
    assert {each.partition(":")[0] for each in reasons.values()} == {"table"}
    assert {k.key for k in unit.kernels} != {k.key for k in before.kernels}
    assert unit.words == before.words
    for entry in cuda_artifact.manifest.files:
        if entry.kind != "kernel":
            assert made.artifact.read_bytes(entry.path) == cuda_artifact.read_bytes(entry.path)
