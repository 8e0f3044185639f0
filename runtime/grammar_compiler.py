"""Grammars through the llguidance library: JSON schemas, regular expressions, choices and Lark grammars as
token masks. The one file that knows the library."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ..spec.errors import RequestError, TargetError
from .grammar import Mask
from .structured import StructuredOutput
from .tokenizer import Tokenizer

# Blanks between the tokens of JSON: one, or a line end with an indent. Without a bound, a model that does
# not know JSON may write blanks for ever.
WHITESPACE = r"[ ]|\r?\n[ \t]{0,32}"
_WORD_BITS = 32
# What the masks of one answer may take of the engine's thread, which serves everybody, in seconds of
# processor time: so much for each, and so much beyond that at once.
_MASK_GRACE_S = 0.5
_MASK_MEAN_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """A tokenizer as the text of its `tokenizer.json`, with how many tokens it has; how many the model has,
    and which of them end its texts."""

    tokenizer_json: str
    tokenizer_size: int
    vocab_size: int
    end_ids: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Tokenizer, vocab_size: int, end_ids: Sequence[int]) -> Self:
        return cls(
            tokenizer_json=tokenizer.as_json(),
            tokenizer_size=tokenizer.vocab_size,
            vocab_size=vocab_size,
            end_ids=tuple(end_ids),
        )


class GrammarCompiler:
    """Compiles what requests ask for. The library is imported and the vocabulary read at the first use.
    Thread-safe, and other threads run meanwhile; how long it takes has no bound."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._lock = threading.Lock()
        self._library: Any = None
        self._tokens: Any = None

    def compile(self, wanted: StructuredOutput) -> LlguidanceGrammar:
        """RequestError saying what in `wanted` cannot be used; TargetError without the library."""
        self.load()
        matcher_type = self._library.LLMatcher
        matcher = matcher_type(self._tokens, _as_grammar(wanted, matcher_type), log_level=0)
        if matcher.is_error():
            raise refused(wanted.kind, str(matcher.get_error()))
        return LlguidanceGrammar(matcher, self._vocabulary.vocab_size)

    def load(self) -> None:
        """Makes ready to compile, if it is not. TargetError without the library."""
        with self._lock:
            if self._library is None:
                self._load()

    def _load(self) -> None:
        try:
            import llguidance
        except ModuleNotFoundError as error:
            raise TargetError(
                "target.missing_library",
                "Structured output needs the library llguidance.",
                "It is not installed in this environment.",
                "Install it with `pip install 'llmc-compiler[serve]'`.",
            ) from error
        known = self._vocabulary
        size = max(known.vocab_size, known.tokenizer_size)
        # The library wants an end token: a model without one gets a token that no mask has room for.
        ends = list(known.end_ids) or [size]
        self._tokens = llguidance.LLTokenizer(
            known.tokenizer_json, n_vocab=size + (not known.end_ids), eos_token=ends
        )
        self._library = llguidance


class LlguidanceGrammar:
    """`runtime.grammar.Grammar` over a matcher before its first token."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def start(self) -> LlguidanceState:
        return LlguidanceState(self._matcher.deep_copy(), self._vocab_size)


class LlguidanceState:
    """`runtime.grammar.GrammarState` over one matcher. The matcher never raises: it falls into a state of
    error and stays there. So does an answer whose masks take too long."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._tail = np.uint32((1 << (vocab_size % _WORD_BITS or _WORD_BITS)) - 1)
        self._is_over = False
        self._left_s = _MASK_GRACE_S

    @property
    def is_over(self) -> bool:
        return self._is_over

    @property
    def error(self) -> str | None:
        if self._left_s < 0:
            return f"The grammar is too slow: its masks take more than {_MASK_MEAN_S * 1000:.0f} ms each."
        if not self._matcher.is_error():
            return None
        return "The grammar cannot go on: " + _one_line(self._matcher.get_error())

    def fill(self, mask: Mask, draft_ids: Sequence[int] = ()) -> None:
        if self._left_s < 0:
            mask[:] = 0
            return
        started_s = time.thread_time()
        self._fill_rows(mask, draft_ids)
        spent_s = time.thread_time() - started_s
        self._left_s = min(_MASK_GRACE_S, self._left_s + (1 + len(draft_ids)) * _MASK_MEAN_S - spent_s)

    def count_allowed(self, draft_ids: Sequence[int]) -> int:
        return int(self._matcher.validate_tokens(list(draft_ids)))

    def accept(self, token_id: int) -> None:
        self._matcher.consume_token(token_id)
        self._is_over = bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    def _fill_rows(self, mask: Mask, draft_ids: Sequence[int]) -> None:
        self._fill_row(mask[0])
        for index, token_id in enumerate(draft_ids):
            self._matcher.consume_token(token_id)
            self._fill_row(mask[index + 1])
        if draft_ids:
            self._matcher.rollback(len(draft_ids))

    def _fill_row(self, row: NDArray[np.uint32]) -> None:
        """The library's mask covers its own vocabulary, which may be larger than the model's."""
        allowed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint32)
        if self._matcher.is_error():
            row[:] = 0
            return
        row[:] = allowed[: row.size]
        row[-1] &= self._tail


def _as_grammar(wanted: StructuredOutput, matcher_type: Any) -> str:
    """`wanted` in the library's own notation."""
    if wanted.regex is not None:
        return str(matcher_type.grammar_from_regex(wanted.regex))
    if wanted.grammar is not None:
        return str(matcher_type.grammar_from_lark(wanted.grammar))
    if wanted.choice:
        alternatives = " | ".join(json.dumps(each, ensure_ascii=False) for each in wanted.choice)
        return str(matcher_type.grammar_from_lark(f"start: {alternatives}"))
    schema: object = {"type": "object"} if wanted.json_schema is None else json.loads(wanted.json_schema)
    if schema is False:
        raise refused("json_schema", "The schema false allows no answer")
    options = {"whitespace_pattern": WHITESPACE}
    source = json.dumps({} if schema is True else schema)
    try:
        return str(matcher_type.grammar_from_json_schema(source, overrides=options))
    except ValueError as error:
        raise refused("json_schema", str(error)) from error


def refused(kind: str, why: str) -> RequestError:
    """What is said of a form of `kind` that cannot be used, and why."""
    return RequestError(
        f"request.structured.{kind}",
        f"The {kind} of structured output cannot be compiled.",
        f"{_one_line(why).rstrip('.')}.",
        "Correct it, or do without what it names.",
    )


def _one_line(text: str) -> str:
    """The message without the state dump that follows it."""
    return " ".join(text.partition("<state>")[0].split())
