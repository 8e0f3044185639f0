"""A worker of a comparison whose executor waits for a share of each decode step: a known slowdown."""

from __future__ import annotations

import os
import sys
import time

from llmc.compiler.compare.worker import main
from llmc.runtime.executors.stepped import SteppedExecutor
from llmc.runtime.protocol import StepPlan, StepResult, Ticket

SHARE = float(os.environ["LLMC_BENCH_SLOWDOWN"])
# The system sleeps no shorter than some 60 µs: what is due is gathered until it is worth sleeping for.
LEAST_S = 1e-4


class Slowed:
    """`submit` and `collect` of an executor. A decode step owes SHARE of the time since the step before it:
    that is what a token takes, the engine's own work included. It is paid by sleeping, which leaves the
    interpreter to the engine's other threads, and what was slept too long is paid in advance."""

    def __init__(self) -> None:
        self.submit, self.collect = SteppedExecutor.submit, SteppedExecutor.collect
        self.ended, self.owed_s = time.perf_counter(), 0.0
        self.decodes = False

    def submitted(self, executor: SteppedExecutor, plan: StepPlan) -> Ticket:
        """A step begins."""
        self.decodes = all(segment.num_tokens == 1 for segment in plan.segments)
        return self.submit(executor, plan)

    def collected(self, executor: SteppedExecutor, ticket: Ticket) -> StepResult:
        """A step ends."""
        result = self.collect(executor, ticket)
        now = time.perf_counter()
        if self.decodes:
            self.owed_s += SHARE * (now - self.ended)
            if self.owed_s >= LEAST_S:
                time.sleep(self.owed_s)
                slept = time.perf_counter()
                self.owed_s, now = self.owed_s - (slept - now), slept
        self.ended = now
        return result


if __name__ == "__main__":
    slowed = Slowed()
    SteppedExecutor.submit = lambda self, plan: slowed.submitted(self, plan)  # type: ignore[method-assign]
    SteppedExecutor.collect = lambda self, ticket: slowed.collected(self, ticket)  # type: ignore[method-assign]
    main(*sys.argv[1:])
