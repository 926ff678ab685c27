"""Time that messages between GPUs take, by published rates: NVLink inside a node, InfiniBand or RoCE between nodes.

A collective takes its bytes over a rate, and latency. Rings are timed as NCCL's own
tuner does, and trees with the bandwidth of rings, of which they reach less. Nothing here
was measured by us, and no collective is slowed by another or by what is multiplied meanwhile.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Fact(NamedTuple):
    """Constant of a network, and who says so."""

    value: float
    source: str


_TUNER = "NCCL 2.28.7, src/graph/tuning.cc"
FACTS = {
    "node": Fact(8, "GPUs in a node; NVIDIA DGX H100 data sheet"),
    "far": Fact(50e9, "bytes/s of a GPU to other nodes, one way, whatever the GPU; DGX H100 data sheet: 400 Gb/s"),
    "all_to_all_near": Fact(0.96, "of NVLink; DeepEP V1 (docs/legacy.md): 153 of 160 GB/s among 8 H800"),
    "all_to_all_far": Fact(0.86, "of the network; DeepEP V1: 43 of 50 GB/s among 16 H800"),
    "begin": Fact(8.4e-6, f"seconds of any send; {_TUNER}: Simple"),
    "hop_near": Fact(3.4e-6, f"seconds to a GPU of the node; {_TUNER}: ring, Simple"),
    "hop_far": Fact(14.0e-6, f"seconds to another node; {_TUNER}: ring, Simple"),
    "message": Fact(1e-6, "seconds between two messages that a GPU's proxy sends to other nodes, assumed"),
}


class Protocol(NamedTuple):
    """Protocol of rings and trees: seconds to begin and of a hop to the node's GPUs and to others, and what it reaches.

    Attributes:
        share: of the rate of the links.
        most: bytes/s, in one node, in two, and in more.
    """

    ring: tuple[float, float, float]
    tree: tuple[float, float, float]
    share: float
    most: tuple[float, float, float]


# NCCL 2.28.7, src/graph/tuning.cc, Hopper. Simple, whose bandwidth it does not discount, is left out.
PROTOCOLS = {
    "LL": Protocol((6.6e-6, 0.6e-6, 2.7e-6), (6.8e-6, 0.6e-6, 5.0e-6), 0.5, (141e9, 45e9, 35e9)),
    "LL128": Protocol((14e-6, 1.9e-6, 4.0e-6), (14e-6, 1.25e-6, 8.5e-6), 0.92, (math.inf, math.inf, math.inf)),
}
PROTOCOLS_SOURCE = (
    f"{_TUNER}: Hopper's LL and LL128, whichever is faster; rings, and for sums trees with their bandwidth"
)


class Seconds(NamedTuple):
    """Time of a collective: of its bytes, and latency."""

    bytes: float
    latency: float

    @property
    def both(self) -> float:
        """Return the whole time."""
        return self.bytes + self.latency

    def plus(self, other: Seconds) -> Seconds:
        """Return the time of both, one after the other."""
        return Seconds(self.bytes + other.bytes, self.latency + other.latency)

    def times(self, factor: float) -> Seconds:
        """Return the time of so many of it."""
        return Seconds(self.bytes * factor, self.latency * factor)


NOTHING = Seconds(0.0, 0.0)


class Group(NamedTuple):
    """Ranks of a process group: how many, and how many of them are in each node."""

    ranks: int
    near: int

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return -(-self.ranks // self.near)


class Network(NamedTuple):
    """Rates and latencies, see `FACTS`; `near` is what a GPU sends to its node, bytes/s one way."""

    near: float
    node: int = int(FACTS["node"].value)
    far: float = FACTS["far"].value
    all_to_all_near: float = FACTS["all_to_all_near"].value
    all_to_all_far: float = FACTS["all_to_all_far"].value
    begin: float = FACTS["begin"].value
    hop_near: float = FACTS["hop_near"].value
    hop_far: float = FACTS["hop_far"].value
    message: float = FACTS["message"].value

    def group(self, ranks: int, stride: int = 1) -> Group:
        """Return the group of every `stride`-th rank; ranks fill one node after the other."""
        return Group(ranks, max(1, min(ranks, self.node // stride)))

    def gather(self, total: float, group: Group) -> Seconds:
        """Return the time in which every rank gets `total` bytes, an equal part from each; or sums and keeps a part.

        Where a ring passes through nodes, all network cards of the group in a node carry it.
        """
        if group.ranks == 1:
            return NOTHING
        moved, hops = total * (group.ranks - 1) / group.ranks, group.ranks - 1
        return min((self._ring(p, moved, hops, group) for p in PROTOCOLS.values()), key=lambda s: s.both)

    def broadcast(self, total: float, senders: int, group: Group) -> Seconds:
        """Return the time in which some ranks send `total` bytes to all, by broadcasts that are launched together.

        They are taken to follow one another around a ring; NCCL's tuner does not say how they do.
        """
        if group.ranks == 1:
            return NOTHING
        hops = group.ranks - 2 + senders
        return min((self._ring(p, total, hops, group) for p in PROTOCOLS.values()), key=lambda s: s.both)

    def reduce(self, total: float, group: Group) -> Seconds:
        """Return the time in which `total` bytes are summed over all ranks, and all get the sums: by ring or tree."""
        if group.ranks == 1:
            return NOTHING
        ways = []
        for p in PROTOCOLS.values():
            twice = 2 * (group.ranks - 1)
            ways.append(self._ring(p, total * twice / group.ranks, twice, group))
            begin, near, far = p.tree
            latency = begin + 2 * ((group.near - 1) * near + math.floor(math.log2(group.nodes)) * far)
            ways.append(Seconds(2 * total / self._rate(p, group), latency))
        return min(ways, key=lambda s: s.both)

    def _ring(self, protocol: Protocol, moved: float, hops: int, group: Group) -> Seconds:
        begin, near, far = protocol.ring
        between = (group.nodes - 1) * hops / (group.ranks - 1)
        return Seconds(moved / self._rate(protocol, group), begin + (hops - between) * near + between * far)

    def _rate(self, protocol: Protocol, group: Group) -> float:
        links = self.near if group.nodes == 1 else min(self.near, group.near * self.far)
        return min(links * protocol.share, protocol.most[min(group.nodes, 3) - 1])

    def all_to_all(self, near: float, far: float, messages: float) -> Seconds:
        """Return the time in which a rank sends, or is sent, so many bytes of its node and of others at once.

        Args:
            near, far: bytes.
            messages: with other nodes; 0 if there are none.
        """
        if not (near or far):
            return NOTHING
        bytes_ = max(near / (self.near * self.all_to_all_near), far / (self.far * self.all_to_all_far))
        hop = self.hop_far + (messages - 1) * self.message if messages else self.hop_near
        return Seconds(bytes_, self.begin + hop)


class Loads(NamedTuple):
    """Bytes and messages that each rank sends to owners, and gets as one, in a round. On the way back both swap.

    Attributes:
        sent_near, sent_far, got_near, got_far: bytes inside a node and between nodes; float64, by rank.
        sends, gets: messages between nodes.
    """

    sent_near: Tensor
    sent_far: Tensor
    got_near: Tensor
    got_far: Tensor
    sends: Tensor
    gets: Tensor

    def seconds(self, network: Network) -> Seconds:
        """Return the time until the last rank has all; of a rank's two directions the busier counts."""
        near, far = self.sent_near.maximum(self.got_near), self.sent_far.maximum(self.got_far)
        messages = self.sends.maximum(self.gets)
        each = {*zip(near.tolist(), far.tolist(), messages.tolist(), strict=True)}
        return max((network.all_to_all(*load) for load in each), key=lambda s: s.both)


def loads(records: list[int], taken: list[int], near: int) -> Loads:
    """Return what the ranks of one replica exchange in a round.

    Args:
        records: bytes of a slice, by shard.
        taken: matrices that each rank owns.
        near: ranks in a node, see `Group`.
    """
    size = len(records)
    node = torch.arange(size) // near
    count = int(node[-1]) + 1
    record, own = torch.tensor(records, dtype=torch.float64), torch.tensor(taken, dtype=torch.float64)

    def here(values: Tensor) -> Tensor:
        return torch.zeros(count, dtype=torch.float64).index_add_(0, node, values)[node]

    holds, owns = (record > 0).double(), (own > 0).double()
    return Loads(
        sent_near=(here(own) - own) * record,
        sent_far=(own.sum() - here(own)) * record,
        got_near=own * (here(record) - record),
        got_far=own * (record.sum() - here(record)),
        sends=(owns.sum() - here(owns)) * holds,
        gets=(holds.sum() - here(holds)) * owns,
    )
