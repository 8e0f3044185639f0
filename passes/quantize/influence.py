"""What each form of each unit, alone, changes of the output: measured on codes as a method finds them.

Linears are rounded by what all calibration tokens bring to them, as the method would; tables, experts and
codes of 8 bits, which lose little or gain little by tokens, by the weights alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from ...ir.program import Program
from ...ir.quantized import dequantize_rows
from ...spec.quant import QuantScheme
from ..calibration import Calibration
from ..fuse_linears import LINEAR
from ..graph import is_call
from .finite import finite_weight
from .linears import Inputs
from .moments import SecondMoments
from .rounding import Method, round_matrix
from .segments import Segment, product_sites
from .sensitivity import Sensitivity
from .solve import weight_names
from .units import Form, Unit
from .walk import Walk

# How GPTQ finds codes where influence is measured: what makes up for drift or polishes is left out.
TRIAL = Method(propagate=True)


def measure_influence(
    program: Program,
    units: Sequence[Unit],
    sensitivity: Sensitivity,
    method: Method,
    calibration: Calibration | None,
) -> list[list[float]]:
    """Mean KL divergence in nats by unit and form, codes found by `method`: with the tokens of `calibration`,
    or without any."""
    found: dict[tuple[str, ...], list[float]] = {}
    for inputs, open_units in _by_inputs(program, units, method, calibration):
        for unit in open_units:
            if calibration is not None:
                calibration.watch(len(found), len(units), f"influence of {unit.names[0]}")
            weights = {name: finite_weight(program, name) for name in unit.names}
            found[unit.names] = [
                _divergence(sensitivity, weights, form, method, inputs) for form in unit.forms
            ]
    return [found[unit.names] for unit in units]


def _by_inputs(
    program: Program, units: Sequence[Unit], method: Method, calibration: Calibration | None
) -> Iterator[tuple[Inputs | None, list[Unit]]]:
    """All units, with what is known of their inputs: first those of which nothing is."""
    if calibration is None:
        yield None, list(units)
        return
    linear = {unit.names[0]: unit for unit in units if unit.is_linear}
    yield None, [unit for unit in units if not unit.is_linear]
    walk = Walk(program, product_sites(program.graph), calibration)
    try:
        for segment in walk.segments:
            sites = [site for site in segment.sites if is_call(site, LINEAR)]
            names = dict.fromkeys(name for site in sites for name in weight_names(site) if name in linear)
            if names:
                yield _inputs(walk, segment, method), [linear.pop(name) for name in names]
            if linear:
                walk.advance(segment, {})
    finally:
        walk.close()


def _inputs(walk: Walk, segment: Segment, method: Method) -> Inputs:
    assert segment.x is not None
    moments = SecondMoments(segment.x.meta["val"].shape[-1])
    for value in walk.values(segment.x):
        moments.observe(value.flatten(0, -2))
    return Inputs(moments.gram(), method)


def _divergence(
    sensitivity: Sensitivity,
    weights: Mapping[str, Tensor],
    form: Form,
    method: Method,
    inputs: Inputs | None,
) -> float:
    rounded = {
        name: _rounded(name, weight, scheme, method, inputs)
        for (name, weight), scheme in zip(weights.items(), form.schemes, strict=True)
        if scheme is not None
    }
    return sensitivity.divergence(rounded) if rounded else 0.0


def _rounded(name: str, weight: Tensor, scheme: QuantScheme, method: Method, inputs: Inputs | None) -> Tensor:
    if inputs is None or scheme.bits == 8:
        tensor = round_matrix(weight.flatten(0, -2), scheme, Method(search=method.search)).tensor
    else:
        tensor = inputs.solve(name, weight, scheme).tensor
    return dequantize_rows(*tensor, scheme, weight.shape[-1]).reshape(weight.shape)
