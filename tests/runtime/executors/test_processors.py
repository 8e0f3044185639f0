"""The number of threads follows the affinity mask and the quota of control groups."""

from __future__ import annotations

import os

import pytest

from llmc.runtime.executors.processors import cpu_quota, usable_processors

pytestmark = pytest.mark.pure


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root / "fs", root / "own"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"own": "0::/a/b\n", "fs/a/b/cpu.max": "max 100000\n"}, None),
        ({"own": "0::/a/b\n", "fs/a/b/cpu.max": "150000 100000\n"}, 1.5),
        ({"own": "0::/a/b\n", "fs/a/b/cpu.max": "max 100000\n", "fs/a/cpu.max": "50000 100000\n"}, 0.5),
        ({"own": "0::/\n", "fs/cpu.max": "300000 100000\n"}, 3.0),
        (
            {
                "own": "3:memory:/m\n4:cpu,cpuacct:/docker/x\n",
                "fs/cpu,cpuacct/docker/x/cpu.cfs_quota_us": "250000\n",
                "fs/cpu,cpuacct/docker/x/cpu.cfs_period_us": "100000\n",
            },
            2.5,
        ),
        (
            {
                "own": "4:cpu,cpuacct:/\n",
                "fs/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
                "fs/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
        ({"own": "0::/gone\n"}, None),
    ],
)
def test_quota_is_the_smallest_of_all_groups_above(tmp_path, files, expected):
    assert cpu_quota(*write(tmp_path, files)) == expected


def test_threads_are_at_least_one_and_at_most_the_mask(tmp_path):
    allowed = len(os.sched_getaffinity(0))
    assert usable_processors(*write(tmp_path, {"own": "0::/\n", "fs/cpu.max": "1000 100000\n"})) == 1
    assert usable_processors(*write(tmp_path, {"own": "0::/\n", "fs/cpu.max": "9900000 100000\n"})) == allowed
    assert usable_processors(tmp_path / "none", tmp_path / "nothing") == allowed
