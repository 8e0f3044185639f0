"""What a test gives requests: drafts that it knows to be right or wrong, and a form of answers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class Knowing:
    """Drafts what `answers` say by request; of a text of even length the second draft is wrong."""

    answers: list[list[int]]
    is_free = True

    def propose(self, requests, k):
        drafts = {}
        for request in requests:
            done = len(request.token_ids) - len(request.request.prompt_token_ids)
            draft = self.answers[request.request.request_id][done : done + k]
            if len(request.token_ids) % 2 == 0 and len(draft) > 1:
                draft[1] ^= 1
            drafts[request] = tuple(draft)
        return drafts

    def forget(self, request_id):
        pass


@dataclass
class Even:
    """Answers of tokens with even ids, as a grammar and as its own state."""

    is_over: bool = False
    error: str | None = None

    def start(self):
        return Even()

    def fill(self, mask, draft_ids=()):
        mask[:] = np.uint32(0x55555555)

    def count_allowed(self, draft_ids):
        return next((i for i, token in enumerate(draft_ids) if token % 2), len(draft_ids))

    def accept(self, token_id):
        assert token_id % 2 == 0
