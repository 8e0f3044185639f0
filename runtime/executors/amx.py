"""Permission to use tile registers (AMX): Linux grants them to a process that asks for them."""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Callable

# Linux, Documentation/arch/x86/xstate.rst: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
_SYS_ARCH_PRCTL = 158
_ARCH_REQ_XCOMP_PERM = 0x1023
_XFEATURE_XTILEDATA = 18


def request_tiles() -> bool:
    """Ask the system for tile registers, for all threads of this process and for good. Old kernels and
    sandboxes refuse."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA)
    return libc.syscall(*(ctypes.c_long(argument) for argument in arguments)) == 0


def usable_features(features: frozenset[str], request: Callable[[], bool] = request_tiles) -> frozenset[str]:
    """`features` of the processor, without tiles where the system refuses them."""
    if "amx_tile" not in features or request():
        return features
    return frozenset(feature for feature in features if not feature.startswith("amx_"))
