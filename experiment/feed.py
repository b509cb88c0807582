"""Batches made ahead of the iterations that use them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

import torch
from torch import Tensor

from experiment.batches import Batch, Recipe
from experiment.errors import RunError
from experiment.progress import say


class Feed:
    """The batches of one process, in order; some of them are made ahead by others.

    Neither threads nor workers change a number: a batch is a function of its iteration.

    Args:
        recipe: Makes rows of the batch of an iteration.
        rows: Those of this process.
        device: Where they are wanted.
        ahead: How many are made ahead; 0 makes each when it is asked for.
        workers: Processes that make them; 0 for a thread of this one.
    """

    def __init__(
        self, recipe: Recipe, rows: range, device: torch.device, *, ahead: int, workers: int
    ) -> None:
        self.recipe, self.rows, self.device = recipe, rows, device
        self.ahead, self.workers = max(ahead, workers), workers
        self._pool: Executor | None = None
        self._coming: deque[tuple[int, Future[Batch]]] = deque()
        self._restarted = False

    @contextmanager
    def running(self) -> Iterator[Feed]:
        """With its thread or workers at work."""
        try:
            yield self
        finally:
            self._stop()

    def __call__(self, iteration: int) -> Batch:
        """The batch of an iteration, on the device.

        Raises:
            RunError: If workers die twice.
        """
        if not self.ahead:
            return self.recipe(iteration, self.rows).to(self.device)
        try:
            batch = self._next(iteration)
        except BrokenProcessPool as error:
            self._restart(iteration, error)
            batch = self._next(iteration)
        return batch.to(self.device)

    def _next(self, iteration: int) -> Batch:
        if self._pool is None:
            self._pool = self._start()
        if self._coming and self._coming[0][0] != iteration:
            self._coming.clear()
        following = self._coming[-1][0] + 1 if self._coming else iteration
        for number in range(following, iteration + self.ahead + 1):
            self._coming.append((number, self._pool.submit(*self._job(number))))
        batch = self._coming.popleft()[1].result()
        if not self.workers:
            return batch
        batch = batch.map(torch.from_numpy)
        return batch.pinned() if self._pins else batch

    @property
    def _pins(self) -> bool:
        return self.device.type == "cuda"

    def _job(self, iteration: int) -> tuple:
        if self.workers:
            return _made, iteration, self.rows
        return self._make, iteration

    def _make(self, iteration: int) -> Batch:
        batch = self.recipe(iteration, self.rows)
        return batch.pinned() if self._pins else batch

    def _start(self) -> Executor:
        if not self.workers:
            return ThreadPoolExecutor(1, thread_name_prefix="batches")
        # spawned: a fork of a process with threads or a GPU may hang
        return ProcessPoolExecutor(
            self.workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_prepare,
            initargs=(self.recipe,),
        )

    def _restart(self, iteration: int, error: BrokenProcessPool) -> None:
        if self._restarted:
            raise RunError(
                f"the workers that read the data died twice, the second time at iteration "
                f"{iteration} ({error}). Look at their memory, or use speed.workers=0."
            ) from error
        self._restarted = True
        say(f"a worker died at iteration {iteration}; the workers are started once more")
        self._stop()

    def _stop(self) -> None:
        self._coming.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


_recipe: Recipe | None = None


def _prepare(recipe: Recipe) -> None:
    """In a worker: keep what all its batches have in common; one thread each.

    Signals to the whole group are for the process that trains, which ends its workers; of one that
    was killed they would wait for ever, so they look for it.
    """
    global _recipe
    _recipe = recipe
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()


def _leave_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _made(iteration: int, rows: range) -> Batch:
    """As arrays: tensors would go through shared memory, whose keeper outlives a killed worker and
    hides its death."""
    assert _recipe is not None
    return _recipe(iteration, rows).map(Tensor.numpy)
