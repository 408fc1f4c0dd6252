"""Sockets of the service: clients that never finish their request, and ports that are taken."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from pyard.errors import InputError


class ImpatientProtocol(H11Protocol):
    """HTTP of uvicorn, which waits for ever for the rest of a request; this closes the connection after `seconds`."""

    seconds = 10.0
    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait_or_stop()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._wait_or_stop()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._waiting is not None:
            self._waiting.cancel()

    def _wait_or_stop(self) -> None:
        answering = self.cycle is not None and not self.cycle.response_complete
        if self._waiting is not None and answering:
            self._waiting.cancel()
            self._waiting = None
        elif self._waiting is None and not answering:
            # Not anew for each byte: one a second would keep a connection for ever.
            self._waiting = self.loop.call_later(self.seconds, self._give_up)

    def _give_up(self) -> None:
        self._waiting = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; an InputError if the port is taken or may not be used, before the service says that it runs."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        reason = reason.partition(" (while ")[0]  # some versions of Python repeat the address
        raise InputError(f"cannot listen on {host} port {port} ({reason}); choose another --port or --host") from None
