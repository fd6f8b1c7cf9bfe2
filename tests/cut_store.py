"""An object store that can be cut off, and is back later with all that it held."""

import contextlib
import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import parse_qs, quote, urlsplit

from tests.object_store import served_bucket


class CutStore:
    """A wire to a served bucket. Cutting the server itself would leave the connections that are open.

    Args:
        address: of the bucket at its server.
    """

    def __init__(self, address: str) -> None:
        server = parse_qs(urlsplit(address).query)["endpoint_override"][0]
        host, _, port = server.partition(":")
        self._server = (host, int(port))
        self._listener: socket.socket | None = None
        self._open: set[socket.socket] = set()
        self._port = 0
        self.restore()
        self.address = address.replace(quote(server, safe=""), quote(f"127.0.0.1:{self._port}", safe=""))
        """Of the bucket by way of the wire."""

    def restore(self) -> None:
        """Answer again, at the same port."""
        if self._listener is None:
            self._listener = socket.create_server(("127.0.0.1", self._port))
            self._port = self._listener.getsockname()[1]
            threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self) -> None:
        """Refuse new connections and break the old ones in the middle of what they say."""
        if self._listener is not None:
            listener, self._listener = self._listener, None
            _break(listener)
            for end in list(self._open):
                _break(end)

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                near = listener.accept()[0]
                far = socket.create_connection(self._server)
                self._open |= {near, far}
                if self._listener is not listener:  # cut meanwhile
                    _break(near)
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=(one, other), daemon=True).start()

    def _carry(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while content := one.recv(1 << 16):
                other.sendall(content)
        for end in (one, other):
            _break(end)
            self._open.discard(end)


def _break(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()


@contextmanager
def cut_store() -> Iterator[CutStore]:
    """An empty bucket behind a wire that can be cut."""
    with served_bucket() as address:
        logging.getLogger("werkzeug").setLevel(logging.CRITICAL)  # the server tells of requests that were cut
        store = CutStore(address)
        try:
            yield store
        finally:
            store.cut()
