"""Plans made by the last passes and obeyed by executors: memory today, captures for graph targets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferSlot:
    """Where one intermediate value lives in the activation arena.

    Bytes are for `MemoryPlan.max_tokens` rows. `first` and `last` are node indexes of its life.
    """

    value: str
    offset_bytes: int
    size_bytes: int
    first: int
    last: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes an executor will need, known before anything is loaded.

    `max_tokens` is the row budget of one step the arena was sized for;
    `cache_bytes_per_token` covers all groups; `arena` is in order of first use.
    """

    weight_bytes: int
    activation_bytes: int
    activation_bytes_unshared: int
    max_tokens: int
    max_rows: int
    cache_bytes_per_token: int
    arena: tuple[BufferSlot, ...] = ()

    def cache_tokens_within(self, total_bytes: int) -> int:
        """How many cached tokens fit in `total_bytes` beside weights and activations (0 if none)."""
        left = total_bytes - self.weight_bytes - self.activation_bytes
        return max(0, left // self.cache_bytes_per_token) if self.cache_bytes_per_token else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CapturePlan:
    """Numbers of rows, a row being a token of a sequence, for which a graph target records one replayable
    step, fewest first.

    Those of `at_load` are recorded when the artifact is loaded, in about `seconds` and while less than
    `load_seconds` have passed, others when they are first wanted. A step enqueues about `num_launches`
    kernels. In a recorded step each token attends by itself; where tokens of one sequence would read more
    than `keys_read_again` cached tokens again for that, launching the step is faster.
    """

    decode_rows: tuple[int, ...]
    at_load: tuple[int, ...] = ()
    num_launches: int = 0
    seconds: float = 0.0
    load_seconds: float = 1.0
    keys_read_again: int = 0
