"""The `llmc::` operators: importing this package registers schema, fake and reference implementation."""

from . import activation, attention, linear, moe, norm, rope, rope_cache

__all__ = ["activation", "attention", "linear", "moe", "norm", "rope", "rope_cache"]
