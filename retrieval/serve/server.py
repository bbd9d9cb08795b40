"""The server: a socket, uvicorn, and patience for slow clients that ends."""

import asyncio
import contextlib
import ipaddress
import logging
import socket
from dataclasses import dataclass, field
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from ...pipeline.config import ComputeOptions
from ...pipeline.errors import QfError
from ...pipeline.results import Result
from ...pipeline.workspace import Workspace
from ..config import ServeOptions
from .app import make_app
from .collection import Collection
from .limits import Door

log = logging.getLogger(__name__)
HEADER_SECONDS = 10.0  # in which the header of a request must have arrived
CONNECTIONS = 900  # at a time; beyond them uvicorn answers 503
BACKLOG = 1024
LAST_SECONDS = 5  # that running requests get when the server ends
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


class PatientProtocol(H11Protocol):
    """HTTP whose connections are closed if no whole header comes for a while."""

    seconds = HEADER_SECONDS
    _overdue: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def _wait(self) -> None:
        """Begin to wait for a header, or stop if it is there."""
        if self.conn.their_state is not h11.IDLE:
            self._stop()
        elif self._overdue is None:
            self._overdue = self.loop.call_later(self.seconds, self.transport.close)

    def _stop(self) -> None:
        if self._overdue is not None:
            self._overdue.cancel()
            self._overdue = None


@dataclass(frozen=True)
class Serving(Result):
    """A server that has its address, and waits to be run."""

    url: str
    images: int
    app: ASGIApp = field(repr=False)
    listener: socket.socket = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """The address and the number of images."""
        return {"url": self.url, "images": self.images}

    def __str__(self) -> str:
        return f"serving {self.images:,} images at {self.url}  (Ctrl-C ends it)"

    def run(self) -> None:
        """Answer until the process is interrupted."""
        config = uvicorn.Config(
            self.app,
            http=PatientProtocol,
            ws="none",
            log_config=None,
            log_level="critical",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=CONNECTIONS,
            backlog=BACKLOG,
            timeout_keep_alive=15,
            timeout_graceful_shutdown=LAST_SECONDS,
        )
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn passes the signal on once all is closed
            uvicorn.Server(config).run(sockets=[self.listener])


def open_server(workspace: Workspace, options: ServeOptions, on: ComputeOptions) -> Serving:
    """Open the index of a workspace and the server's address. QfError if the address cannot be used; errors of
    `open_searcher`."""
    listener = _listen(options.host, options.port)
    host, port = listener.getsockname()[:2]
    local = ipaddress.ip_address(host).is_loopback
    if not local and not options.token:
        log.warning("everybody who reaches %s can search and see these pictures; --token asks for one", host)
    door = Door(options.token, (*LOCAL_NAMES, options.host.lower()) if local else ())
    try:
        collection = Collection(workspace, on, round(options.max_megapixels * 1e6))
        app = make_app(collection, door, round(options.max_upload * 2**20), options.queue)
        listener.listen(BACKLOG)  # from here on a client waits rather than being refused
    except BaseException:
        listener.close()
        raise
    shown = f"[{host}]" if ":" in host else host
    return Serving(f"http://{shown}:{port}", len(collection.opened), app, listener)


def _listen(host: str, port: int) -> socket.socket:
    """A socket that is bound to the address. QfError if it cannot be."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise QfError(f"cannot listen at {host}:{port} ({reason}); choose another --port or --host") from error
    listener.setblocking(False)
    return listener
