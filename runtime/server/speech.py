"""What a model says, taken apart while it says it: thoughts, content, tool calls. Knows the ways in which
families of models write these, no HTTP shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from .call_scanner import CallArguments, CallBegins, CallScanner

THINK, END_THINK = "<think>", "</think>"


class ToolFormat(Enum):
    """How a model writes calls. HERMES (Qwen and others): objects between <tool_call> and </tool_call>.
    LLAMA3: nothing but objects, with `;` between them, maybe behind <|python_tag|>. MISTRAL: behind
    [TOOL_CALLS] a list of objects, or name, [ARGS] and an object. LIST and ARGUMENTS are what structured
    output makes any model write: a list of objects, or the arguments of one function."""

    NONE = "none"
    HERMES = "hermes"
    LLAMA3 = "llama3"
    MISTRAL = "mistral"
    LIST = "list"
    ARGUMENTS = "arguments"


_BEGINS = {
    ToolFormat.HERMES: "<tool_call>",
    ToolFormat.MISTRAL: "[TOOL_CALLS]",
    ToolFormat.LLAMA3: "<|python_tag|>",
}
# Tokens that are special in these vocabularies must be seen in the text.
SHOWS_SPECIAL = frozenset({ToolFormat.LLAMA3, ToolFormat.MISTRAL})


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeechStyle:
    """How to read one answer. `tools` are the functions offered; `thinks` where <think> has a meaning, and
    `starts_thinking` where the prompt has opened it; `one_call` leaves out what comes behind a first call."""

    tool_format: ToolFormat = ToolFormat.NONE
    tools: tuple[str, ...] = ()
    thinks: bool = False
    starts_thinking: bool = False
    one_call: bool = False


class Content(NamedTuple):
    text: str


class Thought(NamedTuple):
    text: str


class Call(NamedTuple):
    """Call `number` begins (`name`), or its arguments go on."""

    number: int
    name: str | None
    arguments: str


class CallEnds(NamedTuple):
    number: int


Part = Content | Thought | Call | CallEnds


class Speech:
    """Text in, parts out; what could be the beginning of a marker is held back until it is known.

    Marked text that turns out not to be a call of an offered function is content, as it was written.
    """

    def __init__(self, style: SpeechStyle) -> None:
        self._style = style
        self._allowed = frozenset(style.tools)
        self._buffer = ""
        self._parts: list[Part] = []
        self._scanner: CallScanner | None = None
        self._raw = ""
        self._in_list = False
        self._at_start = True
        self._has_thought = False
        self._after_thought = False
        self.num_calls = 0
        self._advance: Callable[[bool], bool] = self._start
        if style.starts_thinking:
            self._advance = self._think

    def push(self, text: str) -> list[Part]:
        """The parts that more text makes certain."""
        self._buffer += text
        return self._run(is_last=False)

    def finish(self) -> list[Part]:
        """The rest, when no text will follow."""
        parts = self._run(is_last=True)
        if self._scanner is not None and not self._scanner.has_begun:
            parts.append(Content(self._raw))
        if self._advance == self._mistral:
            parts.append(Content(self._raw + self._buffer))
        self._buffer = ""
        return parts

    def _run(self, is_last: bool) -> list[Part]:
        while self._buffer and self._advance(is_last):
            pass
        parts, self._parts = self._parts, []
        return parts

    def _start(self, is_last: bool) -> bool:
        """Thoughts come first or not at all."""
        if self._style.thinks and not self._after_thought:
            text = self._buffer.lstrip()
            if text.startswith(THINK):
                self._buffer = text[len(THINK) :]
                self._advance = self._think
                return True
            if THINK.startswith(text) and not is_last:
                return False
        if self._after_thought:
            self._buffer = self._buffer.lstrip("\n")
            if not self._buffer:
                return False
        self._advance = self._first_words()
        return True

    def _first_words(self) -> Callable[[bool], bool]:
        form = self._style.tool_format
        if form is ToolFormat.ARGUMENTS:
            return self._arguments
        if form is ToolFormat.LIST:
            return self._list
        return self._content

    def _think(self, is_last: bool) -> bool:
        if not self._has_thought:
            self._buffer = self._buffer.lstrip("\n")
        before, found = self._until(END_THINK, is_last)
        before = before.rstrip() if found else before
        if before:
            self._has_thought = True
            self._parts.append(Thought(before))
        if found:
            self._after_thought = True
            self._advance = self._start
        return found

    def _content(self, is_last: bool) -> bool:
        """Plain text up to the marker of a call. Llama's calls may come without one, at the very start."""
        form = self._style.tool_format
        if form is ToolFormat.LLAMA3 and self._at_start:
            text = self._buffer.lstrip()
            if not text and not is_last:
                return False
            self._at_start = False
            if text.startswith("{"):
                return self._begin_call()
        self._at_start = False
        marker = _BEGINS.get(form, "")
        if not marker:
            self._parts.append(Content(self._buffer))
            self._buffer = ""
            return False
        before, found = self._until(marker, is_last)
        shown = before.rstrip() if found else before
        if shown:
            self._parts.append(Content(shown))
        if not found:
            return False
        self._raw = before[len(shown) :] + marker
        if form is ToolFormat.MISTRAL:
            self._advance = self._mistral
            return True
        return self._begin_call(self._raw)

    def _mistral(self, _: bool) -> bool:
        """Behind the marker: a list, or a function's name."""
        text = self._buffer.lstrip()
        if text.startswith("["):
            self._buffer = text[1:]
            self._in_list = True
            return self._begin_call(f"{self._raw}[")
        brace = text.find("{")
        if brace < 0:
            return False
        name = text[:brace].split("[")[0].strip()
        self._buffer = text[brace:]
        return self._begin_call(self._raw + text[:brace], name)

    def _list(self, _: bool) -> bool:
        text = self._buffer.lstrip()
        if not text:
            return False
        if not text.startswith("["):
            self._advance = self._content
            return True
        self._buffer = text[1:]
        self._in_list = True
        return self._begin_call("[")

    def _arguments(self, _: bool) -> bool:
        name = self._style.tools[0] if not self.num_calls else None
        self.num_calls = 1
        self._parts.append(Call(0, name, self._buffer))
        self._buffer = ""
        return False

    def _begin_call(self, raw: str = "", name: str | None = None) -> bool:
        self._scanner = CallScanner(self._allowed, name)
        self._raw = raw
        self._advance = self._call
        return True

    def _call(self, _: bool) -> bool:
        """Hands characters to the scanner until it has enough."""
        scanner = self._scanner
        assert scanner is not None
        used = 0
        while used < len(self._buffer) and not (scanner.is_over or scanner.has_failed):
            told = scanner.push(self._buffer[used])
            self._raw += self._buffer[used]
            used += 1
            for part in told:
                self._raw = ""
                name = part.name if isinstance(part, CallBegins) else None
                text = part.text if isinstance(part, CallArguments) else ""
                self._parts.append(Call(self.num_calls, name, text))
        self._buffer = self._buffer[used:]
        if scanner.has_failed:
            self._parts.append(Content(self._raw))
            self._scanner, self._advance = None, self._content
        elif scanner.is_over:
            self._parts.append(CallEnds(self.num_calls))
            self.num_calls += 1
            self._scanner, self._raw = None, ""
            self._advance = self._silence if self._style.one_call else self._between
        return bool(self._buffer)

    def _between(self, is_last: bool) -> bool:
        """Behind a call: its closing marker, another call, or other text."""
        text = self._buffer.lstrip()
        form = self._style.tool_format
        if not text:
            self._buffer = ""
            return False
        if self._in_list:
            self._in_list = text[0] == ","
            self._buffer = text[1:] if text[0] in ",]" else text
            if self._in_list:
                return self._begin_call(",")
            self._advance = self._content
            return True
        closes = {ToolFormat.HERMES: "</tool_call>", ToolFormat.LLAMA3: ";"}.get(form, "")
        if closes and text.startswith(closes):
            self._buffer = text[len(closes) :]
            if form is ToolFormat.LLAMA3:
                return self._begin_call(closes)
            self._advance = self._after_call
            return True
        if closes.startswith(text) and closes and not is_last:
            return False
        self._advance = self._after_call
        return True

    def _after_call(self, _: bool) -> bool:
        """Blanks between calls are not content."""
        self._buffer = self._buffer.lstrip()
        self._advance = self._content
        return bool(self._buffer)

    def _silence(self, _: bool) -> bool:
        self._buffer = ""
        return False

    def _until(self, marker: str, is_last: bool) -> tuple[str, bool]:
        """(text before `marker`, whether it was found); takes both from the buffer, and holds back blanks
        and whatever may be its beginning."""
        place = self._buffer.find(marker)
        if place >= 0:
            before, self._buffer = self._buffer[:place], self._buffer[place + len(marker) :]
            return before, True
        if is_last:
            before, self._buffer = self._buffer, ""
            return before, False
        kept = next(
            (size for size in range(len(marker) - 1, 0, -1) if self._buffer.endswith(marker[:size])), 0
        )
        shown = self._buffer[: len(self._buffer) - kept].rstrip()
        self._buffer = self._buffer[len(shown) :]
        return shown, False


def detect_tools(template: str | None) -> ToolFormat:
    """The format that a chat template writes earlier calls in; NONE where it knows no tools."""
    if template is None or "tool" not in template:
        return ToolFormat.NONE
    if "[TOOL_CALLS]" in template:
        return ToolFormat.MISTRAL
    if "<tool_call>" in template and "<function=" not in template:
        return ToolFormat.HERMES
    if "<|python_tag|>" in template or '"parameters"' in template:
        return ToolFormat.LLAMA3
    return ToolFormat.NONE


def detect_thinking(template: str | None) -> bool:
    """Whether a chat template knows thoughts."""
    return template is not None and (THINK in template or END_THINK in template)
