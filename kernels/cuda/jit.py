"""Launches by triton's own compiler: under its interpreter on a machine without a GPU, or to measure on one
with.

Served artifacts never come here: their kernels are compiled ahead of time.
"""

# pyright: basic

from __future__ import annotations

from importlib import import_module

import triton

from .launch import Launch


def kernel_function(name: str) -> triton.JITFunction:
    """The triton function `module.function` of this package."""
    module, function = name.split(".")
    return getattr(import_module(f".{module}", __package__), function)


def launch_jit(launch: Launch) -> None:
    """`kernels.cuda.launch.Launcher` by `triton.jit`."""
    specialisation = launch.specialisation
    if 0 in launch.grid:
        return
    kernel = kernel_function(specialisation.kernel)
    options = {
        "num_warps": specialisation.warps,
        "num_stages": specialisation.stages,
        "enable_fp_fusion": False,
    }
    kernel[launch.grid](**launch.values, **dict(specialisation.constants), **options)
