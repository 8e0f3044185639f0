"""The server as a process: a listening socket, uvicorn, signals and the drain. Knows no route."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Callable, Generator

import uvicorn

from ...spec.errors import TargetError
from .app import LOG, make_app
from .config import ServerConfig
from .http import BoundedConnections, Protocol
from .state import ServerState
from .watchdog import watch

_SWITCH_INTERVAL_S = 0.0005
_POLL_S = 0.02
_MAX_HEADER_BYTES = 65536


def listen(config: ServerConfig) -> socket.socket:
    """A bound socket. TargetError when the address cannot be had.

    The kernel gives up a connection whose peer takes nothing for `send_timeout_s`, so that what is buffered
    for a dead reader does not stay for ever.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            timeout_ms = int(config.send_timeout_s * 1000)
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeout_ms)
        bound.bind(address)
        bound.listen(2048)
    except OSError as error:
        raise TargetError(
            "server.address",
            f"The server cannot listen on {config.host}, port {config.port}.",
            f"{error.strerror or error}.",
            "Choose another --host or --port.",
        ) from error
    return bound


class Server:
    """Serves `state` on `bound` until told to stop.

    `begin_drain` (or a first SIGTERM or SIGINT) refuses new requests and makes `/ready` fail; the running
    ones have `drain_timeout_s`, then they are aborted, and the server ends. A second signal aborts at once.
    """

    def __init__(
        self, state: ServerState, bound: socket.socket, on_ready: Callable[[], None] | None = None
    ) -> None:
        self.state = state
        self._bound = bound
        self._on_ready = on_ready
        app = BoundedConnections(make_app(state), state, lambda: len(self._uvicorn.server_state.connections))
        self._uvicorn = _Uvicorn(_settings(app, state.config))
        self._drain: asyncio.Task[None] | None = None
        self._log = logging.getLogger(LOG)

    @property
    def port(self) -> int:
        return int(self._bound.getsockname()[1])

    def run(self, handle_signals: bool = True) -> None:
        """Serves in this thread; closes the engines at the end."""
        try:
            with _quick_switches():
                asyncio.run(self.serve(handle_signals))
        finally:
            for model in self.state.models.values():
                model.client.shut_down()

    async def serve(self, handle_signals: bool = True) -> None:
        """Serves in the running event loop."""
        loop = asyncio.get_running_loop()
        for model in self.state.models.values():
            model.client.connect()
        if handle_signals:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self.begin_drain)
        ready = asyncio.create_task(self._announce())
        watching = asyncio.create_task(watch(self.state))
        try:
            await self._uvicorn.serve(sockets=[self._bound])
        finally:
            ready.cancel()
            watching.cancel()

    def begin_drain(self) -> None:
        """Once: drain. Twice: end at once. In the event loop."""
        if self.state.is_draining:
            self._log.warning("ending at once: %d requests are aborted", self.state.num_open)
            for model in self.state.models.values():
                model.client.abort_all()
            self._uvicorn.should_exit = self._uvicorn.force_exit = True
            return
        self.state.is_draining = True
        self._log.warning("draining: %d requests may finish", self.state.num_open)
        self._drain = asyncio.get_running_loop().create_task(self._finish())

    async def _announce(self) -> None:
        while not self._uvicorn.started:
            await asyncio.sleep(_POLL_S / 4)
        if self._on_ready is not None:
            self._on_ready()

    async def _finish(self) -> None:
        deadline_s = self.state.clock() + self.state.config.drain_timeout_s
        while self.state.num_open and self.state.clock() < deadline_s:
            await asyncio.sleep(_POLL_S)
        if self.state.num_open:
            self._log.warning("%d requests did not finish in time and are aborted", self.state.num_open)
            for model in self.state.models.values():
                model.client.abort_all()
        self._uvicorn.should_exit = True


class _Uvicorn(uvicorn.Server):
    """uvicorn without signal handlers of its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


def _settings(app: BoundedConnections, config: ServerConfig) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=config.access_log,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
        timeout_graceful_shutdown=5,
        ssl_certfile=config.tls_certificate,
        ssl_keyfile=config.tls_key,
    )


@contextlib.contextmanager
def _quick_switches() -> Generator[None]:
    """The engine's thread computes and the loop's thread waits for the network: with the interpreter's usual
    5 ms between switches, each send would wait that long for its turn."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
