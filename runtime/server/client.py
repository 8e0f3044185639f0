"""Requests of this server in the engine: commands out, and every event to the mailbox of its request."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence

from .channel import EngineChannel
from .messages import Abort, EngineFacts, EngineSnapshot, Event, Generate
from .plan import Plan


class ClientGone(Exception):
    """Nobody is left to read the answer."""


class Mailbox:
    """Events of one HTTP request, in order, for one reader. `names` are its engine requests by number."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = {name: index for index, name in enumerate(names)}
        self._events: list[Event] = []
        self._is_abandoned = False
        self._waiter: asyncio.Future[None] | None = None

    def put(self, event: Event) -> None:
        self._events.append(event)
        self._wake()

    def abandon(self) -> None:
        """The reader need not go on: its next `take` raises ClientGone."""
        self._is_abandoned = True
        self._wake()

    async def take(self) -> list[Event]:
        """All events that have come, at least one."""
        while not self._events and not self._is_abandoned:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._is_abandoned:
            raise ClientGone
        events, self._events = self._events, []
        return events

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class EngineClient:
    """One engine as the event loop sees it. Aborts whatever is no longer read."""

    def __init__(self, channel: EngineChannel) -> None:
        self._channel = channel
        self._mailboxes: dict[str, Mailbox] = {}
        self._numbers = itertools.count()

    @property
    def facts(self) -> EngineFacts:
        return self._channel.facts

    @property
    def num_open(self) -> int:
        """Engine requests that have not ended, or not been let go."""
        return len(self._mailboxes)

    def connect(self) -> None:
        """Begins to listen. Call it in the event loop."""
        self._channel.connect(self._deliver)

    def open(self, plan: Plan, owner: str) -> Mailbox:
        """Sends a request for each prompt of `plan`, in the name of an API key's owner."""
        names = [f"r{next(self._numbers)}" for _ in plan.prompts]
        mailbox = Mailbox(names)
        self._mailboxes.update(dict.fromkeys(names, mailbox))
        for name, prompt, params in zip(names, plan.prompts, plan.params, strict=True):
            self._channel.send(
                Generate(
                    request_id=name,
                    prompt_token_ids=prompt,
                    params=params,
                    priority=plan.priority,
                    timeout_s=plan.timeout_s,
                    seed_is_drawn=plan.seed_is_drawn,
                    owner=owner,
                )
            )
        return mailbox

    def close(self, mailbox: Mailbox, open_names: Sequence[str]) -> None:
        """Lets a request go: aborts what is still running of it."""
        for name in open_names:
            self._channel.send(Abort(request_id=name))
        for name in mailbox.names:
            self._mailboxes.pop(name, None)

    def abort_all(self) -> None:
        """Ends every request; each is told so."""
        for name in self._mailboxes:
            self._channel.send(Abort(request_id=name))

    def snapshot(self) -> EngineSnapshot:
        return self._channel.snapshot()

    def recover(self) -> bool:
        """Ends an engine that is stuck, to start it again. False where that cannot be done."""
        return self._channel.recover()

    def shut_down(self) -> None:
        """Ends the engine. Waits for it."""
        self._channel.close()

    def _deliver(self, events: Sequence[Event]) -> None:
        for event in events:
            mailbox = self._mailboxes.get(event.request_id)
            if mailbox is not None:
                mailbox.put(event)
