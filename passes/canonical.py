"""The canonicalise stage in order: from a traced graph to the vocabulary that later passes look for."""

from __future__ import annotations

from .base import Pass
from .dead_code import DeadCode
from .drop_batch import DropBatch
from .fold_constants import FoldConstants
from .gated_activation import GatedActivation
from .merge_common import MergeCommon
from .name_activations import NameActivations
from .name_norms import NameNorms
from .normalize import Normalize
from .rope import Rope
from .simplify import Simplify


def canonical_passes() -> tuple[Pass, ...]:
    """One instance of each pass of the stage, with default options, in the order that they need."""
    return (
        FoldConstants(),
        DropBatch(),
        MergeCommon(),
        Simplify(),
        NameNorms(),
        NameActivations(),
        GatedActivation(),
        Rope(),
        Normalize(),
        DeadCode(),
    )
