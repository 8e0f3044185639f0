"""What `manifest.json` says, as frozen dataclasses, and its bytes. Knows neither where an artifact lies nor
how its other files look inside."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Literal

import msgspec

from ..spec.cache import CacheLayout
from ..spec.errors import ArtifactError
from ..spec.history import PassRecord
from ..spec.model import ModelSpec
from ..spec.plans import CapturePlan, MemoryPlan
from ..spec.target import Target

SCHEMA_VERSION = 1
SUFFIX = ".llmc"
MANIFEST = "manifest.json"
PROGRAM = "program.json"
PORTABLE_PROGRAM = "program.portable.json"
PROGRAM_TEXT = "program.txt"
ORACLE = "oracle.safetensors"
REPORT = "report.json"
REPORT_PAGE = "report.html"
TOKENIZER_FOLDER = "tokenizer"

FileKind = Literal["weights", "program", "kernel", "tokenizer", "oracle", "report"]
_UNSIGNED = "0" * 64


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """One file of the artifact: its path within the folder, and the SHA-256 of each 16 MiB chunk."""

    path: str
    kind: FileKind
    size_bytes: int
    chunks: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """One file of the source model that went into the artifact."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where an artifact comes from: facts that are the same wherever and whenever it is built.

    `model` is the source's own name, not a path; `tools` maps a library to its version.
    """

    model: str
    llmc_version: str
    files: tuple[SourceFile, ...] = ()
    tools: dict[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeStep:
    """One pass of the recipe with the options it ran with."""

    name: str
    options: dict[str, bool | int | float | str] = field(default_factory=dict[str, bool | int | float | str])


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The pass pipeline as it was asked for. `name` is the preset's, or `custom`."""

    name: str
    steps: tuple[RecipeStep, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """All that is known about an artifact without opening its other files.

    `checksum` is the SHA-256 of the manifest's own bytes with the checksum's digits replaced by zeros.
    `files` lists every file but the manifest, in order of path.
    """

    format: Literal["llmc"] = "llmc"
    schema_version: int = SCHEMA_VERSION
    checksum: str = _UNSIGNED
    provenance: Provenance
    spec: ModelSpec
    recipe: Recipe
    target: Target
    cache: CacheLayout
    memory: MemoryPlan | None = None
    capture: CapturePlan | None = None
    history: tuple[PassRecord, ...] = ()
    files: tuple[FileEntry, ...] = ()

    def of_kind(self, kind: FileKind) -> tuple[FileEntry, ...]:
        """The files of one kind, in order of path."""
        return tuple(entry for entry in self.files if entry.kind == kind)


class _Header(msgspec.Struct):
    format: str
    schema_version: int
    checksum: str


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of `manifest.json`, signed: the same for equal manifests, and readable."""
    unsigned = msgspec.json.encode(replace(manifest, checksum=_UNSIGNED), order="deterministic")
    text = msgspec.json.format(unsigned, indent=1) + b"\n"
    return text.replace(_UNSIGNED.encode(), hashlib.sha256(text).hexdigest().encode(), 1)


def decode_manifest(data: bytes) -> Manifest:
    """Inverse of `encode_manifest`.

    Raises ArtifactError for bytes that are no manifest, for a schema newer than `SCHEMA_VERSION`
    (naming both), and where the bytes do not match their own checksum.
    """
    try:
        header = msgspec.json.decode(data, type=_Header)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise _damaged(f"it is not a manifest ({error})") from error
    if header.format != "llmc":
        raise _damaged(f"its format is {header.format!r}")
    if header.schema_version > SCHEMA_VERSION:
        raise ArtifactError(
            "artifact.schema",
            f"The artifact has schema version {header.schema_version}.",
            f"This version of llmc reads versions up to {SCHEMA_VERSION}.",
            "Update llmc, or compile the model again with this version.",
        )
    unsigned = data.replace(header.checksum.encode(), _UNSIGNED.encode(), 1)
    if hashlib.sha256(unsigned).hexdigest() != header.checksum:
        raise _damaged("its bytes do not match its checksum")
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except msgspec.MsgspecError as error:
        raise _damaged(str(error)) from error
    for entry in manifest.files:
        if not is_inside(entry.path):
            raise _damaged(f"it names the file {entry.path!r}, which is outside of the artifact")
    return manifest


def is_inside(path: str) -> bool:
    """Whether `path` stays within the folder it is relative to."""
    parts = PurePosixPath(path).parts
    return bool(parts) and ".." not in parts and not path.startswith("/") and "\\" not in path


def _damaged(why: str) -> ArtifactError:
    return ArtifactError(
        "artifact.manifest",
        f"The artifact's {MANIFEST} is damaged.",
        f"It cannot be used: {why}.",
        "Copy the artifact again, or compile the model again.",
    )
