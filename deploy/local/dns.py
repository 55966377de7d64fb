"""A DNS server with one name, standing in for Docker's: it answers with the addresses of the live replicas."""

from __future__ import annotations

import socketserver
import struct
import threading

__all__ = ["ReplicaDns"]

_TYPE_A, _TYPE_OPT, _CLASS_IN = 1, 41, 1


class ReplicaDns:
    """UDP on 127.0.0.1, a port chosen by the system. `set` replaces the list of addresses ("host:port" or "host")."""

    def __init__(self, name: str = "server") -> None:
        self.name = name.lower()
        self._addresses: tuple[str, ...] = ()
        dns = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                data, udp = self.request
                if answer := dns.answer(data):
                    udp.sendto(answer, self.client_address)

        self._server = socketserver.ThreadingUDPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True).start()

    def set(self, addresses: list[str]) -> None:
        self._addresses = tuple(address.rsplit(":", 1)[0] for address in addresses)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, query: bytes) -> bytes | None:
        """The answer to one query (RFC 1035); None for what is not a query."""
        if len(query) < 12:
            return None
        number, flags, questions, _, _, num_additional = struct.unpack(">6H", query[:12])
        if flags & 0x8000 or questions != 1:
            return None
        labels, at = [], 12
        while at < len(query) and query[at]:
            labels.append(query[at + 1 : at + 1 + query[at]].decode("ascii", "replace"))
            at += 1 + query[at]
        if at + 5 > len(query):
            return None
        kind, _ = struct.unpack(">2H", query[at + 1 : at + 5])
        question = query[12 : at + 5]
        is_ours = ".".join(labels).lower().rstrip(".") == self.name
        addresses = self._addresses if is_ours and kind == _TYPE_A else ()
        status = 0 if is_ours else 3  # NXDOMAIN
        records = b"".join(
            # A pointer to the name in the question, a life of no time: the list changes at any moment.
            struct.pack(">HHHIH", 0xC00C, _TYPE_A, _CLASS_IN, 0, 4) + bytes(map(int, address.split(".")))
            for address in addresses
        )
        # EDNS in, EDNS out: without it a resolver takes the answer to be limited to 512 bytes (31 replicas).
        extra = struct.pack(">BHHIH", 0, _TYPE_OPT, 8192, 0, 0) if num_additional else b""
        header = struct.pack(">6H", number, 0x8480 | status, 1, len(addresses), 0, 1 if extra else 0)
        return header + question + records + extra
