"""The `llmc::` operators: importing this package registers schema, fake and reference implementation."""

from . import activation, attention, linear, moe, norm, rope

__all__ = ["activation", "attention", "linear", "moe", "norm", "rope"]
