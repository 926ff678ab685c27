"""State in fewer bits: 8-bit momentum, and fp32 parameters in a bf16 one and sixteen more bits.

Both are judged by the same training with a momentum, or parameters, in fp32, to the bit; and the bits themselves by
formulas written here and by Python's integers.
"""

import copy
import math
import pickle
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from checks.training import same, snapshot
from torch import Tensor, nn

from muon_kernels import Muon, MuonAdamW, SpectralMomentum, backends
from muon_kernels.coefficients import resolve
from muon_kernels.split import blocks, equal, heads, pieces, qkv
from muon_kernels.stages import Stage, packed
from muon_kernels.stages.packed import BLOCK, EightBitMomentum, Halves, MasterWeights, Quantized
from muon_kernels.step.operands import Operand
from muon_kernels.step.options import StepOptions
from muon_kernels.step.plan import Bucket, plan_bucket
from muon_kernels.step.prepare import prepare

MAKERS: dict[str, Callable[[], Tensor]] = {
    "wide": lambda: torch.randn(70, 90),
    "tall": lambda: torch.randn(90, 70),
    "transposed": lambda: torch.randn(90, 70).T,
    "strided": lambda: torch.randn(140, 180)[::2, ::2],
    "whole blocks": lambda: torch.randn(64, 96),
    "row": lambda: torch.randn(1, 9),
    "batch": lambda: torch.randn(7, 60, 35),
    "strided batch": lambda: torch.randn(35, 2, 60).movedim(1, 0),
    "convolution": lambda: torch.randn(12, 40, 3, 5),
    "channels last": lambda: torch.randn(12, 3, 5, 40).permute(0, 3, 1, 2),
    "no strides": lambda: torch.randn(40, 4, 20, 3)[:, :, :, ::2],
    "nothing": lambda: torch.randn(0, 5),
    "no matrix": lambda: torch.randn(0, 24, 40),
}
STEPS = 3
EIGHT: dict[str, Any] = {"momentum_dtype": torch.int8}
MASTER: dict[str, Any] = {"master_weights": True}


@pytest.fixture(autouse=True, params=[1 << 18, 2 * BLOCK], ids=["pieces", "small pieces"])
def _pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices are packed several at a time, or each block by block."""
    monkeypatch.setattr(packed, "_PIECE_ON_CPU", request.param)


def parameters(dtype: torch.dtype = torch.float32, names: Sequence[str] = tuple(MAKERS)) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(0.1 * MAKERS[name]().to(dtype)) for name in names]


def feed(params: Sequence[nn.Parameter], t: int) -> None:
    """Gradients of step t that bf16 holds, of several magnitudes."""
    for i, p in enumerate(params):
        generator = torch.Generator().manual_seed(100 * t + i)
        g = torch.randn(p.shape, generator=generator)
        if g.numel():
            g.view(g.shape[0], -1)[::3] *= 5
        p.grad = g.bfloat16().to(p.dtype)


def train(optimizer: torch.optim.Optimizer, params: Sequence[nn.Parameter], start: int, stop: int) -> None:
    for t in range(start, stop):
        feed(params, t)
        optimizer.step()


def matrices(t: Tensor) -> list[Tensor]:
    return list(t.reshape(1, t.shape[0], -1) if t.ndim == 4 else t.reshape(math.prod(t.shape[:-2]), *t.shape[-2:]))


def in_blocks(t: Tensor) -> list[Tensor]:
    """Of 2048 elements along the rows of every matrix, the last one of each shorter."""
    return [block for matrix in matrices(t) if matrix.numel() for block in matrix.flatten().split(2048)]


def quantized(t: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of t's size, and the absmax of all blocks; of numbers that are not all zero."""
    absmax = [block.abs().max() for block in in_blocks(t)]
    codes = [(block / most * 127).round().to(torch.int8) for block, most in zip(in_blocks(t), absmax, strict=True)]
    if not codes:
        return torch.zeros(t.shape, dtype=torch.int8), torch.zeros(0)
    return torch.cat(codes).view(t.shape), torch.stack(absmax)


def dequantized(codes: Tensor, scale: Tensor) -> Tensor:
    numbers = [block.float() / 127 * most for block, most in zip(in_blocks(codes), scale, strict=True)]
    return torch.cat(numbers).view(codes.shape) if numbers else torch.zeros(codes.shape)


# ---- 8-bit momentum ----


