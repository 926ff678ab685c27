"""Everything that is timed and checked: workloads of real models, and sizes, for a GPU or for a rehearsal."""

from __future__ import annotations

from typing import NamedTuple

Shapes = list[tuple[int, int, int]]


def gpt2(layers: int) -> Shapes:
    """Return GPT-2 124M's shapes: fused QKV, attention output, MLP up and down, width 768."""
    return [(2304, 768, layers), (768, 768, layers), (3072, 768, layers), (768, 3072, layers)]


RAGGED: Shapes = [(100, 333, 8), (65, 257, 8), (17, 1000, 8), (333, 100, 8), (129, 129, 8)]
# What a whole step of a model is, each by (rows, columns, how many).
WORKLOADS: dict[str, Shapes] = {
    "GPT-2 124M, 12 layers": gpt2(12),
    "Llama-2 7B, one layer": [(4096, 4096, 4), (11008, 4096, 2), (4096, 11008, 1)],
    "MoE, 64 experts 1024x2048": [(1024, 2048, 64)],
    "MoE, 32 experts 384x1024": [(384, 1024, 32)],
    "per head, 144 of 64x768": [(64, 768, 144)],
    "many, 256 of 64x64": [(64, 64, 256)],
    "one of 4096x4096": [(4096, 4096, 1)],
    "one of 2048x2048": [(2048, 2048, 1)],
    "ragged": RAGGED,
}
# Those whose kernels are looked at one by one.
TRACED = ("GPT-2 124M, 12 layers", "MoE, 64 experts 1024x2048")


class Operands(NamedTuple):
    """Operands of a product: `batch` matrices of m x n, whose rows begin at multiples of `width` bytes and no more.

    A batch below 0 is that many times the multiprocessors: large tiles are taken where there are enough of them.
    """

    batch: int
    m: int
    n: int
    width: int


class Sizes(NamedTuple):
    """Sizes of what stages do.

    Attributes:
        rounds: of everything that is timed.
        products: whose results are checked.
        biased: k of the products whose diagonals are compared.
        squares: sides of matrices whose corrections of diagonals are checked.
        steps: shapes of parameters whose steps are checked.
        zoo: (coefficient set, shape), over all spectra.
        copied: bytes of a copy.
        matmuls: sides of the products that give the peak.
        bmms: (batch, side), likewise.
        launches: of a kernel that does next to nothing.
        side: of the products of the sweep along k.
        ks: of that sweep.
        waves: its tiles, in multiples of the multiprocessors.
        sides: of the products that backends are compared on.
        batches: of these.
        workloads: whose steps are timed.
        traced: those that are profiled.
        passes: shapes whose passes over memory are timed.
        fused_rows: of matrices whose step is fused.
        fused_columns: of these.
        fused_counts: how many.
        compiler: of torch.compile.
    """

    rounds: int
    products: tuple[Operands, ...]
    biased: tuple[int, ...]
    squares: tuple[int, ...]
    steps: tuple[tuple[int, ...], ...]
    zoo: tuple[tuple[str, tuple[int, int]], ...]
    copied: int
    matmuls: tuple[int, ...]
    bmms: tuple[tuple[int, int], ...]
    launches: int
    side: int
    ks: tuple[int, ...]
    waves: tuple[int, ...]
    sides: tuple[int, ...]
    batches: tuple[int, ...]
    workloads: dict[str, Shapes]
    traced: tuple[str, ...]
    passes: Shapes
    fused_rows: tuple[int, ...]
    fused_columns: tuple[int, ...]
    fused_counts: tuple[int, ...]
    compiler: str


_PRODUCTS = (
    *(Operands(3, 72, 136, 16), Operands(2, 77, 93, 2), Operands(2, 200, 328, 16), Operands(2, 129, 301, 2)),
    *(Operands(1, 65, 151, 4), Operands(1, 17, 5, 8), Operands(1, 1, 9, 2)),
)
_STEPS = ((24, 40), (40, 24), (3, 24, 40), (64, 64), (130, 150), (150, 130), (136, 136))

FULL = Sizes(
    rounds=7,
    products=(*_PRODUCTS, Operands(-2, 136, 200, 16), Operands(-2, 129, 201, 2), Operands(1, 1032, 776, 16)),
    biased=(4096, 14336, 65536),
    squares=(17, 72, 129, 264),
    steps=(*_STEPS, (64, 2048), (2048, 64), (768, 3072), (1024, 1024)),  # the two of 64 in parts, if fused
    zoo=(
        *((name, shape) for name in ("keller", "polar_express", "you6") for shape in ((64, 256), (129, 300))),
        *(("keller", (520, 600)), ("keller", (1024, 2048))),
    ),
    copied=8 << 30,
    matmuls=(4096, 8192),
    bmms=((64, 1024), (24, 768)),
    launches=200,
    side=512,
    ks=(64, 256, 768, 1536, 4096),
    waves=(2, 8, 1),
    sides=(128, 192, 256, 384, 512, 768, 1024, 1280, 1536, 2048, 3072, 4096),
    batches=(1, 4, 12, 24, 64),
    workloads=WORKLOADS,
    traced=TRACED,
    passes=[(768, 3072, 24), (3072, 768, 24), (4096, 4096, 4), (64, 768, 144)],
    fused_rows=(16, 32, 64, 128),
    fused_columns=(256, 1024, 4096, 16384),
    fused_counts=(1, 8, 132, 264, 1024),
    compiler="inductor",
)

# What a processor checks: as much as takes a minute.
CPU = FULL._replace(
    products=_PRODUCTS,
    biased=(4096,),
    squares=(17, 72, 129),
    steps=((24, 40), (3, 40, 24), (64, 64), (130, 150)),
    zoo=(("keller", (64, 100)), ("polar_express", (129, 200))),
)

# What the executor checks, and what stages that time things are rehearsed with.
TINY = Sizes(
    rounds=2,
    products=(Operands(2, 24, 40, 16), Operands(1, 17, 21, 2)),
    biased=(256,),
    squares=(17,),
    steps=((24, 40), (130, 132)),
    zoo=(("keller", (24, 40)),),
    copied=1 << 12,
    matmuls=(16,),
    bmms=((2, 16),),
    launches=2,
    side=16,
    ks=(16, 32),
    waves=(1,),
    sides=(16, 32),
    batches=(1,),
    workloads={"tiny": [(24, 40, 2), (40, 24, 1)]},
    traced=("tiny",),
    passes=[(24, 40, 2)],
    fused_rows=(16,),
    fused_columns=(24,),
    fused_counts=(1, 2),
    compiler="eager",
)
