"""An engine over the stub driver in a process of its own, for tests of what follows an error of the device:
`python cuda_child.py ARTIFACT LIBRARY SETTINGS MARK FD`. The driver fails at a launch unless the file MARK is
there, and then makes it, so that it fails once."""

from __future__ import annotations

import asyncio
import socket
import sys
from pathlib import Path

import msgspec
from stub_device import Interpreted
from stub_executor import specialisations_of, stubbed_executor

from llmc.artifact.reader import open_unchecked
from llmc.kernels.cuda.interpreter import correct_interpreter
from llmc.runtime.config import RuntimeConfig
from llmc.runtime.llm import LLM
from llmc.runtime.server.engine_process import host_engine

# In the second step of the first request.
FAILING_LAUNCH = 40


def main():
    path, library, settings, mark, number = sys.argv[1:]
    correct_interpreter()
    artifact, config = open_unchecked(path), msgspec.json.decode(settings, type=RuntimeConfig)
    interpreted = Interpreted(library, specialisations_of(artifact))
    executor = stubbed_executor(artifact, library, interpreted, config)
    if not Path(mark).exists():
        Path(mark).touch()
        interpreted.fail_after(FAILING_LAUNCH)
    llm = LLM(executor, None, artifact.manifest.spec, config)
    with socket.socket(fileno=int(number)) as connection, llm:
        asyncio.run(host_engine(llm, connection, {}))


main()