@pytest.mark.parametrize("options", [{}, {"nesterov": False, "dampened": False}, {"maximize": True}], ids=str)
@pytest.mark.parametrize("cap", [None, 170_000])
def test_eight_bits_are_fp32_within_a_step(backend: str, cap: int | None, options: dict[str, Any]) -> None:
    """A step is that of an fp32 momentum, dequantized before and quantized after it: parameters, codes and scales."""
    params, twins = parameters(), [nn.Parameter(p.detach().contiguous()) for p in parameters()]
    eight = Muon(params, backend=backend, max_workspace_bytes=cap, **EIGHT, **options)
    full = Muon(twins, backend=backend, max_workspace_bytes=cap, **options)
    assert cap is None or max(len(b.chunks) for b in eight.plan().buckets) > 1
    for t in range(STEPS):
        for p, q in zip(params, twins, strict=True) if t else ():
            state = eight.state[p]
            full.state[q]["momentum_buffer"].copy_(dequantized(state["momentum_buffer"], state["momentum_scale"]))
        train(eight, params, t, t + 1)
        train(full, twins, t, t + 1)
        for name, p, q in zip(MAKERS, params, twins, strict=True):
            state, (codes, scale) = eight.state[p], quantized(full.state[q]["momentum_buffer"])
            assert same(state["momentum_buffer"], codes) and same(state["momentum_scale"], scale), name
            assert torch.equal(p, q), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_eight_bits_in_torchs_operations(dtype: torch.dtype) -> None:
    params = parameters(dtype)
    optimizer = Muon(params, momentum=0.9, backend="eager", **EIGHT)
    for t in range(STEPS):
        feed(params, t)
        expected = []
        for p in params:
            state = optimizer.state.get(p)
            assert p.grad is not None
            M = dequantized(state["momentum_buffer"], state["momentum_scale"]) if state else torch.zeros(p.shape)
            computed = torch.promote_types(dtype, torch.float32)
            expected.append(quantized(M.to(computed).lerp_(p.grad.to(computed), 1 - 0.9).float()))
        optimizer.step()
        for name, p, (codes, scale) in zip(MAKERS, params, expected, strict=True):
            state = optimizer.state[p]
            assert same(state["momentum_buffer"], codes) and same(state["momentum_scale"], scale), name


def test_eight_bits_are_little_more_than_a_byte(backend: str) -> None:
    """And nothing else is kept for a parameter but the workspace."""
    params = [nn.Parameter(torch.zeros(shape)) for shape in [(768, 3072), (768, 768), (2, 100, 333), (64, 32, 3, 3)]]
    optimizer = Muon(params, backend=backend, **EIGHT)
    train(optimizer, params, 0, 1)
    for p in params:
        kept = [t.nbytes for t in optimizer.state[p].values()]
        assert len(kept) == 2 and p.numel() < sum(kept) <= 1.01 * p.numel() < 1.1 * p.numel()


CUTS: dict[str, tuple[tuple[int, ...], bool | None, str]] = {
    "rows": ((90, 70), None, equal(3)),
    "heads of several blocks": ((240, 70), None, heads(3)),
    "columns": ((70, 90), None, equal(3, dim=1)),
    "every second": ((40, 180), None, blocks(1, 1, interleaved=True, dim=1)),
    "interleaved": ((72, 40), None, qkv(2, interleaved=True)),
    "of sizes": ((70, 90), None, blocks(20, 40, 10)),
    "stack": ((3, 80, 70), None, equal(2)),
    "stack without strides": ((3, 80, 70), None, blocks(20, 20, 40)),
    "convolution": ((24, 10, 3, 5), None, equal(2)),
    "flattened": ((24, 10, 15), True, equal(2, dim=1)),
}


