"""Stages 2 and 3: whether products and steps are right. The judge is float64; see `muon_kernels.checks`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from ... import backends
from ...backends import cuda
from ...checks import Wrong, products, steps
from .implementations import Implementation, implementations
from .stage import Context, Place, Result
from .traces import profiled
from .workloads import Operands

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}


class Case(NamedTuple):
    """A check: its name, and what raises where it fails."""

    name: str
    check: Callable[[], object]


def judged(cases: Sequence[Case], context: Context, data: dict[str, Any]) -> Result:
    """Run checks as long as there is time; say what is wrong, and what was left out.

    Raises:
        RuntimeError: there was time for no check, which is no reason to call anything right; or the GPU is lost, so
            that checks after this one would say nothing.
    """
    wrong, done = [], 0
    for case in cases:
        if context.left() <= 0:
            break
        torch.manual_seed(0)
        try:
            case.check()
        except Wrong as error:
            wrong.append(f"{case.name}: {error}")
        except Exception as error:
            wrong.append(f"{case.name}: {type(error).__name__}: {error}")
            if lost(context.place):
                raise RuntimeError(f"{wrong[-1]}; the GPU answers nothing after that") from error
        done += 1
    if cases and not done:
        raise RuntimeError(f"there was no time for one of {len(cases)} checks; give more --minutes")
    data |= {"checks": done, "left out": [case.name for case in cases[done:]]}
    what = f"{done} checks" if done == len(cases) else f"{done} of {len(cases)} checks"
    summary = f"{what}, {len(wrong)} wrong" if wrong else f"{what}, all right"
    if done < len(cases):
        summary += "; no time for the others"
    return Result(summary, data, tuple(wrong))


def lost(place: Place) -> bool:
    """Whether an earlier error has spoilt the GPU for this process."""
    if place.device != "cuda":
        return False
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device=place.device).item()
    except Exception:
        return True
    return False


def check_products(context: Context) -> Result:
    """Check products of every tile and instruction set, of both dtypes, aligned and not, each made twice."""
    data: dict[str, Any] = {"diagonal bias, 2^-24": {}}
    cases = _interleaved([_product_cases(context, dtype, data["diagonal bias, 2^-24"]) for dtype in DTYPES])
    result = judged(cases, context, data)
    data["cases by implementation"] = dict(Counter(case.name.partition(": ")[0] for case in cases))
    if context.place.kind != "cpu" and not result.wrong:
        data["kernels"] = {name: _kernels_of(context, name) for name in context.place.backends if name != "eager"}
    return result


def _kernels_of(context: Context, name: str) -> list[str]:
    """Return the names of the kernels that a backend takes for these products: which of its tiles were checked."""
    run, device = products.of_backend(backends.get(name)), context.place.device

    def step() -> None:
        with torch.device(device):
            for at in context.sizes.products:
                products.any_shape(run, *_batched(at, context.place), at.width)

    try:
        return sorted({kernel.name for kernel in profiled(step, device) if "product" in kernel.name})
    except Exception as error:  # of a profiler that is not installed whole: no reason to doubt results
        return [f"not known: {type(error).__name__}: {error}"]


def _interleaved(parts: Sequence[Iterator[tuple[int, Case]]]) -> list[Case]:
    """Return all cases by their turns: if time runs out, every implementation has had as many."""
    return [case for _, case in sorted((each for part in parts for each in part), key=lambda each: each[0])]


def _product_cases(context: Context, dtype_name: str, bias: dict[str, Any]) -> Iterator[tuple[int, Case]]:
    place, dtype = context.place, DTYPES[dtype_name]
    for implementation in implementations(place, dtype):
        checks = _checks_of(implementation, context, dtype, bias)
        for turn, (what, check) in enumerate(checks):
            yield turn, Case(f"{implementation.name}, {dtype_name}: {what}", partial(_on, place.device, check))


def _on(device: str, check: Callable[[], object]) -> None:
    with torch.device(device):
        check()


def _checks_of(
    implementation: Implementation, context: Context, dtype: torch.dtype, bias: dict[str, Any]
) -> Iterator[tuple[str, Callable[[], object]]]:
    run, sizes = products.twice(implementation.run), context.sizes
    if implementation.fixed:
        yield from _of_a_tile(run, context, dtype)
        return
    for at in sizes.products:
        shape = (*_batched(at, context.place), at.width, dtype)
        what = f"{shape[0]} of {at.m}x{at.n}, {at.width} bytes"
        if not implementation.precise:
            yield f"roughly, {what}", partial(products.roughly, run, *shape)
            continue
        yield f"exact, {what}", partial(products.any_shape, run, *shape)
        yield f"one rounding, {what}", partial(products.one_rounding, run, *shape)
    if not implementation.precise:
        return
    for m in sizes.squares:
        width = 16 if m % 8 == 0 else 2
        yield f"parts of squares, {m}", partial(products.parts_of_squares, run, m, width, dtype)
    if dtype == torch.bfloat16:
        yield from _of_bf16(run, sizes.squares)
    for k in sizes.biased:
        yield f"diagonals, k = {k}", partial(_biased, implementation, k, dtype, bias)


def _of_a_tile(run: products.Run, context: Context, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield few checks of one tile: each product that differs is a kernel that takes seconds to compile."""
    few = context.sizes.products[: 2 if dtype == torch.bfloat16 else 1]
    for at in few:
        shape = (*_batched(at, context.place), at.width, dtype)
        yield f"exact, {shape[0]} of {at.m}x{at.n}, {at.width} bytes", partial(products.any_shape, run, *shape)
    if dtype == torch.bfloat16:
        m = context.sizes.squares[:2][-1]
        yield f"parts of squares, {m}", partial(products.parts_of_squares, run, m, 16 if m % 8 == 0 else 2, dtype)


