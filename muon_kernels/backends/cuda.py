"""The verbs in CUDA C++ for NVIDIA GPUs of compute capability 8.0 and up (csrc/cuda)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..coefficients import Schedule
from ..newton_schulz import Square, square
from ..verbs import ApplyOptions, ApplyUpdate, MomentumUpdate, Step
from . import Fused, eager, get, kinds, native
from .gpu import FUSED_TILE, fused_parts, fusing_pays
from .gpu import default_workspace_bytes as default_workspace_bytes
from .gpu import leading_dimension as leading_dimension
from .gpu import precise_squares as precise_squares
from .gpu import symmetric_products as symmetric_products
from .kinds import MMA, TRITON, WGMMA, Ranking
from .terms import terms_needed

# Matrices of a launch, csrc's momentum_capacity() and so on, for plans made on a machine without the module.
MOMENTUM_CAPACITY, APPLY_CAPACITY, FUSED_CAPACITY = 406, 677, 392
# Most rows of `fused_step`, by the terms of a number. Registers hold R, Q and their product.
FUSED_ROWS = {2: 128, 3: 64}
# Tensor instructions, by major compute capability, that take the place of mma.sync.
_OWN_INSTRUCTIONS = {9: "wgmma", 10: "tcgen05"}
_HOPPER = (9, 0)  # the only compute capability that has it
# Whether "auto" takes product_sm90.cu there, unless `tune` has timed it. It was executed on a CPU alone. What waits for
# what in it is written by hand; for Triton's kernels a compiler does that, which others have used for years. True once
# `verify` has passed.
_WGMMA_PROVEN = False


# Facts, see `Backend`.
device_types = ("cuda",)
normalizes = False


class _Device:
    """The device of tensors and launches. Tests put another in its place, whose launches an emulator executes."""

    type = "cuda"

    def module(self) -> ModuleType:
        """Return the compiled module."""
        return native.required()

    def unavailable(self) -> str | None:
        """Implement `Backend.unavailable`: name all that is missing, the device first."""
        missing = []
        if torch.version.cuda is None:
            missing.append(f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch")
        elif not torch.cuda.is_available():
            missing.append("torch finds no CUDA device; check the driver with nvidia-smi")
        if native.module() is None:
            missing.append(
                "the compiled module is missing; install muon_kernels with a C++17 compiler and nvcc on PATH, and with "
                "pip's -e if Python starts in its source directory"
            )
        elif not hasattr(native.module(), "cuda"):
            missing.append(
                "muon_kernels was built without CUDA; reinstall it with MUON_KERNELS_CUDA=1 and nvcc, which is on PATH "
                "or comes with pip install nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-cccl"
            )
        return ", and ".join(missing) or None

    def has_wgmma(self) -> bool:
        """Return whether the module has code for sm_90a."""
        return bool(getattr(getattr(native.module(), "cuda", None), "wgmma", False))

    def capability(self, device: torch.device) -> tuple[int, int]:
        """Return (major, minor) of the compute capability."""
        return torch.cuda.get_device_capability(device)

    def name(self, device: torch.device) -> str:
        """Return the GPU's name."""
        return torch.cuda.get_device_name(device)

    def stream(self, device: torch.device) -> int:
        """Return the address of the current stream."""
        return torch.cuda.current_stream(device).cuda_stream

    def guard(self, device: torch.device) -> AbstractContextManager[Any]:
        """Make `device` the current one."""
        return torch.cuda.device(device)

    def __init__(self) -> None:
        self._loaded: set[torch.device] = set()
        self.rankings: dict[str, tuple[Ranking, ...]] = {}  # by the GPU's name; as kept, read when they are asked for

    def load(self, device: torch.device) -> None:
        """Load all kernels before the first launch: a graph that is captured later may need one that never ran."""
        if device not in self._loaded:
            self.module().cuda.load_kernels()
            self._loaded.add(device)


_device = _Device()

_NO_CODE = "muon_kernels was built without code for this GPU; reinstall it with MUON_KERNELS_CUDA_ARCHS={}{}"
_DRIVER = "the driver is older than the nvcc that built muon_kernels; update it, or reinstall with an older nvcc"
_ARGUMENTS = (
    "kernels take up to 32 KiB of arguments, for which the driver must be of CUDA 12.1 (530) or newer (nvidia-smi "
    "shows it); if it is, please report it"
)
_EARLIER = "an earlier launch may be at fault, not only this one; CUDA_LAUNCH_BLOCKING=1 shows which"
# By cudaError_t.
_MENDS = {
    1: _ARGUMENTS,
    2: "free memory on the device",
    35: _DRIVER,
    98: _NO_CODE,
    200: _ARGUMENTS,
    209: _NO_CODE,
    222: _DRIVER,
}


