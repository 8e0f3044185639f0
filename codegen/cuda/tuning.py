"""Which variant of each product is fastest on a device, by measurement, among those that give the same bits.
What runs and what tells the time is the caller's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...ir.program import Program
from ...kernels.cuda.launch import Launch, Launcher, Specialisation
from ...kernels.cuda.operators import CudaOperators
from ...kernels.cuda.products import DENSE, coded_kernel, rows_of_program
from ...kernels.cuda.substitution import substitute
from ...kernels.cuda.variants import NO_SCHEME, Choose, ProductClass, Variant, modelled, variants_of
from .dry_walk import Recorder, walk

# Rows of the classes of products (see `kernels.cuda.products`).
ROWS = (1, 32, 64, 128)
# What a variant must gain over the shipped one to be taken: less is noise.
_GAIN = 0.03

# Seconds that a call takes on the device.
Timer = Callable[[Callable[[], object]], float]
# Told of kernels before they are launched.
Prepare = Callable[[Sequence[Specialisation]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A product of a program: the width of its rows, their dtype, the arguments of `llmc.linear` or
    `llmc.quantized_linear` behind them, and what is around it, as `CudaOperators.product` takes them. Weights
    stand there by name, in a `WeightName`."""

    width: int
    dtype: torch.dtype
    weight: tuple[Any, ...]
    norm: tuple[Any, ...] | None
    gate: str


@dataclass(frozen=True, slots=True)
class WeightName:
    """Where a weight belongs."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What was found for a class of products: seconds of every variant that gives the bits of the shipped
    one, which is first, and how many do not."""

    name: str
    seconds: Mapping[Variant, float]
    num_differing: int

    @property
    def chosen(self) -> Variant:
        """The fastest, or the shipped one where none is faster by enough."""
        first = next(iter(self.seconds))
        best = min(self.seconds, key=self.seconds.__getitem__)
        return best if self.seconds[best] < (1 - _GAIN) * self.seconds[first] else first


def sites_of(program: Program, weights: Mapping[str, Any]) -> list[Site]:
    """The products of a final program, one of each form and shape, in order. `weights` as for
    `dry_walk.needs_of`."""
    found: dict[str, Site] = {}
    names: dict[int, WeightName] = {}
    alive: list[Tensor] = []
    operators = CudaOperators(Recorder())

    def see_weight(name: str, tensor: Tensor) -> None:
        names[id(tensor)] = WeightName(name)
        alive.append(tensor)  # so that no other has its identity

    def named(values: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(names.get(id(each), each) for each in values)

    def multiply(
        x: Tensor, weight: tuple[Any, ...], norm: tuple[Any, ...] | None, gate: str, residual: Any
    ) -> Tensor:
        shapes = [(tuple(e.shape), e.dtype) if isinstance(e, Tensor) else e for e in weight]
        site = Site(
            width=x.shape[-1],
            dtype=x.dtype,
            weight=named(weight),
            norm=None if norm is None else named(norm),
            gate=gate,
        )
        found.setdefault(repr((shapes, x.shape[-1], x.dtype, norm is None, gate)), site)
        return operators.product(x, weight, norm, gate, residual)

    graph = substitute(program.graph, operators, multiply)
    walk(program, graph, weights, {"T": 1, "S": 1, "Q": 2, "L": 1}, lambda logits: None, see_weight)
    return list(found.values())


def measure(
    sites: Sequence[Site],
    weight: Callable[[str], Tensor],
    launcher: Launcher,
    timer: Timer,
    prepare: Prepare = lambda wanted: None,
    rows: Sequence[int] = ROWS,
    choose: Choose = modelled,
) -> list[Measured]:
    """Time every variant of every class of products on random rows; `weight` gives tensors on the device.
    What `choose` says is the first of each."""
    trials = [trial for site in sites for count in rows for trial in _trials(site, weight, count, choose)]
    prepare([launch.specialisation for trial in trials for launch in trial.launches()])
    by_class: dict[str, list[_Trial]] = {}
    for trial in trials:
        by_class.setdefault(trial.name, []).append(trial)
    return [_measured(name, those, launcher, timer) for name, those in by_class.items()]


def choices(measured: Sequence[Measured]) -> dict[str, Variant]:
    """The variants to use, by class, where they are not the shipped ones."""
    return {each.name: each.chosen for each in measured if each.chosen != next(iter(each.seconds))}


@dataclass(frozen=True, slots=True)
class _Trial:
    """One variant of a class, on operands."""

    name: str
    variant: Variant
    x: Tensor
    site: Site
    weight: tuple[Any, ...]
    norm: tuple[Any, ...] | None

    def run(self, launcher: Launcher) -> Tensor:
        operators = CudaOperators(launcher, choose=lambda product: self.variant)
        return operators.product(self.x, self.weight, self.norm, self.site.gate, None)

    def launches(self) -> list[Launch]:
        """What it would launch."""
        found: list[Launch] = []

        def note(launch: Launch) -> None:
            found.append(launch)

        self.run(note)
        return found


def _trials(site: Site, weight: Callable[[str], Tensor], count: int, choose: Choose) -> list[_Trial]:
    def bound(values: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(weight(each.name) if isinstance(each, WeightName) else each for each in values)

    operands = bound(site.weight)
    norm = None if site.norm is None else bound(site.norm)
    x = torch.randn(count, site.width).to(operands[0].device, site.dtype)
    is_dense = len(operands) == 2
    scheme = NO_SCHEME if is_dense else operands[4]
    product = ProductClass(
        kernel=DENSE if is_dense else coded_kernel(scheme),
        scheme=scheme,
        n=operands[0 if is_dense else 1].shape[0],
        k=site.width,
        rows=rows_of_program(count, scheme),
    )
    tried = variants_of(product, choose(product))
    return [_Trial(product.name, each, x, site, operands, norm) for each in tried]


def _measured(name: str, trials: Sequence[_Trial], launcher: Launcher, timer: Timer) -> Measured:
    """The first product of the class stands for all: they differ in what is around them alone."""
    own = [trial for trial in trials if trial.site is trials[0].site]
    expected = own[0].run(launcher)
    same = [trial for trial in own if torch.equal(trial.run(launcher), expected)]
    seconds = {trial.variant: timer(lambda trial=trial: trial.run(launcher)) for trial in same}
    return Measured(name=name, seconds=seconds, num_differing=len(own) - len(same))
