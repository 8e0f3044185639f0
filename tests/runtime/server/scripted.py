"""An engine that says what it is told to, in pieces of a few letters: for what depends on the text alone."""

from __future__ import annotations

import asyncio

from llmc.runtime.admission import EngineLimits
from llmc.runtime.outputs import StreamChunk
from llmc.runtime.params import SamplingParams
from llmc.runtime.request import FinishReason
from llmc.runtime.server.messages import Abort, EngineFacts, EngineSnapshot, Said


class ScriptedChannel:
    """`text` is every answer, `sent` every command. It ends with `reason`."""

    def __init__(self, text="", size=3, reason=FinishReason.STOP, **limits):
        self.text, self.size, self.reason = text, size, reason
        self.sent = []
        values = {"vocab_size": 29, "max_requests": 8, "max_step_tokens": 64, "max_waiting": 64}
        self.facts = EngineFacts(
            executor="scripted",
            limits=EngineLimits(**{**values, "max_model_len": 100_000, **limits}),
            defaults=SamplingParams(temperature=0.0),
        )

    def connect(self, deliver):
        self._deliver = deliver

    def send(self, command):
        self.sent.append(command)
        if not isinstance(command, Abort):
            asyncio.get_running_loop().create_task(self._say(command))

    async def _say(self, command):
        pieces = [self.text[start : start + self.size] for start in range(0, len(self.text), self.size)]
        for index in range(command.params.n):
            for place, piece in enumerate(pieces or [""]):
                ending = self.reason if place + 1 == max(1, len(pieces)) else None
                chunk = StreamChunk(
                    request_id=command.request_id,
                    index=index,
                    text=piece,
                    token_ids=(place % 28,),
                    finish_reason=ending,
                )
                self._deliver([Said(chunk)])
                await asyncio.sleep(0)

    def snapshot(self):
        return EngineSnapshot(
            num_running=0,
            num_waiting=0,
            kv_usage=0.0,
            num_steps=1,
            num_failed_steps=0,
            num_preemptions=0,
            num_computed_tokens=0,
        )

    def close(self):
        pass
