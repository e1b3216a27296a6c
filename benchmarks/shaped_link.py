"""Run a TCP proxy on this machine with the delay and bandwidth of a wide-area network.

    python benchmarks/shaped_link.py --to 5555 --round-trip-ms 100 --mbit-per-second 100

Prints {"port": …, "counts_port": …} when ready. What connects to `port` is connected to 127.0.0.1:`--to`; each
direction has the bandwidth for itself, and half of the round trip as its delay. What connects to `counts_port` is told
{"up": …, "down": …}: the bytes that have been passed on to the target and back. Bytes keep their order and none are
lost, so this is a line without losses and without TCP's own search for the bandwidth; headers of packets are not
counted.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections import deque

import click

CHUNK_BYTES = 16 * 1024
# What a router in front of the line would hold. Beyond it the sender is held up.
QUEUE_BYTES = 256 * 1024
# Small, so that the bytes wait where they are paced. (Linux takes this twice.)
SOCKET_BUFFER_BYTES = 64 * 1024
# As on a real line. Loopback's packets of 64 kB in such buffers stop and go: 5 % of the bandwidth were lost.
SEGMENT_BYTES = 1448


class Direction:
    """One way through the link. A chunk leaves the queue when the line has sent those before it and itself, and
    arrives `delay_seconds` later."""

    def __init__(self, delay_seconds: float, bytes_per_second: float) -> None:
        self._delay_seconds = delay_seconds
        self._bytes_per_second = bytes_per_second
        self._max_held_bytes = QUEUE_BYTES + delay_seconds * bytes_per_second
        self._line_free_at = 0.0
        self.passed_bytes = 0

    async def carry(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        """Until the source ends, or one of the two is lost."""
        held: deque[tuple[float, bytes]] = deque()  # when each chunk arrives
        held_bytes = 0
        changed = asyncio.Event()
        loop = asyncio.get_running_loop()

        async def take() -> None:
            nonlocal held_bytes
            while chunk := await _read(source):
                now = loop.time()
                self._line_free_at = max(self._line_free_at, now) + len(chunk) / self._bytes_per_second
                held.append((self._line_free_at + self._delay_seconds, chunk))
                held_bytes += len(chunk)
                changed.set()
                await asyncio.sleep(self._line_free_at - now - QUEUE_BYTES / self._bytes_per_second)
                while held_bytes > self._max_held_bytes:  # the target does not read
                    changed.clear()
                    await changed.wait()

        async def give(taking: asyncio.Task[None]) -> None:
            nonlocal held_bytes
            while held or not taking.done():
                if not held:
                    changed.clear()
                    await changed.wait()
                    continue
                arrives_at, chunk = held[0]
                await asyncio.sleep(arrives_at - loop.time())
                target.write(chunk)
                await target.drain()
                held.popleft()
                held_bytes -= len(chunk)
                self.passed_bytes += len(chunk)
                changed.set()

        taking = asyncio.create_task(take())
        taking.add_done_callback(lambda _: changed.set())
        try:
            await give(taking)
        except ConnectionError:
            pass
        finally:
            taking.cancel()
            target.close()  # each way needs the other: the whole connection ends


class Link:
    """The link to one port."""

    def __init__(self, to_port: int, round_trip_seconds: float, bytes_per_second: float) -> None:
        self._to_port = to_port
        self._up = Direction(round_trip_seconds / 2, bytes_per_second)
        self._down = Direction(round_trip_seconds / 2, bytes_per_second)

    async def serve(self) -> None:
        """Until the process is ended."""
        listening = _small(socket.socket())  # accepted sockets inherit the sizes
        listening.bind(("127.0.0.1", 0))
        line = await asyncio.start_server(self._connected, sock=listening, limit=CHUNK_BYTES)
        counts = await asyncio.start_server(self._counts, "127.0.0.1", 0)
        ready = {"port": _port(line), "counts_port": _port(counts)}
        print(json.dumps(ready), flush=True)
        await line.serve_forever()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connecting = _small(socket.socket())
        connecting.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(connecting, ("127.0.0.1", self._to_port))
        except OSError:
            writer.close()
            return
        far_reader, far_writer = await asyncio.open_connection(sock=connecting, limit=CHUNK_BYTES)
        for one in (writer, far_writer):
            one.transport.set_write_buffer_limits(CHUNK_BYTES)
        await asyncio.gather(self._up.carry(reader, far_writer), self._down.carry(far_reader, writer))

    async def _counts(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(json.dumps({"up": self._up.passed_bytes, "down": self._down.passed_bytes}).encode())
        writer.close()


async def _read(source: asyncio.StreamReader) -> bytes:
    """Read up to one chunk; empty at the end of the stream, also of a lost connection."""
    try:
        return await source.read(CHUNK_BYTES)
    except ConnectionError:
        return b""


def _small(unconnected: socket.socket) -> socket.socket:
    unconnected.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SEGMENT_BYTES)
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        unconnected.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
    return unconnected


def _port(server: asyncio.Server) -> int:
    return int(server.sockets[0].getsockname()[1])


@click.command()
@click.option("--to", type=int, required=True, help="Target port on this machine.")
@click.option("--round-trip-ms", type=float, required=True, help="Round-trip delay.")
@click.option("--mbit-per-second", type=float, required=True, help="Bandwidth of each direction.")
def main(to: int, round_trip_ms: float, mbit_per_second: float) -> None:
    """Forward bytes with the delay and the bandwidth of a long line."""
    asyncio.run(Link(to, round_trip_ms / 1e3, mbit_per_second * 1e6 / 8).serve())


if __name__ == "__main__":
    main()
