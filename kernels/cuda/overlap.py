"""Kernels that begin before the one ahead has ended: programmatic dependent launch, from sm_90 on."""

# pyright: basic

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# The default of kernels: they are launched when the one ahead has ended.
NOT_EARLY = tl.constexpr(False)


@triton.jit
def follow(PDL: tl.constexpr):
    """Where the launch may begin early (`PDL`): wait until all that was launched before has ended and can be
    seen, and let the next begin. Every kernel that is launched so calls it before it touches memory: what is
    waited for then includes whatever the one ahead waited for."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
