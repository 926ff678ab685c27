"""What momentum_update and apply_update must do on a GPU, whoever wrote the kernels: against the formulas in float64.

A module that imports these tests has a fixture `verbs` of the protocol below; tests of one implementation alone are its
own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import cycle, product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from checks.random_bits import random_bits, rounded_by, windows
from checks.vast import far_apart
from muon_kernels.verbs import ApplyOptions


def wide(t: Tensor) -> Tensor:
    """As the kernels see a parameter: no more rows than columns."""
    return t.mT if t.shape[-2] > t.shape[-1] else t


class MomentumOptions(NamedTuple):
    """Options of a momentum_update, with what tests take if they name none.

    All but the last, which is written, are in the order of verbs.MomentumUpdate.
    """

    mu: float = 0.9
    nesterov: bool = True
    dampened: bool = True
    grad_scale: float = 1.0
    eps: float = 1e-7
    margin: float = 1.0
    norms: Tensor | None = None


# Learning rate and weight decay, each as a number or as a tensor with one element.
Rates = tuple[float | Tensor, float | Tensor]


class Implementation(ABC):
    """The two verbs of one implementation, for matrices or stacks of them. They fail if a launch touches anything but
    its arguments, or if the executor warns."""

    def momentum_update(
        self, grads: Sequence[Tensor], momenta: Sequence[Tensor] | None, X: Tensor, **options: Any
    ) -> Tensor:
        """Update with `MomentumOptions(**options)`; return scale."""
        return self._momentum_update(grads, momenta, X, MomentumOptions(**options))

    def apply_update(
        self,
        params: Sequence[Tensor],
        X: Tensor,
        *,
        lr: float | Tensor = 0.5,
        weight_decay: float | Tensor = 0.5,
        ratios: Sequence[float] | None = None,
        **options: Any,
    ) -> None:
        """Update with `ApplyOptions(**options)` and ratios of 1 if there are none."""
        ratios = [1.0] * len(X) if ratios is None else ratios
        self._apply_update(params, X, (lr, weight_decay), ratios, ApplyOptions(**options))

    @abstractmethod
    def _momentum_update(
        self, grads: Sequence[Tensor], momenta: Sequence[Tensor] | None, X: Tensor, options: MomentumOptions
    ) -> Tensor: ...

    @abstractmethod
    def _apply_update(
        self, params: Sequence[Tensor], X: Tensor, rates: Rates, ratios: Sequence[float], options: ApplyOptions
    ) -> None: ...

    @abstractmethod
    def options(self, **options: Any) -> AbstractContextManager[Any]:
        """How the executor runs what is launched inside."""

    @abstractmethod
    def grids(self) -> list[tuple[int, ...]]:
        """Of the launches since the last `options`."""

    @abstractmethod
    def rules(self, *dtypes: torch.dtype) -> Sequence[tuple[bool, bool, float]]:
        """Of RULES, those that tensors of these types are worth."""


TILE = 64
# How a parameter of (rows, cols) lies in a block of memory: the block, and the parameter in it.
LAYOUTS: dict[str, Callable[[int, int], tuple[Tensor, Tensor]]] = {
    "contiguous": lambda m, n: (t := torch.empty(m, n), t),
    "transposed": lambda m, n: (t := torch.empty(n, m), t.T),
    "sliced": lambda m, n: (
        t := torch.empty(m + 2, n + 8),
        t[1:-1, 3:-5],
    ),  # rows as far apart as vectors, but not on them
    "padded": lambda m, n: (
        t := torch.empty(m, (n + 7) // 8 * 8 + 8),
        t[:, :n],
    ),  # vectors that the columns do not fill
    "every second": lambda m, n: (t := torch.empty(2 * m, 2 * n), t[::2, ::2]),
}
SHAPES = [(1, 1), (40, 1), (17, 33), (33, 17), (64, 64), (72, 136), (136, 72), (16, 200)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALVES = [torch.bfloat16, torch.float16]
UNIT = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
RULES = list(product((True, False), (True, False), (0.9, 0.3)))  # nesterov, dampened, mu
ALIGNMENTS = [(8, 0), (8, 0), (7, 0), (8, 1), (8, 0)]  # of a workspace: its start and what its rows have more
SENTINEL = 77.0


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class Block:
    """A random matrix, and everything around it, which must stay as it is."""

    def __init__(self, shape: tuple[int, int], kind: str, dtype: torch.dtype) -> None:
        block, view = LAYOUTS[kind](*shape)
        self.block = torch.full_like(block, SENTINEL, dtype=dtype)
        self.view = self.block.as_strided(view.shape, view.stride(), view.storage_offset())
        self.view.copy_(torch.randn(shape))
        self.before = self.view.double()

    def assert_untouched_around(self) -> None:
        around = self.block.clone()
        around.as_strided(self.view.shape, self.view.stride(), self.view.storage_offset()).fill_(SENTINEL)
        assert (around == SENTINEL).all(), "written outside a matrix"


def workspace(batch: int, m: int, n: int, dtype: torch.dtype, start: int = 8, more: int = 0) -> tuple[Tensor, Tensor]:
    """X full of NaN inside a block of sentinels, and the block; aligned unless its start or its row stride is odd."""
    block = torch.full((batch, m + 2, (n + 7) // 8 * 8 + 16 + more), SENTINEL, dtype=dtype)
    return block[:, 1:-1, start : start + n].fill_(torch.nan), block


def assert_workspace(X: Tensor, block: Tensor) -> None:
    outside = torch.ones_like(block, dtype=torch.bool)
    outside.as_strided(X.shape, X.stride(), X.storage_offset()).fill_(False)
    assert (block[outside] == SENTINEL).all(), "written outside the workspace"


def fma(a: float | Tensor, b: Tensor, c: Tensor) -> Tensor:
    """In fp32: the product of two floats is exact in float64."""
    a = a if isinstance(a, Tensor) else torch.tensor(a, dtype=torch.float32)
    return (a.double() * b.double() + c.double()).float()


def lerp(start: Tensor, end: Tensor, weight: float) -> Tensor:
    """torch.lerp's two branches."""
    w = torch.tensor(weight, dtype=torch.float32)
    return fma(w, end - start, start) if w < 0.5 else fma(w - 1, end - start, end)


