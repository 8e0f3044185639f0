"""Keep the codes of a checkpoint that is quantised already.

    w = weight a.weight  (values of codes)      c = weight a.weight.codes   (the checkpoint's, packed anew)
    y = llmc.linear(x, w, None)            →    s = weight a.weight.scales
                                                y = llmc.quantized_linear(x, c, s, None, None, 'int4_g128')

Nothing is rounded again: what was fused before is cut from and joined of codes. Where a checkpoint says how
the inputs of a product are rounded, the operator says so too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from ...ir.coded import Codes, Dequantized, coded_form, is_coded
from ...ir.program import Program
from ...ir.weights import Expr
from ...spec.errors import ModelError
from ...spec.history import Decision
from ...spec.quant import QuantScheme
from ..base import (
    CANONICAL,
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
from ..bits import num_parameters
from ..graph import argument, calls, erase_dead, read_weight, weight_nodes
from ..rewrite import insert
from .replace import MOE, QUANTIZED_LINEAR, Role, quantize_experts, quantize_matrix, weight_roles

Forms = Mapping[str, Dequantized]


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepCodes:
    """Codes of a quantised checkpoint, used as they are."""

    name: ClassVar[str] = "keep_codes"
    stage: ClassVar[Stage] = Stage.quantise
    requires: ClassVar[frozenset[str]] = frozenset({CANONICAL})
    provides: ClassVar[frozenset[str]] = frozenset()
    contract: ClassVar[Contract] = Exact()

    dense: bool = option(
        False, "Dequantise weights whose codes cannot be kept; otherwise such a weight is an error."
    )
    round_inputs: bool = option(
        True, "Round the inputs of products as the checkpoint says; otherwise they stay in the compute dtype."
    )
    expect: int = expect_option()

    def run(self, program: Program, context: PassContext) -> PassResult:
        """One match per weight. Lossy where inputs are rounded, which the weights' values alone are not."""
        coded = {name: expr for name, expr in _used(program).items() if is_coded(expr)}
        if not coded:
            return PassResult(program=program, report=PassReport())
        graph = program.copy_graph()
        roles = weight_roles(graph, program)
        forms = {name: form for name, expr in coded.items() if (form := coded_form(expr)) is not None}
        problems = {name: _problem(name, forms, roles) for name in coded}
        kept = {name: forms[name] for name, problem in problems.items() if problem is None}
        problems |= _halves(graph, kept, coded)
        refused = {name: problem for name, problem in problems.items() if problem is not None}
        if refused and not self.dense:
            raise _refusal(refused)
        added = self._replace(graph, program, {n: f for n, f in kept.items() if n not in refused}, roles)
        erase_dead(graph)
        decisions = [
            Decision(subject=name, choice=_choice(form, self.round_inputs), reason="as the checkpoint has it")
            for name, form in kept.items()
            if name not in refused
        ]
        decisions += [Decision(subject=n, choice="dequantised", reason=why) for n, why in refused.items()]
        rounding = self.round_inputs and any(form.activation for form in kept.values())
        report = PassReport(
            matches=len(kept) - sum(name in kept for name in refused),
            decisions=tuple(decisions),
            contract=Lossy() if rounding else None,
        )
        weights = program.weights.with_entries(added)
        return PassResult(program=program.replace(graph=graph, weights=weights), report=report)

    def _replace(
        self, graph: fx.Graph, program: Program, kept: Forms, roles: Mapping[str, Role]
    ) -> dict[str, Expr]:
        def parts(name: str, expr: Expr, scheme: QuantScheme) -> dict[str, Expr]:
            form = kept[name]
            found: dict[str, Expr | None] = {
                "codes": Codes(form.codes, num_parameters(expr)),
                "scales": form.scales,
                "zeros": form.zeros,
            }
            return {f"{name}.{part}": made for part, made in found.items() if made is not None}

        added: dict[str, Expr] = {}
        readers = weight_nodes(graph)
        for name, form in kept.items():
            if roles[name] is not Role.expert:
                added |= quantize_matrix(graph, readers[name], form.scheme, program.weights[name], parts)
                added |= self._inputs(graph, name, form)
        for moe in calls(graph, MOE):
            names = [str(argument(moe, part).target) for part in ("gate_up", "down")]
            if all(name in kept for name in names):
                rounding = kept[names[0]].activation if self.round_inputs else ""
                schemes = (kept[names[0]].scheme, kept[names[1]].scheme)
                quantised = quantize_experts(graph, moe, program, schemes, parts)
                codes = weight_nodes(graph)[f"{names[0]}.codes"]
                (user,) = codes.users
                user.args = (*user.args, rounding) if rounding else user.args
                added |= quantised
        return added

    def _inputs(self, graph: fx.Graph, name: str, form: Dequantized) -> dict[str, Expr]:
        """What products that read codes `name` do with their input: its order, and its rounding."""
        codes = weight_nodes(graph)[f"{name}.codes"]
        products = [user for user in codes.users if user.target is QUANTIZED_LINEAR]
        added: dict[str, Expr] = {}
        with graph.inserting_before(codes):
            order = scale = None
            if form.order is not None and products:
                added[f"{name}.order"] = form.order
                order = read_weight(graph, f"{name}.order")
            if form.activation_scale is not None and self.round_inputs and products:
                added[f"{name}.activation_scale"] = form.activation_scale
                scale = read_weight(graph, f"{name}.activation_scale")
        for product in products:
            if order is not None:
                x = argument(product, "x")
                with graph.inserting_before(product):
                    args = (x, x.meta["val"].dim() - 1, order)
                    product.update_arg(0, insert(graph, torch.ops.aten.index_select.default, args))
            if form.activation and self.round_inputs:
                rounding = (form.activation,) if scale is None else (form.activation, scale)
                product.args = (*product.args, *rounding)
        return added