@pytest.mark.parametrize("case", CUTS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtypes", [["int8"] * 2, [None, "int8", None]], ids=["eight bits", "changing"])
def test_eight_bits_of_parts(backend: str, case: str, transposed: bool, dtypes: list[str | None]) -> None:
    """As if every part were a parameter, whose momentum lies where it is and whose scales follow one another."""
    shape, flatten, split = CUTS[case]
    cut = pieces(shape, flatten, split)
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(*shape[:-2], shape[-1], shape[-2]).mT if transposed else torch.randn(shape))

    def parts(t: Tensor) -> list[Tensor]:
        """(matrices, rows, cols) of each; leading dimensions first, then the equal parts."""
        found = []
        for piece in cut:
            assert piece is not None
            starts = [piece.start + i * piece.size for i in range(piece.parts)]
            at = [[a + run * piece.period + j for run in range(piece.runs) for j in range(piece.size)] for a in starts]
            own = [t.index_select(piece.dim, torch.tensor(a)) for a in at]
            flat = flatten or t.ndim == 4
            found.append(torch.stack([x.flatten(1) if flat else x for x in own], -3))
        return [x.reshape(-1, *x.shape[-2:]) for x in found]

    whole = Muon([p], flatten=flatten, split=split, backend=backend)
    alone = [nn.Parameter(x.detach().clone()) for x in parts(p)]
    apart = Muon(alone, backend=backend)
    for t, dtype in enumerate(dtypes):
        whole.param_groups[0]["momentum_dtype"] = apart.param_groups[0]["momentum_dtype"] = dtype
        feed([p], t)
        assert p.grad is not None
        for x, g in zip(alone, parts(p.grad), strict=True):
            x.grad = g
        whole.step()
        apart.step()
        state = whole.state[p]
        if dtype is None:  # columns of what is flattened are ordered as memory runs
            for x, own in zip(alone, parts(p.detach()), strict=True):
                torch.testing.assert_close(x.detach(), own, rtol=0, atol=1e-2)
                x.data.copy_(own)
        assert all(map(torch.equal, parts(p), alone))
        buffers = [apart.state[x]["momentum_buffer"] for x in alone]
        assert all(map(torch.equal, parts(state["momentum_buffer"]), buffers))
        assert ("momentum_scale" in state) == (dtype is not None)
        if dtype:
            assert torch.equal(state["momentum_scale"], torch.cat([apart.state[x]["momentum_scale"] for x in alone]))


def test_nan_stays_in_its_matrix(backend: str) -> None:
    params = [nn.Parameter(torch.ones(3, 60, 40)), nn.Parameter(torch.ones(60, 40))]
    optimizer = Muon(params, backend=backend, **EIGHT)
    for t in range(3):
        feed(params, t)
        if t == 1:
            assert params[0].grad is not None
            params[0].grad[1, 2, 3] = torch.nan
        optimizer.step()
    assert params[0][1].isnan().all() and params[0][::2].isfinite().all() and params[1].isfinite().all()
    assert optimizer.state[params[0]]["momentum_buffer"][1, 2, 3] == -128


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_changing_to_eight_bits_and_back(backend: str, dtype: torch.dtype) -> None:
    """A momentum that is there is converted by the next step with a gradient, one that is not begins so."""
    params, twins = parameters(dtype), parameters(dtype)
    optimizer, other = Muon(params, backend=backend), Muon(twins, backend=backend)

    def both_train(t: int, without: int | None = None) -> None:
        for own in (params, twins):
            feed(own, t)
            if without is not None:
                own[without].grad = None
        optimizer.step()
        other.step()
        assert all(map(torch.equal, params, twins))

    both_train(0, without=1)
    optimizer.param_groups[0].update(EIGHT)
    other.param_groups[0].update(EIGHT)
    for q in (twins[0], *twins[3:]):
        state = other.state[q]
        state["momentum_buffer"], state["momentum_scale"] = quantized(state["momentum_buffer"].float())
    both_train(1, without=2)
    held = {name: set(optimizer.state[p]) for name, p in zip(MAKERS, params, strict=True)}
    assert held.pop("transposed") == {"momentum_buffer"}
    assert set(map(frozenset, held.values())) == {frozenset(("momentum_buffer", "momentum_scale"))}
    # What waits for its gradient is loaded as it is.
    again = Muon(params, backend=backend, **EIGHT)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert same(again.state_dict(), optimizer.state_dict())
    for each in (optimizer, other):
        each.param_groups[0]["momentum_dtype"] = None
    for q in twins:
        state = other.state[q]
        if "momentum_scale" in state:
            numbers = dequantized(state["momentum_buffer"], state.pop("momentum_scale"))
            state["momentum_buffer"] = torch.empty_like(q).copy_(numbers)
    both_train(2)
    assert {(*state, t.dtype) for state in optimizer.state.values() for t in state.values()} == {
        ("momentum_buffer", dtype)
    }


def test_changing_to_eight_bits_and_failing(backend: str) -> None:
    """State is converted when the step is sure; `init_state` does it without one."""
    params = parameters(names=["wide", "tall"])
    train(optimizer := Muon(params, backend=backend), params, 0, 1)
    optimizer.param_groups[0].update(EIGHT)
    before = snapshot(optimizer, params)
    optimizer.plan()
    assert same(before, snapshot(optimizer, params))
    kept = optimizer.state[params[1]].pop("momentum_buffer")
    optimizer.state[params[1]]["momentum_buffer"] = kept[1:]
    before = snapshot(optimizer, params)
    with pytest.raises(ValueError, match="momentum_buffer should have the parameter's size"):
        optimizer.step()
    assert same(before, snapshot(optimizer, params))
    optimizer.state[params[1]]["momentum_buffer"] = kept
    optimizer.init_state()
    for state, numbers in zip(optimizer.state.values(), (before[1]["state"][0]["momentum_buffer"], kept), strict=True):
        codes, scale = quantized(numbers)
        assert same(state, {"momentum_buffer": codes, "momentum_scale": scale})
    del optimizer.state[params[0]]["momentum_scale"]
    optimizer.param_groups[0]["momentum_dtype"] = None
    with pytest.raises(ValueError, match="momentum_scale should be in the state beside a momentum_buffer of int8"):
        optimizer.step()