def directions(g: Tensor, b: Tensor, mu: float, nesterov: bool, dampened: bool) -> tuple[Tensor, Tensor]:
    """The new momentum and the direction in the fp32 operations of csrc/cpu."""
    g, b = g.float(), b.float()
    new = lerp(b, g, 1 - mu) if dampened else fma(mu, b, g)
    if not nesterov:
        return new, new
    return new, lerp(g, new, mu) if dampened else fma(mu, new, g)


def check_x(X: Tensor, scale: Tensor, direction: Tensor) -> None:
    """X * scale is the normalised direction, correct to the last bit of X's type where an entry matters."""
    exact = wide(direction).double()
    exact = exact / exact.norm()
    tiny = 2.0**-25 if X.dtype == torch.float16 else 1e-30  # below 2^-14 times the norm f16 may be subnormal
    torch.testing.assert_close(X.double() * scale.double(), exact, rtol=UNIT[X.dtype] * 1.001, atol=tiny)


@pytest.mark.parametrize("X_dtype", HALVES, ids=str)
@pytest.mark.parametrize("momentum_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_momentum_update(
    verbs: Implementation, dtype: torch.dtype, momentum_dtype: torch.dtype, X_dtype: torch.dtype
) -> None:
    rules, alignments = cycle(verbs.rules(dtype, momentum_dtype, X_dtype)), cycle(ALIGNMENTS)
    alike = cycle((True, False))
    for kind, shape in product(LAYOUTS, SHAPES):
        nesterov, dampened, mu = next(rules)
        m, n = sorted(shape)
        grads = [Block(shape, k, dtype) for k in (kind, "contiguous", "transposed")]
        momenta = [Block(shape, k, momentum_dtype) for k in (kind, "contiguous", "transposed" if next(alike) else kind)]
        X, block = workspace(3, m, n, X_dtype, *next(alignments))
        scale = verbs.momentum_update(
            [g.view for g in grads],
            [b.view for b in momenta],
            X,
            mu=mu,
            nesterov=nesterov,
            dampened=dampened,
            grad_scale=-0.75,
        )
        assert_workspace(X, block)
        for i, (g, b) in enumerate(zip(grads, momenta, strict=True)):
            g.assert_untouched_around()
            b.assert_untouched_around()
            assert torch.equal(g.view.double(), g.before), "a gradient was written"
            new, direction = directions(-0.75 * g.before, b.before, mu, nesterov, dampened)
            assert torch.equal(b.view, new.to(momentum_dtype)), (kind, shape)
            check_x(X[i], scale[i], direction)
            if X_dtype == torch.bfloat16:
                assert torch.equal(X[i], wide(direction).bfloat16()), (kind, shape)


