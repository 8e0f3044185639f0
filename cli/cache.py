"""`llmc cache`: what earlier compiles left to be reused, and how to be rid of it."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from .output import Output, human_bytes, table, with_output

if TYPE_CHECKING:
    from ..compiler.cache.store import CacheEntry


@click.group()
def cache() -> None:
    """List or clear the compile cache: results of passes, quantised weights, generated libraries."""


@cache.command("list")
@click.option("--entries", is_flag=True, help="List every entry, not only the kinds.")
@with_output
def list_cache(output: Output, entries: bool) -> None:
    """Say what is in the compile cache, where it lies and how large it may become."""
    from ..compiler.cache.config import CacheConfig
    from ..compiler.cache.store import CacheStore, total_bytes

    config = CacheConfig.from_environment()
    found = CacheStore(config).entries()
    data = {
        "folder": str(config.folder),
        "max_bytes": config.max_bytes,
        "size_bytes": total_bytes(found),
        "kinds": _by_kind(found),
        "entries": [asdict(entry) for entry in found],
    }
    kinds = [(kind, str(count), human_bytes(size)) for kind, (count, size) in _by_kind(found).items()]
    lines = [
        f"{config.folder}: {human_bytes(total_bytes(found))} of at most {human_bytes(config.max_bytes)}",
        table(kinds, ("kind", "entries", "size")),
    ]
    if entries:
        rows = [(entry.kind, human_bytes(entry.size_bytes), entry.label) for entry in found]
        lines.append(table(rows, ("kind", "size", "what")))
    output.result(data, "\n\n".join(line for line in lines if line) if found else f"{lines[0]}.")


@cache.command("clear")
@with_output
def clear_cache(output: Output) -> None:
    """Remove everything from the compile cache but what a running compile uses."""
    from ..compiler.cache.config import CacheConfig
    from ..compiler.cache.store import CacheStore, total_bytes

    store = CacheStore(CacheConfig.from_environment())
    removed = store.trim(0)
    left = store.entries()
    data = {
        "removed": len(removed),
        "removed_bytes": total_bytes(removed),
        "in_use": len(left),
        "in_use_bytes": total_bytes(left),
    }
    text = f"Removed {len(removed)} entries, {human_bytes(total_bytes(removed))}."
    if left:
        text += f" {len(left)} are in use by a running compile and stay."
    output.result(data, text)


def _by_kind(entries: list[CacheEntry]) -> dict[str, tuple[int, int]]:
    """Kind -> how many entries, and their bytes."""
    found: dict[str, tuple[int, int]] = {}
    for entry in sorted(entries, key=lambda entry: entry.kind):
        count, size = found.get(entry.kind, (0, 0))
        found[entry.kind] = (count + 1, size + entry.size_bytes)
    return found