# ---- fp32 masters ----


def bits_of(x: float) -> int:
    found: int = struct.unpack("<I", struct.pack("<f", x))[0]
    return found


def rounded(x: Tensor) -> Tensor:
    """fp32 to the nearest bf16, halfway away from zero; of numbers."""
    return ((x.view(torch.int32).long() + 2**15) >> 16).to(torch.int16).view(torch.bfloat16)


def test_halves_of_every_upper_half() -> None:
    """Of all 2^16 with the lower halves that matter, against Python's integers."""
    upper = torch.arange(-(2**15), 2**15)
    lower = torch.tensor([0, 1, 2**15 - 1, 2**15, 2**15 + 1, 2**16 - 1])
    bits = ((upper << 16)[:, None] + lower).to(torch.int32)
    numbers = bits.view(torch.float32)
    half = Halves(
        torch.empty(1, *bits.shape, dtype=torch.bfloat16), False, torch.empty(1, *bits.shape, dtype=torch.int16)
    )
    half.pack(numbers.reshape(1, -1).clone())
    for b, high, low in zip(
        bits.flatten().tolist(),
        half.stored.view(torch.int16).flatten().tolist(),
        half.mantissa.flatten().tolist(),
        strict=True,
    ):
        magnitude = b & 0x7FFFFFFF
        if magnitude > 0x7F800000:  # NaN
            assert high & 0x7FFF > 0x7F80 and low == 0
        else:
            assert ((high << 16) + low - b) % 2**32 == 0
            nearest = (magnitude + 0x8000) >> 16
            assert (high & 0x7FFF, high < 0) == (nearest, b < 0)
    assert torch.equal(half.stored[0].isnan(), numbers.isnan())
    back = torch.empty(1, bits.numel())
    half.unpack(back)
    assert torch.equal(back.isnan(), numbers.reshape(1, -1).isnan())
    assert torch.equal(back.view(torch.int32)[~back.isnan()], bits.reshape(1, -1)[~back.isnan()])
    # What is no tie, torch rounds as well.
    sound = ~numbers.isnan() & (lower != 2**15)
    assert torch.equal(half.stored[0][sound], numbers.bfloat16()[sound])


MASTERS: dict[str, dict[str, Any]] = {
    "default": {},
    "variants": {"cautious": True, "second_moment": "element", "weight_decay_form": "independent"},
    "neuron": {"second_moment": "neuron", "lr": torch.tensor(0.05), "momentum_dtype": torch.int8},
    "power": {"power": 0.5, "nesterov": False},
}


@pytest.mark.parametrize("cap", [None, 170_000])
@pytest.mark.parametrize("case", MASTERS)
def test_masters_are_trained_as_fp32_parameters(backend: str, case: str, cap: int | None) -> None:
    """To the bit; what the model sees is their rounding."""
    if cap is not None and not backends.get(backend).precise_squares:
        pytest.skip("torch's products depend on how many there are, and as many fp32 matrices take another cap")
    options = {"lr": 0.05, "momentum_dtype": torch.float32, "backend": backend, **MASTERS[case]}
    params = parameters(torch.bfloat16)
    masters = [nn.Parameter(p.detach().float()) for p in parameters(torch.bfloat16)]
    half, full = (
        Muon(params, max_workspace_bytes=cap, **MASTER, **options),
        Muon(masters, max_workspace_bytes=cap, **options),
    )
    different = 0
    for t in range(STEPS):
        train(half, params, t, t + 1)
        train(full, masters, t, t + 1)
        for name, p, q in zip(MAKERS, params, masters, strict=True):
            mantissa = half.state[p]["mantissa"]
            assert mantissa.dtype == torch.int16 and mantissa.shape == p.shape
            bits = (p.detach().view(torch.int16).int() << 16) + mantissa
            assert torch.equal(bits, q.detach().view(torch.int32)), name
            assert torch.equal(p, rounded(q.detach())), name
            different += int((p.float() != q).sum())
    assert different > 10_000


