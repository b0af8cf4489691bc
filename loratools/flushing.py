"""What is written goes to the disk while more of it is made, so that the sync at the end has little left to wait for."""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor

EVERY = 64 << 20  # bytes: a file below that is synced once, at its end
_sync = getattr(os, "fdatasync", os.fsync)  # macOS has the second alone


class Flushing:
    """Syncs an open file in a thread of its own, whenever so many more bytes were written to it, from any thread.

    It never waits for the disk but in `finish`, and a slow one is asked again only when it is done: syncs do not pile up.
    """

    def __init__(self, descriptor: int, every: int | None = None) -> None:
        self.descriptor, self.every = descriptor, EVERY if every is None else every
        self._lock, self._fresh = threading.Lock(), 0
        self._pool: ThreadPoolExecutor | None = None
        self._last: Future[None] | None = None

    def wrote(self, count: int) -> None:
        """Take note of bytes just written. Raises the OSError of the sync before, whose bytes may be lost."""
        with self._lock:
            self._fresh += count
            if self._fresh < self.every or (self._last is not None and not self._last.done()):
                return
            if self._last is not None:
                self._last.result()
            self._pool = self._pool or ThreadPoolExecutor(1)
            self._fresh, self._last = 0, self._pool.submit(_sync, self.descriptor)

    def finish(self) -> None:
        """Wait for the sync under way. Raises its OSError: a later sync of the file would not tell of it again."""
        self.stop()
        if self._last is not None:
            self._last.result()

    def stop(self) -> None:
        """Wait for the sync under way, whatever becomes of it, so that the file can be closed."""
        if self._pool is not None:
            self._pool.shutdown()
