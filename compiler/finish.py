"""What an artifact holds beside programs and weights: tokenizer, oracle, report, manifest."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

from .. import __version__
from ..artifact.checksums import sha256_of
from ..artifact.oracle import write_oracle
from ..artifact.reader import Artifact
from ..artifact.schema import (
    REPORT,
    REPORT_PAGE,
    TOKENIZER_FOLDER,
    Manifest,
    Provenance,
    Recipe,
    RecipeStep,
    SourceFile,
)
from ..artifact.writer import ArtifactWriter
from ..codegen.base import backend_for
from ..ir.program import Program
from ..ir.weights import Reader, WeightStore
from ..ir.widened import widened
from ..passes.base import option_values
from ..passes.calibration import Calibration
from ..passes.probe import logits_of
from ..runtime.tokenizer import Tokenizer
from ..spec.errors import InternalError
from .checkpoint import Checkpoint
from .ledger import Ledger
from .library_check import check_libraries
from .onnx_check import Judged, check_graph
from .oracle import make_oracle
from .page.report_page import report_page
from .pipeline import Compiled, is_small
from .quality import Quality, check_quality, compare, probe_prompts
from .report import encode_report, report_data
from .request import CompileRequest
from .source import source_name

_TOOLS = ("torch", "transformers", "safetensors")


def finish_artifact(
    request: CompileRequest,
    checkpoint: Checkpoint,
    compiled: Compiled,
    writer: ArtifactWriter,
    ledger: Ledger,
    *,
    calibration: Calibration | None = None,
) -> Quality:
    """Write everything that a backend leaves to the driver, and say how good the compiled model is.

    Quality and oracle are measured on the files as written, so that what is judged is what ships. Of a large
    model the quality is that of the portable program, which takes one step where the final one takes
    several; what the lay-out stage adds is exact, and in the oracle. For a target that computes in float32
    whatever the checkpoint's dtype is, all programs do.
    """
    shown = widened if request.parsed_target.kind == "onnx" else _as_it_is
    for file in checkpoint.tokenizer.files:
        writer.copy_file(f"{TOKENIZER_FOLDER}/{file.name}", "tokenizer", file)
    tokenizer = Tokenizer.from_folder(checkpoint.folder)
    preview = writer.preview(make_manifest(request, checkpoint, compiled, hashed=False))
    with ledger.stage("measure quality"):
        prompts = probe_prompts(tokenizer, compiled.bound)
        judged = compiled.final if is_small(compiled.bound) else compiled.portable
        written = shown(as_written(judged, preview))
        seen = Judged(prompts, logits_of(shown(compiled.bound), prompts), logits_of(written, prompts))
        quality = compare(seen.original, seen.compiled, prompts)
        check_quality(quality, request.kl_limit())
        compiled.bound.weights.reader.close()
    with ledger.stage("make the oracle"):
        oracle = make_oracle(shown(as_written(compiled.final, preview)), tokenizer.encode)
        write_oracle(writer, oracle)
    if preview.manifest.target.kind == "cpu":
        with ledger.stage("check the libraries"):
            check_libraries(writer.preview(preview.manifest), oracle)
    backend = None
    if preview.manifest.target.kind == "onnx":
        with ledger.stage("check the graph"):
            backend = check_graph(writer.preview(preview.manifest), oracle, seen)
    report = report_data(
        compiled.final,
        recipe=compiled.pipeline.name,
        verify=request.verify,
        quality=quality,
        calibration=calibration,
        backend=backend,
    )
    writer.write_bytes(REPORT, "report", encode_report(report))
    title = f"{source_name(request.model)}, {compiled.pipeline.name}, for {request.parsed_target.name}"
    writer.write_bytes(REPORT_PAGE, "report", report_page(report, title))
    return quality


def _as_it_is(program: Program) -> Program:
    return program


def as_written(program: Program, artifact: Artifact) -> Program:
    """`program` with every weight read from the files of `artifact`, mapped."""
    stored = backend_for(artifact.manifest.target).stored_weights(artifact)
    entries = {name: expr for name, expr in stored.items() if name in program.weights}
    missing = [name for name in program.used_weights() if name not in entries]
    if missing:
        raise InternalError(
            "compile.unwritten_weight",
            f"The weight {missing[0]!r} was not written.",
            f"The backend wrote {len(entries)} weights and the program reads {len(missing)} more.",
            "Report this with the command that led to it.",
        )
    return program.replace(weights=WeightStore(entries, program.weights.ties, Reader()))


def make_manifest(
    request: CompileRequest, checkpoint: Checkpoint, compiled: Compiled, *, hashed: bool = True
) -> Manifest:
    """The manifest without its list of files; `hashed` says whether source files are hashed, which takes
    as long as reading them."""
    final = compiled.final
    if final.cache is None:
        raise InternalError(
            "compile.no_cache_layout",
            "The compiled program has no cache layout.",
            "The recipe ran without the pass that makes one.",
            "Add `kv_layout` and `paged_attention` to the recipe.",
        )
    steps = tuple(
        RecipeStep(name=pass_.name, options=option_values(pass_)) for pass_ in compiled.pipeline.passes
    )
    return Manifest(
        provenance=_provenance(request, checkpoint, hashed),
        spec=final.spec,
        recipe=Recipe(name=compiled.pipeline.name, steps=steps),
        target=request.parsed_target,
        cache=final.cache,
        memory=final.memory,
        capture=final.capture,
        history=final.history,
    )


def _provenance(request: CompileRequest, checkpoint: Checkpoint, hashed: bool) -> Provenance:
    weights = {tensor.path for tensor in checkpoint.tensors.values()}
    files = sorted({checkpoint.folder / "config.json", *checkpoint.tokenizer.files, *weights})
    return Provenance(
        model=source_name(request.model),
        llmc_version=__version__,
        files=tuple(_source_files(files)) if hashed else (),
        tools={name: metadata.version(name) for name in _TOOLS},
    )


def _source_files(paths: Iterable[Path]) -> Iterable[SourceFile]:
    ordered = list(paths)
    with ThreadPoolExecutor(thread_name_prefix="llmc-hash") as pool:
        for path, digest in zip(ordered, pool.map(sha256_of, ordered), strict=True):
            yield SourceFile(name=path.name, size_bytes=path.stat().st_size, sha256=digest)