def test_masters_see_what_bf16_would_lose(backend: str) -> None:
    params = [nn.Parameter(torch.full((20, 30), 256.0, dtype=torch.bfloat16)) for _ in range(2)]
    ours, plain = (
        Muon(params[i : i + 1], lr=1e-2, weight_decay=0.0, backend=backend, master_weights=i == 0) for i in (0, 1)
    )
    for _ in range(100):
        for p in params:
            p.grad = torch.ones(20, 30, dtype=torch.bfloat16).tril()
        ours.step()
        plain.step()
    assert torch.equal(params[1], torch.full((20, 30), 256.0)) and not torch.equal(params[0], params[1])


def test_parameters_written_between_steps(backend: str) -> None:
    """The lower half stays, at most half a unit in the last place, and is the parameter's that it was of."""
    (p,) = parameters(torch.bfloat16, ["wide"])
    optimizer = Muon([p], lr=0.05, backend=backend, **MASTER)
    train(optimizer, [p], 0, 2)
    mantissa = optimizer.state[p]["mantissa"].clone()
    with torch.no_grad():
        p.copy_(new := torch.randn(p.shape).bfloat16())
    bits = (new.view(torch.int16).int() << 16) + mantissa
    master = nn.Parameter(bits.view(torch.float32))
    assert ((master - new.float()).abs() <= 2.0**-8 * new.float().abs() * 1.01).all() and mantissa.any()
    other = Muon([master], lr=0.05, momentum_dtype=torch.bfloat16, backend=backend)
    other.state[master]["momentum_buffer"] = optimizer.state[p]["momentum_buffer"].clone()
    train(optimizer, [p], 2, 3)
    train(other, [master], 2, 3)
    assert torch.equal(p, rounded(master.detach()))
    del optimizer.state[p]["mantissa"]
    exact = nn.Parameter(p.detach().float())
    last = Muon([exact], lr=0.05, momentum_dtype=torch.bfloat16, backend=backend)
    last.state[exact]["momentum_buffer"] = optimizer.state[p]["momentum_buffer"].clone()
    train(optimizer, [p], 3, 4)
    train(last, [exact], 3, 4)
    assert torch.equal(p, rounded(exact.detach()))


# ---- both ----


def both(params: list[nn.Parameter], backend: str) -> torch.optim.Optimizer:
    return Muon(params, backend=backend, **EIGHT, **MASTER)


def spectral(params: list[nn.Parameter], backend: str) -> torch.optim.Optimizer:
    return SpectralMomentum(params, lr=0.1, power=0.25, backend=backend, **EIGHT, **MASTER)


def with_adamw(params: list[nn.Parameter], backend: str) -> torch.optim.Optimizer:
    groups = [{"params": params[:1], "use_muon": False}, {"params": params[1:4], "use_muon": True}]
    groups.append({"params": params[4:], "use_muon": True, **MASTER, "momentum_dtype": None})
    return MuonAdamW(groups, muon_options={"backend": backend, **EIGHT})


@pytest.mark.parametrize("make", [both, spectral, with_adamw])
@pytest.mark.parametrize("how", ["checkpoint", "pickle"])
def test_resumes_to_the_bit(backend: str, tmp_path: Path, how: str, make: Callable[..., torch.optim.Optimizer]) -> None:
    whole = parameters(torch.bfloat16)
    train(uninterrupted := make(whole, backend), whole, 0, 2 * STEPS)
    params = parameters(torch.bfloat16)
    train(first := make(params, backend), params, 0, STEPS)
    if how == "pickle":
        second = pickle.loads(pickle.dumps(first))
        params = [p for group in second.param_groups for p in group["params"]]
    else:
        torch.save(first.state_dict(), tmp_path / "state.pt")
        second = make(params, backend)
        second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert same(second.state_dict(), first.state_dict())
    entries = [(key, t) for state in second.state.values() for key, t in state.items()]
    dtypes = {"momentum_scale": torch.float32, "mantissa": torch.int16}
    assert all(t.dtype == dtypes[key] for key, t in entries if key in dtypes)
    assert {"momentum_buffer", *dtypes} <= {key for key, _ in entries}
    own = {id(t) for state in first.state.values() for t in state.values()}
    assert not own & {id(t) for _, t in entries}
    train(second, params, STEPS, 2 * STEPS)
    assert all(map(torch.equal, params, whole)) and same(second.state_dict(), uninterrupted.state_dict())


def fp32(params: list[nn.Parameter], backend: str) -> torch.optim.Optimizer:
    return Muon(params, backend=backend)


