"""Tile registers: asked for, and gone from the features where the system refuses."""

from __future__ import annotations

import pytest

from llmc.kernels.levels import AMX, supported_levels
from llmc.runtime.executors.amx import request_tiles, usable_features

pytestmark = [pytest.mark.pure, pytest.mark.cpu]

XEON = AMX.features | {"amx_bf16", "sse2"}


def test_granted_tiles_stay_and_choose_the_tile_level():
    usable = usable_features(XEON, request=lambda: True)
    assert usable == XEON
    assert supported_levels(usable)[-1] is AMX


def test_refused_tiles_leave_the_next_level():
    usable = usable_features(XEON, request=lambda: False)
    assert not any(feature.startswith("amx") for feature in usable)
    assert supported_levels(usable)[-1].name == "avx512vnni"


def test_nobody_is_asked_without_the_hardware():
    def never():
        raise AssertionError("asked")

    assert usable_features(frozenset({"avx2"}), request=never) == {"avx2"}


def test_asking_answers_whatever_the_machine():
    assert request_tiles() in (True, False)
