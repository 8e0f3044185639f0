"""What the structure tests read: every Python file of the package, parsed, with its imports resolved."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Import:
    """One imported module. `module` is dotted; within the package it is relative to the package's root
    ("" is the root itself). `lazy` means inside a function, `typing_only` under TYPE_CHECKING."""

    module: str
    names: tuple[str, ...]
    internal: bool
    lazy: bool
    typing_only: bool
    line: int

    @property
    def room(self) -> str:
        return self.module.partition(".")[0]


@dataclass(frozen=True)
class Source:
    """One file of the package."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.relative_to(REPOSITORY).as_posix()

    @property
    def room(self) -> str:
        """The first folder; "" for the package's own `__init__.py`."""
        return self.name.partition("/")[0] if "/" in self.name else ""

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, filename=self.name)

    @cached_property
    def imports(self) -> tuple[Import, ...]:
        return tuple(_imports(self.tree.body, self.name, lazy=False, typing_only=False))


def _imports(body: list[ast.stmt], name: str, *, lazy: bool, typing_only: bool) -> Iterator[Import]:
    for node in body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(
                    alias.name, (), alias.name.partition(".")[0] == "llmc", lazy, typing_only, node.lineno
                )
        elif isinstance(node, ast.ImportFrom):
            yield from _from_imports(node, name, lazy=lazy, typing_only=typing_only)
        else:
            inner_lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            for field, value in ast.iter_fields(node):
                if isinstance(value, list):
                    typing = typing_only or (field == "body" and _is_type_checking(node))
                    statements = [statement for item in value for statement in _statements(item)]
                    yield from _imports(statements, name, lazy=inner_lazy, typing_only=typing)


def _statements(item: object) -> list[ast.stmt]:
    """The statements that an AST list holds directly, or one level down (except handlers, match cases)."""
    if isinstance(item, ast.stmt):
        return [item]
    return item.body if isinstance(item, ast.ExceptHandler | ast.match_case) else []


def _is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _from_imports(node: ast.ImportFrom, name: str, *, lazy: bool, typing_only: bool) -> Iterator[Import]:
    names = tuple(alias.name for alias in node.names)
    if node.level == 0:
        module = node.module or ""
        yield Import(module, names, module.partition(".")[0] == "llmc", lazy, typing_only, node.lineno)
        return
    package = list(Path(name).parent.parts)
    base = package[: len(package) - (node.level - 1)]
    if node.module is not None:
        module = ".".join([*base, node.module])
        yield Import(module, names, True, lazy, typing_only, node.lineno)
        return
    for one in names:  # `from .. import x`: x is a module of that folder, or a name in its __init__.py
        folder = REPOSITORY.joinpath(*base)
        is_module = (folder / f"{one}.py").exists() or (folder / one / "__init__.py").exists()
        module = ".".join([*base, one] if is_module else base)
        yield Import(module, (one,), True, lazy, typing_only, node.lineno)


def package_list() -> tuple[str, ...]:
    """The packages that pyproject.toml ships."""
    with (REPOSITORY / "pyproject.toml").open("rb") as file:
        return tuple(tomllib.load(file)["tool"]["setuptools"]["packages"])


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def packages() -> tuple[str, ...]:
    return package_list()


@pytest.fixture(scope="session")
def sources() -> tuple[Source, ...]:
    """Every Python file that ships, found through the package list."""
    folders = [REPOSITORY.joinpath(*package.split(".")[1:]) for package in package_list()]
    return tuple(Source(path) for folder in folders for path in sorted(folder.glob("*.py")))
