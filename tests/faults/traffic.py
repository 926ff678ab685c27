"""Faults in who is dealt what, and in what a rank is said to send, keep and hold; see plant.py."""

from __future__ import annotations

from plant import Fault

TESTS = ["tests/distributed/test_traffic.py"]

BALANCE = "muon_kernels/distributed/balance.py"
EXCHANGE = "muon_kernels/distributed/exchange.py"
TRAFFIC = "muon_kernels/distributed/traffic.py"
SLICES = "muon_kernels/distributed/slices.py"
OWNER, REPLICAS = (f"muon_kernels/distributed/strategies/{name}.py" for name in ("owner", "replicas"))

FAULTS = [
    Fault("cheapest first", "key=lambda i: (-costs[i], i)", "key=lambda i: (costs[i], i)", "deal or slowest", BALANCE),
    Fault("LPT alone", "_TRIES if high * ranks > _GOOD * sum(total) else 0", "0", "deal or slowest", BALANCE),
    Fault(
        "first fit in all cases",
        "_TRIES if high * ranks > _GOOD * sum(total) else 0",
        "_TRIES",
        "figures",
        BALANCE,
    ),
    Fault(
        "first fit forgets loads",
        "owners, total = [0] * len(costs), list(loads)",
        "owners, total = [0] * len(costs), [0] * len(loads)",
        "deal_minds",
        BALANCE,
    ),
    Fault(
        "LPT forgets loads",
        "total = [0] * len(costs), before.copy()",
        "total = [0] * len(costs), [0] * ranks",
        "deal_minds",
        BALANCE,
    ),
    Fault("any rank may have it", "(among[i] if among else None) or everybody", "everybody", "deal_minds", BALANCE),
    Fault(
        "bound passed", "if total[owner] + costs[i] <= bound:", "if total[owner] <= bound:", "deal or slowest", BALANCE
    ),
    Fault("goes on where none is better", "if low >= high:", "if low > high:", "even_one_is_kept", BALANCE),
    Fault("one try", "_TRIES = 10", "_TRIES = 1", "deal or slowest", BALANCE),
    Fault("place of another kind kept", "before, start = kind, 0", "before = kind", "deal or slowest", BALANCE),
    Fault(
        "least is the costliest or the mean", "bound = max(bound, sum(", "max(bound, sum(", "deal or slowest", BALANCE
    ),
    Fault(
        "least counts one piece more",
        "falling[k * (ranks - 1) : k * ranks + 1]",
        "falling[k * (ranks - 1) : k * ranks + 2]",
        "deal or slowest",
        BALANCE,
    ),
    Fault(
        "what stays is sent",
        "out = end_of(self.sent) - self.sent[team.shard].bytes",
        "out = end_of(self.sent)",
        "counted and 2-None",
        OWNER,
    ),
    Fault("nothing comes back", "return out + back + (team", "return out + (team", "counted and 2-None", OWNER),
    Fault(
        "replicas for nothing",
        "(team.replica_count - 1) * self.share * self.sent[0].record\n\n",
        "0\n\n",
        "counted and HSDP",
        OWNER,
    ),
    Fault(
        "a share to itself",
        "return self.share * (self.team.replica_count - 1)",
        "return self.share * self.team.replica_count",
        "counted and DDP",
        REPLICAS,
    ),
    Fault(
        "places of one rank for all",
        "place in zip(self.lots, self.places[self.team.replica], strict=True)",
        "place in zip(self.lots, self.places[0], strict=True)",
        "DDP",
        REPLICAS,
    ),
    Fault(
        "norms not held", "(slices + owned + NORM_BYTES * norms)", "(slices + owned)", "counted and 2-None", EXCHANGE
    ),
    Fault(
        "one set of buffers counted",
        "return min(IN_FLIGHT, len(self.rounds)) * (slices",
        "return (slices",
        "counted and 2-None",
        EXCHANGE,
    ),
    Fault(
        "state of one replica's matrices",
        "for bundle in r.momenta for matrix in bundle or ()]",
        "for bundle in r.momenta[:1] for matrix in bundle or ()]",
        "counted and HSDP",
        EXCHANGE,
    ),
    Fault(
        "gathers not counted",
        "return 2 + (self.lot.key.team.replicas is not None)",
        "return 2",
        "counted and HSDP",
        OWNER,
    ),
    Fault(
        "buffers as if there were one replica",
        "IN_FLIGHT * 2 * elements * (1 + replicas)",
        "IN_FLIGHT * 2 * elements * 2",
        "held_memory",
        SLICES,
    ),
    Fault(
        "shares grow with ranks", "cap // (IN_FLIGHT * (1 + ranks))", "cap // (IN_FLIGHT * 2)", "held_memory", SLICES
    ),
    Fault("model: rounds of all", "range(0, max(self.owned), size)]", "range(1)]", "counted and 700000", TRAFFIC),
    Fault(
        "model: own slices sent",
        "sent[rank] += (here - own) * record",
        "sent[rank] += here * record",
        "counted and 2-None",
        TRAFFIC,
    ),
    Fault(
        "model: tall as wide",
        "shards = [Rectangle(left, top, c, r) for top, left, r, c in shards]",
        "pass",
        "counted and 3-None",
        TRAFFIC,
    ),
    Fault("model: no lone holder", "alone = mesh.shards > 1 and", "alone = False and", "lone", TRAFFIC),
    Fault(
        "model: dealt lot by lot",
        "if mesh.shards > 1:\n        order",
        "if True:\n        order",
        "equal_cost",
        TRAFFIC,
    ),
    Fault("AdamW has one moment", "Cost(0, 8 * elements", "Cost(0, 4 * elements", "figures", TRAFFIC),
    Fault(
        "paper gathers fp32",
        "sent=_ring(2 * elements(shapes), ranks)",
        "sent=_ring(4 * elements(shapes), ranks)",
        "figures",
        TRAFFIC,
    ),
    Fault("sums sent once", "count * sums * 2 * _ring(4", "count * sums * _ring(4", "sums", TRAFFIC),
    Fault("MuonBP: all blocks", "(period - 1) * blocks) / period", "period * blocks) / period", "sums", TRAFFIC),
    Fault(
        "AdamW by the rank's own matrices",
        "return 8 * self.elements // self.ranks",
        "return 8 * self.elements",
        "without_a_part",
        "muon_kernels/step/plan.py",
    ),
    Fault(
        "plan leaves out what is shared",
        "for task in ordered for bucket in task.buckets",
        "for task in ordered if not task.together for bucket in task.buckets",
        "counted and 2-None",
        "muon_kernels/step/run.py",
    ),
]
