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

    Counters that can decide nothing any more are forgotten. What a key is lifted to never falls, for whoever
    begins to wait is lifted to it, and whoever stops only raises it. So a key without live requests whose
    counter is no higher will be lifted past it when it comes back, forgotten or not.
    """

    def __init__(self, prompt_weight: float, output_weight: float, num_kept: int = 64) -> None:
        self.prompt_weight = prompt_weight
        self.output_weight = output_weight
        self._served: dict[str, float] = {}
        self._waiting: Counter[str] = Counter()
        self._live: Counter[str] = Counter()
        self._last_waiting = ""
        self._num_kept = self._most = num_kept

    @property
    def num_counters(self) -> int:
        """How many keys have a counter."""
        return len(self._served)

    def served(self, key: str) -> float:
        """The counter of `key`."""
        return self._served.get(key, 0.0)

    def arrive(self, key: str) -> None:
        """A new request of `key` begins to wait."""
        if key not in self._waiting:
            self._served[key] = max(self.served(key), self._floor())
        self._waiting[key] += 1
        self._live[key] += 1

    def leave(self, key: str) -> None:
        """A request of `key` waits no more."""
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

    def end(self, key: str) -> None:
        """A request of `key`, which waits no more, ended: nothing more is generated for it."""
        self._live[key] -= 1
        if not self._live[key]:
            del self._live[key]
        if len(self._served) > self._most:
            self._forget()

    def _floor(self) -> float:
        """What a key that begins to wait is lifted to."""
        return min(map(self.served, self._waiting or (self._last_waiting,)))

    def _forget(self) -> None:
        """Drops the counters that can decide nothing. Waits until there are twice those left, so that each
        ending pays for a few keys only."""
        floor = self._floor()
        kept = {*self._live, self._last_waiting}
        self._served = {
            key: counter for key, counter in self._served.items() if counter > floor or key in kept
        }
        self._most = max(self._num_kept, 2 * len(self._served))
