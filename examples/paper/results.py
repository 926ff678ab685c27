"""Results in a file of JSON lines, and the processes that make what is missing there."""

from __future__ import annotations

import heapq
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

from configs import SPECTRA, Config, Result

# Of a line. Raise it when a result gets other fields, or a config's field another meaning.
FORMAT = 3


def key(kind: str, config: Result) -> str:
    """Return what tells a task from all others: its kind and its fields."""
    return json.dumps([kind, config], sort_keys=True)


class Results:
    """Results by task. A task that is missing is run, and its result appended to the file at once.

    Of the tasks that wait, the one that costs most goes first: what depends on it has the most time then.

    Args:
        path: path of the file, which need not exist yet.
        pool: where tasks run; None raises LookupError for one that is missing.
        work: what runs a task in the pool and returns its result.
        workers: how many tasks run at the same time.
        say: called with a line of text for each task that is done.

    Raises:
        ValueError: a line is of another format, or two are of texts that have one name and are not the same. Half of a
            last line, as an interruption leaves it, is cut off.
    """

    def __init__(
        self,
        path: Path,
        pool: Executor | None = None,
        work: Callable[[Any], Result] | None = None,
        workers: int = 1,
        say: Callable[[str], object] = print,
    ) -> None:
        self.path, self.pool, self.work, self.say = path, pool, work, say
        self._free = workers
        self._stopped: BaseException | None = None
        self._lock = threading.RLock()  # again by the same thread, where the pool runs a task at once
        self._waiting: list[tuple[float, int, Any, Future[Result]]] = []
        self._done: dict[str, Future[Result]] = {}
        self._texts: dict[str, str] = {}
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        if lines and not lines[-1].endswith(b"\n"):
            if pool is not None:
                os.truncate(path, sum(map(len, lines[:-1])))
            del lines[-1]
        for number, line in enumerate(lines, 1):
            result = self._read(line, number)
            self.check_texts(result.get("texts", {}))
            self._done[key(result["kind"], result["config"])] = done = Future()
            done.set_result(_with_fields(result))

    def _read(self, line: bytes, number: int) -> Result:
        try:
            result = json.loads(line)
        except ValueError:
            result = None
        found = result.get("format") if isinstance(result, dict) else None
        if found == FORMAT and result["kind"] == "Config":
            fits = result["config"].keys() == {field.name for field in fields(Config)}
        else:
            fits = found == FORMAT
        if not fits:
            raise ValueError(
                f"line {number} of {self.path} should be a result of format {FORMAT} with today's fields of Config but "
                f"has format: {found}; move the file away, or give another folder by --out"
            )
        return result  # type: ignore[no-any-return]

    def check_texts(self, texts: Mapping[str, str]) -> None:
        """Raise ValueError if a text, of this name and digest, is not that of the results so far."""
        for name, digest in texts.items():
            if (known := self._texts.setdefault(name, digest)) != digest:
                raise ValueError(
                    f"text {name!r} should be that of the other results in {self.path}, {known}, but is {digest}: its "
                    "file has changed, or another Python, with another library, made them; take that file, or the "
                    'Python that "machine" names there, or give another folder by --out'
                )

    def has(self, task: Any) -> bool:
        """Return whether the result of a task is there."""
        future = self._done.get(key(type(task).__name__, asdict(task)))
        return future is not None and future.done()

    def stop(self) -> None:
        """Begin no other task, now or later; what asks for one that is missing raises KeyboardInterrupt."""
        with self._lock:
            self._drop(KeyboardInterrupt())

    def _drop(self, error: BaseException) -> None:
        self._stopped = error
        waiting, self._waiting = self._waiting, []
        for *_, done in waiting:
            done.set_exception(error)

    def __call__(self, tasks: Sequence[Any]) -> list[Result]:
        """Return the results of tasks, in order; wait until all are there.

        Raises:
            LookupError: one is missing, and there is no pool.
        """
        with self._lock:
            futures = [self._wanted(task) for task in tasks]
            self._start()
        return [future.result() for future in futures]

    def _wanted(self, task: Any) -> Future[Result]:
        name = key(type(task).__name__, asdict(task))
        if name not in self._done:
            if self.pool is None:
                raise LookupError(f"{self.path} should have every result but lacks: {task}; run.py makes it")
            if self._stopped is not None:
                raise self._stopped
            self._done[name] = Future()
            heapq.heappush(self._waiting, (-task.cost, len(self._done), task, self._done[name]))
        return self._done[name]

    def _start(self) -> None:
        assert self.pool is not None or not self._waiting
        while self._free and self._waiting:
            self._free -= 1
            *_, task, done = heapq.heappop(self._waiting)
            self.pool.submit(self.work, task).add_done_callback(partial(self._finish, task, done))  # type: ignore[union-attr, arg-type]

    def _finish(self, task: Any, done: Future[Result], of: Future[Result]) -> None:
        """Keep a result before anyone can see it, and start the next task."""
        with self._lock:
            self._free += 1
            try:
                result = {"format": FORMAT, "kind": type(task).__name__, **of.result()}
                self.check_texts(result.get("texts", {}))
                line = json.dumps(_without_fields(result), allow_nan=False)
                with self.path.open("a") as file:
                    file.write(line + "\n")
            except BaseException as error:
                done.set_exception(error)
                # The whole stops, and goes on where it was when it is started again.
                self._drop(error)
                return
            done.set_result(_with_fields(json.loads(line)))
            self._start()
        self.say(f"{task}{_summary(result)}")


def _without_fields(result: Result) -> Result:
    """Return a result whose rows of spectra are without the names of their fields, which are most of the file."""
    if "spectra" not in result:
        return result
    return {**result, "spectra": [[row[field] for field in SPECTRA] for row in result["spectra"]]}


def _with_fields(result: Result) -> Result:
    """Undo `_without_fields`."""
    if "spectra" not in result:
        return result
    return {**result, "spectra": [dict(zip(SPECTRA, row, strict=True)) for row in result["spectra"]]}


def _summary(result: Result) -> str:
    if "loss" not in result:
        return ""
    found = "diverged" if result["loss"] is None else f"loss {result['loss']:.4f}"
    return f": {found}, {result['seconds']:.1f} s"
