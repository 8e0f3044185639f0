"""What the jobs of one row have in common, in the layout of a job. Knows requests; no steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .cpu_library import SAMPLE_JOB
from .rows import Row

_COPIED = (
    "temperature",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "min_p",
    "top_p",
    "seed",
    "top_k",
    "min_tokens",
)


class RowState:
    """The part of a row's jobs that does not change, and its tokens where penalties read them. `template` is
    that part as the bytes of a job: joining arrays would promote each field of each of them."""

    def __init__(self, row: Row) -> None:
        sampling = row.entry.sampling
        self._banned = np.asarray(sampling.banned_until_min, np.int64)
        self._bias_ids = np.asarray([token for token, _ in sampling.logit_bias], np.int64)
        self._biases = np.asarray([bias for _, bias in sampling.logit_bias], np.float32)
        self._tokens = np.empty(0, np.int64)
        self._num_tokens = 0
        self._reads_tokens = (
            sampling.repetition_penalty != 1.0
            or sampling.presence_penalty != 0.0
            or sampling.frequency_penalty != 0.0
        )
        self.wants_logprob = sampling.logprobs is not None
        self.num_top = sampling.logprobs or 0
        self._job = np.zeros(1, SAMPLE_JOB)
        for name in _COPIED:
            self._job[name] = getattr(sampling, name)
        self._job["known"] = -1
        self._job["num_prompt_tokens"] = row.entry.num_prompt_tokens
        self._job["banned"], self._job["num_banned"] = self._banned.ctypes.data, len(self._banned)
        self._job["bias_ids"], self._job["biases"] = self._bias_ids.ctypes.data, self._biases.ctypes.data
        self._job["num_biases"] = len(self._biases)
        self._job["num_top"] = self.num_top
        self.template = self._job.tobytes()

    def hold(
        self, token_ids: Sequence[int], num_known: int, draft_ids: Sequence[int], num_later: int
    ) -> None:
        """Brings the tokens up to `token_ids`, of which the first `num_known` stay as they are, and then
        `draft_ids`, with room for `num_later` more behind."""
        if not self._reads_tokens:
            return
        length = len(token_ids) + len(draft_ids)
        if length + num_later > len(self._tokens):
            grown = np.empty(2 * (length + num_later), np.int64)
            grown[: self._num_tokens] = self._tokens[: self._num_tokens]
            self._tokens = grown
            self._job["tokens"] = grown.ctypes.data
            self.template = self._job.tobytes()
        self._tokens[self._num_tokens : length] = [*token_ids[self._num_tokens :], *draft_ids]
        self._num_tokens = num_known
