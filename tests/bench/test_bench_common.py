"""The record that every bench writes."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from pathlib import Path

import pytest

pytestmark = pytest.mark.pure

spec = importlib.util.spec_from_file_location(
    "bench_common", Path(__file__).resolve().parents[2] / "bench" / "common.py"
)
common = importlib.util.module_from_spec(spec)
spec.loader.exec_module(common)


@pytest.mark.parametrize("count", [1, 2, 3, 10, 99, 100, 101])
def test_percentiles_are_samples_with_enough_below(count):
    samples = [float(index) for index in range(1, count + 1)]
    found = common.percentiles(samples[::-1])
    for share in (50, 90, 99):
        value = found[f"p{share}"]
        assert sum(sample <= value for sample in samples) * 100 >= share * count
        assert sum(sample < value for sample in samples) * 100 < share * count
    assert found["n"] == count


def test_percentiles_of_nothing_are_an_error():
    with pytest.raises(ValueError, match="no samples"):
        common.percentiles([])


@pytest.mark.parametrize("count", [1, 2, 5, 6, 9, 20, 51])
def test_the_interval_of_a_median_misses_it_as_rarely_as_it_says(count):
    samples = [float(index) for index in range(count)]
    found = common.median_interval(samples[::-1])
    below = int(found["low"])  # so many samples are below the interval, and as many above it
    assert found["high"] == count - 1 - below
    assert found["median"] == (count - 1) / 2
    misses = 2 * sum(math.comb(count, few) for few in range(below + 1)) / 2**count
    wider = 2 * sum(math.comb(count, few) for few in range(below + 2)) / 2**count
    assert misses <= 0.05 or below == 0
    assert wider > 0.05, "the narrowest interval that holds"


def test_the_median_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="no samples"):
        common.median_interval([])


def test_a_record_says_what_it_depends_on(tmp_path):
    path = common.Record("sleep", tmp_path).write({"nap_s": common.percentiles([0.1, 0.2])})
    written = json.loads(path.read_text())
    assert path.name == "sleep.json"
    assert written["results"]["nap_s"] == {"p50": 0.1, "p90": 0.2, "p99": 0.2, "n": 2}
    assert written["machine"]["cores"] == len(os.sched_getaffinity(0))
    assert written["machine"]["libraries"]["llmc-compiler"]
    assert written["machine"]["memory_bytes"] > 2**28
    assert 0 <= written["foreign_cpu_share"] <= 1.5
    assert written["wall_s"] >= 0
    assert common.peak_memory_bytes() > 2**20
