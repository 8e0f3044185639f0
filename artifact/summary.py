"""What is inside an artifact, in numbers: for `llmc inspect`. Reads the manifest and the weights' headers,
no values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import msgspec

from .reader import Artifact
from .schema import MANIFEST, FileKind, Manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorGroup:
    """All weights of one storage dtype."""

    dtype: str
    num_tensors: int
    num_elements: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactSummary:
    """Sizes in bytes, the manifest's own included. `bits_per_weight` is of all weight tensors, scales and
    zero points included, over the parameters of the source model."""

    name: str
    manifest: Manifest
    size_bytes: int
    size_by_kind: dict[FileKind, int]
    weights: tuple[TensorGroup, ...]
    bits_per_weight: float

    def as_dict(self) -> dict[str, Any]:
        """The object that `llmc inspect --json` prints; files go without their digests."""
        manifest = self.manifest
        facts = msgspec.to_builtins(
            {
                "provenance": manifest.provenance,
                "spec": manifest.spec,
                "recipe": manifest.recipe,
                "target": manifest.target,
                "cache": manifest.cache,
                "memory": manifest.memory,
                "history": manifest.history,
                "weights": self.weights,
            }
        )
        return {
            "name": self.name,
            "schema_version": manifest.schema_version,
            "size_bytes": self.size_bytes,
            "size_by_kind": dict(self.size_by_kind),
            "bits_per_weight": self.bits_per_weight,
            "cache_bytes_per_token": manifest.cache.bytes_per_token,
            **facts,
            "files": [
                {"path": entry.path, "kind": entry.kind, "size_bytes": entry.size_bytes}
                for entry in manifest.files
            ],
        }


def summarise(artifact: Artifact) -> ArtifactSummary:
    """The summary of an opened artifact. Raises ArtifactError when the header of a weight file is damaged."""
    manifest = artifact.manifest
    sizes: dict[FileKind, int] = {}
    for entry in manifest.files:
        sizes[entry.kind] = sizes.get(entry.kind, 0) + entry.size_bytes
    groups = weight_groups(artifact)
    weight_bytes = sum(group.size_bytes for group in groups)
    return ArtifactSummary(
        name=artifact.path.name,
        manifest=manifest,
        size_bytes=artifact.size_bytes + (artifact.path / MANIFEST).stat().st_size,
        size_by_kind=dict(sorted(sizes.items())),
        weights=groups,
        bits_per_weight=8 * weight_bytes / max(1, manifest.spec.num_parameters),
    )


def weight_groups(artifact: Artifact) -> tuple[TensorGroup, ...]:
    """The stored weights by dtype, largest first."""
    groups: dict[str, TensorGroup] = {}
    for _, views in artifact.weight_files():
        for view in views.values():
            known = groups.get(view.dtype)
            groups[view.dtype] = TensorGroup(
                dtype=view.dtype,
                num_tensors=1 + (known.num_tensors if known else 0),
                num_elements=math.prod(view.shape) + (known.num_elements if known else 0),
                size_bytes=view.data.nbytes + (known.size_bytes if known else 0),
            )
    return tuple(sorted(groups.values(), key=lambda group: (-group.size_bytes, group.dtype)))
