"""Passes TCP connections on, later: `slow_link.py ADDRESS PORT HOST:PORT DELAY [FOLDER]`.

What comes in at ADDRESS PORT goes on to HOST:PORT after DELAY seconds, and back. FOLDER gets what was passed, a file
for each direction of each connection: 0-to, 0-from, 1-to.
"""

import asyncio
import itertools
import socket
import sys
from pathlib import Path

MOST = 2**18  # bytes read at once
WAITING = 512  # such pieces on their way, at most


# As on a connection without this process in between: a side that has fallen silent is noticed after 7 or 8 s.
ALIVE = ((socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 2),
         (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1), (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 5),
         (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 8000), (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1))  # fmt: skip


async def pump(reader, writer, delay, record):
    """Copies to the end of what comes in."""
    loop, pieces = asyncio.get_running_loop(), asyncio.Queue(WAITING)

    async def write():
        while True:
            due, piece = await pieces.get()
            await asyncio.sleep(due - loop.time())
            if not piece:
                return writer.write_eof()
            writer.write(piece)
            await writer.drain()

    writing = asyncio.create_task(write())
    piece = b"-"
    try:
        while piece:
            piece = await reader.read(MOST)
            if record is not None:
                record.write(piece)
                record.flush()
            await pieces.put((loop.time() + delay, piece))
        await writing
    finally:
        writing.cancel()


async def passed_on(near, to, delay, records):
    """A connection, until both sides have closed it, or one has broken it."""
    host, _, port = to.rpartition(":")
    try:
        far = await asyncio.open_connection(host, int(port), limit=MOST)
    except OSError:
        return near[1].transport.abort()
    for _, writer in (near, far):
        for option in ALIVE:
            writer.get_extra_info("socket").setsockopt(*option)
    sides = ((near[0], far[1]), (far[0], near[1]))
    pumps = [asyncio.create_task(pump(*side, delay, record)) for side, record in zip(sides, records)]
    done, rest = await asyncio.wait(pumps, return_when=asyncio.FIRST_EXCEPTION)
    for task in rest:
        task.cancel()
    broken = [task for task in done if isinstance(task.exception(), OSError)]
    for writer in (near[1], far[1]):
        writer.transport.abort() if broken else writer.close()


async def main(address, port, to, delay, folder=None):
    numbers = itertools.count()

    async def accept(reader, writer):
        number = next(numbers)
        names = [Path(folder, f"{number}-{way}") for way in ("to", "from")] if folder else []
        files = [open(name, "wb") for name in names]
        await passed_on((reader, writer), to, float(delay), files or (None, None))
        for file in files:
            file.close()

    server = await asyncio.start_server(accept, address, int(port), limit=MOST)
    print("listening", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