def _batched(at: Operands, place: Place) -> tuple[int, int, int]:
    return (at.batch if at.batch > 0 else -at.batch * place.multiprocessors), at.m, at.n


def _of_bf16(run: products.Run, squares: Sequence[int]) -> Iterator[tuple[str, Callable[[], object]]]:
    for m in squares:
        yield f"precise squares, {m}", partial(products.precise_squares, run, m)
    for which, width in (("a", 8), ("b", 4), ("c", 2), ("out", 8)):
        yield f"{which} at {width} bytes", partial(products.one_less_aligned, run, which, width)
    yield "matrices an odd distance apart", partial(products.odd_distance_of_matrices, run)
    yield "no columns", partial(products.without_columns, run, 17)
    yield "a NaN", partial(products.nan_stays_in_its_matrix, run)
    yield "symmetric to the bit", partial(products.result_is_symmetric, run)


def _biased(implementation: Implementation, k: int, dtype: torch.dtype, bias: dict[str, Any]) -> None:
    mean, largest = products.diagonal_bias(implementation.run, 64, k, dtype)
    bias[f"{implementation.name}, {str(dtype).removeprefix('torch.')}, k = {k}"] = {"mean": mean, "largest": largest}


class Here(NamedTuple):
    """A backend at a place, as checks of steps want it; `capture` and `replay` are of a graph of its own."""

    backend: str
    device: str
    capture: Any = None
    replay: Any = None


def check_steps(context: Context) -> Result:
    """Check whole steps of every backend."""
    place = context.place
    cases = _interleaved([enumerate(_step_cases(context, name)) for name in place.backends])
    return judged(cases, context, {})


def _step_cases(context: Context, name: str) -> Iterator[Case]:
    place, shapes = context.place, context.sizes.steps
    here = Here(name, place.device)
    exact = partial(steps.steps_are_exact, here, shapes)
    yield Case(f"{name}: two steps", exact)
    device = torch.device(place.device)
    if name == "cuda" and len(own := cuda.own_kinds(device)) > 1:
        for kind in own:
            yield Case(f"{name}: two steps by {kind}", partial(_by_kind, kind, device, exact))
    yield Case(f"{name}: momentum is torch's to the bit", partial(steps.momentum_is_torchs, here, shapes))
    for shape in _ends(shapes):
        yield Case(f"{name}: zero and NaN, {shape[0]}x{shape[1]}", partial(steps.zero_and_nan, here, shape))
    for factor in (1e30, 1e-30):
        yield Case(f"{name}: gradients times {factor:g}", partial(exact, factor=factor, steps=1))
    yield Case(f"{name}: not contiguous", partial(exact, strided=True, steps=1))
    if backends.get(name).refuses(device, [torch.bfloat16], torch.bfloat16) is None:
        yield Case(f"{name}: parameters in bf16", partial(exact, dtype=torch.bfloat16))
    yield Case(f"{name}: a learning rate on the device", partial(steps.lr_on_the_device, here, shapes))
    if place.device == "cuda":
        yield Case(f"{name}: on a side stream", partial(steps.on_a_side_stream, here, shapes))
    if place.graph is not None:
        yield Case(
            f"{name}: captured and replayed", partial(_captured, steps.captured_steps_replay, here, place, shapes)
        )
        if place.kind == "gpu":  # what replays elsewhere knows no memory but its own
            what = f"{name}: replayed after the workspace had grown"
            yield Case(what, partial(_captured, steps.replays_after_growth, here, place, shapes))
    for coefficients, shape in context.sizes.zoo:
        what = f"{name}: all spectra, {coefficients}, {shape[0]}x{shape[1]}"
        yield Case(what, partial(steps.zoo, here, coefficients, shape))


def _by_kind(kind: str, device: torch.device, check: Callable[[], None]) -> None:
    with cuda.multiplying_by(kind, device):
        check()


def _ends(shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, int]]:
    """Return a shape of few rows and one of many."""
    flat = sorted({(s[0], s[1]) for s in shapes if len(s) == 2})
    return [flat[0], flat[-1]]


def _captured(check: Callable[..., None], here: Here, place: Place, shapes: Sequence[tuple[int, ...]]) -> None:
    assert place.graph is not None
    graph = place.graph()
    check(here._replace(capture=graph.capture, replay=graph.replay), shapes)
