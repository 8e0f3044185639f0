"""The ONNX backend: weights in files that graphs point into, a graph for ONNX Runtime GenAI, one for llmc."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from importlib import metadata

from ...artifact.onnx import (
    GENAI_CONFIG,
    ONNX_ENGINE,
    ONNX_MODEL,
    ONNX_UNIT,
    OnnxCache,
    OnnxUnit,
    decode_onnx_unit,
    encode_onnx_unit,
)
from ...artifact.reader import Artifact
from ...artifact.tensors import locate_tensors
from ...artifact.writer import ArtifactWriter
from ...ir.program import Program
from ...ir.weights import Expr, WeightStore
from ...spec.errors import TargetError
from ...spec.target import Target
from ..base import RecallBytes, compute_bytes
from ..programs import WeightProgress, shared_weights, stored_sources, write_programs, write_weights
from .forms import chosen_activations, portable_entries, stored_forms, stored_store
from .genai import genai_config, genai_problem
from .graph import IR_VERSION, OPSET, StoredTensor
from .lowered import Export, cache_widths, lower, serialize
from .mixtures import mixture_notes
from .options import OnnxOptions
from .stored import StoredWeights

# Programs, graphs, tokenizer and manifest beside the weights, generously.
_BESIDE_WEIGHTS_BYTES = 64 * 2**20


class Backend:
    """`codegen.base.Backend` of target kind `onnx`."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.options = OnnxOptions.of(target)

    def estimate_bytes(self, program: Program, portable: Program) -> int:
        """Bytes of all weights as stored, and a bound for the rest.

        Raises TargetError for what ONNX cannot hold: an operator, a scheme, a dtype of the cache.
        """
        _check_cache(program)
        forms = stored_forms(portable, self.options.contrib)
        store = stored_store(shared_weights(program, portable), forms)
        nowhere = {name: StoredTensor("", 0, store.num_bytes(name)) for name in store}
        lower(
            portable,
            StoredWeights(store, nowhere),
            Export(contrib=self.options.contrib, activations=chosen_activations(program)),
            {},
        )
        return store.total_bytes + _BESIDE_WEIGHTS_BYTES

    def stored_form(self, program: Program, portable: Program) -> WeightStore:
        """The weights of both programs, codes and zero points as ONNX operators take them."""
        return stored_store(shared_weights(program, portable), stored_forms(portable, self.options.contrib))

    def emit(
        self,
        program: Program,
        portable: Program,
        writer: ArtifactWriter,
        progress: Callable[[WeightProgress], None] | None = None,
        cache: RecallBytes = compute_bytes,
    ) -> None:
        """Write programs, weights, both graphs and GenAI's settings.

        Raises TargetError naming the operator, scheme or dtype that ONNX cannot hold.
        """
        _check_cache(program)
        contrib = self.options.contrib
        forms = stored_forms(portable, contrib)
        store = stored_store(shared_weights(program, portable), forms)
        write_programs(program, portable, writer)
        write_weights(store, writer, self.options.file_bytes, progress)
        stored = StoredWeights(store, _places(writer))
        facts = _facts(portable, self.target)
        operators: dict[str, int] = {}
        for path, logits in ((ONNX_MODEL, self.options.logits), (ONNX_ENGINE, "rows")):
            model = lower(
                portable,
                stored,
                Export(contrib=contrib, logits=logits, activations=chosen_activations(program)),
                facts,
            )
            operators = dict(sorted(Counter(node.op_type for node in model.graph).items()))
            writer.write_bytes(path, "kernel", serialize(model))
        unit = OnnxUnit(
            opset=OPSET,
            ir_version=IR_VERSION,
            operators=operators,
            notes=mixture_notes(portable) if contrib else (),
            genai_problem=genai_problem(portable.spec),
            in_place=contrib,
            caches=tuple(OnnxCache(**cache) for cache in cache_widths(portable.spec, contrib)),
            forms=forms,
        )
        writer.write_bytes(ONNX_UNIT, "kernel", encode_onnx_unit(unit))
        if not unit.genai_problem:
            writer.write_bytes(GENAI_CONFIG, "kernel", genai_config(portable.spec, unit))

    def stored_weights(self, artifact: Artifact) -> Mapping[str, Expr]:
        """The tensors of the files, codes and zero points in the portable packing."""
        unit = decode_onnx_unit(artifact.read_bytes(ONNX_UNIT))
        return portable_entries(stored_sources(artifact), unit.forms)


def _places(writer: ArtifactWriter) -> dict[str, StoredTensor]:
    """Where every weight written so far lies."""
    return {
        name: StoredTensor(entry.path, offset, length)
        for entry in writer.entries
        if entry.kind == "weights"
        for name, (offset, length) in locate_tensors(writer.folder / entry.path).items()
    }


def _facts(program: Program, target: Target) -> dict[str, str]:
    """What the model file says about itself: the same whenever and wherever it is made."""
    spec = program.spec
    return {
        "llmc.architecture": spec.architecture,
        "llmc.compute_dtype": spec.compute_dtype,
        "llmc.family": spec.family,
        "llmc.max_context": str(spec.max_context),
        "llmc.passes": ", ".join(record.name for record in program.history),
        "llmc.recipe": json.dumps(
            [{"name": record.name, "options": record.options} for record in program.history], sort_keys=True
        ),
        "llmc.target": target.name,
        "llmc.onnx_ir": metadata.version("onnx-ir"),
        **{f"llmc.option.{name}": str(value).lower() for name, value in target.options.items()},
        **{f"llmc.choice.{name}": value for name, value in spec.choices.items()},
    }


def _check_cache(program: Program) -> None:
    dtypes = {group.dtype for group in program.cache.groups} if program.cache is not None else set[str]()
    if dtypes - {"float32"}:
        raise TargetError(
            "onnx.cache_dtype",
            f"The ONNX target cannot keep the KV cache in {', '.join(sorted(dtypes - {'float32'}))}.",
            "Its graphs compute in float32 and keep K and V as they are.",
            "Leave out --kv-dtype, or say float32.",
        )
