"""Reads one tool call, a JSON object with a name and arguments, while it is being written. Knows no markers
around it."""

from __future__ import annotations

import json
from enum import Enum, auto
from typing import NamedTuple

_BLANK = " \t\r\n"
_ARGUMENTS = ("arguments", "parameters")


class CallBegins(NamedTuple):
    """A call of the function `name`; arguments follow."""

    name: str


class CallArguments(NamedTuple):
    """More of the arguments, as JSON text."""

    text: str


class _At(Enum):
    OPEN = auto()
    KEY_OR_END = auto()
    KEY = auto()
    COLON = auto()
    VALUE_START = auto()
    VALUE = auto()


class CallScanner:
    """Takes characters until the object has ended (`is_over`) or cannot be a call of one of `allowed`
    (`has_failed`; then nothing has been told of it). `has_begun` once something has. `name` is given where
    the name stood before, and only the object of arguments follows.

    The arguments are handed on as they are written. They are told once the name is known, whatever the
    order of the keys.
    """

    def __init__(self, allowed: frozenset[str], name: str | None = None) -> None:
        self._allowed = allowed
        self._name = name
        self._is_bare = name is not None
        self._at = _At.VALUE_START if self._is_bare else _At.OPEN
        self._key = "arguments" if self._is_bare else ""
        self._token: list[str] = []
        self._depth = 0
        self._in_string = False
        self._is_escaped = False
        self._held: list[str] = []
        self._has_arguments = False
        self.has_begun = False
        self.is_over = False
        self.has_failed = self._is_bare and name not in allowed

    def push(self, char: str) -> list[CallBegins | CallArguments]:
        """What one more character tells."""
        step = {
            _At.OPEN: self._open,
            _At.KEY_OR_END: self._key_or_end,
            _At.KEY: self._in_key,
            _At.COLON: self._colon,
            _At.VALUE_START: self._value_start,
            _At.VALUE: self._value,
        }[self._at]
        step(char)
        if self.has_failed:
            return []
        return self._told()

    def _told(self) -> list[CallBegins | CallArguments]:
        told: list[CallBegins | CallArguments] = []
        if self._name is None or not (self._held or self.is_over):
            return told
        if not self.has_begun:
            self.has_begun = True
            told.append(CallBegins(self._name))
        if self.is_over and not self._has_arguments:
            self._held.append("{}")
        if self._held:
            told.append(CallArguments("".join(self._held)))
            self._held.clear()
        return told

    def _fail(self) -> None:
        """Once a call has been told of it has to end as one."""
        if self.has_begun:
            self.is_over = True
        else:
            self.has_failed = True

    def _open(self, char: str) -> None:
        if char == "{":
            self._at = _At.KEY_OR_END
        elif char not in _BLANK:
            self._fail()

    def _key_or_end(self, char: str) -> None:
        if char == '"':
            self._token = [char]
            self._at = _At.KEY
        elif char == "}":
            if self._name is None:
                self._fail()
            self.is_over = not self.has_failed
        elif char not in _BLANK and char != ",":
            self._fail()

    def _in_key(self, char: str) -> None:
        self._token.append(char)
        if self._ends_string(char):
            try:
                self._key = json.loads("".join(self._token))
            except ValueError:
                self._fail()
            self._at = _At.COLON

    def _colon(self, char: str) -> None:
        if char == ":":
            self._at = _At.VALUE_START
        elif char not in _BLANK:
            self._fail()

    def _value_start(self, char: str) -> None:
        if char in _BLANK:
            return
        self._at = _At.VALUE
        self._token = []
        self._depth = 0
        if (self._is_bare and char != "{") or char in ",:]}":
            self._fail()
            return
        self._value(char)

    def _value(self, char: str) -> None:
        """Containers and strings end with themselves, other values before a comma or a bracket."""
        is_first = not self._token
        if not is_first and not self._depth and not self._in_string and char in ",} \t\r\n":
            self._end_value()
            if char not in _BLANK:
                self._key_or_end(char)
            return
        self._token.append(char)
        if self._key in _ARGUMENTS and self._token[0] == "{":
            self._has_arguments = True
            self._held.append(char)
        if self._in_string:
            self._in_string = not self._ends_string(char)
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
        if not self._depth and not self._in_string and char in '"}]':
            self._end_value()

    def _ends_string(self, char: str) -> bool:
        if self._is_escaped:
            self._is_escaped = False
            return False
        self._is_escaped = char == "\\"
        return char == '"'

    def _end_value(self) -> None:
        self._at = _At.KEY_OR_END
        if self._is_bare:
            self.is_over = True
            return
        if self._key == "name":
            self._end_name()
        elif self._key in _ARGUMENTS and self._token[0] != "{":
            self._end_odd_arguments()

    def _end_name(self) -> None:
        try:
            name = json.loads("".join(self._token))
        except ValueError:
            name = None
        if name not in self._allowed:
            self._fail()
        else:
            self._name = name

    def _end_odd_arguments(self) -> None:
        """A string holds the object once more as text; null means none."""
        try:
            value: object = json.loads("".join(self._token))
        except ValueError:
            value = 0
        if isinstance(value, str) and value.strip():
            self._has_arguments = True
            self._held.append(value)
        elif value not in (None, ""):
            self._fail()
