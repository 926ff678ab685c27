"""Processes that wait to be the ranks of a process group; to start one takes seconds."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _serve(connection: Connection) -> None:
    torch.set_num_threads(1)
    connection.send("ready")
    while True:
        task = connection.recv()
        if task is None:
            return
        function, args, rank, size, (port, prefix), timeout = task
        try:
            store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=timeout))
            dist.init_process_group(
                "gloo",
                store=dist.PrefixStore(prefix, store),
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=timeout),
            )
            connection.send((True, function(*args)))
        except BaseException as error:  # whatever it is, the test wants to know
            connection.send((False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


class World:
    """Up to `most` ranks."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._ranks: list[tuple[Any, Connection]] = []
        # Not a FileStore: the first ranks that leave a group may delete its file under the last that comes.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._tasks = 0

    def _start(self, count: int) -> None:
        context = mp.get_context("forkserver")  # which imports once; it has run nothing, so it has no threads
        context.set_forkserver_preload(["torch.distributed.fsdp", "torch.distributed.tensor.parallel", "muon_kernels"])
        before = len(self._ranks)
        while len(self._ranks) < count:
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there,), daemon=True)
            process.start()
            there.close()  # or the end of the process would not be heard of
            self._ranks.append((process, here))
        for _, connection in self._ranks[before:]:
            connection.recv()  # imports take seconds, which are no part of a test's timeout

    def outcomes(
        self, size: int, function: Callable[..., Any], *args: Any, timeout: float = 60
    ) -> list[tuple[bool, Any]]:
        """(whether it returned, what) of function(*args) on every rank of a new gloo group; what it raised as text."""
        assert size <= self._most
        self._start(size)
        self._tasks += 1
        place = self._store.port, str(self._tasks)
        for rank in range(size):
            self._ranks[rank][1].send((function, args, rank, size, place, timeout))
        found: list[tuple[bool, Any]] = []
        alive = []
        for process, connection in self._ranks[:size]:
            try:
                found.append(connection.recv())
                alive.append((process, connection))
            except EOFError:
                found.append((False, "died"))
        # A process keeps its rank: torch remembers where parts are for a mesh that looks the same.
        self._ranks = [*alive, *self._ranks[size:]]
        return found

    def run(self, size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What function(*args) returns on every rank; AssertionError where one raised."""
        found = self.outcomes(size, function, *args)
        failed = [f"rank {rank} of {size}: {what}" for rank, (returned, what) in enumerate(found) if not returned]
        assert not failed, "\n".join(sorted(failed, key=lambda text: "Timed out" in text))
        return [what for _, what in found]

    def stop(self) -> None:
        """End the processes."""
        for process, connection in self._ranks:
            connection.send(None)
            process.join(10)
        self._ranks = []


@contextmanager
def world(most: int = 4) -> Iterator[World]:
    """Of processes that end with the context."""
    ranks = World(most)
    try:
        yield ranks
    finally:
        ranks.stop()
