"""The status page: its numbers, and what a browser makes of them, wide and narrow, light and dark."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import threading
import time
import zlib

import pytest

from llmc.runtime.server.recent import Lengths, Rate, percentiles

pytestmark = pytest.mark.pure

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LONG = {"prompt": "hello there", "max_tokens": 90, "ignore_eos": True}


class Clock:
    now_s = 1000.5

    def __call__(self):
        return self.now_s


def test_a_rate_forgets_what_is_older_than_a_minute():
    clock = Clock()
    rate = Rate(clock)
    assert rate.history() == []
    for second in range(70):
        rate.add(second)
        clock.now_s += 1
    assert rate.history() == list(range(11, 70))
    clock.now_s += 5
    assert rate.history() == [*range(16, 70), 0, 0, 0, 0, 0]
    clock.now_s += 1000
    assert rate.history() == [0] * 59


def test_percentiles_and_lengths():
    assert percentiles([]) is None
    assert percentiles([float(n) for n in range(1, 101)]) == (50, 90, 99)
    lengths = Lengths()
    assert lengths.bars() == []
    for size in (1, 3, 5, 30, 31):
        lengths.add(size)
    assert lengths.bars() == [(1, 1), (2, 0), (5, 2), (10, 0), (20, 0), (50, 2)]


def test_the_numbers_are_those_of_the_requests(serve):
    running = serve(hourly_price=2.0)
    running.executor.delay_s = 0.01
    assert running.http.get(f"{running.url}/status.json").json()["cost_per_1k"] is None
    thread = threading.Thread(target=lambda: running.post("/v1/completions", **LONG, n=2))
    thread.start()
    end = time.monotonic() + 10
    (live,) = [[]]
    while not live and time.monotonic() < end:
        (model,) = running.http.get(f"{running.url}/status.json").json()["models"]
        live = [request for request in model["requests"] if request["num_output_tokens"]]
    thread.join()
    assert live[0]["num_sequences"] == 2
    assert live[0]["num_prompt_tokens"] == 11
    assert live[0]["max_tokens"] == 180
    time.sleep(1.1)
    status = running.http.get(f"{running.url}/status.json").json()
    (model,) = status["models"]
    assert model["requests"] == []
    assert sum(model["history"]) == 180
    assert status["cost_per_1k"] == pytest.approx(2.0 / 3600 / model["tokens_per_s"] * 1000)
    assert model["prompt_lengths"] == [[20, 1]]
    assert model["output_lengths"] == [[100, 2]]
    assert 0.01 <= model["itl_s"][0] < 1
    page = running.http.get(running.url)
    assert page.headers["content-type"].startswith("text/html")
    assert not re.search(r"(src|href)=\"(?!data:)", page.text), "the page needs nothing from elsewhere"
    assert "innerHTML" not in page.text


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_a_browser_draws_it(serve, tmp_path):
    running = serve(hourly_price=2.0, served_name=None)
    running.executor.delay_s = 0.01
    for _ in range(3):
        running.post("/v1/completions", **LONG)
    time.sleep(1.0)
    dom = browse("--dump-dom", running.url, profile=tmp_path / "a").decode()
    drawn = dom.partition("<script>")[0]
    for words in ("letters", ">serving<", "per 1k tokens", "Live requests: 0", "polyline", "Prefix hit rate"):
        assert words in drawn, words
    shots = {}
    for name, flags in (
        ("wide", ("--window-size=1200,900",)),
        ("phone", ("--window-size=500,1600",)),
        ("dark", ("--window-size=1200,900", "--blink-settings=preferredColorScheme=0")),
    ):
        file = tmp_path / f"{name}.png"
        browse(*flags, f"--screenshot={file}", running.url, profile=tmp_path / name)
        shots[name] = pixels(file)
    light, dark = shots["wide"][2], shots["dark"][2]
    assert sum(light[0][:3]) > 600, "the light page is light"
    assert sum(dark[0][:3]) < 150, "the dark page is dark"
    for width, height, rows in shots.values():
        assert len({bytes(row) for row in rows}) > height // 8, "something is drawn"
        edge = {tuple(row[-3:]) for row in rows}
        assert len(edge) == 1, f"nothing runs over the edge at {width}"


def browse(*arguments, profile):
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=2500")
    done = subprocess.run(
        [BROWSER, *flags, f"--user-data-dir={profile}", *arguments],
        capture_output=True,
        check=True,
        timeout=120,
    )
    return done.stdout


def pixels(file):
    """(width, height, rows of RGB) of an 8-bit PNG without interlacing."""
    data = file.read_bytes()
    place, idat = 8, b""
    while place < len(data):
        size, kind = struct.unpack(">I4s", data[place : place + 8])
        body = data[place + 8 : place + 8 + size]
        if kind == b"IHDR":
            width, height, depth, colour = struct.unpack(">IIBB", body[:10])
            assert (depth, colour) in ((8, 2), (8, 6))
            step = 3 if colour == 2 else 4
        elif kind == b"IDAT":
            idat += body
        place += 12 + size
    raw, rows, above = zlib.decompress(idat), [], bytearray(width * step)
    for start in range(0, len(raw), width * step + 1):
        row = bytearray(raw[start + 1 : start + 1 + width * step])
        unfilter(raw[start], row, above, step)
        rows.append(bytes(value for index, value in enumerate(row) if index % step < 3))
        above = row
    return width, height, rows


def unfilter(kind, row, above, step):
    for index in range(len(row)):
        left = row[index - step] if index >= step else 0
        up = above[index]
        corner = above[index - step] if index >= step else 0
        if kind == 4:
            guess = left + up - corner
            nearest = min((left, up, corner), key=lambda value: abs(guess - value))
        else:
            nearest = (0, left, up, (left + up) // 2)[kind]
        row[index] = (row[index] + nearest) & 255
