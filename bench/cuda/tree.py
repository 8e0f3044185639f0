"""The package from the tree, for this process and for those that it starts, where nothing is installed. Knows
which libraries the bench needs."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
# What the bench imports, and nothing else may be needed: msgspec has a stand-in in the tree.
LIBRARIES = ("torch", "triton", "transformers", "safetensors", "tokenizers", "numpy", "jinja2", "pytest")


class NotCarried(Exception):
    """What a part measures is not on this machine, and nothing else needs it."""


def missing_libraries() -> list[str]:
    """Those of `LIBRARIES` that are not installed."""
    return [name for name in LIBRARIES if find_spec(name) is None]


def use_tree(folder: Path) -> None:
    """Make `llmc` importable from the tree, here and in processes started from here, by a link in `folder`:
    the root of the tree is the package. Where msgspec is missing, its stand-in goes beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / "llmc"
    if not link.is_symlink() or link.resolve() != REPOSITORY:
        link.unlink(missing_ok=True)
        link.symlink_to(REPOSITORY)
    paths = [str(folder)]
    if find_spec("msgspec") is None:
        paths.append(str(Path(__file__).parent / "stand_ins"))
    before = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:0] = [path for path in paths if path not in sys.path]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([*paths, *before]))
