"""What tests of backends share: small portable programs of a family, with random weights."""

from __future__ import annotations

import pytest
import torch
import transformers

from llmc.compiler.trace import trace_config
from llmc.models.families import FAMILIES
from llmc.passes.base import PassContext
from llmc.passes.manager import run_passes
from llmc.passes.pipeline import canonicalise, fuse
from llmc.passes.probe import with_random_weights


@pytest.fixture(scope="session")
def portable_program():
    """`portable_program(family, *quantisers)`: what the lay-out stage would be given."""

    def make(name, *quantisers):
        family = next(family for family in FAMILIES if family.name == name)
        config = getattr(transformers, family.config)(**family.options)
        program = with_random_weights(trace_config(config, dtype=torch.float32), 0)
        return run_passes(program, (*canonicalise(), *fuse(), *quantisers), PassContext())

    return make