def of_torch(params: list[nn.Parameter], backend: str) -> torch.optim.Optimizer:
    return torch.optim.Muon(params)


def eight(params: list[nn.Parameter], backend: str) -> torch.optim.Optimizer:
    return Muon(params, backend=backend, **EIGHT)


def master(params: list[nn.Parameter], backend: str) -> torch.optim.Optimizer:
    return Muon(params, backend=backend, **MASTER)


@pytest.mark.parametrize(
    ("theirs", "ours", "sentence"),
    [
        (fp32, eight, "momentum_dtype of the checkpoint should be int8, as in this optimizer, but is: None;"),
        (of_torch, eight, "load it into an optimizer with momentum_dtype=None"),
        (eight, fp32, "momentum_dtype of the checkpoint should be None, as in this optimizer, but is: int8;"),
        (fp32, master, "master_weights of the checkpoint should be True, as in this optimizer, but is: False;"),
        (of_torch, master, "load it into an optimizer with master_weights=False"),
        (master, fp32, "master_weights of the checkpoint should be False, as in this optimizer, but is: True;"),
        (eight, master, "momentum_dtype of the checkpoint should be None"),
    ],
)
@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("inside", [False, True])
def test_a_checkpoint_of_another_precision(
    theirs: Callable[..., torch.optim.Optimizer],
    ours: Callable[..., torch.optim.Optimizer],
    sentence: str,
    steps: int,
    inside: bool,
) -> None:
    """Raises, says what would fit, and changes nothing."""
    params = parameters(torch.bfloat16, ["wide", "tall"])
    train(saved := theirs(params, "auto"), params, 0, steps)
    state, optimizer = saved.state_dict(), ours(params, "auto")
    if inside:
        for group in state["param_groups"]:
            group["use_muon"] = True
        options = {key: optimizer.param_groups[0][key] for key in (*EIGHT, *MASTER)}
        optimizer = MuonAdamW([{"params": params, "use_muon": True}], muon_options=options)
    train(optimizer, params, 1, 2)
    before = snapshot(optimizer, params)
    with pytest.raises(ValueError) as caught:
        optimizer.load_state_dict(state)
    assert sentence in str(caught.value)
    assert same(before, snapshot(optimizer, params))
    train(optimizer, params, 2, 3)


def test_changing_over(backend: str) -> None:
    """As the docstring says: load it as it was saved, then change the option."""
    params = parameters(torch.bfloat16, ["wide", "tall"])
    train(saved := fp32(params, backend), params, 0, 2)
    optimizer = fp32(params, backend)
    optimizer.load_state_dict(saved.state_dict())
    optimizer.param_groups[0].update({**EIGHT, **MASTER})
    fresh = [nn.Parameter(p.detach().clone()) for p in params]
    other = both(fresh, backend)
    for p, q in zip(params, fresh, strict=True):
        codes, scale = quantized(saved.state[p]["momentum_buffer"].float())
        other.state[q].update(momentum_buffer=codes, momentum_scale=scale)
    train(optimizer, params, 2, 4)
    train(other, fresh, 2, 4)
    assert all(map(torch.equal, params, fresh))
    assert same(list(optimizer.state[params[0]]), list(other.state[fresh[0]]))
    loaded = both(params, backend)
    loaded.load_state_dict(optimizer.state_dict())


