"""Shares of clients by what they were served: virtual token counters (Sheng et al. 2024, "Fairness in Serving
Large Language Models"). Arithmetic over keys; knows no queue and no pages."""

from __future__ import annotations

from collections import Counter


class FairShare:
    """A counter of served tokens for each key: `prompt_weight` for a computed prompt token, `output_weight`
    for a generated one. The key with the lowest counter among those that wait is admitted next.

    A key that begins to wait is lifted to the lowest counter of those that wait already, or, when none does,
    to that of the key that waited last: nobody saves up credit while idle. So the counters of two keys that
    both wait differ by at most prompt_weight · L + output_weight · M, where L is the longest prompt and M
    the most tokens that running requests may still generate together; what two keys are served while both
    wait differs by at most twice that (theorem 4.4 of the paper).
    """

    def __init__(self, prompt_weight: float, output_weight: float) -> None:
        self.prompt_weight = prompt_weight
        self.output_weight = output_weight
        self._served: dict[str, float] = {}
        self._waiting: Counter[str] = Counter()
        self._last_waiting = ""

    def served(self, key: str) -> float:
        """The counter of `key`."""
        return self._served.get(key, 0.0)

    def arrive(self, key: str) -> None:
        """A new request of `key` begins to wait."""
        if key not in self._waiting:
            floor = min(map(self.served, self._waiting or (self._last_waiting,)))
            self._served[key] = max(self.served(key), floor)
        self._waiting[key] += 1

    def leave(self, key: str) -> None:
        """A request of `key` that never ran waits no more."""
        self._waiting[key] -= 1
        if not self._waiting[key]:
            del self._waiting[key]
            self._last_waiting = key

    def admit(self, key: str, num_tokens: int) -> None:
        """A request of `key` starts for the first time, with `num_tokens` of its prompt to compute."""
        self._served[key] = self.served(key) + self.prompt_weight * num_tokens
        self.leave(key)

    def generate(self, key: str, num_tokens: int) -> None:
        """`num_tokens` more tokens were generated for `key`."""
        self._served[key] = self.served(key) + self.output_weight * num_tokens
