"""Imports go one way through the rooms; the rooms that serve know no torch."""

from __future__ import annotations

import ast
import sys

import pytest

pytestmark = pytest.mark.pure

# Room -> the rooms it may import, itself aside. "" is the package's own __init__.py.
MAY_IMPORT = {
    "": {"compiler", "runtime"},
    "spec": set(),
    "artifact": {"spec"},
    "ir": {"spec"},
    "kernels": {"spec"},
    "passes": {"ir", "spec", "kernels"},
    "codegen": {"ir", "kernels", "artifact", "spec"},
    "runtime": {"artifact", "spec"},
    "compiler": {"spec", "artifact", "ir", "kernels", "passes", "codegen", "runtime", "models"},
    "models": set(),
    "cli": {"spec", "artifact", "ir", "kernels", "passes", "codegen", "runtime", "compiler", "models"},
}
COMPILE_TIME_LIBRARIES = {"torch", "transformers", "triton", "onnx"}
TORCH_FREE_ROOMS = {"", "spec", "artifact", "runtime", "cli"}


def needs_torch(name):
    """The executors that import what they execute, and are themselves imported in functions only."""
    return name.startswith(("runtime/executors/reference", "runtime/executors/cuda"))


def deferred(imported):
    return imported.lazy or imported.typing_only


def allowed(source, imported):
    room = imported.room
    if room == source.room:
        return True
    if room == "":  # the package itself: nothing but its version
        return imported.names == ("__version__",)
    if needs_torch(source.name) and room in ("ir", "kernels"):
        return True
    if source.room == "passes" and room == "kernels":
        return imported.module == "kernels.catalog" or imported.names == ("catalog",)
    return room in MAY_IMPORT[source.room]


def test_every_room_is_in_the_table(packages):
    rooms = {package.split(".")[1] for package in packages if "." in package}
    assert rooms == set(MAY_IMPORT) - {""}


def test_rooms_import_only_what_is_below_them(sources):
    wrong = [
        f"{source.name}:{imported.line} imports {imported.module or 'the package itself'}"
        for source in sources
        for imported in source.imports
        if imported.internal and not allowed(source, imported)
    ]
    assert not wrong, "\n".join(wrong)


def test_imports_within_the_package_are_relative(sources):
    wrong = [
        f"{source.name}:{imported.line} imports {imported.module}"
        for source in sources
        for imported in source.imports
        if imported.module.partition(".")[0] == "llmc"
    ]
    assert not wrong, "\n".join(wrong)


def test_serving_rooms_import_no_compile_time_library(sources):
    wrong = [
        f"{source.name}:{imported.line} imports {imported.module}"
        for source in sources
        if source.room in TORCH_FREE_ROOMS or source.name == "kernels/catalog.py"
        for imported in source.imports
        if imported.room in COMPILE_TIME_LIBRARIES and not needs_torch(source.name)
    ]
    assert not wrong, "\n".join(wrong)


def test_executors_with_torch_are_imported_in_functions_only(sources):
    wrong = [
        f"{source.name}:{imported.line} imports {imported.module}"
        for source in sources
        if not needs_torch(source.name)
        for imported in source.imports
        if imported.internal and needs_torch(imported.module.replace(".", "/")) and not deferred(imported)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_command_line_imports_the_package_in_functions_only(sources):
    wrong = [
        f"{source.name}:{imported.line} imports {imported.module}"
        for source in sources
        if source.room == "cli"
        for imported in source.imports
        if imported.internal and imported.room not in ("cli", "spec", "") and not deferred(imported)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_kernels_room_stays_free_of_imports(repository):
    """transformers probes for a package named `kernels` and imports this one when started at the root."""
    tree = ast.parse((repository / "kernels" / "__init__.py").read_text(encoding="utf-8"))
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


def test_no_room_hides_a_standard_module(packages):
    """With the root on sys.path a room's name wins over a library's."""
    rooms = {package.split(".")[1] for package in packages if "." in package}
    assert not rooms & set(sys.stdlib_module_names)
