"""The digest of the code behind a result: a module and every module of its package, and of llmc, that it
imports. Reads files; imports nothing."""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]
_PACKAGE = __name__.partition(".")[0]
_LIBRARIES = ("torch", "transformers", "numpy", "safetensors", "tokenizers")


class SourceDigests:
    """Digests of modules' source, each file read once."""

    def __init__(self) -> None:
        self._files: dict[Path, tuple[str, tuple[Path, ...]]] = {}

    def of_module(self, name: str) -> str:
        """The digest of a loaded module's code. A module without a file is a ValueError: what was typed into
        an interpreter cannot be told from what is typed next."""
        module = sys.modules.get(name)
        file = getattr(module, "__file__", None)
        if file is None:
            raise ValueError(f"module {name!r} has no source file")
        return self.of_files(Path(file))

    def of_files(self, *paths: Path) -> str:
        """The digest of `paths` and all they import of the packages they and llmc are in."""
        seen: set[Path] = set()
        left = [path.resolve() for path in paths]
        while left:
            path = left.pop()
            if path not in seen:
                seen.add(path)
                left.extend(self._read(path)[1])
        lines = sorted(self._read(path)[0] for path in seen)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def _read(self, path: Path) -> tuple[str, tuple[Path, ...]]:
        if path not in self._files:
            data = path.read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            self._files[path] = (f"{path.name}:{digest}", tuple(_imports(path, ast.parse(data))))
        return self._files[path]


def _imports(path: Path, tree: ast.Module) -> Iterator[Path]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            folder = _folder_of(node, path)
            if folder is not None:
                yield from _modules(folder, [alias.name for alias in node.names])
        elif isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                if parts[0] == _PACKAGE:
                    yield from _modules(ROOT.joinpath(*parts[1:]), [])


def _folder_of(node: ast.ImportFrom, path: Path) -> Path | None:
    """The path, without suffix, of what is imported from; None for other packages."""
    parts = node.module.split(".") if node.module else []
    if node.level:
        return path.parents[node.level - 1].joinpath(*parts)
    return ROOT.joinpath(*parts[1:]) if parts[:1] == [_PACKAGE] else None


def _modules(base: Path, names: list[str]) -> Iterator[Path]:
    candidates = [base.with_suffix(".py"), base / "__init__.py", *(base / f"{name}.py" for name in names)]
    yield from (candidate for candidate in candidates if candidate.is_file())


def environment() -> str:
    """The libraries and the processor's capability, on which results' bits may depend."""
    import torch

    versions = [f"{name} {_version(name)}" for name in _LIBRARIES]
    python = ".".join(map(str, sys.version_info[:2]))
    return "; ".join([*versions, f"python {python}", torch.backends.cpu.get_cpu_capability()])


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"