@pytest.mark.parametrize("X_dtype", HALVES, ids=str)
def test_without_momentum(verbs: Implementation, X_dtype: torch.dtype) -> None:
    for dtype, shape in product(DTYPES, [(72, 136), (136, 72)]):
        g = Block(shape, "contiguous", dtype)
        X, block = workspace(1, *sorted(shape), X_dtype)
        scale = verbs.momentum_update([g.view], None, X, margin=1.25)
        assert_workspace(X, block)
        check_x(X[0], scale[0] * 1.25, g.before)


def test_scale_is_the_norm_in_double(verbs: Implementation) -> None:
    """Of the direction before it was rounded, with more partial sums than a block has threads."""
    G = torch.randn(20, 64 * 300)
    X = torch.empty(1, *G.shape, dtype=torch.bfloat16)
    norms = torch.full((2,), torch.nan, dtype=torch.float64)
    scale = verbs.momentum_update([G], None, X, norms=norms[:1])
    torch.testing.assert_close(scale.double(), 1 / G.double().norm()[None], rtol=2.0**-24, atol=0)
    torch.testing.assert_close(norms[:1], G.double().norm()[None], rtol=2.0**-44, atol=0)
    assert norms[1].isnan()


@pytest.mark.parametrize("X_dtype", HALVES, ids=str)
@pytest.mark.parametrize("factor", [1e-30, 1e-25, 1e-12, 1e-5, 1.0, 1e5, 1e12, 1e25, 1e30])
def test_direction_keeps_its_digits_at_any_scale(verbs: Implementation, factor: float, X_dtype: torch.dtype) -> None:
    for shape in ((80, 144), (144, 80)):
        G = torch.randn(shape) * factor
        X, block = workspace(1, 80, 144, X_dtype)
        norms = torch.empty(1, dtype=torch.float64)
        scale = verbs.momentum_update([G], None, X, norms=norms)
        torch.testing.assert_close(norms, G.double().norm()[None], rtol=2.0**-24, atol=0)
        assert_workspace(X, block)
        assert 2.0**-30 <= float(scale) <= 2.0**30
        check_x(X[0], scale[0], G)


@pytest.mark.parametrize("X_dtype", HALVES, ids=str)
@pytest.mark.parametrize("value", [7e-41, 7e-40, 7e-39, 3e-38])
def test_numbers_below_bf16s_normal_range(verbs: Implementation, value: float, X_dtype: torch.dtype) -> None:
    """Rounding to bf16 may double them; the iteration diverges where the norm is not that of what was rounded."""
    for shape in ((4, 4), (80, 144), (144, 80)):
        X, block = workspace(1, *sorted(shape), X_dtype)
        norms = torch.empty(1, dtype=torch.float64)
        G = torch.full(shape, value)
        scale = verbs.momentum_update([G], None, X, norms=norms)
        torch.testing.assert_close(norms, G.double().norm()[None], rtol=2.0**-24, atol=0)
        assert_workspace(X, block)
        check_x(X[0], scale[0], G)


