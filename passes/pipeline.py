"""The default pipeline as a table of contents: which passes stand in which stage, in which order."""

from __future__ import annotations

from .base import Pass
from .canonical import canonical_passes
from .cuda_graph import CudaGraph
from .fuse_add_norm import FuseAddNorm
from .fuse_gate_up import FuseGateUp
from .fuse_qkv import FuseQkv
from .fuse_rope_cache import FuseRopeCache
from .kv_layout import KvLayout
from .memory_plan import PlanMemory
from .narrow_rows import NarrowRows
from .paged_attention import PagedAttention
from .quantize.awq import Awq
from .quantize.fp8 import Fp8
from .quantize.gptq import Gptq
from .quantize.keep_codes import KeepCodes
from .quantize.mixed_precision import MixedPrecision
from .quantize.rotate import Rotate
from .quantize.round_inputs import RoundInputs
from .quantize.rtn import Rtn
from .quantize.scale_search import ScaleSearch
from .quantize.smooth import Smooth
from .select_kernels import SelectKernels


def canonicalise() -> tuple[Pass, ...]:
    """From the traced graph to the vocabulary that all later passes look for."""
    return canonical_passes()


def fuse() -> tuple[Pass, ...]:
    """Fewer, larger operators. None of these must match: a model may have no gate and no bias."""
    return (
        # projections of one input become one product
        FuseQkv(),
        FuseGateUp(),
        # the residual stream is read once where it is added to and normalised
        FuseAddNorm(),
    )


def keep() -> tuple[Pass, ...]:
    """What is quantised in the checkpoint stays as it is."""
    return (KeepCodes(),)


def round_searched(bits: int, group_size: int) -> tuple[Pass, ...]:
    """Weights to codes on scales that are searched for by the weights alone; head and embedding stay at 8
    bits, which costs little and keeps the ranking."""
    return (ScaleSearch(bits=bits, group_size=group_size, data=False, expect=1),)


def round_calibrated(
    bits: int,
    group_size: int,
    *,
    symmetric: bool = True,
    rounds: int = 2,
    growth: float = 0.0,
    epochs: int = 2,
    work: float = 4.0,
) -> tuple[Pass, ...]:
    """The same by what calibration tokens bring to each layer, then, where `work` allows, by the logits, with
    `growth` more bytes where they help most."""
    return (
        # outliers of inputs are moved out of the way where there are any
        Awq(bits=bits, group_size=group_size, symmetric=symmetric),
        Gptq(
            bits=bits,
            group_size=group_size,
            symmetric=symmetric,
            rounds=rounds,
            growth=growth,
            epochs=epochs,
            work=work,
            expect=1,
        ),
    )


def round_within(budget: float) -> tuple[Pass, ...]:
    """The same with a scheme for each weight, so that all take `budget` bits on average."""
    return (MixedPrecision(budget=budget, expect=1),)


def round_sensitive(enough: float) -> tuple[Pass, ...]:
    """The same with 4 bits or 8 for each weight, so that all change the output by about `enough` nats, and
    longest learning."""
    return (
        Awq(bits=4, group_size=32, symmetric=False),
        MixedPrecision(
            budget=0.0,
            enough=enough,
            schemes="int4_g32_asym, int8_g128, int8_g32",
            rounds=6,
            epochs=4,
            work=200.0,
            expect=1,
        ),
    )


def round_to_fp8() -> tuple[Pass, ...]:
    """Weights and the inputs of their products to 8-bit floats."""
    return (Fp8(expect=1),)


def round_both_to_int8() -> tuple[Pass, ...]:
    """Weights by row and inputs by token to 8-bit integers, outliers of the inputs moved to the weights."""
    return (
        Smooth(),
        Rtn(bits=8, group_size=0, head_bits=8, embedding_bits=8, expect=1),
        RoundInputs(scheme="int8_token", expect=1),
    )


def layout() -> tuple[Pass, ...]:
    """From whole sequences to a paged cache: what a server runs."""
    return (
        KvLayout(expect=1),
        PagedAttention(expect=1),
        # needs the cache writes that the pass before makes
        FuseRopeCache(),
        # a prompt's tokens end with their keys and values, but for the last
        NarrowRows(),
    )


def plan() -> tuple[Pass, ...]:
    """By which kernels the finished program runs, and what it will need."""
    return (SelectKernels(), PlanMemory(), CudaGraph())


def _quantisers() -> tuple[Pass, ...]:
    integers = (Awq(), Rtn(), *round_searched(4, 32), Gptq())
    return (Rotate(), Smooth(), *integers, *round_within(4.5), *round_to_fp8(), RoundInputs())


# Every pass of llmc, in the order above.
BUILT_IN: tuple[type[Pass], ...] = tuple(
    type(pass_) for pass_ in (*canonicalise(), *fuse(), *keep(), *_quantisers(), *layout(), *plan())
)
