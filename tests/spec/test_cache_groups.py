"""What a cache group may say of itself."""

from __future__ import annotations

import msgspec
import pytest

from llmc.spec.cache import CacheGroup
from llmc.spec.errors import InternalError

pytestmark = pytest.mark.pure
FIELDS = {"layers": (0,), "num_kv_heads": 1, "k_dim": 4, "v_dim": 4, "dtype": "float32", "page_tokens": 4}


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"kind": "sliding"}, "The kind 'sliding' is none of full, window, chunk."),
        ({"kind": "window"}, "A window of 0 tokens does not go with kind 'window'."),
        ({"kind": "chunk", "window": -3}, "A window of -3 tokens does not go with kind 'chunk'."),
        ({"window": 8}, "A window of 8 tokens does not go with kind 'full'."),
    ],
)
def test_a_group_that_nothing_could_follow_is_refused(fields, why):
    with pytest.raises(InternalError) as caught:
        CacheGroup(**FIELDS, **fields)
    assert caught.value.why == why


def test_groups_survive_their_stored_form():
    for fields in ({}, {"kind": "window", "window": 7}, {"kind": "chunk", "window": 7}):
        group = CacheGroup(**FIELDS, **fields)
        assert msgspec.json.decode(msgspec.json.encode(group), type=CacheGroup) == group