@pytest.mark.parametrize("X_dtype", HALVES, ids=str)
def test_tiles_of_different_sizes(verbs: Implementation, X_dtype: torch.dtype) -> None:
    """The second launch brings all tiles of a matrix to one power of two: in f16, and in bf16 where some are tiny."""
    sizes = torch.tensor([[1e-9, 1.0, 0.0], [1e-3, 30.0, 1e-6], [3e2, 1e-2, 1e4]])
    G = torch.randn(3 * TILE, 3 * TILE) * sizes.repeat_interleave(TILE, 0).repeat_interleave(TILE, 1)
    many = torch.randn(TILE, 130 * TILE)  # shared by two blocks
    many[:, ::3] *= 1e-6
    many[:, 64 * TILE : 100 * TILE] *= 1e-6
    quiet, faint = torch.randn(2, TILE, 2 * TILE)
    quiet[:, TILE:] *= 1e-35
    faint[:, TILE:] *= 0.4
    faint *= 1.2 * 2.0**-100 / faint.norm()  # one tile is below 2^-100, and the power of two is that of such tiles
    for g in (G, G.T.contiguous().T, G * 1e-20, G[:100, :150], many, many * 1e-20, quiet, faint):
        X, block = workspace(1, *g.shape, X_dtype)
        scale = verbs.momentum_update([g], None, X)
        assert_workspace(X, block)
        check_x(X[0], scale[0], g)


@pytest.mark.parametrize("X_dtype", HALVES, ids=str)
def test_scale_of_what_has_no_norm(verbs: Implementation, X_dtype: torch.dtype) -> None:
    """Zero, infinity, NaN, and a margin; each its own matrix's."""
    G = torch.randn(4, 70, 90)
    G[0] = 0
    G[1, 2, 3] = torch.inf
    G[2, 65, 80] = torch.nan
    X, _ = workspace(4, 70, 90, X_dtype)
    norms = torch.empty(4, dtype=torch.float64)
    scale = verbs.momentum_update(list(G), None, X, margin=1.25, norms=norms)
    assert not X[0].any() and scale[0] == 0
    assert norms[0] == 0 and norms[1] == torch.inf and norms[2].isnan()
    assert scale[1:3].isnan().all()
    assert not X[1].isfinite().all() and X[2].isnan().any()
    check_x(X[3], scale[3] * 1.25, G[3])


@pytest.mark.parametrize("shape", [(4, 8), (8, 4), (3, 7), (7, 3)], ids=str)
def test_offsets_have_64_bits(verbs: Implementation, shape: tuple[int, int]) -> None:
    """Matrices and their lines 2^31 elements and more apart, in whole vectors and one by one."""
    strides = 2**34 + 64, 2**31 + 8, 1
    values = [torch.randn(3, *shape) for _ in range(3)]
    grads, momenta, params = ([*far_apart(v, strides)] for v in values)
    X = far_apart(torch.full((3, *sorted(shape)), torch.nan).bfloat16(), strides)
    scale = verbs.momentum_update(grads, momenta, X)
    verbs.apply_update(params, X)
    for i, (grad, momentum, param) in enumerate(zip(*values, strict=True)):
        new, direction = directions(grad, momentum, 0.9, True, True)
        assert torch.equal(momenta[i], new)
        check_x(X[i], scale[i], direction)
        update = direction.bfloat16().float()
        assert torch.equal(params[i], fma(-0.5, update, param * 0.75))


MANY = 70_000  # matrices: more than a grid has rows
SOME = [0, 1, 65_535, 65_536, MANY - 1]  # of them, that are executed


def test_many_matrices_take_one_launch(verbs: Implementation) -> None:
    """A block each, of which a few are executed."""
    (G, P), X = torch.randn(2, MANY, 2, 4), torch.full((MANY, 2, 4), torch.nan).bfloat16()
    before, norms = P.clone(), torch.full((MANY,), torch.nan).double()
    with verbs.options(blocks=SOME):
        scale = verbs.momentum_update([G], None, X, norms=norms)
        assert verbs.grids() == [(MANY, 1, 1)] * 2
    check = G.double().norm(dim=(1, 2))
    torch.testing.assert_close(norms[SOME], check[SOME], rtol=2.0**-24, atol=0)
    torch.testing.assert_close(scale[SOME].double(), 1 / check[SOME], rtol=2.0**-23, atol=0)
    assert torch.equal(X[SOME], G[SOME].bfloat16()) and int(X.isfinite().sum()) == 8 * len(SOME)
    with verbs.options(blocks=SOME):
        verbs.apply_update([P], X)
        assert verbs.grids() == [(MANY, 1, 1)]
    assert torch.equal(P[SOME], fma(-0.5, X[SOME].float(), before[SOME] * 0.75))


