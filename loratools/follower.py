"""Blocks of bytes, handed in order to a function in a thread of its own, while their maker goes on with the next."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

from loratools.refs import BLOCK_BYTES, Buffer, chunks

DEPTH = 8  # blocks on their way: maker and follower need not take the same time for each


class Follower:
    """Calls `take` with a copy of every block that is `put`, `DEPTH` blocks behind at most.

    `finish` waits for it; leaving the `with` before that drops what is on its way.
    """

    def __init__(self, take: Callable[[memoryview], object]) -> None:
        self._take = take
        self._free: SimpleQueue[bytearray] = SimpleQueue()
        self._full: SimpleQueue[tuple[bytearray, int] | None] = SimpleQueue()
        self._made, self._dropping = 0, False
        self._error: Exception | None = None

    def __enter__(self) -> Follower:
        self._pool = ThreadPoolExecutor(1)
        self._run = self._pool.submit(self._follow)
        return self

    def put(self, block: Buffer) -> None:
        """Take a block, whose buffer may be used again at once. Raises what `take` raised of an earlier one."""
        for part in chunks(block):
            room = self._room()
            if self._error is not None:
                raise self._error
            size = memoryview(part).nbytes
            room[:size] = part
            self._full.put((room, size))

    def _room(self) -> bytearray:
        if self._made < DEPTH and self._free.empty():
            self._made += 1
            return bytearray(BLOCK_BYTES)
        return self._free.get()

    def _follow(self) -> None:
        """Every block is given back, those behind an error unseen: whoever waits for room is not left waiting."""
        while (item := self._full.get()) is not None:
            room, size = item
            try:
                if not self._dropping:
                    self._take(memoryview(room)[:size])
            except Exception as error:
                self._error, self._dropping = error, True
            self._free.put(room)

    def finish(self) -> None:
        """Wait until every block was taken. Raises what `take` raised."""
        self._full.put(None)
        self._run.result()
        if self._error is not None:
            raise self._error

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._dropping = True
        self._full.put(None)
        self._pool.shutdown()
