"""Text from tokens as they come: no split characters, no lost ones, stop strings wherever they are cut."""

from __future__ import annotations

import itertools

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from llmc.runtime.detokenize import Detokenizer
from llmc.runtime.stops import StopMatcher
from llmc.runtime.tokenizer import Tokenizer

pytestmark = pytest.mark.pure

TEXT = st.text(st.sampled_from("ab ab éß中文字😀🏳️‍🌈 \n"), max_size=24)


def byte_level():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<eos>": 0, **{symbol: index + 1 for index, symbol in enumerate(alphabet)}}
    pairs = [("a", "b"), ("Ġ", "a"), ("ð", "Ł"), ("ä", "¸"), ("ä¸", "Ń")]
    for left, right in pairs:
        vocab[left + right] = len(vocab)
    backend = tokenizers.Tokenizer(models.BPE(vocab, pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<eos>"])
    return Tokenizer(backend, {"eos_token": "<eos>"})


def byte_fallback():
    """A sentencepiece-like vocabulary: words with a leading mark, everything else as bytes."""
    vocab = {f"<0x{value:02X}>": value for value in range(256)}
    for piece in ("<unk>", "▁", "a", "b", "▁a", "ab", "▁ab"):
        vocab[piece] = len(vocab)
    backend = tokenizers.Tokenizer(
        models.BPE(vocab, [("▁", "a"), ("a", "b"), ("▁a", "b")], unk_token="<unk>", byte_fallback=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(backend, {})


KINDS = {"byte level": byte_level(), "byte fallback": byte_fallback()}


def stream(detokenizer, token_ids):
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.finish()]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(text=TEXT)
def test_stream_equals_decoding_at_once(kind, text):
    tokenizer = KINDS[kind]
    token_ids = tokenizer.encode(text)
    pieces = stream(Detokenizer(tokenizer), token_ids)
    assert "".join(pieces) == tokenizer.decode(token_ids)
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(prompt=TEXT, text=TEXT)
def test_text_continues_its_prompt(kind, prompt, text):
    """The pieces behind a prompt are what the whole has more than the prompt, spaces included."""
    tokenizer = KINDS[kind]
    token_ids = tokenizer.encode(prompt + text)
    for cut in range(1, len(token_ids)):
        before = tokenizer.decode(token_ids[:cut])
        if before and not before.endswith("\ufffd"):
            pieces = stream(Detokenizer(tokenizer, token_ids[:cut]), token_ids[cut:])
            assert before + "".join(pieces) == tokenizer.decode(token_ids)


@settings(max_examples=200, deadline=None)
@given(token_ids=st.lists(st.integers(0, 255), max_size=40))
def test_any_bytes_stream_to_the_same_text(token_ids):
    tokenizer = KINDS["byte level"]
    assert "".join(stream(Detokenizer(tokenizer), token_ids)) == tokenizer.decode(token_ids)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_how_many_tokens_come_at_once_changes_no_text(kind, data):
    """Of words, and of any bytes at all."""
    tokenizer = KINDS[kind]
    words = st.lists(TEXT.map(tokenizer.encode), max_size=4).map(lambda parts: [*itertools.chain(*parts)])
    token_ids = data.draw(st.one_of(words, st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=20)))
    together = Detokenizer(tokenizer)
    pieces, place = [], 0
    while place < len(token_ids):
        size = data.draw(st.integers(1, 5))
        pieces.append(together.push_all(token_ids[place : place + size]))
        place += size
    assert "".join([*pieces, together.finish()]) == "".join(stream(Detokenizer(tokenizer), token_ids))


def test_emoji_comes_whole():
    tokenizer = KINDS["byte level"]
    pieces = stream(Detokenizer(tokenizer), tokenizer.encode("a😀b"))
    assert pieces[0] == "a"
    assert "😀" in pieces
    assert len(tokenizer.encode("😀")) == 3


def test_character_begun_in_the_prompt_is_finished_in_the_text():
    tokenizer = KINDS["byte level"]
    token_ids = tokenizer.encode("a中b文")
    cut = len(tokenizer.encode("a中b")) + 1
    assert "".join(stream(Detokenizer(tokenizer, token_ids[:cut]), token_ids[cut:])) == "文"


def test_unfinished_character_appears_at_the_end_only():
    tokenizer = KINDS["byte level"]
    pieces = stream(Detokenizer(tokenizer), tokenizer.encode("a😀")[:-1])
    assert pieces == ["a", *[""] * (len(pieces) - 2), "\ufffd"]


@pytest.mark.parametrize("skip", [True, False])
def test_special_tokens_are_skipped_or_shown(skip):
    tokenizer = KINDS["byte level"]
    token_ids = [*tokenizer.encode("ab"), 0, *tokenizer.encode("a")]
    text = "".join(stream(Detokenizer(tokenizer, skip_special_tokens=skip), token_ids))
    assert text == ("aba" if skip else "ab<eos>a")


def obvious_stop(text, stops):
    """Character by character: the first moment at which the text ends with a stop string."""
    for end in range(1, len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            longest = max(matches, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_stop_strings_do_not_depend_on_the_cuts(data):
    text = data.draw(st.text("abc", max_size=20))
    stops = tuple(data.draw(st.lists(st.text("abc", min_size=1, max_size=4), max_size=3)))
    matcher = StopMatcher(stops)
    shown, matched, position = "", None, 0
    while position < len(text) and matched is None:
        size = data.draw(st.integers(1, 5))
        result = matcher.push(text[position : position + size])
        shown, matched = shown + result.text, result.matched
        position += size
        assert not any(stop in shown for stop in stops)
    if matched is None:
        shown += matcher.finish()
    assert (shown, matched) == obvious_stop(text, stops)


def test_text_is_held_only_while_a_match_is_possible():
    matcher = StopMatcher(("</s>",))
    assert [matcher.push(piece).text for piece in ("a<", "/", "b", "<")] == ["a", "", "</b", ""]
    assert matcher.finish() == "<"
