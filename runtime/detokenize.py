"""Token ids to text, one at a time, never half a character. Knows decoding, not stop strings or requests."""

from __future__ import annotations

from collections.abc import Sequence

from .tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
_CONTEXT_TOKENS = 6
_LONGEST_INCOMPLETE = 3


class Detokenizer:
    """The text of a growing list of tokens.

    Text is decoded over a short window that begins at tokens already told, because decoders look at
    neighbours (a leading space, joined bytes). Up to three replacement characters at the end are held
    back, as is text that a decoder takes back for so long: they may be a character to come. The
    concatenation of what `push` and `finish` return is the text, and equals decoding at once wherever
    the tokens are valid UTF-8; `prompt_ids` give the first window its left neighbour.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._window = list(prompt_ids[-_CONTEXT_TOKENS:])
        while self._window and self._decode().startswith(REPLACEMENT):
            del self._window[0]
        self._told: str = _whole_characters(self._decode())
        self._boundary = len(self._window)

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes."""
        self._window.append(token_id)
        text = self._decode()
        whole = _whole_characters(text)
        if not text.startswith(self._told) and whole != text and self._num_pending <= _LONGEST_INCOMPLETE:
            return ""
        new = self._tell(whole)
        if new and len(whole) == len(text):
            self._slide()
        return new

    def push_all(self, token_ids: Sequence[int]) -> str:
        """The text that `token_ids` complete: as `push` of each, but decoded once where they end between
        characters."""
        if len(token_ids) > 1:
            num_before = len(self._window)
            self._window.extend(token_ids)
            text = self._decode()
            if text.startswith(self._told) and REPLACEMENT not in text[len(self._told) :]:
                new = self._tell(text)
                if new:
                    self._slide()
                return new
            del self._window[num_before:]
        return "".join([self.push(token_id) for token_id in token_ids])

    def finish(self) -> str:
        """What is still held: bytes that never became a character."""
        return self._tell(self._decode())

    def _tell(self, text: str) -> str:
        if self._told.startswith(text):
            return ""
        if not text.startswith(self._told):
            # NOTE: a byte-fallback decoder takes back a whole run of bytes while one of them is invalid.
            # It was not completed in time, so what was told stays told and the rest stands alone.
            self._window = self._window[self._boundary :]
            self._told, text = "", self._decode()
            self._boundary = 0
        new = text[len(self._told) :]
        self._told = text
        return new

    @property
    def _num_pending(self) -> int:
        return len(self._window) - self._boundary

    def _slide(self) -> None:
        """All of the window is told: what came since the last time stays as left neighbour, if it has
        text."""
        window, told = self._window, self._told
        self._window = window[self._boundary :]
        self._told = self._decode()
        if not self._told:
            self._window, self._told = window, told
        self._boundary = len(self._window)

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=self._skip_special_tokens)


def _whole_characters(text: str) -> str:
    """`text` without the replacement characters at its end that more bytes may still turn into one."""
    end = len(text)
    while len(text) - end < min(_LONGEST_INCOMPLETE, len(text)) and text[end - 1] == REPLACEMENT:
        end -= 1
    return text[:end]
