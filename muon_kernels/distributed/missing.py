"""Names of the ranks that keep a collective from completing.

What fails in a collective seldom says whose part is missing. So each rank on which one fails writes to the store of the
process group when it came to it, and reads who else has: a rank that died or hangs has not, nor has one that still
waits for such a rank; one that was slow came last. A step that goes well writes nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from threading import Thread
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

# Seconds for which a rank whose collective has failed waits for word of the others, whose timeouts may end later.
_PATIENCE = 5.0
# The store that has this rank's word.
_given: Any = None
# Seconds after the first rank from which on it is said which rank came last.
_LATE = 0.5


class _Call:
    """A roll call of a process group.

    Attributes:
        answered: whether the store has said who is absent.
        absent: the other ranks of the group of which there is no word.
        words: of each rank the name of the group in which a collective has failed, and when the rank came to it, in
            seconds since the epoch; none unless all ranks have given theirs.
    """

    def __init__(self, store: Any, ranks: Sequence[int], word: tuple[str, float]) -> None:
        """Take the store of all ranks, the numbers of those of the group, and this one's word."""
        self._store, self._ranks, self._word = store, ranks, word
        self.answered = False
        self.absent = [rank for rank in ranks if rank != dist.get_rank()]
        self.words: dict[int, tuple[str, float]] = {}

    def run(self) -> None:
        """Give this rank's word and wait for the others'; end early where the store is gone."""
        try:
            self._store.set(_key(dist.get_rank()), json.dumps(self._word))
            end = time.monotonic() + _PATIENCE
            while (absent := self._silent(self.absent)) and time.monotonic() < end:
                self.absent, self.answered = absent, True
                time.sleep(0.05)
            if not absent:
                self.words = {rank: tuple(json.loads(self._store.get(_key(rank)))) for rank in self._ranks}
            self.absent, self.answered = absent, True
        except Exception:  # the store may be on the rank that died; what was heard before stays known
            return

    def _silent(self, ranks: list[int]) -> list[int]:
        """Return which of `ranks` have not given their word; one question, or some more for each of these."""
        if not ranks or self._store.check([_key(rank) for rank in ranks]):
            return []
        half = len(ranks) // 2
        return self._silent(ranks[:half]) + self._silent(ranks[half:]) if half else ranks


def _key(rank: int) -> str:
    return f"muon_kernels/failed/{rank}"


def take_back() -> None:
    """Take back this rank's word of a failure that the process has survived: it would be mistaken for the next."""
    global _given
    if _given is not None:
        store, _given = _given, None
        with suppress(Exception):
            store.delete_key(_key(dist.get_rank()))


def missing(group: dist.ProcessGroup, since: float) -> str:
    """Return which ranks keep a collective that has failed here from completing, as the end of a sentence.

    Takes five seconds where a rank is missing. All ranks on which it has failed should call this.

    Args:
        group: the ranks of the collective.
        since: when this rank came to it, in seconds since the epoch.
    """
    try:
        return _missing(group, since)
    except Exception:  # the groups may be gone, and the error that is being told of matters more
        return ""


def _missing(group: dist.ProcessGroup, since: float) -> str:
    global _given
    store = distributed_c10d._get_process_group_store(distributed_c10d._get_default_group())
    call = _Call(store, dist.get_process_group_ranks(group), (group.group_name, since))
    _given = store
    asking = Thread(target=call.run, daemon=True)  # which may wait for a store that hangs
    asking.start()
    asking.join(2 * _PATIENCE)
    if not call.answered:
        return "; which rank is missing is not known, as the store of the process group does not answer"
    if call.absent:
        who = names(call.absent)
        return f"; missing: {who}, not heard of within {_PATIENCE:g} s: dead, hanging, or waiting for one that is"
    elsewhere = [rank for rank, (name, _) in call.words.items() if name != group.group_name]
    if elsewhere:
        return f"; missing: {names(elsewhere)}, where a collective with other ranks has failed"
    times = {rank: since for rank, (_, since) in call.words.items()}
    last = max(times, key=times.__getitem__)
    if (late := times[last] - min(times.values())) > _LATE:
        return f"; rank {last} came last, {late:.1f} s after the first"
    return "; all ranks came to it, and it failed on all"


def names(ranks: Sequence[int]) -> str:
    """Return a text such as "rank 0" or "ranks 1 and 2"."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > 4:
        return f"{len(ranks)} ranks from {ranks[0]} to {ranks[-1]}"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"
