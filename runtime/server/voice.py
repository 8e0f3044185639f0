"""One choice of a chat as deltas: the parts of its speech in OpenAI's shapes, and their sum."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from .responses import AssistantMessage, CallDelta, CalledFunction, CallMade, Delta, FunctionDelta
from .speech import Call, Content, Part, Speech, SpeechStyle, Thought, ToolFormat
from .tools import draw_call_id


class Voice:
    """The first delta has the role. Without `shows_thoughts` thoughts are left out."""

    def __init__(self, style: SpeechStyle, shows_thoughts: bool = True) -> None:
        self._form = style.tool_format
        self._is_plain = self._form is ToolFormat.NONE and not style.thinks
        self._speech = Speech(style)
        self._shows_thoughts = shows_thoughts
        self._has_begun = False

    @property
    def num_calls(self) -> int:
        """Calls that are whole."""
        return self._speech.num_calls

    def delta(self, text: str, *, is_last: bool) -> Delta:
        """What `text` adds; with `is_last` nothing is held back any more."""
        is_first, self._has_begun = not self._has_begun, True
        role = "assistant" if is_first else msgspec.UNSET
        if self._is_plain:
            return Delta(role=role, content=text if text or is_first else msgspec.UNSET)
        parts: list[Part] = self._speech.push(text)
        if is_last:
            parts += self._speech.finish()
        content = "".join(part.text for part in parts if isinstance(part, Content))
        thought = "".join(part.text for part in parts if isinstance(part, Thought))
        calls = self._calls([part for part in parts if isinstance(part, Call)])
        return Delta(
            role=role,
            content=content if content or (is_first and not calls) else msgspec.UNSET,
            reasoning_content=thought if thought and self._shows_thoughts else msgspec.UNSET,
            tool_calls=calls or msgspec.UNSET,
        )

    def _calls(self, parts: Sequence[Call]) -> list[CallDelta]:
        """One entry per call, whatever number of parts it came in."""
        calls: list[CallDelta] = []
        for number in dict.fromkeys(part.number for part in parts):
            own = [part for part in parts if part.number == number]
            name = own[0].name
            calls.append(
                CallDelta(
                    index=number,
                    id=draw_call_id(self._form) if name is not None else msgspec.UNSET,
                    type="function" if name is not None else msgspec.UNSET,
                    function=FunctionDelta(
                        name=msgspec.UNSET if name is None else name,
                        arguments="".join(part.arguments for part in own),
                    ),
                )
            )
        return calls


def joined_message(deltas: Sequence[Delta]) -> AssistantMessage:
    """The message that a reader of all deltas has in the end."""
    content = "".join(delta.content for delta in deltas if isinstance(delta.content, str))
    thoughts = [delta.reasoning_content for delta in deltas if isinstance(delta.reasoning_content, str)]
    calls: list[CallMade] = []
    for delta in deltas:
        for told in delta.tool_calls if isinstance(delta.tool_calls, list) else ():
            if isinstance(told.id, str) and isinstance(told.function.name, str):
                calls.append(
                    CallMade(id=told.id, function=CalledFunction(name=told.function.name, arguments=""))
                )
            before = calls[told.index]
            calls[told.index] = CallMade(
                id=before.id,
                function=CalledFunction(
                    name=before.function.name, arguments=before.function.arguments + told.function.arguments
                ),
            )
    return AssistantMessage(
        content=content if content or not calls else None,
        tool_calls=calls or msgspec.UNSET,
        reasoning_content="".join(thoughts) if thoughts else msgspec.UNSET,
    )
