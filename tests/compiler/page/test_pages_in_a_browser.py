"""Pages in a browser: nothing wider than the screen, nothing loaded, no complaint, readable in the dark."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import replace

import pytest

from llmc.compiler.compare.compare import Comparison, Row
from llmc.compiler.compare.divergence import Divergence
from llmc.compiler.compare.page import comparison_page
from llmc.compiler.compare.statistics import Ratio
from llmc.compiler.driver import compile_model

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed on this machine")

# Every element that reaches beyond the screen, unless it is in something that scrolls by itself.
WIDER = """(() => [...document.body.querySelectorAll('*')].filter(element =>
  !element.closest('.scroll > *') && element.getBoundingClientRect().right > WIDTH + 0.5
).map(element => element.outerHTML.slice(0, 80)))()"""
# The height of the smallest words of a picture, in the screen's own units.
SMALLEST = """Math.min(...[...document.querySelectorAll('svg text')].map(
  text => parseFloat(getComputedStyle(text).fontSize) * text.getScreenCTM().a))"""
# The least contrast (WCAG 2.2) of any text with what lies behind it.
CONTRAST = """(() => {
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v =>
    v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4).reduce((sum, v, i) =>
    sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = element => {
    for (let at = element; at; at = at.parentElement) {
      const colour = rgb(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  let least = 21;
  for (const element of document.body.querySelectorAll('*')) {
    if (![...element.childNodes].some(node => node.nodeType === 3 && node.data.trim())) continue;
    if (element.tagName === 'title') continue;
    const style = getComputedStyle(element);
    const own = light(rgb(element instanceof SVGElement ? style.fill : style.color));
    const other = light(behind(element));
    least = Math.min(least, (Math.max(own, other) + 0.05) / (Math.min(own, other) + 0.05));
  }
  return least;
})()"""


class Browser:
    """A headless Chromium, spoken to over its debugging pipe."""

    def __init__(self, profile):
        to_browser, self.commands = os.pipe()
        self.answers, from_browser = os.pipe()
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        arguments += ["--disable-dev-shm-usage", "--no-first-run", f"--user-data-dir={profile}"]

        def hand_over():  # the pipe is read from descriptor 3 and written to descriptor 4
            kept = os.dup(to_browser), os.dup(from_browser)
            os.dup2(kept[0], 3)
            os.dup2(kept[1], 4)

        self.process = subprocess.Popen(
            [CHROMIUM, *arguments, "about:blank"],
            preexec_fn=hand_over,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self.count, self.rest, self.session = 0, b"", None
        self.events = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method, **params):
        """The result of a command; events on the way are kept."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while (answer := self.next()).get("id") != self.count:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def next(self):
        """The next message."""
        while b"\0" not in self.rest:
            read = os.read(self.answers, 1 << 16)
            assert read, "the browser ended"
            self.rest += read
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def open(self, path, width, scheme):
        """Show a file on a screen of that width, light or dark. Returns what the page complained of."""
        self.events.clear()
        metrics = {"width": width, "height": 800, "deviceScaleFactor": 2, "mobile": width < 600}
        self.ask("Emulation.setDeviceMetricsOverride", **metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.ask("Emulation.setEmulatedMedia", features=features)
        self.ask("Page.navigate", url=path.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.next())
        self.look("1")  # behind everything that loading had to say
        return [event for event in self.events if is_complaint(event, path.as_uri())]

    def look(self, script):
        """The value of an expression on the page."""
        return self.ask("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def close(self):
        """End it."""
        os.close(self.commands)
        self.process.terminate()
        self.process.wait(20)
        os.close(self.answers)


def is_complaint(event, own):
    """Errors and warnings of the console, exceptions, and anything loaded beside the page itself."""
    params = event.get("params", {})
    match event.get("method"):
        case "Runtime.exceptionThrown" | "Log.entryAdded" | "Runtime.consoleAPICalled":
            return True
        case "Network.requestWillBeSent":
            return params["request"]["url"] != own
    return False


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


def made_row(name, scale, parted):
    """A side with a number in every column."""
    values = {
        "bits_per_weight": 16 * scale,
        "size_bytes": 1e9 * scale,
        "peak_bytes": 2e9 * scale,
        "load_s": scale,
        "perplexity": 12 + scale,
        "kl_mean": 0.02 / scale,
        "kl_p99": 0.3 / scale,
        "same_top": 0.9,
        "ttft_s": 0.2 * scale,
        "tpot_s": 0.02 * scale,
        "prefill_tokens_per_s": 1e4 / scale,
        "decode_tokens_per_s": 50 / scale,
        "throughput_tokens_per_s": 200 / scale,
        "goodput_per_s": 3 / scale,
        "cost_per_million": 0.4 * scale,
    }
    ratio = Ratio(ratio=scale, low=0.98 * scale, high=1.02 * scale)
    text = "A <b>long</b> & winding_road_without_any_space_" * 6
    return Row(
        name=name,
        values=values,
        ratios=dict.fromkeys(("ttft_s", "tpot_s", "throughput_tokens_per_s"), ratio),
        layers=tuple(0.001 * (index + 1) / scale for index in range(33)),
        divergence=parted,
        texts=(text, text, text),
        latencies={
            key: tuple(values[key] * (1 + index / 50) for index in range(60)) for key in ("ttft_s", "tpot_s")
        },
        executor="cpu",
        recipe=name,
        decisions=3,
    )


@pytest.fixture(scope="module")
def comparison():
    parted = Divergence(
        prompt=0,
        index=3,
        token=1,
        baseline_token=2,
        gap=0.25,
        baseline_gap=0.5,
        continuation=(1,),
        baseline_continuation=(2,),
    )
    names = ["original", "int8", "a-configuration-with-quite-a-long-name", "int4-small"]
    rows = [made_row(name, 1 / (index + 1), parted if index else None) for index, name in enumerate(names)]
    return Comparison(
        baseline="original",
        reference="original",
        rows=tuple(rows),
        pareto=("original", "int4-small"),
        rounds=60,
        concurrency=4,
        num_tokens=32,
        quality_tokens=1024,
        seconds=30.0,
    )


@pytest.fixture(scope="module")
def pages(comparison, stories_1m, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    (folder / "comparison.html").write_text(comparison_page(comparison), encoding="utf-8")
    lone = replace(comparison, rows=comparison.rows[:2], pareto=())
    (folder / "small.html").write_text(comparison_page(lone), encoding="utf-8")
    made = compile_model(stories_1m, output=folder / "a.llmc", quant="int8", target="reference", verify="off")
    shutil.copy(made.path / "report.html", folder / "report.html")
    return folder


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("name", ["comparison", "small", "report"])
def test_a_page_fits_is_quiet_and_can_be_read(browser, pages, name, width, scheme):
    complaints = browser.open(pages / f"{name}.html", width, scheme)
    assert not complaints
    assert browser.look("document.documentElement.scrollWidth") <= width
    assert browser.look(WIDER.replace("WIDTH", str(width))) == []
    assert browser.look(CONTRAST) >= 4.5, "as WCAG 2.2 asks of text"
    assert browser.look(SMALLEST) >= 9
    paper = browser.look("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, paper[4:-1].split(","))) < 200) == (scheme == "dark")


def test_the_browser_test_sees_what_is_wrong(browser, tmp_path):
    """So that silence means something."""
    path = tmp_path / "bad.html"
    path.write_text(
        "<meta name=viewport content='width=device-width'><body style='background:#fff'>"
        "<p style='width:900px;color:#bbb'>wide and pale</p>"
        "<img src='missing.png'><script>throw new Error('no')</script>"
    )
    complaints = {event["method"] for event in browser.open(path, 360, "light")}
    assert {"Runtime.exceptionThrown", "Network.requestWillBeSent"} <= complaints
    assert browser.look(WIDER.replace("WIDTH", "360"))
    assert browser.look(CONTRAST) < 4.5