BROKEN: dict[str, tuple[str, Callable[[Tensor], Tensor | None], type[Exception], str]] = {
    "no scale": ("momentum_scale", lambda t: None, ValueError, "momentum_scale should be in the state beside"),
    "short scale": (
        "momentum_scale",
        lambda t: t[1:],
        ValueError,
        r"of size \(4,\), one for every block of each matrix",
    ),
    "bf16 scale": ("momentum_scale", lambda t: t.bfloat16(), ValueError, "and float32 but is of size"),
    "codes of another size": ("momentum_buffer", lambda t: t[1:], ValueError, "momentum_buffer.* the parameter's size"),
    "codes of another kind": (
        "momentum_buffer",
        lambda t: t.short(),
        TypeError,
        "momentum_buffer.* a dtype among .*, int8 but is",
    ),
    "mantissa of another size": ("mantissa", lambda t: t[1:], ValueError, "mantissa should have the parameter's size"),
    "mantissa in fp32": ("mantissa", lambda t: t.float(), TypeError, "mantissa should be of int16 but is"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_state_that_does_not_fit(backend: str, case: str) -> None:
    """In a checkpoint or in the state: raises, and nothing changes."""
    key, spoil, error, sentence = BROKEN[case]
    params = parameters(torch.bfloat16, ["wide", "tall"])
    optimizer = both(params, backend)
    train(optimizer, params, 0, 1)
    state = copy.deepcopy(optimizer.state_dict())
    spoilt = spoil(state["state"][0].pop(key))
    if spoilt is not None:
        state["state"][0][key] = spoilt
    before = snapshot(optimizer, params)
    with pytest.raises(error, match=sentence):
        optimizer.load_state_dict(state)
    assert same(before, snapshot(optimizer, params))
    own = optimizer.state[params[0]]
    kept = own.pop(key)
    if spoilt is not None:
        own[key] = spoilt
    feed(params, 1)
    with pytest.raises(error, match=sentence):
        optimizer.step()
    own[key] = kept
    assert same(before[0], [p.detach() for p in params])
    assert all(same(optimizer.state_dict()["state"][i], before[1]["state"][i]) for i in (0, 1))
    train(optimizer, params, 1, 2)


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        (
            {**MASTER, "stochastic_rounding": True},
            ValueError,
            "stochastic_rounding should be False where master_weights",
        ),
        (
            {**MASTER, "power": 1.0},
            ValueError,
            "master_weights should be False where power is 1",
        ),
        ({**EIGHT, "power": 1.0}, ValueError, "momentum_dtype should be floating-point where power is 1"),
        ({"master_weights": 1}, TypeError, "master_weights should be True or False but is: 1"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], error: type[Exception], sentence: str) -> None:
    params = parameters(torch.bfloat16, ["wide"])
    with pytest.raises(error, match=sentence):
        Muon(params, **options)
    optimizer = Muon(params)
    optimizer.param_groups[0].update(options)
    feed(params, 0)
    before = snapshot(optimizer, params)
    with pytest.raises(error, match=sentence):
        optimizer.step()
    assert same(before, snapshot(optimizer, params))


def test_what_is_not_bf16_has_no_other_half() -> None:
    with pytest.raises(TypeError, match=r"one is of: torch.float32; put it into a group with master_weights=False"):
        Muon(parameters(names=["wide"]), **MASTER)
    params = parameters(names=["wide"])
    optimizer = Muon(params)
    optimizer.param_groups[0].update(MASTER)
    feed(params, 0)
    with pytest.raises(TypeError, match=r"master_weights is of torch.bfloat16 parameters"):
        optimizer.step()
    assert not optimizer.state


def test_power_one_refuses_a_momentum_of_eight_bits(backend: str) -> None:
    p, codes = parameters(names=["wide"])[0], torch.zeros(70, 90, dtype=torch.int8)
    with pytest.raises(ValueError, match="momentum_buffer should be floating-point where power is 1"):
        prepare(
            [Operand(p, torch.ones_like(p), codes)], StepOptions(resolve("keller"), None, power=1.0, backend=backend)
        )


def test_a_failed_step_changes_nothing(backend: str) -> None:
    for before_it in (0, 1):
        params = parameters(torch.bfloat16, ["wide", "tall", "batch"])
        optimizer = both(params, backend)
        train(optimizer, params, 0, before_it)
        before = snapshot(optimizer, params)
        feed(params, 1)
        assert params[2].grad is not None
        params[2].grad = params[2].grad.to_sparse()
        with pytest.raises(TypeError, match="gradient should be dense"):
            optimizer.step()
        assert same(before, snapshot(optimizer, params))


def test_missing_gradients_and_inference_mode(backend: str) -> None:
    params = parameters(torch.bfloat16)
    optimizer = both(params, backend)
    feed(params, 0)
    params[0].grad = None
    before = params[0].detach().clone()
    with torch.inference_mode():
        optimizer.step()
    assert params[0] not in optimizer.state and torch.equal(params[0], before)
    train(optimizer, params, 1, 2)
    assert not any(t.is_inference() for state in optimizer.state.values() for t in state.values())
    twins = parameters(torch.bfloat16)
    other = both(twins, backend)
    feed(twins, 0)
    twins[0].grad = None
    other.step()
    train(other, twins, 1, 2)
    assert all(map(torch.equal, params, twins))


def test_plan_and_workspace(backend: str, workspace_blocks: list[int]) -> None:
    """What packing takes is planned: memory, which the cap bounds, passes over it, and bytes that it moves."""
    params = [nn.Parameter(torch.ones(8, 30, 50, dtype=torch.bfloat16)) for _ in range(2)]
    plans = []
    for options in ({}, EIGHT, MASTER, {**EIGHT, **MASTER}):
        optimizer = Muon(params, backend=backend, max_workspace_bytes=150_000, ns_algorithm="standard", **options)
        (bucket,) = optimizer.plan().buckets
        workspace_blocks.clear()
        train(optimizer, params, 0, 1)
        assert bucket.packed == len(options) and bucket.workspace_bytes <= 150_000
        assert not workspace_blocks[1:] and workspace_blocks[0] == bucket.workspace_bytes
        assert not (options and bucket.fused)
        notes = [n for n in optimizer.plan().notes if "goes through fp32 memory" in n]
        assert len(notes) == len(options) and all(any(n.startswith(key) for n in notes) for key in options)
        plans.append(bucket)
    plain, *rest = plans
    each = lambda b: b.workspace_bytes // b.slots
    if not plain.fused:
        assert {each(b) - each(plain) for b in rest} == {4 * 1504}  # 30 x 50 fp32 to 64 bytes
        elements = 16 * 30 * 50
        # Codes instead of bf16; a mantissa; and, of each, fp32 numbers written and read twice.
        assert [b.bytes - plain.bytes for b in rest] == [elements * n for n in (-2 + 16, 4 + 16, -2 + 4 + 32)]
        launches = lambda b: (b.launches - 2 * len(b.chunks) * b.packed) / len(b.chunks)
        assert {launches(b) for b in plans} == {plain.launches / len(plain.chunks)}
        with pytest.raises(ValueError, match="max_workspace_bytes should be at least"):
            Muon(params, backend=backend, max_workspace_bytes=each(plain), **EIGHT).plan()


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_no_packed_step_is_fused(name: str) -> None:
    def planned(*stages: Stage) -> Bucket:
        return plan_bucket((64, 64), 8, StepOptions(resolve("keller", None), stages=stages), name, bytes_per_element=10)

    assert planned().fused and not planned(EightBitMomentum()).fused and not planned(MasterWeights()).fused


def test_no_more_than_a_piece_beside_the_workspace(backend: str) -> None:
    """Nothing that torch allocates while it packs is as large as a matrix."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
            if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in given:
                self.elements = max(self.elements, out.numel())
            return out

    values = torch.randn(1, 300 * 5000)
    for made in (
        Quantized(torch.zeros(1, 300, 5000, dtype=torch.int8), False, torch.zeros(1, 733)),
        Halves(torch.zeros(1, 300, 5000).bfloat16(), False, torch.zeros(1, 300, 5000, dtype=torch.int16)),
    ):
        made.reserve()  # bytes, which are more than elements, and here already only if other tests were before
        with Largest() as largest:
            made.pack(values)
            made.unpack(values)
        assert 0 < largest.elements <= packed._PIECE_ON_CPU


def test_a_rehearsal_reads_and_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The verbs do not run then, and the workspace is empty."""
    eager = backends.get("eager")

    @contextmanager
    def rehearsal() -> Iterator[None]:
        with monkeypatch.context() as patch:
            for verb in ("momentum_update", "apply_update", "syrk", "syrkx", "gemm"):
                patch.setattr(eager, verb, lambda *args, **options: rehearsed.append(0))
            yield

    params, twins = parameters(torch.bfloat16), parameters(torch.bfloat16)
    train(other := both(twins, "eager"), twins, 0, 2)
    rehearsed: list[int] = []
    monkeypatch.setattr(eager, "rehearsal", rehearsal)
    optimizer = both(params, "eager")
    feed(params, 0)
    optimizer._workspace.reserve(torch.device("cpu"), 1 << 24)
    optimizer._workspace._blocks[torch.device("cpu")].fill_(123)
    train(optimizer, params, 0, 2)
    assert rehearsed and all(map(torch.equal, params, twins))
    assert same(other.state_dict()["state"], optimizer.state_dict()["state"])


def test_packed_state_of_a_model_in_two_groups(backend: str) -> None:
    """Options are a group's; MuonAdamW's groups too."""
    params = parameters(torch.bfloat16, ["wide", "tall", "batch", "row"])
    groups = [
        {"params": params[:2], "use_muon": True, **EIGHT},
        {"params": params[2:3], "use_muon": True, **MASTER},
        {"params": params[3:], "use_muon": False},
    ]
    optimizer = MuonAdamW(groups, muon_options={"backend": backend})
    train(optimizer, params, 0, 1)
    keys = [set(optimizer.state[p]) for p in params]
    assert keys[0] == keys[1] == {"momentum_buffer", "momentum_scale"}
    assert keys[2] == {"momentum_buffer", "mantissa"} and "exp_avg" in keys[3]
