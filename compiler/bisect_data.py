"""What calibrated passes are given while a pipeline is bisected: random tokens of the vocabulary, so that
solvers run as they do in a compile, and the same for a model and for the small one of a reproducer."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ..passes.base import PassContext
from ..passes.calibration import Calibration
from ..spec.model import ModelSpec

# Enough that second moments of inputs are of full rank in the widths of small models, in seconds.
_NUM_SEQUENCES, _TOKENS = 16, 128


@contextmanager
def probe_calibration(context: PassContext, spec: ModelSpec) -> Generator[PassContext]:
    """`context` with tokens to calibrate on; what passes keep of them is gone afterwards."""
    draw = random.Random(f"calibration {context.seed}")
    length = min(_TOKENS, spec.max_context)
    sequences = tuple(
        tuple(draw.randrange(spec.vocab_size) for _ in range(length)) for _ in range(_NUM_SEQUENCES)
    )
    with tempfile.TemporaryDirectory(prefix="llmc-bisect-") as folder:
        calibration = Calibration(sequences=sequences, source="random tokens", folder=Path(folder))
        yield replace(context, calibration=calibration)
