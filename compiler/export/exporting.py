"""`llmc export`: the weights of an artifact as a compressed-tensors checkpoint, for vLLM and transformers.

Linears and experts keep their codes and scales as they are. Tables and heads, which the format's readers
take as values, are dequantised.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...artifact.folder import StagingFolder
from ...artifact.reader import Artifact, open_artifact
from ...ir.program import Program
from ...ir.quantized import QTensor, dequantize_rows
from ...ir.weights import Reader
from ...spec.errors import UsageError
from ...spec.quant import QuantScheme, parse_scheme
from ..checkpoint import COMPUTE_DTYPES
from ..compare.quality import portable_program
from .coded import CodedWeight, coded_weights
from .config import write_config
from .form import Form, form_of, refusal
from .places import Piece
from .shards import ShardWriter
from .source import SourceModel, open_source

_MARKER = "config.json"
_WEIGHT = ".weight"
Watch = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What was written. `forms` counts the modules of each form, `dequantised` are weights whose codes the
    format's readers do not take, `widened` says that codes of 3 bits lie in 4."""

    path: Path
    size_bytes: int
    dtype: str
    forms: dict[str, int]
    dequantised: tuple[str, ...]
    widened: bool

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "path": str(self.path),
            "format": "compressed-tensors",
            "size_bytes": self.size_bytes,
            "dtype": self.dtype,
            "forms": self.forms,
            "dequantised": list(self.dequantised),
            "widened": self.widened,
        }


def export_artifact(artifact: Path, out: Path, model: str, watch: Watch) -> Exported:
    """Write the checkpoint to the new folder `out`; `model` is the folder or hub id that was compiled.

    Raises UsageError where `out` exists, where `model` is another model, and for weights that the format has
    no form for, each before anything is written; ArtifactError and ModelError for what cannot be opened.
    """
    if out.exists() or out.is_symlink():
        raise UsageError(
            "export.exists",
            f"The output {str(out)!r} exists already.",
            "A checkpoint is exported to a new folder.",
            "Choose another name with -o, or remove what is there.",
        )
    opened = open_artifact(artifact)
    job = _Job(opened, open_source(model, opened.manifest))
    staging = StagingFolder(out, _MARKER)
    try:
        size = job.write(staging.path, watch)
        staging.publish(replace=False)
    except BaseException:
        staging.discard()
        raise
    return Exported(
        path=out,
        size_bytes=size,
        dtype=opened.manifest.spec.compute_dtype,
        forms=job.counts(),
        dequantised=tuple(job.dequantised),
        widened=any(form.bits > form.scheme.bits for form in job.modules.values()),
    )


