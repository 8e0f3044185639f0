"""Forms tried in a process of its own, which can be ended: a compile without end, or one that takes all
memory, costs the caller nothing but the wait. Started as `python -m llmc.runtime.grammar_trial`."""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection, Pipe

import msgspec
import numpy as np

from ..spec.errors import LlmcError, TargetError
from .grammar import mask_words
from .grammar_compiler import GrammarCompiler, Vocabulary, refused
from .structured import StructuredOutput

MAX_BYTES = 2 << 30
_START_S = 60.0
_NUM_STEPS = 16
# The first mask of a large form may take long; every answer waits for it.
_MAX_MASK_S = 0.25


class Verdict(msgspec.Struct, frozen=True):
    """Why a form is refused; empty where it is not."""

    why: str = ""


class Trial:
    """A process that compiles what it is told to and takes the first steps of an answer. It is started when
    it is first needed, and again after it had to be ended. Not thread-safe."""

    def __init__(self, vocabulary: Vocabulary, limit_s: float) -> None:
        self._vocabulary = vocabulary
        self._limit_s = limit_s
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    @property
    def pid(self) -> int | None:
        """The process, while there is one."""
        return self._process.pid if self._process is not None else None

    def check(self, wanted: StructuredOutput) -> None:
        """RequestError when `wanted` cannot be compiled within the limits of time and memory, or when its
        masks would hold up others. TargetError when the process cannot be started."""
        connection = self._connection or self._start()
        try:
            connection.send_bytes(msgspec.msgpack.encode(wanted))
            if not connection.poll(self._limit_s):
                self.close()
                raise refused(wanted.kind, f"It takes more than {self._limit_s:g} s to compile")
            verdict = msgspec.msgpack.decode(connection.recv_bytes(), type=Verdict)
        except (EOFError, OSError) as error:
            self.close()
            raise refused(wanted.kind, f"It takes more than {MAX_BYTES >> 30} GiB to compile") from error
        if verdict.why:
            raise refused(wanted.kind, verdict.why)

    def interrupt(self) -> None:
        """Kills the process, so that a `check` under way in another thread ends."""
        process = self._process
        if process is not None:
            process.kill()

    def close(self) -> None:
        """Ends the process. Idempotent."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _start(self) -> Connection:
        ours, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                (sys.executable, "-m", __name__, str(theirs.fileno())),
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            )
        self._connection = ours
        try:
            ours.send_bytes(msgspec.msgpack.encode(self._vocabulary))
            if ours.poll(_START_S):
                ours.recv_bytes()
                return ours
        except (EOFError, OSError):
            pass
        self.close()
        raise TargetError(
            "target.no_grammar_process",
            "The process that tries forms of structured output cannot be started.",
            f"It ended, or was not ready within {_START_S:.0f} s.",
            f"Run `{os.path.basename(sys.executable)} -m {__name__} 0` to see why.",
        )


def main(arguments: Sequence[str]) -> int:
    """The child: the number of the inherited pipe. A vocabulary comes first, then forms. The exit code."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = min(each for each in (MAX_BYTES, soft, hard) if each != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
    with Connection(int(arguments[0])) as connection:
        try:
            vocabulary = msgspec.msgpack.decode(connection.recv_bytes(), type=Vocabulary)
            compiler = GrammarCompiler(vocabulary)
            compiler.load()
            connection.send_bytes(b"ready")
            while True:
                wanted = msgspec.msgpack.decode(connection.recv_bytes(), type=StructuredOutput)
                connection.send_bytes(msgspec.msgpack.encode(_try(compiler, wanted, vocabulary.vocab_size)))
        except EOFError:
            return 0


def _try(compiler: GrammarCompiler, wanted: StructuredOutput, vocab_size: int) -> Verdict:
    """Compiles, then walks along any answer and times the masks, in processor time."""
    try:
        state = compiler.compile(wanted).start()
    except LlmcError as error:
        return Verdict(error.why)
    draw = random.Random(0)
    mask = np.zeros((1, mask_words(vocab_size)), dtype=np.uint32)
    for _ in range(_NUM_STEPS):
        started_s = time.thread_time()
        state.fill(mask)
        spent_s = time.thread_time() - started_s
        if spent_s > _MAX_MASK_S:
            return Verdict(f"Finding out what may come next takes {spent_s:.2f} s a token")
        allowed = np.flatnonzero(np.unpackbits(mask[0].view(np.uint8), bitorder="little"))
        if state.error is not None or not allowed.size:
            break
        state.accept(int(draw.choice(allowed)))
        if state.is_over:
            break
    return Verdict()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
