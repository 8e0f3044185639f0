"""How an operator is registered: schema from the annotations, one implementation for every device.

`torch.library.custom_op` would do the same, at the price of importing the torch compiler on the first call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class Operator:
    """A registered operator; calling it goes through torch, so that fakes and tracing see it. `function` is
    what was decorated: plain torch, which gradients flow through where nothing is changed in place."""

    def __init__(self, name: str, function: Callable[..., Any], mutates_args: Iterable[str]) -> None:
        self._name = name
        schema = torch.library.infer_schema(function, mutates_args=tuple(mutates_args))
        torch.library.define(name, schema)
        torch.library.impl(name, "CompositeExplicitAutograd", func=function)
        self.__doc__ = function.__doc__
        self.function = function
        namespace, short = name.split("::")
        self.overload: Callable[..., Any] = getattr(getattr(torch.ops, namespace), short).default

    def __call__(self, *args: Any) -> Any:
        """Run it."""
        return self.overload(*args)

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Say what shapes and dtypes come out, without computing."""
        torch.library.register_fake(self._name, function)
        return function


def operator(name: str, *, mutates_args: Iterable[str] = ()) -> Callable[[Callable[..., Any]], Operator]:
    """Register the decorated function as operator `name` (`llmc::...`)."""
    return lambda function: Operator(name, function, mutates_args)
