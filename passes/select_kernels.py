"""Choose which kernels multiply: how each product of integer codes rounds its input, and whether a library
may multiply many rows by dense weights.

    llmc.quantized_linear(x, …, 'int4_g32', '')    →    llmc.quantized_linear(x, …, 'int4_g32', 'int8_g32')

Accurate products (16-bit inputs) stay as they are: that is what a step does where nothing was chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from ..ir.program import Program
from ..kernels.catalog import IntegerLinear, integer_linear, integer_seconds
from ..spec.errors import RecipeError, TargetError
from ..spec.history import Decision, LayerError
from ..spec.quant import parse_scheme
from .base import (
    PAGED,
    Contract,
    Exact,
    Lossy,
    PassContext,
    PassReport,
    PassResult,
    Stage,
    expect_option,
    option,
)
from .block_inputs import round_by_blocks
from .graph import argument, argument_names, calls
from .probe import logits_of, probe_sequences
from .quantize.replace import QUANTIZED_LINEAR

_BATCH_ROWS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectKernels:
    """Say for each product of codes whether its inputs have 8 or 16 bits (`cpu`); on
    `onnx`, whether they are rounded to 8 bits in the blocks of the weights; on `cuda`, whether a row's
    bits may depend on its batch."""

    name: ClassVar[str] = "select_kernels"
    stage: ClassVar[Stage] = Stage.plan
    requires: ClassVar[frozenset[str]] = frozenset({PAGED})
    provides: ClassVar[frozenset[str]] = frozenset()
    contract: ClassVar[Contract] = Exact()

    inputs: str = option(
        "accurate",
        "Bits of the inputs of products: 16 (accurate), 8 (fast), or 8 where a product loses little (auto).",
        choices=("accurate", "fast", "auto"),
        search=("accurate", "auto", "fast"),
        search_on=("cpu", "onnx"),
    )
    max_error: float = option(
        0.01, "What auto lets 8-bit inputs change of a product, as a share of its size.", low=0.0, high=1.0
    )
    invariant: bool = option(
        True,
        "Whether a row's bits depend on nothing but the row; if not, torch's library (cuBLAS) multiplies "
        "more than 64 rows by dense weights on `cuda`.",
    )
    expect: int = expect_option()

    def run(self, program: Program, context: PassContext) -> PassResult:
        """One match per product with a choice. The contract is lossy where any takes 8-bit inputs.

        Raises RecipeError where rows need not be invariant on a target that has no other kernels.
        """
        if context.target.kind == "cuda" and not self.invariant:
            return _by_library(program)
        if not self.invariant:
            raise _no_library(context.target.name)
        if context.target.kind == "onnx":
            return round_by_blocks(program, self.inputs)
        if context.target.kind != "cpu":
            return PassResult(program=program, report=PassReport(misses=(f"target {context.target.name}",)))
        graph = program.copy_graph()
        products, misses = _open_products(graph)
        errors: Mapping[str, float] = {}
        if self.inputs == "auto" and products and not context.planning:
            errors = _measured_errors(program, products, context.seed)
        decisions: list[Decision] = []
        for product in products:
            fast = self.inputs == "fast" or errors.get(product.node.name, 1.0) <= self.max_error
            decisions.append(_decision(product, fast, errors.get(product.node.name)))
            if fast:
                _set_activation(product.node, product.fast.activation)
        report = PassReport(
            matches=len(products),
            decisions=tuple(decisions),
            misses=tuple(misses),
            errors=tuple(
                LayerError(subject=name, error=error**2, nearest_error=error**2)
                for name, error in errors.items()
            ),
            contract=Exact() if self.inputs == "accurate" else Lossy(),
        )
        return PassResult(program=program.replace(graph=graph), report=report)


def _by_library(program: Program) -> PassResult:
    """The decision for dense products; what executes them asks the history for it."""
    dense = calls(program.graph, torch.ops.llmc.linear.default)
    decisions = tuple(
        Decision(
            subject=node.name,
            choice="torch, above 64 rows",
            reason="rows may depend on their batch (invariant)",
        )
        for node in dense
    )
    misses = () if dense else ("no weight is dense: codes are multiplied by invariant kernels alone",)
    report = PassReport(matches=len(dense), decisions=decisions, misses=misses)
    return PassResult(program=program, report=report)


def _no_library(target: str) -> RecipeError:
    return RecipeError(
        "select_kernels.invariant",
        f"select_kernels.invariant cannot be false for the target {target}.",
        "All of its kernels give a row the same bits in every batch; only on cuda is a library faster.",
        "Leave it out.",
    )


@dataclass(frozen=True, slots=True)
class _Kernel:
    """One way to multiply, and the activation scheme that asks for it."""

    linear: IntegerLinear
    activation: str


@dataclass(frozen=True, slots=True)
class _Product:
    """A call whose input may have 8 or 16 bits."""

    node: fx.Node
    shape: tuple[int, int]
    fast: _Kernel
    accurate: _Kernel


def _open_products(graph: fx.Graph) -> tuple[list[_Product], list[str]]:
    """Products that leave their activation open and have integer kernels, and why others have no choice."""
    products: list[_Product] = []
    misses: list[str] = []
    for node in calls(graph, QUANTIZED_LINEAR):
        scheme = str(argument(node, "scheme"))
        if argument(node, "activation"):
            misses.append(f"{node.name}: the checkpoint or the recipe chose {argument(node, 'activation')}")
            continue
        try:
            kernels = _kernels(scheme)
        except TargetError as error:
            misses.append(f"{node.name}: {error.why}")
            continue
        width = int(argument(node, "x").meta["val"].shape[-1])
        rows = int(argument(node, "codes").meta["val"].shape[0])
        products.append(_Product(node, (rows, width), *kernels))
    return products, misses


def _kernels(scheme: str) -> tuple[_Kernel, _Kernel]:
    fast, accurate = (integer_linear(parse_scheme(scheme), limbs=limbs) for limbs in (1, 2))
    return (
        _Kernel(fast, f"int8_g{fast.activation_group}"),
        _Kernel(accurate, f"int16_g{accurate.activation_group}"),
    )


def _decision(product: _Product, fast: bool, error: float | None) -> Decision:
    chosen, other = (product.fast, product.accurate) if fast else (product.accurate, product.fast)
    texts = [f"{kernel.activation} {_times(kernel, product.shape)}" for kernel in (chosen, other)]
    measured = "" if error is None else f"; 8-bit inputs change {error:.2%} of the product"
    return Decision(
        subject=product.node.name,
        choice=f"{chosen.activation} inputs for {chosen.linear.layout.name}",
        reason=f"predicted {texts[0]}, instead of {texts[1]}{measured}",
    )


def _times(kernel: _Kernel, shape: tuple[int, int]) -> str:
    one, batch = (integer_seconds(kernel.linear, *shape, rows) for rows in (1, _BATCH_ROWS))
    return f"{1e6 * one:.3g} us for a row and {1e3 * batch:.3g} ms for {_BATCH_ROWS}, on one thread"


def _set_activation(node: fx.Node, activation: str) -> None:
    names = argument_names(node)
    values = [argument(node, name) for name in names]
    values[names.index("activation")] = activation
    node.args, node.kwargs = tuple(values), {}


def _measured_errors(program: Program, products: Sequence[_Product], seed: int) -> dict[str, float]:
    """What 8-bit inputs change of each product on the probe batch, in float32: |fast - exact| over |exact|,
    the largest over the steps."""
    fast = {product.node.name: product.fast.activation for product in products}
    largest: dict[str, float] = dict.fromkeys(fast, 0.0)
    inputs = {argument(product.node, "x").name for product in products}
    seen: dict[str, Tensor] = {}

    def observe(node: fx.Node, value: Any) -> None:
        if node.name in inputs:
            seen[node.name] = value
        if node.name not in fast:
            return
        x = seen[argument(node, "x").name].float()
        codes = [argument(node, name) for name in ("codes", "scales", "zeros")]
        stored = [None if code is None else program.weights.evaluate(str(code.target)) for code in codes]
        scheme = str(argument(node, "scheme"))
        exact, rounded = (QUANTIZED_LINEAR(x, *stored, None, scheme, name) for name in ("", fast[node.name]))
        size = float(exact.norm())
        largest[node.name] = max(largest[node.name], float((rounded - exact).norm()) / size if size else 0.0)

    logits_of(program, probe_sequences(program.spec, seed), observe)
    return largest
