"""Which passes there are: those of llmc, and those that other packages add.

A package adds a pass by an entry point of group `llmc.passes` that names the class.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from importlib.metadata import EntryPoint, entry_points

from ..spec.errors import RecipeError
from .base import Contract, Exact, OptionInfo, Pass, Stage, Within, options_of
from .options import closest
from .pipeline import BUILT_IN

PLUGIN_GROUP = "llmc.passes"
_MEMBERS = ("name", "stage", "requires", "provides", "contract", "run", "__dataclass_fields__")


@dataclass(frozen=True, slots=True, kw_only=True)
class PassInfo:
    """One pass as `llmc passes` shows it."""

    name: str
    stage: Stage
    summary: str
    contract: str
    requires: tuple[str, ...]
    provides: tuple[str, ...]
    options: tuple[OptionInfo, ...]


def known_passes() -> dict[str, type[Pass]]:
    """Every pass class by name: llmc's own in pipeline order, then plugins by name.

    Raises RecipeError for a plugin that cannot be loaded, is no pass, or takes a name that is taken.
    """
    known = {kind.name: kind for kind in BUILT_IN}
    for entry in sorted(entry_points(group=PLUGIN_GROUP), key=lambda entry: entry.name):
        kind = _load(entry)
        if kind.name in known:
            raise _bad_plugin(entry, f"The name {kind.name!r} is taken by {known[kind.name].__module__}.")
        known[kind.name] = kind
    return known


def pass_named(name: str) -> type[Pass]:
    """The pass class called `name`. Raises RecipeError naming the closest ones."""
    known = known_passes()
    if name not in known:
        raise RecipeError(
            "recipe.unknown_pass",
            f"There is no pass {name!r}.",
            "Neither llmc nor an installed plugin has a pass of that name.",
            closest(name, known),
        )
    return known[name]


def describe_passes() -> tuple[PassInfo, ...]:
    """All passes in order of their stages, described."""
    kinds = sorted(known_passes().values(), key=lambda kind: kind.stage)
    return tuple(
        PassInfo(
            name=kind.name,
            stage=kind.stage,
            summary=(kind.__doc__ or "").strip().split("\n")[0],
            contract=contract_text(kind.contract),
            requires=tuple(sorted(kind.requires)),
            provides=tuple(sorted(kind.provides)),
            options=options_of(kind),
        )
        for kind in kinds
    )


def contract_text(contract: Contract) -> str:
    """A contract in words."""
    if isinstance(contract, Exact):
        return "exact"
    return f"within {contract.tolerance:g}" if isinstance(contract, Within) else "lossy"


def _load(entry: EntryPoint) -> type[Pass]:
    try:
        kind = entry.load()
    except (ImportError, AttributeError) as error:
        raise _bad_plugin(entry, f"Loading it failed: {error}.") from error
    missing = [member for member in _MEMBERS if not hasattr(kind, member)]
    if missing:
        raise _bad_plugin(entry, f"It is no pass: it has no {missing[0]!r}.")
    undocumented = [field.name for field in fields(kind) if "doc" not in field.metadata]
    if undocumented:
        raise _bad_plugin(entry, f"Its field {undocumented[0]!r} is not made with `option`.")
    return kind


def _bad_plugin(entry: EntryPoint, why: str) -> RecipeError:
    package = entry.dist.name if entry.dist else "an installed package"
    return RecipeError(
        "recipe.plugin",
        f"The pass plugin {entry.name!r} of {package} cannot be used.",
        why,
        f"Repair or uninstall {package}.",
    )
