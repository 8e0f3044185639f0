"""kill -9 in the middle of streams: clients see a broken stream, and a new server on the same artifact says
what the first one would have said."""

from __future__ import annotations

import hashlib
import threading

import httpx2 as httpx
import pytest

pytestmark = pytest.mark.slow

ASK = {"prompt": "Once upon a time", "max_tokens": 200, "temperature": 1, "seed": 11, "ignore_eos": True}


def fingerprint(folder):
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


def test_nothing_is_left_broken(judged, serve_judged):
    before = fingerprint(judged)
    url, process = serve_judged()
    expected = httpx.post(f"{url}/v1/completions", json=ASK, timeout=120).json()["choices"][0]["text"]
    begun = threading.Barrier(5)
    ends: list[str] = []

    def read():
        text = ""
        try:
            with httpx.stream(
                "POST", f"{url}/v1/completions", json={**ASK, "stream": True}, timeout=60
            ) as got:
                for number, line in enumerate(got.iter_lines()):
                    text += line
                    if number == 2:
                        begun.wait(60)
        except httpx.HTTPError as error:
            text += type(error).__name__
        ends.append(text)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    begun.wait(60)
    process.kill()
    process.wait(30)
    for thread in threads:
        thread.join(60)
    assert len(ends) == 4
    assert all(not text.endswith("[DONE]") and "Error" in text for text in ends)
    assert fingerprint(judged) == before
    url, _ = serve_judged()
    again = httpx.post(f"{url}/v1/completions", json=ASK, timeout=120).json()["choices"][0]["text"]
    assert again == expected