def test_orders_and_races(verbs: Implementation) -> None:
    """The same bits whatever runs first; a tall matrix and a wide one of two tiles, and one that is rescaled."""
    begun = [torch.randn(2, *shape) for shape in ((70, 130), (130, 70))]
    begun[0][1] *= 1e-20
    for X_dtype in HALVES:
        results = []
        for order, seed, races in [
            ("forward", 0, True),
            ("backward", 0, True),
            ("random", 1, False),
            ("random", 2, False),
        ]:
            grads, momenta = ([g for t in begun for g in t.clone()] for _ in range(2))
            params = [t.clone() for t in grads]
            X, _ = workspace(4, 70, 130, X_dtype)
            with verbs.options(order=order, seed=seed, races=races):
                scale = verbs.momentum_update(grads, momenta, X)
                verbs.apply_update(params, X)
            results.append([*momenta, X, scale, *params])
        for result in results[1:]:
            assert all(map(torch.equal, results[0], result))


def test_empty_matrices(verbs: Implementation) -> None:
    X = torch.empty(3, 0, 5, dtype=torch.bfloat16)
    assert not verbs.momentum_update(list(torch.empty(3, 0, 5)), None, X).any()
    verbs.apply_update(list(torch.empty(3, 0, 5)), X)


@pytest.mark.parametrize("X_dtype", HALVES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_apply_update(verbs: Implementation, dtype: torch.dtype, X_dtype: torch.dtype) -> None:
    alignments, cautions = cycle(ALIGNMENTS), cycle((False, True))
    on_device = torch.tensor(0.5), torch.tensor(0.3)
    for (kind, shape), given in zip(product(LAYOUTS, SHAPES), cycle(((0.5, 0.3), on_device))):
        cautious = next(cautions)
        params = [Block(shape, k, dtype) for k in (kind, "contiguous", "transposed")]
        X, block = workspace(3, *sorted(shape), X_dtype, *next(alignments))
        X.copy_(torch.randn(X.shape))
        before = X.clone()
        verbs.apply_update(
            [p.view for p in params], X, lr=given[0], weight_decay=given[1], ratios=[1.0, 2.0, 0.3], cautious=cautious
        )
        assert torch.equal(X, before)
        assert_workspace(X, block)
        for p, x, ratio in zip(params, X, (1.0, 2.0, 0.3), strict=True):
            p.assert_untouched_around()
            old, update = p.before.float(), (x.mT if p.view.shape[0] > p.view.shape[1] else x).float()
            decay = torch.tensor(1 - 0.5 * float(given[1]), dtype=torch.float32)
            decayed = old * decay
            if cautious:
                decayed = torch.where(update.double() * old.double() >= 0, decayed, old)
            assert torch.equal(p.view, fma(-0.5 * ratio, update, decayed).to(dtype)), (kind, shape)


def test_cautious_where_the_product_underflows(verbs: Implementation) -> None:
    p = torch.tensor([[1e-30, -1e-30, 1e-30, -1e-30]])
    X = torch.tensor([[[1e-30, -1e-30, -1e-30, 1e-30]]], dtype=torch.bfloat16)
    verbs.apply_update([p], X, lr=1.0, weight_decay=0.5, ratios=[0.0], cautious=True)
    assert torch.equal(p, torch.tensor([[0.5e-30, -0.5e-30, 1e-30, -1e-30]]))


def stochastic(verbs: Implementation, params: list[Tensor], seed: int, X: Tensor, **more: Any) -> list[Tensor]:
    params = [p.clone(memory_format=torch.preserve_format) for p in params]
    verbs.apply_update(params, X, lr=1.0, stochastic_rounding=True, seed=seed, **{"weight_decay": 0.0, **more})
    return params


def test_stochastic_rounding_is_unbiased(verbs: Implementation) -> None:
    """1 plus a fraction of bf16's step there: up as often as the fraction says, in every place of a 2 x 2 block."""
    for fraction in (0.0, 0.125, 0.5, 0.9375):
        X = torch.full((2, 128, 256), -fraction * 2.0**-7).bfloat16()
        X[1] *= -1
        above, below = (p.float() for p in stochastic(verbs, [torch.ones(128, 256).bfloat16()] * 2, 3, X))
        ups = (above - 1) / 2**-7
        assert set(ups.unique().tolist()) <= {0.0, 1.0}
        for i, j in product(range(2), range(2)):
            part = ups[i::2, j::2]
            assert abs(float(part.mean()) - fraction) <= 4 * (fraction * (1 - fraction) / part.numel()) ** 0.5
        if fraction == 0.5:  # neighbours agree half of the time
            for a, b in [
                (ups[::2], ups[1::2]),
                (ups[:, ::2], ups[:, 1::2]),
                (ups[2:], ups[:-2]),
                (ups[:, 2:], ups[:, :-2]),
            ]:
                assert abs(float((a == b).float().mean()) - 0.5) <= 2 / a.numel() ** 0.5
        below = (1 - below) / 2**-8  # the step is half as large there
        assert abs(float(below.mean()) - 2 * fraction) <= 4 * (1 / below.numel()) ** 0.5


def test_stochastic_rounding_depends_on_seed_and_place_alone(verbs: Implementation) -> None:
    X, _ = workspace(3, 72, 136, torch.bfloat16)
    X.copy_(torch.randn(3, 72, 136))
    params = list(torch.randn(3, 72, 136).bfloat16())
    bits = stochastic(verbs, params, 5, X)
    assert all(map(torch.equal, bits, stochastic(verbs, params, 5, X)))
    tall = [p.T.contiguous().T for p in params]  # walked along the columns
    assert all(map(torch.equal, bits, stochastic(verbs, tall, 5, X)))
    single = [torch.zeros(72, 137).bfloat16()[:, 1:].copy_(p) for p in params]  # not in vectors
    before = [p.clone() for p in single]
    verbs.apply_update(single, X, lr=1.0, weight_decay=0.0, stochastic_rounding=True, seed=5)
    assert all(map(torch.equal, bits, single)) and not any(map(torch.equal, before, single))
    assert not any(map(torch.equal, bits, stochastic(verbs, params, 6, X)))
    same = stochastic(verbs, [params[0]] * 3, 5, X[:1].expand(3, -1, -1).contiguous())
    assert not torch.equal(same[0], same[1]), "two matrices share their random numbers"
    assert all(map(torch.equal, bits[1:], stochastic(verbs, params[1:], 5, X[1:].clone(), number=[1, 2])))


@pytest.mark.parametrize("shape", [(24, 72), (17, 33)], ids=str)
def test_random_bits_are_those_of_whole_matrices(verbs: Implementation, shape: tuple[int, int]) -> None:
    """To the bit, wherever a part is cut out and however it is walked, by vectors and not."""
    seed, numbers = 2**64 - 3, [7, 1 << 24, 3, 2]  # a stack's two matrices have not a number and the next
    X, _ = workspace(4, *shape, torch.bfloat16)
    X.copy_(torch.randn(4, *shape))
    kept = torch.randn(4, *shape).bfloat16()
    value = (kept.double() - X.double()).float()
    for window, whole, here in windows(*shape):
        params = [kept[0].clone(), kept[1].T.contiguous().T, kept[2:].clone()]
        verbs.apply_update(
            params,
            X,
            lr=1.0,
            weight_decay=0.0,
            stochastic_rounding=True,
            seed=seed,
            number=numbers,
            window=window,
        )
        for p, v, number in zip([*params[:2], *params[2]], value, numbers, strict=True):
            bits = random_bits(seed, number, *whole)[here]
            assert torch.equal(p, rounded_by(v, bits.mT if window.turned else bits)), window


def test_stochastic_rounding_of_special_values(verbs: Implementation) -> None:
    values = torch.tensor([[0.0, -0.0, 1.0, -3.0e38, torch.inf, -torch.inf, torch.nan, 2.0**-133]]).bfloat16()
    (p,) = stochastic(verbs, [values], 1, torch.zeros(1, 1, 8, dtype=torch.bfloat16))
    assert torch.equal(p[~p.isnan()], values[~values.isnan()]) and torch.equal(p.isnan(), values.isnan())
    nan = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)  # a GPU's: any bit more and it is a zero
    p = torch.zeros(1, 2).bfloat16()
    verbs.apply_update([p], torch.ones(1, 1, 2).bfloat16(), lr=nan, stochastic_rounding=True)
    assert p.isnan().all()
