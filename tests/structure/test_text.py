"""What stands in the files: nobody's own paths, nothing left to do, no link that leads nowhere."""

from __future__ import annotations

import hashlib
import re
import subprocess

import pytest

pytestmark = pytest.mark.pure

BINARY = (".safetensors", ".png", ".gz", ".xz")
# Assembled, so that this file does not hold what it looks for.
ABSOLUTE_PATH = re.compile(
    r"(?<![\w.<>*/:-])/(?:" + "|".join(["home", "Users", "root", "work", "mnt"]) + r")/\w"
)
UNFINISHED = re.compile(r"\b(?:" + "|".join(["TO" + "DO", "FIX" + "ME", "X" * 3]) + r")\b")
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)[^)]*\)")


@pytest.fixture(scope="module")
def tracked(repository):
    """Name -> text of every text file under version control that still exists."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=repository, capture_output=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout")
    names = [name for name in listing.stdout.decode().split("\0") if name and not name.endswith(BINARY)]
    return {
        name: (repository / name).read_text(encoding="utf-8")
        for name in names
        if (repository / name).exists()
    }


def occurrences(tracked, pattern):
    return [
        f"{name}:{number}: {line.strip()[:120]}"
        for name, text in tracked.items()
        if not name.endswith("tokenizer.json") and not name.startswith("tests/data/")
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]


def test_no_file_names_a_path_of_one_machine(tracked):
    found = occurrences(tracked, ABSOLUTE_PATH)
    assert not found, "\n".join(found)


def test_nothing_is_left_to_do(tracked):
    found = occurrences(tracked, UNFINISHED)
    assert not found, "\n".join(found)


def test_links_between_documents_lead_somewhere(repository, tracked):
    dead = [
        f"{name}: {target}"
        for name, text in tracked.items()
        if name.endswith(".md")
        for target in LINK.findall(CODE.sub("", text))
        if not re.match(r"[a-z]+:", target) and not ((repository / name).parent / target).exists()
    ]
    assert not dead, "\n".join(dead)


def test_the_bundled_models_are_what_their_cards_say(repository):
    cards = sorted(repository.glob("models/*/README.md"))
    assert {card.parent.name for card in cards} >= {"stories-7m", "stories-1m"}
    for card in cards:
        if not (card.parent / "model.safetensors").exists():
            continue
        weights = (card.parent / "model.safetensors").read_bytes()
        assert hashlib.sha256(weights).hexdigest() in card.read_text(encoding="utf-8"), card.parent.name
        assert len(weights) < 16 * 2**20
