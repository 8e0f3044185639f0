"""Opens an artifact and says what is wrong with it. Knows names, sizes and checksums; what the files mean is
the executors' business."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..spec.errors import ArtifactError
from .checksums import Problem, check_contents, check_presence
from .schema import MANIFEST, SUFFIX, TOKENIZER_FOLDER, FileEntry, FileKind, Manifest, decode_manifest
from .tensors import TensorView, read_tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A compiled model on disk. `path` is its folder."""

    path: Path
    manifest: Manifest

    @property
    def tokenizer_folder(self) -> Path:
        """Where the source model's tokenizer files lie."""
        return self.path / TOKENIZER_FOLDER

    @property
    def size_bytes(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(entry.size_bytes for entry in self.manifest.files)

    def entry(self, path: str) -> FileEntry:
        """The listed file at `path`. ArtifactError when the artifact has none."""
        for entry in self.manifest.files:
            if entry.path == path:
                return entry
        raise ArtifactError(
            "artifact.no_file",
            f"The artifact {self.path.name!r} has no file {path!r}.",
            "Its manifest does not list one.",
            "Compile the model again.",
        )

    def has(self, path: str) -> bool:
        """Whether the manifest lists a file at `path`."""
        return any(entry.path == path for entry in self.manifest.files)

    def read_bytes(self, path: str) -> bytes:
        """The content of a listed file."""
        return (self.path / self.entry(path).path).read_bytes()

    def read_tensors(self, path: str) -> dict[str, TensorView]:
        """The tensors of a listed safetensors file, mapped."""
        return read_tensors(self.path / self.entry(path).path)

    def weights(self) -> dict[str, TensorView]:
        """All weights, over all weight files, mapped."""
        return {name: view for _, views in self.weight_files() for name, view in views.items()}

    def weight_files(self) -> Iterator[tuple[str, Mapping[str, TensorView]]]:
        """(path within the artifact, tensors) of each weight file, in order."""
        for entry in self.manifest.of_kind("weights"):
            yield entry.path, read_tensors(self.path / entry.path)


def is_artifact(path: Path) -> bool:
    """Whether `path` looks like an artifact rather than a model, or was meant to be one."""
    return path.suffix == SUFFIX or (path / MANIFEST).is_file()


def open_artifact(path: str | os.PathLike[str]) -> Artifact:
    """Opens the artifact at `path` and checks every byte of it.

    Raises ArtifactError naming what is missing, of another size, damaged (file and chunk) or of a newer
    schema.
    """
    artifact = open_unchecked(path)
    raise_damage(artifact, check_files(artifact))
    return artifact


def open_unchecked(path: str | os.PathLike[str]) -> Artifact:
    """Opens the artifact at `path` after checking its manifest, and that every file is there with its
    size. The contents are not read: `check_files` does that, at the caller's time."""
    folder = Path(path)
    if not folder.exists():
        raise ArtifactError(
            "artifact.not_found",
            f"There is no artifact at {str(path)!r}.",
            "Nothing exists under that name.",
            "Check the path, or make one with `llmc compile`.",
        )
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise ArtifactError(
            "artifact.not_an_artifact",
            f"{str(path)!r} is not an artifact.",
            f"It has no {MANIFEST}.",
            "Pass a folder that `llmc compile` wrote; a Hugging Face model must be compiled first.",
        )
    artifact = Artifact(path=folder.absolute(), manifest=decode_manifest(manifest.read_bytes()))
    raise_damage(artifact, check_presence(artifact.path, artifact.manifest.files))
    return artifact


def check_files(
    artifact: Artifact, kinds: frozenset[FileKind] | None = None, num_threads: int = 0
) -> list[Problem]:
    """Files (of some `kinds`, or all) whose bytes differ from their checksums; reads all of them."""
    entries = [entry for entry in artifact.manifest.files if kinds is None or entry.kind in kinds]
    return check_contents(artifact.path, entries, num_threads)


def verify_artifact(path: str | os.PathLike[str]) -> list[Problem]:
    """Everything that is wrong with the artifact at `path`: an empty list when it is whole.

    Files that no manifest lists are reported, too. Raises ArtifactError only when there is no artifact
    that could be looked at.
    """
    folder = Path(path)
    if not (folder / MANIFEST).is_file():
        open_unchecked(folder)
    try:
        manifest = decode_manifest((folder / MANIFEST).read_bytes())
    except ArtifactError as error:
        return [Problem(file=MANIFEST, what=f"cannot be used: {error.why[0].lower()}{error.why[1:]}")]
    problems = check_presence(folder, manifest.files)
    broken = {problem.file for problem in problems}
    problems += check_contents(folder, [entry for entry in manifest.files if entry.path not in broken])
    listed = {entry.path for entry in manifest.files} | {MANIFEST}
    for found in sorted(folder.rglob("*")):
        name = found.relative_to(folder).as_posix()
        if not found.is_dir() and name not in listed:
            problems.append(Problem(file=name, what="is not part of the artifact"))
    return problems


def raise_damage(artifact: Artifact, problems: list[Problem]) -> None:
    """Raises ArtifactError naming the first of `problems` and counting the rest; returns when none."""
    if problems:
        rest = f" ({len(problems) - 1} more problems were found)" if len(problems) > 1 else ""
        raise ArtifactError(
            "artifact.damaged",
            f"The artifact {artifact.path.name!r} is damaged.",
            f"{problems[0]}{rest}.",
            "Copy the artifact again, or compile the model again; `llmc verify` lists every problem.",
        )
