"""From codes found layer by layer to codes that were learnt from the model's own logits: what is learnt, what
it may cost, where it is kept, and what is said about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ...ir.program import Program
from ...ir.quantized import QTensor
from ...ir.weights import Expr
from ...spec.history import Decision
from ..bits import num_parameters
from ..calibration import Calibration
from .replace import Role
from .rounding import Method, Tuning
from .selection import Choice, scheme_of
from .solve import Solutions, coded_values
from .solved import Result, SolvedFolder, fingerprint
from .tuning import STEP_TOKENS, split_sequences, tune
from .walk import raised

# Of fewer, codes learn the text rather than the model.
_FEWEST_TOKENS = 16384
# What is learnt: of 8 bits, a step moves codes and scales further than rounding did.
_LEARNT = (Role.linear, Role.head)
_MOST_BITS = 4


# Float32 values by weight: exact, codes and scales as they are learnt, gradients, two moments of Adam.
_COPIES = 6
# Float32 values by logit of a step: both models' logits, their logarithms, and gradients.
_LOGITS = 6


class TunedParts(NamedTuple):
    """Stored parts by name that take the place of others, and what is to be said."""

    parts: dict[str, Expr]
    decision: Decision


def learning_bytes(program: Program, tuning: Tuning, num_tokens: int) -> int:
    """Bytes of memory that learning from so many tokens takes at most; 0 where it will not be done."""
    size = _size(program)
    if num_tokens < _FEWEST_TOKENS or not tuning.affordable(size, num_tokens):
        return 0
    return 4 * (_COPIES * size + _LOGITS * STEP_TOKENS * program.spec.vocab_size)


def tuned_parts(
    program: Program,
    choices: Mapping[str, Choice],
    solutions: Solutions,
    method: Method,
    calibration: Calibration,
    seed: int,
) -> TunedParts:
    """Parts of the linears of `choices` after tuning; none where it costs too much or does not help."""
    tuning = method.tuning
    assert tuning is not None
    chosen = {name: choice for name, choice in choices.items() if choice.scheme is not None}
    names = [
        name
        for name, choice in chosen.items()
        if choice.role in _LEARNT and scheme_of(choice).bits <= _MOST_BITS
    ]
    num_tokens = calibration.num_tokens
    epochs = tuning.affordable(_size(program), num_tokens)
    if not epochs:
        return _untouched(f"{num_tokens} tokens take more than {tuning.work:g} million million products")
    if num_tokens < _FEWEST_TOKENS:
        return _untouched(
            f"{num_tokens} tokens are too few to learn from, at least {_FEWEST_TOKENS} are needed"
        )
    if not split_sequences(calibration)[0] or not names:
        return _untouched("there is no weight to learn, or but one sequence to learn from")
    tensors = {name: _tensor(program, solutions.parts[name]) for name in chosen}
    key = fingerprint(program, "tuned", method, epochs, seed, dict(choices), calibration.cache_key())
    folder = SolvedFolder(calibration.folder / key)
    results = folder.load(0)
    if results is None:
        starts = {name: (tensors[name], scheme_of(choices[name])) for name in names}
        rest = [name for name in chosen if name not in names]
        others = {
            name: raised(coded_values(program.weights[name], choices[name], tensors[name])) for name in rest
        }
        found = tune(program, starts, others, calibration, epochs, seed)
        errors = {error.subject: error for error in solutions.errors}
        note = f"{found.before:.4g} {found.after:.4g}"
        results = {name: Result(tensor, errors[name], note) for name, tensor in found.tensors.items()}
        folder.save(0, results)
    before, after = map(float, next(iter(results.values())).note.split())
    said = f"mean divergence {before:.4g} before and {after:.4g} after, on sequences kept to judge by"
    if not after < before:
        return _untouched(f"{epochs} epochs did not help: {said}")
    parts: dict[str, Expr] = {}
    for name in names:
        parts |= folder.parts(0, name, program.weights[name], results)
    reason = f"{said}; errors of layers are those before"
    return TunedParts(parts, Decision(subject="tuning", choice=f"{epochs} epochs", reason=reason))


def _size(program: Program) -> int:
    return sum(num_parameters(program.weights[name]) for name in program.used_weights())


def _untouched(why: str) -> TunedParts:
    return TunedParts({}, Decision(subject="tuning", choice="none", reason=why))


def _tensor(program: Program, parts: Mapping[str, Expr]) -> QTensor:
    found = {name.rsplit(".", 1)[1]: expr.evaluate(program.weights.reader) for name, expr in parts.items()}
    return QTensor(found["codes"], found["scales"], found.get("zeros"))