@contextmanager
def _launching(shape: Sequence[int], device: torch.device) -> Iterator[int]:
    """Yield the address of the stream to launch on; errors inside then say what was tried on what, and what helps."""
    try:
        with _device.guard(device):
            _device.load(device)
            yield _device.stream(device)
    except (RuntimeError, ValueError) as error:
        what, *code = error.args
        mend = "please report it"
        if code:
            what += f" (CUDA error {code[0]})"
            mend = _MENDS.get(code[0], _EARLIER).format(*_device.capability(device))
        count, rows, cols = shape
        raise type(error)(f"{what}, for {count} of {rows}x{cols} on {device}; {mend}") from None


def unavailable() -> str | None:
    """Implement `Backend.unavailable`."""
    return _device.unavailable()


def refuses(device: torch.device, dtypes: Sequence[torch.dtype], workspace_dtype: torch.dtype) -> str | None:
    """Implement `Backend.refuses`."""
    if device.type != _device.type:
        return f"expected CUDA tensors, got {device}; use backend='auto'"
    if bad := [d for d in dtypes if d not in native.DTYPES]:
        return f"expected float32, bfloat16 or float16 tensors, got {bad[0]}; use backend='auto'"
    if (capability := _device.capability(device)) < (8, 0):
        return "expected compute capability 8.0 or more, {} has {}.{}; use backend='auto'".format(device, *capability)
    return None


def prefers_instead(device: torch.device, rows: int, cols: int) -> tuple[str, str] | None:
    """Prefer Triton where it was faster when `tune` timed both, or else where it is expected to be.

    It is expected to be faster where a GPU has tensor instructions that this backend does not use, and products take
    the time. On compute capability 9.0 mma.sync reaches 63 % of the tensor cores' rate, wgmma all of it ("Dissecting
    the NVIDIA Hopper Architecture", arXiv 2501.12084), which products use where the module was built with code for
    sm_90a; on 10.x it is further from tcgen05. 12.x has neither. Up to 128 rows a step is fused here and reads
    memory most of the time.
    """
    if ranking := _ranking(device, rows):
        faster = f"triton multiplies faster from {ranking.rows} rows on, measured by tune"
        return (TRITON, faster) if ranking.kinds[0] == TRITON else None
    why = None if _few(rows) else _expects_triton(device)
    return None if why is None else (TRITON, why)


def _few(rows: int) -> bool:
    """Return whether a step of matrices with so many rows is fused, unless its options forbid it."""
    return rows <= max(FUSED_ROWS.values())


def _expects_triton(device: torch.device) -> str | None:
    """Return why Triton is taken there unless something faster was measured; None where it is not."""
    major, minor = _device.capability(device)
    if major not in _OWN_INSTRUCTIONS:
        return None
    if WGMMA in own_kinds(device):
        unproven = "cuda's kernels with wgmma have not run on a GPU yet; backend='cuda' takes them"
        return None if _WGMMA_PROVEN else unproven
    own = _OWN_INSTRUCTIONS[major]
    return f"on compute capability {major}.{minor} tensor cores are faster by {own}, which triton uses"


def rankings_file(device: torch.device) -> Path:
    """Return the file in which `tune` keeps what it found on such a GPU."""
    return kinds.file_of(_device.name(device))


def own_kinds(device: torch.device) -> tuple[str, ...]:
    """Return the kinds of this backend's products that can run there, the one expected to be faster first."""
    return (WGMMA, MMA) if _device.capability(device) == _HOPPER and _device.has_wgmma() else (MMA,)


def kinds_there(device: torch.device) -> tuple[str, ...]:
    """Return the kinds of products that can run there, Triton's among them, the one expected to be faster first."""
    own = own_kinds(device)
    if get(TRITON).unavailable() is not None:
        return own
    return (TRITON, *own) if _expects_triton(device) else (*own, TRITON)


def rankings(device: torch.device) -> tuple[Ranking, ...]:
    """Return what `tune` found on such a GPU; nothing where it did not run."""
    gpu = _device.name(device)
    if gpu not in _device.rankings:
        _device.rankings[gpu] = kinds.load(kinds.file_of(gpu), partial(kinds_there, device))
    return _device.rankings[gpu]


def _ranking(device: torch.device, rows: int) -> Ranking | None:
    """Return what `tune` found for so many rows; None where it did not run."""
    return kinds.ranking_for(rankings(device), rows)


