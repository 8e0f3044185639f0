"""What passes that look at tokens need of a compile."""

from __future__ import annotations

from ...spec.errors import RecipeError
from ..base import PassContext
from ..calibration import Calibration

# Why a search of codes looks at tokens, and what to do without any.
SEARCH_NEEDS = (
    "It finds codes by what tokens bring to each layer, and the compile was given none.",
    "Give the pass context a Calibration, or use scale_search with data=false.",
)


def require_calibration(
    name: str, context: PassContext, why: str, fix: str, *, data: bool = True
) -> Calibration:
    """The calibration that pass `name` was given, with tokens when it looks at `data`.

    Raises RecipeError with `why` and `fix` when there is none.
    """
    calibration = context.calibration
    if calibration is None or (data and not calibration.sequences):
        raise RecipeError("recipe.no_calibration", f"Pass {name!r} has no calibration data.", why, fix)
    return calibration
