"""Requests that come at about the same time are drawn together."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.drawing import Drawer, Noise


@dataclass(eq=False)
class Job:
    """A picture that somebody waits for.

    Args:
        what: label or prompt.
        noise: [1, C, h, w].
        previews: whether the picture after each step is wanted, too.
        gone: nobody waits any more; it need not be drawn.
    """

    what: int | str
    noise: Noise
    previews: bool = False
    gone: bool = False
    _done: asyncio.Queue[tuple[NDArray[Any], int] | Exception] = field(default_factory=asyncio.Queue)

    async def next(self) -> tuple[NDArray[Any], int]:
        """The picture, or the next preview, and how many were drawn together; raises what drawing raised."""
        done = await self._done.get()
        if isinstance(done, Exception):
            raise done
        return done

    def finish(self, done: tuple[NDArray[Any], int] | Exception) -> None:
        self._done.put_nowait(done)


class Batches:
    """A queue of jobs, and the task that draws them, a batch at a time.

    Args:
        drawer: draws.
        max_batch: pictures that are drawn together.
        max_wait: seconds that the first of them waits for others.
        max_queue: pictures that may wait.
        drawn: called for each batch that was drawn, with its size and the seconds that it took, before the last pictures
            are handed on: whoever has a picture finds it counted.
    """

    def __init__(self, drawer: Drawer, max_batch: int, max_wait: float, max_queue: int, drawn: Callable[[int, float], None]):
        self.drawer, self.max_batch, self.max_wait, self.max_queue, self.drawn = drawer, max_batch, max_wait, max_queue, drawn
        self._queue: asyncio.Queue[Job] = asyncio.Queue()
        self._next: Job | None = None  # taken from the queue, but not for the batch of that time

    @property
    def waiting(self) -> int:
        return self._queue.qsize()

    def add(self, jobs: Sequence[Job]) -> bool:
        """Whether there was room for all of them; if not, none is taken."""
        if self.waiting + len(jobs) > self.max_queue:
            return False
        for job in jobs:
            self._queue.put_nowait(job)
        return True

    async def draw_for_ever(self) -> None:
        while True:
            batch = await self._collect()
            try:
                await asyncio.to_thread(self._draw, batch, asyncio.get_running_loop())
            except Exception as error:  # whatever it is, those who wait must hear of it, and the next batch may do better
                for job in batch:
                    job.finish(error)

    async def _collect(self) -> list[Job]:
        batch = [await self._take()]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.max_wait):
                while len(batch) < self.max_batch:
                    job = await self._take()
                    if job.previews != batch[0].previews:  # another graph draws it
                        self._next = job
                        break
                    batch.append(job)
        return batch

    async def _take(self) -> Job:
        while True:
            job, self._next = self._next or await self._queue.get(), None
            if not job.gone:
                return job

    def _draw(self, batch: list[Job], loop: asyncio.AbstractEventLoop) -> None:
        """Runs in a thread of its own."""
        what, noise = [job.what for job in batch], np.concatenate([job.noise for job in batch])
        if batch[0].previews:
            draw, parts = self.drawer.previews, self.drawer.steps
        else:
            draw, parts = lambda *of: [self.drawer.draw(*of)], 1
        begin = time.perf_counter()
        for part, pictures in enumerate(draw(what, noise), 1):
            if part == parts:
                loop.call_soon_threadsafe(self.drawn, len(batch), time.perf_counter() - begin)
            for job, picture in zip(batch, pictures, strict=True):
                loop.call_soon_threadsafe(job.finish, (picture, len(batch)))