def _kind(device: torch.device, rows: int) -> str:
    """Return the kind by which this backend multiplies there."""
    own, ranking = own_kinds(device), _ranking(device, rows)
    if ranking is None and not _WGMMA_PROVEN and _few(rows):
        return MMA  # "auto" takes this backend for so few rows
    return next(kind for kind in (*(ranking.kinds if ranking else ()), *own) if kind in own)


@contextmanager
def multiplying_by(kind: str, device: torch.device) -> Iterator[None]:
    """Let products that are prepared inside run by a kind, whatever is kept: `tune` and `verify` compare them."""
    before, _device.rankings = _device.rankings, {_device.name(device): (Ranking(0, (kind,)),)}
    try:
        yield
    finally:
        _device.rankings = before


def remarks(device: torch.device, shape: tuple[int, int], workspace_dtype: torch.dtype) -> tuple[str, ...]:
    """Say which instructions multiply what does not take the fused step, where there are several or `tune` chose."""
    if ranking := _ranking(device, shape[0]):
        return (f"cuda multiplies by {_kind(device, shape[0])} from {ranking.rows} rows on, measured by tune",)
    if _device.capability(device) != _HOPPER or _few(shape[0]):
        return ()
    if WGMMA in own_kinds(device):
        return ("cuda multiplies by wgmma, the default with code for sm_90a",)
    return ("cuda multiplies by mma.sync: it was built without code for sm_90a",)


def rehearsal() -> None:
    """Return None: all is compiled."""


def describe() -> str:
    """Implement `Backend.describe`."""
    return "CUDA C++ for compute capability 8.0 and up"


def momentum_update(args: MomentumUpdate) -> Tensor:
    """Implement `Backend.momentum_update`. In scratch: the sums of squares of all tiles, and the scales."""
    _C, x, scratch = _device.module(), args.x, args.scratch
    batch = x.shape[0]
    if scratch is None:
        scratch = torch.empty(batch * scratch_bytes(*x.shape[1:]), dtype=torch.uint8, device=x.device)
    scale = scratch[scratch.numel() - 8 * batch :].view(torch.float32)[:batch]
    update, _alive = native.momentum_update(_C, args, scale)
    assert 8 * _C.cuda.momentum_partials(update) + 8 * batch <= scratch.numel()
    with _launching(x.shape, x.device) as stream:
        _C.cuda.momentum_update(update, native.dtype(_C, x.dtype), scratch.data_ptr(), stream)
    if args.momentum is not None:
        torch.autograd.graph.increment_version([b.tensor for b in args.momentum])
    return scale


def _run(products: list[object], operands: list[object]) -> None:
    _prepare(products, operands)()


def _prepare(products: list[object], operands: list[object]) -> Callable[[], None]:
    _C = _device.module()
    out: Tensor = operands[0][3].high  # type: ignore[index]
    with _launching(out.shape, out.device):
        by_wgmma = _kind(out.device, out.shape[1]) == WGMMA
        program = _C.cuda.Program(products, native.dtype(_C, out.dtype), by_wgmma)

    def run(alive: list[object] = operands) -> None:
        with _launching(out.shape, out.device) as stream:
            program.run(stream)

    return run


_queue = native.Queue(_run, _prepare)


