"""Models without weights: parameters that have a shape and no memory, buffers that are real."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from . import adapter


@contextmanager
def weightless_construction() -> Generator[None]:
    """Parameters registered inside the block keep shape and dtype and lose their memory; buffers stay.

    Memory is given back as each parameter is registered, before anything is written to it, so that a
    module of any size costs address space only.
    """
    register = nn.Module.register_parameter

    def without_memory(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(torch.empty_like(param, device="meta"), requires_grad=False)
        register(self, name, param)

    nn.Module.register_parameter = without_memory
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def use_fake_parameters(model: nn.Module) -> dict[str, str]:
    """Replace meta parameters by fake ones on the CPU, one per distinct parameter, so that ties survive.

    Returns alias -> owner for tied names; the owner is the name met first.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    fakes: dict[nn.Parameter, tuple[str, nn.Parameter]] = {}
    ties: dict[str, str] = {}
    for path, module in model.named_modules():
        for key, parameter in adapter.own_parameters(module).items():
            if parameter is None:
                continue
            name = f"{path}.{key}" if path else key
            if parameter in fakes:
                ties[name] = fakes[parameter][0]
            else:
                with mode:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                fakes[parameter] = (name, nn.Parameter(empty, requires_grad=False))
            adapter.own_parameters(module)[key] = fakes[parameter][1]
    return ties
