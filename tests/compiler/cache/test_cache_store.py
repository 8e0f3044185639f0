"""The compile cache on disk: whole entries or none, bounded, shared, and robust to kills and damage."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest

from llmc.compiler.cache.config import DEFAULT_BYTES, CacheConfig
from llmc.compiler.cache.store import CacheStore, total_bytes
from llmc.spec.errors import UsageError


def write(text):
    return lambda folder: (folder / "data").write_bytes(text)


@pytest.fixture
def config(tmp_path):
    return CacheConfig(folder=tmp_path / "cache", max_bytes=1 << 20)


def read(store, key, kind="kind"):
    folder = store.find(kind, key)
    return None if folder is None else (folder / "data").read_bytes()


def test_what_was_kept_is_found_by_another_process_and_counted(config):
    first = CacheStore(config)
    assert read(first, "a") is None
    first.keep("kind", "a", "an entry", write(b"one"), seconds=2.5)
    first.close()
    second = CacheStore(config)
    assert read(second, "a") == b"one"
    assert read(second, "a") == b"one"
    usage = second.usage["kind"]
    assert (usage.hits, usage.misses, usage.saved_s) == (1, 0, 2.5)
    (entry,) = second.entries()
    assert (entry.kind, entry.key, entry.label) == ("kind", "a", "an entry")


def test_a_damaged_or_truncated_entry_is_missed_and_removed(config):
    for damage in (b"onf", b"on", None):
        store = CacheStore(config)
        store.keep("kind", "a", "an entry", write(b"one"))
        store.close()
        path = config.folder / "v1" / "kind" / "a" / "data"
        path.unlink() if damage is None else path.write_bytes(damage)
        store = CacheStore(config)
        assert read(store, "a") is None
        assert store.entries() == []
        store.close()


def test_the_limit_evicts_what_was_used_longest_ago(config):
    clock = iter(range(1_000_000, 2_000_000))
    for number in range(8):
        store = CacheStore(config, clock=lambda: next(clock))
        store.keep("kind", str(number), "x", write(bytes(200_000)))
        store.find("kind", "0")
        store.close()
        for path in (config.folder / "v1" / "kind").iterdir():
            if path.name != "0":
                os.utime(path, (float(path.name), float(path.name)))
    kept = {entry.key for entry in CacheStore(config).entries()}
    assert kept == {"0", "4", "5", "6", "7"}
    assert total_bytes(CacheStore(config).entries()) <= config.max_bytes


def test_a_limit_of_zero_turns_the_cache_off(config):
    off = CacheStore(CacheConfig(folder=config.folder, max_bytes=0))
    assert off.keep("kind", "a", "x", write(b"one")) is None
    assert not config.folder.exists()


def test_a_folder_that_cannot_be_written_is_told_and_fails_nothing(tmp_path):
    (tmp_path / "file").write_text("in the way")
    store = CacheStore(CacheConfig(folder=tmp_path / "file" / "cache"))
    assert store.keep("kind", "a", "x", write(b"one")) is None
    assert "nothing more is kept" in store.problem
    store.close()


def test_clearing_spares_what_a_living_process_uses(config):
    user = CacheStore(config)
    user.keep("kind", "used", "x", write(b"one"))
    other = CacheStore(config)
    other.keep("kind", "idle", "x", write(b"two"))
    other.close()
    removed = CacheStore(config).trim(0)
    assert [entry.key for entry in removed] == ["idle"]
    assert read(user, "used") == b"one"
    user.close()
    assert [entry.key for entry in CacheStore(config).trim(0)] == ["used"]


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from llmc.compiler.cache.config import CacheConfig
    from llmc.compiler.cache.store import CacheStore

    store = CacheStore(CacheConfig(folder=Path(sys.argv[1]), max_bytes=1 << 20))
    store.keep("kind", "whole", "x", lambda folder: (folder / "data").write_bytes(b"one"))

    def dies(folder):
        (folder / "data").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    store.keep("kind", "half", "x", dies)
"""


def test_a_killed_process_leaves_no_half_entry_and_no_lock(config):
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED), str(config.folder)], check=False)
    assert done.returncode == -signal.SIGKILL
    store = CacheStore(config)
    assert read(store, "half") is None
    assert read(store, "whole") == b"one"
    store.close()
    assert list((config.folder / "v1" / ".tmp").iterdir()) == []
    assert CacheStore(config).trim(0)[0].key == "whole"


def test_many_threads_and_stores_agree_on_one_entry(config):
    wrong = []

    def work(number):
        store = CacheStore(config)
        for step in range(20):
            key = str(step % 5)
            found = read(store, key)
            if found not in (None, key.encode() * 100):
                wrong.append((number, key, found))
            store.keep("kind", key, "x", write(key.encode() * 100))
            if step % 7 == number % 7:
                store.trim(300)
        store.close()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_environment_says_where_and_how_large(tmp_path):
    home = CacheConfig.from_environment({"XDG_CACHE_HOME": str(tmp_path)})
    assert (home.folder, home.max_bytes) == (tmp_path / "llmc", DEFAULT_BYTES)
    own = CacheConfig.from_environment({"LLMC_CACHE_DIR": str(tmp_path / "own"), "LLMC_CACHE_BYTES": "5"})
    assert (own.folder, own.max_bytes) == (tmp_path / "own", 5)
    with pytest.raises(UsageError, match="LLMC_CACHE_BYTES is 'much'"):
        CacheConfig.from_environment({"LLMC_CACHE_BYTES": "much"})
