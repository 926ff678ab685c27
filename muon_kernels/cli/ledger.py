"""Count what an optimizer step costs on a GPU, without one: launches, FLOPs, bytes, and the least time they take.

torch.optim.Muon and the batched loop are run on tensors without memory, and their operations counted. Ours are counted
by the plan that a step follows. Nothing here is a measured time: the bound is the largest of three quotients. No
implementation reaches it, except where a cache keeps what is needed again: nobody is credited with that.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from .. import backends
from ..coefficients import COEFFICIENTS, DEFAULT, Schedule, resolve
from ..newton_schulz import Square
from ..step.counting import Counter, count_iteration
from ..step.plan import Plan, plan_for_shapes
from . import estimate, scale
from .estimate import GPUS
from .models import MODELS, Model, Shapes


class Cost(NamedTuple):
    """Costs of one step.

    Bytes count each operand of a launch once, unless a plan knows more, and each result.
    """

    launches: int
    flops: float
    bytes: int


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counter of operations that compute. Views and allocations launch nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches = 0
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        if func.namespace == "aten" and not func.is_view and not name.startswith(("aten::empty", "aten::detach")):
            self.launches += 1
            tensors = [t for a in (*args, *(kwargs or {}).values(), out) for t in _tensors(a)]
            self.bytes += sum(t.numel() * t.itemsize for t in tensors)
        return out


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for t in value if isinstance(t, Tensor)] if isinstance(value, (list, tuple)) else []


def parameters(shapes: Shapes) -> list[nn.Parameter]:
    """Return fp32 parameters with gradients, without memory."""
    made = [nn.Parameter(torch.empty(m, n, device="meta")) for m, n, count in shapes for _ in range(count)]
    for p in made:
        p.grad = torch.empty_like(p)
    return made


def counted(step: Callable[[], Any]) -> Cost:
    """Return the cost of a step on such parameters. A first step, which allocates the state, is not counted."""
    step()
    with _Counter() as counter, FlopCounterMode(display=False) as flops:
        step()
    return Cost(counter.launches, flops.get_total_flops(), counter.bytes)


def batched_loop(params: Sequence[nn.Parameter]) -> Callable[[], None]:
    """Return a step of the bf16 loop that everybody writes, run once for all matrices of a shape."""
    buffers = [torch.zeros_like(p) for p in params]
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, p in enumerate(params):
        groups.setdefault((min(p.shape), max(p.shape)), []).append(i)

    @torch.no_grad()
    def step() -> None:
        for (m, n), members in groups.items():
            grads: list[Tensor] = [g for i in members if (g := params[i].grad) is not None]
            held = [buffers[i] for i in members]
            torch._foreach_lerp_(held, grads, 0.05)
            directions = torch._foreach_lerp(grads, held, 0.95)
            X = torch.stack([d.mT if d.shape[0] > d.shape[1] else d for d in directions]).bfloat16()
            X = X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
            for _ in range(5):
                A = X @ X.mT
                B = torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315)
                X = torch.baddbmm(X, B, X, beta=3.4445)
            updates = [x.mT if params[i].shape != (m, n) else x for i, x in zip(members, X.unbind(), strict=True)]
            own: list[Tensor] = [params[i] for i in members]
            torch._foreach_mul_(own, 1 - 1e-4)
            torch._foreach_add_(own, updates, alpha=-1e-3)

    return step


class Requests(Counter):
    """Counter of the bytes that products ask memory for, in tiles of tile x tile elements. Caches answer most of it.

    A tile needs its rows of A, its columns of B and its own elements of every addend.
    """

    def __init__(self, symmetric: bool, precise: bool, tile: int) -> None:
        super().__init__(symmetric, precise)
        self._tile = tile

    def traffic(self, A: Square, B: Square, C: Tensor | None, out: Tensor, triangle: bool) -> int:
        """Return the bytes that a product asks for. Tiles at an edge count as whole ones."""
        batch, m, n = out.shape
        rows, cols = -(-m // self._tile), -(-n // self._tile)
        tiles = rows * (rows + 1) // 2 if triangle else rows * cols
        # diag(d) B is an addend, too. B counts once if it is also C.
        diagonal_times = [other.high for of, other in ((A, B), (B, A)) if of.diagonal is not None]
        addends = {id(t) for t in (C, *diagonal_times) if t is not None}
        each = 2 * self._tile * A.high.shape[2] + len(addends) * self._tile**2
        return batch * out.itemsize * (tiles * each + m * n)


def requested(plan: Plan, tile: int, schedule: Schedule) -> int:
    """Return the bytes that the products of a step ask for in tiles of this size."""
    total = 0
    for b in plan.buckets:
        if not b.fused:
            ops = backends.get(b.backend)
            counter = Requests(ops.symmetric_products, ops.precise_squares, tile)
            count_iteration(counter, b.algorithm, *b.shape, schedule)
            total += b.count * counter.bytes
    return total


def traffic(plan: Plan, backend: str, schedule: Schedule) -> str:
    """Return, in words, the bytes of a plan by what moves them."""
    ops = backends.get(backend)
    text = f"prologue and epilogue move {plan.bytes / 1e6:.0f} MB,"
    text += f" {plan.bytes / max(1, plan.least_bytes):.2f} of the least"
    if plan.bytes > plan.least_bytes:
        text += " (fused steps read gradient and momentum twice)"
    if plan.product_bytes:
        text += f";\nproducts {plan.product_bytes / 1e6:.0f} MB with each operand read once"
        if tiles := ops.product_tiles():
            least, most = sorted(requested(plan, tile, schedule) / 1e6 for tile in tiles)
            text += f";\nthey load {least:.0f} to {most:.0f} MB, most of it from caches"
    return text


def own_plans(shapes: Shapes, schedule: Schedule) -> dict[str, Plan]:
    """Return the plan of each of our backends for GPUs."""
    names = (n for n in backends.BACKENDS if "cuda" in backends.get(n).device_types)
    return {n: plan_for_shapes(shapes, schedule=schedule, device="cuda", backend=n, available=False) for n in names}


def ledger(shapes: Shapes, schedule: Schedule | None = None) -> dict[str, Cost]:
    """Return the cost of a step of every implementation; ours with `schedule`, or the default one."""
    costs = {
        "torch.optim.Muon": counted(torch.optim.Muon(parameters(shapes)).step),
        "batched bf16 loop": counted(batched_loop(parameters(shapes))),
    }
    for name, plan in own_plans(shapes, schedule or resolve(DEFAULT)).items():
        costs[f"muon_kernels, {name}"] = Cost(plan.launches, plan.flops, plan.bytes + plan.product_bytes)
    return costs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add arguments for what to count, and for which GPU."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument("model", nargs="?", default="gpt2", choices=MODELS, help="default: gpt2")
    what.add_argument(
        "--shape", action="append", type=_shape, metavar="ROWSxCOLSxCOUNT", help="in place of a model; repeatable"
    )
    parser.add_argument("--gpu", "--device", default="h100", choices=GPUS, help="default: h100")
    parser.add_argument(
        "--ns-coefficients", default=DEFAULT, choices=COEFFICIENTS, help=f"of ours only, default: {DEFAULT}"
    )
    parser.add_argument(
        "--launch-us", type=_microseconds, default=2.0, help="assumed time of a launch by one thread, default: 2 µs"
    )
    parser.add_argument(
        "--ranks", type=_ranks, metavar="N", help="instead, estimates of a step on 8 ... N ranks, by layout"
    )


def _shape(text: str) -> tuple[int, int, int]:
    try:
        rows, cols, count = map(int, text.split("x"))
    except ValueError:
        rows = cols = count = 0
    if min(rows, cols, count) < 1:
        raise argparse.ArgumentTypeError(f"should be ROWSxCOLSxCOUNT, for example 64x768x108, but is: {text}")
    return rows, cols, count


def _microseconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"should be a number of microseconds >= 0 but is: {text}")
    return value


def _ranks(text: str) -> int:
    value = int(text)
    if value < 8 or value % 8:
        raise argparse.ArgumentTypeError(f"should be a multiple of 8 but is: {text}")
    return value


def run(args: argparse.Namespace) -> int:
    """Print the table; return 0."""
    model = Model(args.shape) if args.shape else MODELS[args.model]
    shapes, schedule, gpu = model.shapes, resolve(args.ns_coefficients), GPUS[args.gpu]
    if args.ranks:
        if not gpu.nvlink:
            linked = ", ".join(name for name, each in GPUS.items() if each.nvlink)
            print(f"--ranks should be of a GPU with NVLink ({linked}) but is of: {args.gpu}", file=sys.stderr)
            return 2
        print(" + ".join(f"{c} of {m}x{n}" for m, n, c in shapes))
        print("\n".join(scale.text(model, scale.ladder(args.ranks), gpu, schedule)))
        return 0
    costs = ledger(shapes, schedule)
    base = costs["torch.optim.Muon"]
    print(" + ".join(f"{c} of {m}x{n}" for m, n, c in shapes))
    print(f"least time on {args.gpu}: {gpu.flops / 1e12:.0f} TFLOP/s, {gpu.bytes / 1e12:.2f} TB/s,", end=" ")
    print(f"from NVIDIA's data sheet; {args.launch_us:g} µs a launch, assumed\n")
    print(f"{'':24}launches    GFLOP         MB   launch, ms  FLOP, ms  bytes, ms   at least, ms")
    for name, cost in costs.items():
        terms = cost.launches * args.launch_us / 1e3, cost.flops / gpu.flops * 1e3, cost.bytes / gpu.bytes * 1e3
        print(
            f"{name:24}{cost.launches:8}{cost.flops / 1e9:9.1f} ({cost.flops / base.flops:4.0%}){cost.bytes / 1e6:8.0f}"
            f"{terms[0]:11.3f}{terms[1]:10.3f}{terms[2]:11.3f}{max(terms):15.3f}"
        )
    print()
    plans = own_plans(shapes, schedule)
    for name, plan in plans.items():
        print(f"muon_kernels, {name}: {traffic(plan, name, schedule)}")
    print()
    print("\n".join(estimate.lines(plans, gpu, schedule)))
    return 0
