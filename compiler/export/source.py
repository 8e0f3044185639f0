"""The model that an artifact was compiled from: found, held to the artifact's hashes, and laid out."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from ...artifact.checksums import sha256_of
from ...artifact.schema import Manifest
from ...ir.weights import Expr, Source, Unbound
from ...spec.errors import UsageError
from ..bind import bind_checkpoint
from ..checkpoint import COMPUTE_DTYPES, Checkpoint, open_checkpoint
from ..hf.linears import Linears, model_linears
from ..quantised.stored import stored_weights
from ..shards import StoredTensor
from ..source import find_model
from ..trace import trace_config
from .places import Layout, places_of


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceModel:
    """The source of an artifact. `stored` are its weights by the checkpoint's names, as values; `ties` are
    names of the model that share another's tensor."""

    checkpoint: Checkpoint
    layout: Layout
    linears: Linears
    stored: Mapping[str, Expr]
    ties: Mapping[str, str]


def open_source(model: str, manifest: Manifest) -> SourceModel:
    """The model at `model`, laid out as the artifact's programs see it.

    Raises UsageError where its files are not those that the artifact was compiled from, and ModelError for
    a folder that is no whole model.
    """
    checkpoint = open_checkpoint(find_model(model))
    _check_files(checkpoint.folder, manifest)
    stored = stored_weights(checkpoint.tensors, checkpoint.form)
    # A weight of codes becomes one tensor of values: where it lies is what counts, and no value is read.
    values = {name: _as_tensor(name, expr, checkpoint.folder) for name, expr in stored.items()}
    spec = manifest.spec
    traced = trace_config(
        checkpoint.config, dtype=COMPUTE_DTYPES[spec.compute_dtype], max_context=spec.max_context
    )
    bound = bind_checkpoint(traced, replace(checkpoint, tensors=values, form=None))
    parameters = {
        name: expr
        for name, expr in bound.weights.entries.items()
        if isinstance(traced.weights[name], Unbound) or places_of(expr) is not None
    }
    layout = Layout(
        places={name: places_of(expr) for name, expr in parameters.items()},
        shapes={name: expr.shape for name, expr in parameters.items()},
        computed=frozenset(bound.weights.entries) - frozenset(parameters),
    )
    linears = model_linears(checkpoint.config)
    return SourceModel(
        checkpoint=checkpoint, layout=layout, linears=linears, stored=stored, ties=bound.weights.ties
    )


def _as_tensor(name: str, expr: Expr, folder: Path) -> StoredTensor:
    path, key = (Path(expr.path), expr.key) if isinstance(expr, Source) else (folder, name)
    return StoredTensor(path, key, expr.shape, expr.dtype)


def _check_files(folder: Path, manifest: Manifest) -> None:
    """Every file of the artifact's provenance must be there, byte for byte."""
    files = manifest.provenance.files
    paths = [folder / file.name for file in files]
    for path, file in zip(paths, files, strict=True):
        if not path.is_file() or path.stat().st_size != file.size_bytes:
            raise _other_model(folder, file.name, manifest)
    with ThreadPoolExecutor(thread_name_prefix="llmc-hash") as pool:
        for file, digest in zip(files, pool.map(sha256_of, paths), strict=True):
            if digest != file.sha256:
                raise _other_model(folder, file.name, manifest)


def _other_model(folder: Path, name: str, manifest: Manifest) -> UsageError:
    return UsageError(
        "export.other_model",
        f"{folder} is not the model that the artifact was compiled from.",
        f"Its {name} is missing, or differs from the one that was compiled.",
        f"Name the folder of {manifest.provenance.model} with --model.",
    )
