"""One streamed request over a socket, with the times that measures are made of. Written on asyncio alone, so
that a client costs as little as it can."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import msgspec

from ...spec.errors import UsageError
from .workload import Ask


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """A server's address up to and without /v1, the model's name there, and a key."""

    url: str
    model: str
    api_key: str | None = None
    ignore_eos: bool = True

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(
                "bench.url",
                f"{self.url!r} is not the address of a server.",
                "An address begins with http:// or https:// and names a host.",
                "Give for example http://127.0.0.1:8000.",
            )


@dataclass(slots=True, kw_only=True)
class Sample:
    """What became of one request. Seconds since the run's start: when it was due, when it was sent, when
    each of its events came. `error` is set where it did not end well; `status` is HTTP's, 0 without one;
    `retry_after_s` is what a refusal advised."""

    scheduled_s: float
    sent_s: float = 0.0
    event_s: list[float] = field(default_factory=list[float])
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    status: int = 0
    retry_after_s: float | None = None
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        return self.event_s[0] - self.sent_s

    @property
    def e2e_s(self) -> float:
        return self.event_s[-1] - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """None with fewer than two tokens."""
        if self.num_output_tokens < 2:
            return None
        return (self.e2e_s - self.ttft_s) / (self.num_output_tokens - 1)


class _Details(msgspec.Struct):
    cached_tokens: int = 0


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Choice(msgspec.Struct):
    text: str = ""
    finish_reason: str | None = None


class _Failure(msgspec.Struct):
    message: str = ""


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: _Failure | None = None


_EVENTS = msgspec.json.Decoder(_Event)


async def send(endpoint: Endpoint, ask: Ask, started_s: float, timeout_s: float = 600.0) -> Sample:
    """Sends a request and reads its stream to the end. Never raises for what a server or network does: that
    is the sample's error. Times count from `started_s` of time.perf_counter."""
    sample = Sample(scheduled_s=ask.at_s)
    try:
        async with asyncio.timeout(timeout_s):
            await _exchange(endpoint, ask, started_s, sample)
    except TimeoutError:
        sample.error = f"no end after {timeout_s:g} s"
    except (OSError, EOFError, ValueError) as error:
        sample.error = f"{type(error).__name__}: {error}"
    if sample.error is None and not sample.event_s:
        sample.error = "the stream held no events"
    return sample


async def _exchange(endpoint: Endpoint, ask: Ask, started_s: float, sample: Sample) -> None:
    parts = urlsplit(endpoint.url)
    tls = ssl.create_default_context() if parts.scheme == "https" else None
    port = parts.port or (443 if tls else 80)
    sample.sent_s = time.perf_counter() - started_s
    reader, writer = await asyncio.open_connection(parts.hostname, port, ssl=tls)
    try:
        writer.write(_request(endpoint, ask, parts.path.rstrip("/"), parts.netloc))
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        sample.status = int(head.split(" ", 2)[1])
        _, found, advice = head.partition("\r\nretry-after: ")
        sample.retry_after_s = float(advice.split("\r\n")[0]) if found else None
        body = _chunks(reader) if "transfer-encoding: chunked" in head else _rest(reader)
        if sample.status != 200:
            text = b"".join([part async for part in body])
            sample.error = f"status {sample.status}: {text[:200].decode(errors='replace')}"
            return
        await _read_events(body, started_s, sample)
    finally:
        writer.close()


def _request(endpoint: Endpoint, ask: Ask, path: str, host: str) -> bytes:
    body = msgspec.json.encode(
        {
            "model": endpoint.model,
            "prompt": ask.prompt,
            "max_tokens": ask.num_output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"ignore_eos": True} if endpoint.ignore_eos else {}),
        }
    )
    lines = [
        f"POST {path}/v1/completions HTTP/1.1",
        f"Host: {host}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Connection: close",
    ]
    if endpoint.api_key is not None:
        lines.append(f"Authorization: Bearer {endpoint.api_key}")
    return "\r\n".join([*lines, "", ""]).encode() + body


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := int((await reader.readline()).split(b";")[0], 16):
        yield (await reader.readexactly(size + 2))[:-2]


async def _rest(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while part := await reader.read(65536):
        yield part


async def _read_events(body: AsyncIterator[bytes], started_s: float, sample: Sample) -> None:
    """Counts events and notes when they came; the usage tells the tokens."""
    buffer = b""
    num_events = 0
    is_done = False
    async for part in body:
        now_s = time.perf_counter() - started_s
        *events, buffer = (buffer + part).split(b"\n\n")
        for event in events:
            data = event.removeprefix(b"data:").strip()
            if data == b"[DONE]":
                is_done = True
                continue
            if not data.startswith(b"{"):
                continue
            told = _EVENTS.decode(data)
            if told.error is not None:
                sample.error = told.error.message or "an error without words"
                return
            if told.choices:
                num_events += 1
                sample.event_s.append(now_s)
            if told.usage is not None:
                _note_usage(sample, told.usage)
    sample.num_output_tokens = sample.num_output_tokens or num_events
    if not is_done:
        sample.error = "the stream broke off"


def _note_usage(sample: Sample, usage: _Usage) -> None:
    sample.num_prompt_tokens = usage.prompt_tokens
    sample.num_output_tokens = usage.completion_tokens
    if usage.prompt_tokens_details is not None:
        sample.num_cached_tokens = usage.prompt_tokens_details.cached_tokens
