"""Clients that behave like the public: they ask for all kinds of things, some wrong, and some leave early.
Each visit has exactly one ending, or is counted as having none."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

PATIENCE_S = 60.0
MEAN_PAUSE_S = 0.02
CHOICES = (["yes", "no"], ["red", "green", "blue"])
KINDS = {"whole": 30, "stream": 30, "leave": 15, "leave_at_once": 8, "half_body": 5, "late": 6, "wrong": 6}
WRONG = ({"temperature": -1}, {"mood": 1}, {"max_tokens": 10**6}, {"prompt": [10**9]}, {"n": 0})


@dataclass(slots=True)
class Endings:
    """How visits ended. `odd` keeps the first few that should not have ended so."""

    counts: Counter[str] = field(default_factory=Counter[str])
    odd: list[str] = field(default_factory=list[str])

    def add(self, kind: str, ending: str, detail: str = "") -> None:
        self.counts[ending] += 1
        if ending in ("none", "unexpected") and len(self.odd) < 10:
            self.odd.append(f"{kind}: {detail[-300:]}")


class Visitor:
    """One client, again and again until `stop`, with `pause_s` between visits on the average."""

    def __init__(
        self, port: int, vocab_size: int, seed: int, endings: Endings, pause_s: float = MEAN_PAUSE_S
    ) -> None:
        self._port = port
        self._vocab_size = vocab_size
        self._random = random.Random(seed)
        self._endings = endings
        self._pause_s = pause_s

    async def run(self, stop: asyncio.Event) -> None:
        """Visits until told to stop; the last visit is brought to its ending."""
        while not stop.is_set():
            kind = self._random.choices(list(KINDS), list(KINDS.values()))[0]
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await self._visit(kind)
            except TimeoutError:
                self._endings.add(kind, "none", f"nothing came for {PATIENCE_S:.0f} s")
            except OSError as error:
                self._endings.add(kind, "none", f"{type(error).__name__}: {error}")
            await asyncio.sleep(self._random.expovariate(1 / self._pause_s))

    async def _visit(self, kind: str) -> None:
        fields = self._fields(kind)
        body = json.dumps(fields).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            head = ("POST /v1/completions HTTP/1.1", "Host: x", "Connection: close")
            writer.write("\r\n".join((*head, f"Content-Length: {len(body)}", "", "")).encode())
            writer.write(body[: len(body) // 2] if kind == "half_body" else body)
            await writer.drain()
            if kind in ("leave_at_once", "half_body"):
                await asyncio.sleep(self._random.random() * 0.05)
                self._endings.add(kind, "left")
                return
            if kind == "leave":
                with contextlib.suppress(asyncio.IncompleteReadError):
                    await reader.readexactly(self._random.randrange(1, 4000))
                self._endings.add(kind, "left")
                return
            answer = await reader.read(-1)
        finally:
            writer.transport.abort() if kind != "whole" else writer.close()
        ending = ending_of(kind, fields, answer)
        self._endings.add(kind, ending, answer.decode(errors="replace"))

    def _fields(self, kind: str) -> dict[str, Any]:
        """A random request. Few distinct beginnings and seeds, so that caches are hit."""
        draw = self._random
        start = [draw.randrange(3)] * 16
        prompt = start + [draw.randrange(self._vocab_size) for _ in range(draw.choice((1, 2, 30, 70)))]
        if draw.random() < 0.3:
            prompt = [draw.randrange(3), 5, 7]
        fields: dict[str, Any] = {
            "prompt": prompt,
            "max_tokens": draw.choice((1, 4, 12, 40)),
            "temperature": draw.choice((0, 0.8)),
            "n": draw.choice((1, 1, 1, 2, 3)),
            "stream": kind in ("stream", "leave") or (kind == "late" and draw.random() < 0.5),
        }
        if draw.random() < 0.5:
            fields["seed"] = draw.randrange(4)
        if draw.random() < 0.2:
            fields["logprobs"] = 2
        if draw.random() < 0.2:
            fields["stop"] = ["e", "the"]
        if draw.random() < 0.1:
            fields["guided_choice"] = draw.choice(CHOICES)
        if kind == "late":
            fields["timeout_s"] = draw.choice((0.0001, 0.01))
        if kind == "wrong":
            fields |= draw.choice(WRONG)
        return fields


def ending_of(kind: str, fields: dict[str, Any], answer: bytes) -> str:
    """`answered`, `refused`, `late`, or what must not be: `unexpected`, or `none` where it is cut short."""
    head, _, body = answer.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 ") or not body:
        return "none"
    status = int(head[9:12])
    if status == 503:
        return "refused" if b"retry-after:" in head.lower() else "unexpected"
    if kind == "wrong":
        return "refused" if status == 400 else "unexpected"
    if kind == "late" and (status == 504 or b'"request.timeout"' in body):
        return "late"
    if status != 200 or b'"error"' in body:
        return "unexpected"
    num_ends = body.count(b'"finish_reason":"')
    is_whole = num_ends == fields["n"] and (b"data: [DONE]" in body or not fields["stream"])
    return "answered" if is_whole else "none"