@dataclass(slots=True)
class _Job:
    """One export: what each weight of the program becomes, settled before anything is written."""

    artifact: Artifact
    source: SourceModel
    modules: dict[str, Form] = field(default_factory=dict[str, Form])
    owners: set[str] = field(default_factory=set[str])
    dequantised: list[str] = field(default_factory=list[str])
    pieces: dict[str, list[Piece]] = field(default_factory=dict[str, list[Piece]])
    forms: dict[str, Form] = field(default_factory=dict[str, Form])
    plain: list[str] = field(default_factory=list[str])
    program: Program = field(init=False)
    coded: dict[str, CodedWeight] = field(init=False)

    def __post_init__(self) -> None:
        self.program = portable_program(self.artifact)
        self.coded = coded_weights(self.program)
        for weight in self.coded.values():
            self._settle(weight)
        if not self.modules:
            raise UsageError(
                "export.nothing",
                f"{self.artifact.path.name} holds no quantised linear.",
                "A compressed-tensors checkpoint of it would be the model that it was compiled from.",
                "Use that model, or compile it with --quant.",
            )
        parts = {part for weight in self.coded.values() for part in weight.parts}
        for name in self.program.used_weights():
            if name not in parts and not self.source.layout.is_computed(name):
                self.plain.append(name)
                self.pieces[name] = self._pieces(name)

    def _settle(self, weight: CodedWeight) -> None:
        """Decide what one quantised weight becomes."""
        name, linears = weight.name, self.source.linears
        pieces = self.pieces[name] = self._pieces(name)
        owners = [piece.owner.removesuffix(_WEIGHT) for piece in pieces]
        experts = all(piece.index is not None for piece in pieces)
        are_linears = all(owner in linears.names and owner != linears.head for owner in owners)
        if weight.is_table or not (experts or are_linears):
            self.dequantised += [piece.key for piece in pieces]
            return
        form = form_of(name, weight.scheme, weight.inputs, self._width(name))
        for piece in pieces:
            if not piece.key.endswith(_WEIGHT):
                raise refusal(
                    name, f"is stored as {piece.key!r}, several matrices in one", "experts as values"
                )
            if form.scheme.block_rows and not _cut_between_blocks(piece, form.scheme):
                raise refusal(
                    name, "has blocks of rows that lie in two of the model's weights", "fp8_channel"
                )
            self.modules[piece.key.removesuffix(_WEIGHT)] = form
        self.owners |= set(owners)
        self.forms[name] = form

    def _pieces(self, name: str) -> list[Piece]:
        found = self.source.layout.pieces(name)
        if found is None:
            raise UsageError(
                "export.weight",
                f"The weight {name!r} of the artifact is no tensor of the checkpoint.",
                "It was computed when the model was compiled, in a way that has no inverse here.",
                "Compile with a recipe that leaves such weights as they are.",
            )
        return found

    def _width(self, name: str) -> int:
        return self.source.layout.shapes[self.pieces[name][0].owner][-1]

    def counts(self) -> dict[str, int]:
        """How many modules have each form."""
        names = [form.name for form in self.modules.values()]
        return {name: names.count(name) for name in dict.fromkeys(names)}

    def write(self, folder: Path, watch: Watch) -> int:
        """Write weights, config and tokenizer to `folder`; gives the bytes of the weights."""
        shards = ShardWriter(folder)
        names = [*self.coded, *self.plain]
        written: set[str] = set()
        for done, name in enumerate(names):
            watch(done, len(names), "weights")
            tensors = self._module(self.coded[name]) if name in self.forms else self._values(name)
            for key, tensor in tensors.items():
                shards.add(key, tensor)
            written |= {piece.key for piece in self.pieces[name]}
        for key, tensor in self._unread(written).items():
            shards.add(key, tensor)
        shards.close()
        ignored = [name for name in self.source.linears.names if name not in self.owners]
        dtype = self.artifact.manifest.spec.compute_dtype
        write_config(folder, self.source.checkpoint.raw_config, self.modules, ignored, dtype)
        for entry in self.artifact.manifest.of_kind("tokenizer"):
            (folder / Path(entry.path).name).write_bytes(self.artifact.read_bytes(entry.path))
        return shards.num_bytes

    def _module(self, weight: CodedWeight) -> dict[str, Tensor]:
        """The tensors of the modules whose codes one weight holds."""
        form, stored = self.forms[weight.name], weight.read(self.program)
        name = weight.input_scale
        scale = None if name is None else self.program.weights.evaluate(name)
        found: dict[str, Tensor] = {}
        for piece in self.pieces[weight.name]:
            codes, scales = piece.of(stored.codes), piece.of(stored.scales, form.scheme.block_rows or 1)
            assert codes is not None
            assert scales is not None
            zeros = None if stored.zeros is None else piece.of(stored.zeros)
            tensors = form.tensors(QTensor(codes, scales, zeros), self._width(weight.name), scale)
            found |= {piece.key.removesuffix("weight") + part: tensor for part, tensor in tensors.items()}
        return found

    def _values(self, name: str) -> dict[str, Tensor]:
        """The stored tensors of a weight of values, or of codes that are dequantised."""
        whole = (
            self._dequantised(self.coded[name]) if name in self.coded else self.program.weights.evaluate(name)
        )
        found: dict[str, Tensor] = {}
        for piece in self.pieces[name]:
            rows = piece.of(whole) if whole.dim() else whole
            assert rows is not None
            if piece.key:
                found[piece.key] = rows.clone()
        return found

    def _dequantised(self, weight: CodedWeight) -> Tensor:
        stored, scheme = weight.read(self.program), parse_scheme(weight.scheme)
        dtype = COMPUTE_DTYPES[self.artifact.manifest.spec.compute_dtype]
        width, lead = self._width(weight.name), stored.codes.shape[:-2]
        parts = [None if part is None else part.flatten(0, -3) if lead else part[None] for part in stored]
        codes, scales, zeros = parts
        assert codes is not None
        assert scales is not None
        matrices = [
            dequantize_rows(own, scales[index], None if zeros is None else zeros[index], scheme, width, dtype)
            for index, own in enumerate(codes)
        ]
        return torch.stack(matrices) if lead else matrices[0]

    def _unread(self, written: set[str]) -> dict[str, Tensor]:
        """Tensors of the model that the program does not read, as the checkpoint has them."""
        dtype, reader = COMPUTE_DTYPES[self.artifact.manifest.spec.compute_dtype], Reader()
        layout, found = self.source.layout, dict[str, Tensor]()
        for name, places in layout.places.items():
            if name in self.source.ties:
                continue
            for key in {place.key for place in places or ()} - written:
                value = self.source.stored[key].evaluate(reader)
                found[key] = value.to(dtype) if value.is_floating_point() else value
        return found


def _cut_between_blocks(piece: Piece, scheme: QuantScheme) -> bool:
    """Whether the blocks of a piece's rows are its own."""
    rows = piece.ranges[-1][1]
    lines = torch.empty(math.ceil(rows / scheme.block_rows), 0)
    own = Piece(piece.key, piece.owner, None, piece.ranges)
    return own.of(lines, scheme.block_rows) is not None