def _used(program: Program) -> dict[str, Expr]:
    return {name: program.weights[name] for name in program.used_weights()}


def _problem(name: str, forms: Forms, roles: Mapping[str, Role]) -> str | None:
    """Why the codes of a weight cannot be kept; None when they can."""
    if name not in forms:
        return "its values are not rows of one matrix of codes: they were transposed, mixed or computed with"
    if name not in roles:
        return "it is read by an operator that has no form for codes"
    form = forms[name]
    if form.order is not None and roles[name] not in (Role.linear, Role.head, Role.router):
        return "its columns are stored in another order, and it is no plain linear"
    if form.activation_scale is not None and roles[name] is Role.expert:
        return "the inputs of its experts are rounded with stored scales"
    return None


def _halves(graph: fx.Graph, kept: Forms, coded: Mapping[str, Expr]) -> dict[str, str | None]:
    """Experts of which only one weight can be kept, or whose weights ask for different inputs."""
    found: dict[str, str | None] = {}
    for moe in calls(graph, MOE):
        names = [str(argument(moe, part).target) for part in ("gate_up", "down")]
        own = [kept[name] for name in names if name in kept]
        if len(own) == 1 or (len(own) == 2 and own[0].activation != own[1].activation):
            reason = "the two weights of its experts are not stored alike"
            found |= {name: reason for name in names if name in coded}
    return found


def _choice(form: Dequantized, round_inputs: bool) -> str:
    inputs = f", inputs {form.activation}" if form.activation and round_inputs else ""
    return form.scheme.name + inputs + (", columns in another order" if form.order is not None else "")


def _refusal(refused: Mapping[str, str]) -> ModelError:
    name, reason = next(iter(refused.items()))
    more = f" (and those of {len(refused) - 1} more)" if len(refused) > 1 else ""
    return ModelError(
        "model.codes",
        f"The codes of weight {name!r}{more} cannot be kept.",
        f"In this model {reason}.",
        "Let such weights be dequantised with --set keep_codes.dense=true, or use the unquantised model.",
    )