def program(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Implement `Backend.program`."""
    return _queue.program(run)


then = _queue.then


def syrk(A: Tensor | Square, *, out: Square, **options: Any) -> None:
    """Implement `Products.syrk`."""
    A = square(A)
    _queue.product(_device.module(), A, A, out, transposed=True, symmetric=True, **options)


def syrkx(A: Square, B: Square, *, out: Square, gamma: float = 0.0) -> None:
    """Implement `Products.syrkx`."""
    _queue.product(_device.module(), A, B, out, symmetric=True, gamma=gamma)


def gemm(
    A: Square, X: Tensor | Square, *, out: Tensor | Square, C: Tensor | Square | None = None, **options: Any
) -> None:
    """Implement `Products.gemm`."""
    _queue.product(_device.module(), A, square(X), square(out), C=None if C is None else square(C), **options)


def add(A: Square, *, out: Square, C: Square | None = None, **options: Any) -> None:
    """Implement `Products.add`, by torch's operations."""
    then(partial(eager.add, A, out=out, C=C, **options), [out.high, A.high])


def _on_device(x: float | Tensor, device: torch.device) -> tuple[float, Tensor | None]:
    """Return a number for the host, and its tensor if only the device knows it."""
    if isinstance(x, Tensor):
        return 0.0, x.to(device, torch.float32)
    return x, None


def _apply_arguments(
    args: ApplyUpdate, options: ApplyOptions, x: Tensor | None, device: torch.device
) -> tuple[object, object, object]:
    """Return csrc's ApplyUpdate and ApplyOptions, and what must live as long."""
    _C = _device.module()
    lr, lr_tensor = _on_device(args.lr, device)
    weight_decay, decay_tensor = _on_device(args.weight_decay, device)
    update, alive = native.apply_update(_C, args, x, lr, weight_decay)
    on_device = native.pointer(lr_tensor), native.pointer(decay_tensor)
    chosen, numbers = native.apply_options(_C, options, *on_device)
    return update, chosen, (alive, lr_tensor, decay_tensor, numbers)


def apply_update(args: ApplyUpdate, options: ApplyOptions = ApplyOptions()) -> None:
    """Implement `Backend.apply_update`."""
    _C, x = _device.module(), args.x
    update, chosen, _alive = _apply_arguments(args, options, x, x.device)
    with _launching(x.shape, x.device) as stream:
        _C.cuda.apply_update(update, chosen, native.dtype(_C, x.dtype), stream)
    torch.autograd.graph.increment_version([p.tensor for p in args.param])


def scratch_bytes(rows: int, cols: int) -> int:
    """Count a double for each tile of 64x64 and for the scale, in whole sectors: diagonals come behind it."""
    return -(-8 * (-(-rows // 64) * -(-cols // 64) + 1) // 32) * 32


def update_launches(count: int) -> int:
    """Count those of momentum, norms and update, as if no matrix lay next to another."""
    return -(-count // MOMENTUM_CAPACITY) + 1 + -(-count // APPLY_CAPACITY)


def product_tiles() -> tuple[int, int]:
    """Return those of product_sm80.cu."""
    return 64, 128


def fused_plan(
    rows: int,
    cols: int,
    count: int,
    schedule: Schedule,
    stochastic_rounding: bool = False,
    room: int | None = None,
) -> Fused | None:
    """Fuse where the smaller side fits on the chip, which needs no workspace but two visits to the longer one.

    Few wide matrices, which would leave most of the chip idle, are divided along their columns. It rounds to nearest. A
    product is three or six of bf16, of whole squares, and sizes are rounded up to tiles.
    """
    terms = terms_needed(schedule.triples, schedule.margin)
    if stochastic_rounding or terms is None or rows > FUSED_ROWS[terms] or cols >= 2**31 - 32:
        return None
    most = None if room is None else room // max(1, count * partial_bytes(rows))
    parts = fused_parts(rows, cols, count, most)
    if not fusing_pays(rows, cols, count, parts):
        return None
    m, n = max(16, 1 << (rows - 1).bit_length()), -(-cols // FUSED_TILE) * FUSED_TILE
    of_terms, products = terms * (terms + 1) // 2, 4 * len(schedule.triples) - 3
    return Fused(
        slots=0,
        launches=-(-count // FUSED_CAPACITY) * (2 if parts > 1 else 1),
        flops=of_terms * 2 * m * m * (2 * n + parts * products * m),
        reads=2,
        parts=parts,
        partial_bytes=count * parts * partial_bytes(rows) if parts > 1 else 0,
    )


def partial_bytes(rows: int) -> int:
    """Return what a part of a matrix leaves for the others: a square in fp32, and an exponent in a sector."""
    m: int = max(16, 1 << (rows - 1).bit_length())
    return 4 * m * m + 32


def fused_step(args: Step) -> None:
    """Implement `Backend.fused_step`."""
    _C, momentum, param = _device.module(), args.momentum, args.apply.param
    assert momentum.momentum is not None
    device = param[0].tensor.device
    before, _alive = native.momentum_update(_C, momentum, None)
    after, options, _also_alive = _apply_arguments(args.apply, args.options, None, device)
    count, (_, m, n) = len(args.apply.ratio), momentum.x.shape
    coefficients = [c for triple in args.triples for c in triple]
    terms, partials = terms_needed(tuple(args.triples), momentum.margin), args.partials
    needed = count * args.parts * _C.cuda.fused_partial_bytes(m) if args.parts > 1 else 0
    if needed and partials is None:
        partials = torch.empty(needed, dtype=torch.uint8, device=device)
    assert partials is None or needed <= partials.numel()
    with _launching((count, m, n), device) as stream:
        where = native.pointer(partials)
        _C.cuda.fused_step(count, m, n, before, after, coefficients, terms, args.parts, where, options, stream)
    torch.autograd.graph.increment_version([t.tensor for t in (*param, *momentum.momentum)])
