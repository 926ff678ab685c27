"""QK-Clip against a loop over heads in float64, and against the logits that come of it."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from muon_kernels import max_logits, qk_clip_

HEADS, DIM, INNER = 6, 4, 10
LOGITS = [50.0, 100.0, 101.0, 400.0, -7.0, -math.inf]


def weights(*sizes: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*sizes, generator=generator, dtype=torch.float64).to(dtype)


def clipped(rows: Tensor, factors: list[float]) -> Tensor:
    """Each head's rows of a float64 matrix times its factor, one number at a time."""
    out = rows.double().clone()
    per_head = out.shape[0] // len(factors)
    for head, factor in enumerate(factors):
        for row in range(head * per_head, (head + 1) * per_head):
            out[row] = out[row] * factor
    return out


def gammas(logits: list[float], tau: float) -> list[float]:
    return [min(1.0, tau / x) if x > 0 else 1.0 for x in logits]


def assert_rounded_once(actual: Tensor, expected: Tensor) -> None:
    """Within half a unit of the last place, and what computing the factor in fp32 adds."""
    half = torch.finfo(actual.dtype).eps / 2 + 3 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(actual.double(), expected, rtol=half, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("alpha", [0.5, 0.25, 0.0, 1.0])
def test_every_head_has_rows_of_its_own(dtype: torch.dtype, logits_dtype: torch.dtype, alpha: float) -> None:
    q, k = weights(HEADS * DIM, INNER, dtype=dtype), weights(HEADS * DIM, INNER, dtype=dtype, seed=1)
    q_before, k_before = q.clone(), k.clone()
    maxima = torch.tensor(LOGITS).to(logits_dtype)
    factors = gammas(maxima.tolist(), 100.0)
    gamma = qk_clip_(q, k, maxima, alpha=alpha)
    assert gamma.dtype == torch.promote_types(logits_dtype, torch.float32)
    torch.testing.assert_close(gamma.tolist(), factors, rtol=1e-6, atol=0)
    assert_rounded_once(q, clipped(q_before, [g**alpha for g in factors]))
    assert_rounded_once(k, clipped(k_before, [g ** (1 - alpha) for g in factors]))
    for head in (0, 1, 4, 5):  # of those up to tau not a bit
        rows = slice(head * DIM, (head + 1) * DIM)
        assert q[rows].equal(q_before[rows]) and k[rows].equal(k_before[rows])


def test_float64_is_exact() -> None:
    q, k = (weights(HEADS * DIM, INNER, dtype=torch.float64, seed=i) for i in range(2))
    expected = [clipped(W, [math.sqrt(g) for g in gammas(LOGITS, 33.0)]) for W in (q, k)]
    qk_clip_(q, k, torch.tensor(LOGITS, dtype=torch.float64), 33.0)
    torch.testing.assert_close([q, k], expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_grouped_queries_share_the_key_of_the_largest(kv_heads: int, alpha: float) -> None:
    q, k = weights(HEADS * DIM, INNER), weights(kv_heads * DIM, INNER, seed=1)
    q_before, k_before = q.clone(), k.clone()
    maxima = [300.0, 20.0, 150.0, 90.0, 120.0, 600.0]
    qk_clip_(q, k, torch.tensor(maxima), kv_heads=kv_heads, alpha=alpha)
    group = HEADS // kv_heads
    of_key = [max(maxima[i * group : (i + 1) * group]) for i in range(kv_heads)]
    assert_rounded_once(q, clipped(q_before, [g**alpha for g in gammas(maxima, 100.0)]))
    assert_rounded_once(k, clipped(k_before, [g ** (1 - alpha) for g in gammas(of_key, 100.0)]))


def test_latent_attention_has_a_rotary_part_of_queries_alone() -> None:
    nope, rope, value = 5, 2, 3
    q_up = weights(HEADS * (nope + rope), INNER)
    kv_up = weights(HEADS * (nope + value), INNER, seed=1)
    q_before, kv_before = q_up.clone(), kv_up.clone()
    q_heads, kv_heads = q_up.view(HEADS, nope + rope, INNER), kv_up.view(HEADS, nope + value, INNER)
    qk_clip_(q_heads[:, :nope], kv_heads[:, :nope], torch.tensor(LOGITS), q_rope=q_heads[:, nope:], alpha=0.3)
    for head, gamma in enumerate(gammas(LOGITS, 100.0)):
        for rows, before, factor in [
            (q_up.view(HEADS, -1, INNER)[head, :nope], q_before.view(HEADS, -1, INNER)[head, :nope], gamma**0.3),
            (q_up.view(HEADS, -1, INNER)[head, nope:], q_before.view(HEADS, -1, INNER)[head, nope:], gamma),
            (kv_up.view(HEADS, -1, INNER)[head, :nope], kv_before.view(HEADS, -1, INNER)[head, :nope], gamma**0.7),
            (kv_up.view(HEADS, -1, INNER)[head, nope:], kv_before.view(HEADS, -1, INNER)[head, nope:], 1.0),
        ]:
            assert_rounded_once(rows, before.double() * factor)


def test_fused_projection_with_bias_and_master() -> None:
    d = HEADS * DIM
    qkv = nn.Linear(INNER, 3 * d).bfloat16()
    master = qkv.weight.detach().float() * 1.001  # bits that the weight has not
    before = [t.detach().clone() for t in (qkv.weight, qkv.bias, master)]
    q, k, _ = ([qkv.weight[i : i + d], qkv.bias[i : i + d], master[i : i + d]] for i in (0, d, 2 * d))
    qk_clip_(q, k, torch.tensor(LOGITS))
    factors = [math.sqrt(g) for g in gammas(LOGITS, 100.0)]
    for t, was in zip((qkv.weight, qkv.bias, master), before, strict=True):
        t = t.detach()
        for part in (slice(0, d), slice(d, 2 * d)):
            assert_rounded_once(t[part], clipped(was[part], factors))
        assert t[2 * d :].equal(was[2 * d :])


def test_rows_of_a_pair_are_those_of_a_slice() -> None:
    """To the bit; a row of no head stays, whatever it is."""
    d = HEADS * DIM
    whole, bias = weights(3 * d, INNER, dtype=torch.bfloat16), weights(3 * d)
    whole[2 * d], bias[-1] = math.nan, math.inf
    ours = whole.clone(), bias.clone()
    q, k = ([t[i : i + d] for t in (whole, bias)] for i in (0, d))
    expected = qk_clip_(q, k, torch.tensor(LOGITS), alpha=0.3)
    of_k = torch.arange(d, 2 * d, dtype=torch.int32)
    found = qk_clip_([(t, slice(d)) for t in ours], [(t, of_k) for t in ours], torch.tensor(LOGITS), alpha=0.3)
    assert found.equal(expected)
    for t, was in zip(ours, (whole, bias), strict=True):
        torch.testing.assert_close(t, was, rtol=0, atol=0, equal_nan=True)
        assert t._version == 2


def test_rows_of_a_pair_may_be_in_any_order() -> None:
    """Heads that are interleaved in the weight."""
    W, k = weights(HEADS * DIM, INNER), weights(HEADS, INNER, seed=1)
    before = W.clone()
    qk_clip_([(W, torch.arange(HEADS * DIM).view(DIM, HEADS).T.flatten())], k, torch.tensor(LOGITS))
    in_order = before.view(DIM, HEADS, INNER).transpose(0, 1).flatten(0, 1)
    wanted = clipped(in_order, [math.sqrt(g) for g in gammas(LOGITS, 100.0)])
    assert_rounded_once(W.view(DIM, HEADS, INNER).transpose(0, 1).flatten(0, 1), wanted)


def test_slices_of_a_chunk_and_any_strides() -> None:
    d = HEADS * DIM
    qkv = nn.Parameter(weights(INNER, 3 * d))
    before = qkv.detach().clone()
    q, k, _ = qkv.mT.chunk(3)
    qk_clip_(q, k, torch.tensor(LOGITS))
    factors = [math.sqrt(g) for g in gammas(LOGITS, 100.0)]
    for part in (slice(0, d), slice(d, 2 * d)):
        assert_rounded_once(qkv.detach()[:, part].mT, clipped(before[:, part].mT, factors))
    assert qkv[:, 2 * d :].equal(before[:, 2 * d :])


def test_autograd_notices() -> None:
    q, k = (nn.Parameter(weights(HEADS * DIM, INNER, seed=i)) for i in range(2))
    x = torch.randn(3, INNER, requires_grad=True)
    loss = (x @ q.mT).square().sum() + (x @ k.mT).sum()
    versions = q._version, k._version
    qk_clip_(q, k, torch.tensor(LOGITS))
    assert (q._version, k._version) == (versions[0] + 1, versions[1] + 1)
    assert q.requires_grad and q.is_leaf and q.grad is None
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def attention_maxima(q: Tensor, k: Tensor, x: Tensor, kv_heads: int, **options: Any) -> Tensor:
    heads = [(x @ W.mT).view(*x.shape[:-1], n, -1).transpose(-2, -3) for W, n in ((q, HEADS), (k, kv_heads))]
    return max_logits(heads[0], heads[1], **options)


@pytest.mark.parametrize("kv_heads", [6, 2])
def test_clipping_bounds_the_logits(kv_heads: int) -> None:
    """What it is for: the same input does not pass tau again, and those that pass it come to stand at tau."""
    q, k, x = weights(HEADS * DIM, INNER), weights(kv_heads * DIM, INNER, seed=1), weights(3, 20, INNER, seed=2)
    q[:DIM] *= 0.1
    before = attention_maxima(q, k, x, kv_heads)
    tau = before.median().item()
    qk_clip_(q, k, before, tau, kv_heads=kv_heads)
    after = attention_maxima(q, k, x, kv_heads)
    assert (before > tau).any() and (before < tau).any()
    assert (after <= tau * (1 + 1e-5)).all()
    if kv_heads == HEADS:
        torch.testing.assert_close(after, before.clamp(max=tau), rtol=1e-5, atol=0)


class Waits(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the operations that make the host wait."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def test_on_a_device_nothing_waits_for_the_host() -> None:
    """The meta device has no numbers to look at; what a GPU computes is the same graph."""
    with Waits():
        q, k = (torch.empty(HEADS * DIM, INNER, device="meta") for _ in range(2))
        maxima = max_logits(*(torch.empty(2, HEADS, 9, DIM, device="meta") for _ in range(2)), causal=True)
        assert qk_clip_(q, k, maxima, q_rope=torch.empty(HEADS, 2, INNER, device="meta")).shape == (HEADS,)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_numbers_that_are_none_leave_a_head_alone_where_they_are_not_looked_at(
    wrong: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("muon_kernels.qk_clip.on_host", lambda value: False)
    q, k = weights(HEADS * DIM, INNER), weights(2 * DIM, INNER, seed=1)
    q_before, k_before = q.clone(), k.clone()
    maxima = [wrong, 400.0, 20.0, wrong, wrong, wrong]
    gamma = qk_clip_(q, k, torch.tensor(maxima), kv_heads=2)
    torch.testing.assert_close(gamma.tolist(), [math.nan, 0.25, 1.0, *[math.nan] * 3], equal_nan=True)
    assert_rounded_once(q, clipped(q_before, [1, 0.5, 1, 1, 1, 1]))
    assert_rounded_once(k, clipped(k_before, [0.5, 1]))


LOGITS_OF = torch.tensor(LOGITS)
Q, K = weights(HEADS * DIM, INNER), weights(HEADS * DIM, INNER, seed=1)
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no maxima": ({"max_logits": None}, TypeError, r"as muon_kernels.max_logits\(q, k\) makes it, but is: NoneType"),
    "a list": ({"max_logits": LOGITS}, TypeError, "but is: list"),
    "integers": ({"max_logits": torch.ones(HEADS, dtype=torch.int64)}, TypeError, "floating-point dtype"),
    "a maximum a layer": ({"max_logits": torch.ones(2, HEADS)}, ValueError, r"size \(heads,\) but has: \(2, 6\)"),
    "one maximum": ({"max_logits": torch.tensor(3.0)}, ValueError, r"but has: \(\)"),
    "no heads": ({"max_logits": torch.ones(0)}, ValueError, r"but has: \(0,\)"),
    "another number of heads": ({"max_logits": torch.ones(5)}, ValueError, r"q .* that 5 heads share .* \(24, 10\)"),
    "nan": ({"max_logits": torch.tensor([1, 2, math.nan, 4, 5, 6])}, ValueError, r"are: \{2: nan\}; has the training"),
    "infinity": ({"max_logits": torch.tensor([math.inf, 2, 3, 4, 5, 6])}, ValueError, r"are: \{0: inf\}"),
    "kv_heads not a divisor": ({"kv_heads": 4}, ValueError, "divide the 6 heads that max_logits has but is: 4"),
    "kv_heads of no keys": ({"kv_heads": 0}, ValueError, "but is: 0"),
    "keys of another number": ({"k": weights(15, INNER), "kv_heads": 2}, ValueError, "k .* that 2 heads share evenly"),
    "rotary part": ({"q_rope": weights(7, INNER)}, ValueError, "q_rope .* that 6 heads share evenly"),
    "tau": ({"tau": 0.0}, ValueError, "tau should be > 0 and finite but is: 0.0"),
    "tau nan": ({"tau": math.nan}, ValueError, "tau should be > 0"),
    "alpha": ({"alpha": 1.5}, ValueError, r"alpha should be a number in \[0, 1\] but is: 1.5"),
    "integer weights": ({"k": torch.ones(HEADS * DIM, 2, dtype=torch.int8)}, TypeError, "k should be of a floating"),
    "no weight": ({"k": []}, ValueError, "k should be a weight, or several, but is empty"),
    "a weight that is none": ({"k": [K, None]}, TypeError, "k should be a Tensor but is: NoneType"),
    "expanded": ({"k": torch.ones(1, INNER).expand(HEADS, INNER)}, ValueError, "memory for every element"),
    "the whole fused weight twice": ({"k": Q}, ValueError, r"size \(24, 10\) should have memory of its own"),
    "a weight twice": ({"q": [Q, Q]}, ValueError, "q .* shares elements .* would be scaled twice"),
    "slices that overlap": ({"q": Q[:18], "k": Q[6:24]}, ValueError, "k .* shares elements"),
    "no tensor": ({"k": 3}, TypeError, "k should be a tensor or a list of tensors but is: int"),
    "tau a text": ({"tau": "100"}, TypeError, "tau should be a number but is: '100'"),
    "rows of a pair, a list": ({"q": [(Q, [0, 1])]}, TypeError, "rows of q should be a slice or .* but are: list"),
    "rows of a pair, numbers": ({"q": [(Q, torch.ones(6))]}, TypeError, r"but are: torch.float32 of size \(6,\)"),
    "rows of a pair, too far": ({"q": [(Q, torch.arange(19, 25))]}, ValueError, "from 0 to 23 but are from 19 to 24"),
    "rows of a pair, negative": ({"q": [(Q, torch.arange(-1, 5))]}, ValueError, "from 0 to 23 but are from -1 to 4"),
    "rows of a pair, twice": ({"q": [(Q, torch.tensor([0, 1, 2, 3, 4, 4]))]}, ValueError, "there once each, or they"),
    "rows of a pair, elsewhere": ({"q": [(Q, torch.arange(6, device="meta"))]}, ValueError, "on the CPU, so that"),
    "rows of a pair, too few": ({"q": [(Q, slice(0, 7))]}, ValueError, r"size: \(24, 10\), of which 7 rows were given"),
    "rows of a pair, overlap": ({"q": [(Q, slice(0, 12))], "k": [(Q, slice(6, 18))]}, ValueError, "k .* scaled twice"),
    "rows of a pair, and all": ({"q": [Q, (Q, slice(0, 6))]}, ValueError, "q .* would be scaled twice"),
    "a pair outside of a list": ({"q": (Q, slice(0, 6))}, TypeError, "q should be a Tensor but is: slice"),
    "a group that is none": ({"group": "world"}, TypeError, "group should be a torch.distributed.ProcessGroup"),
    "another device": ({"k": torch.ones(HEADS, 2, device="meta")}, ValueError, "device of max_logits, cpu, but is on"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_used_changes_nothing(case: str) -> None:
    changes, error, message = REFUSED[case]
    arguments = {"q": Q, "k": K, "max_logits": LOGITS_OF, **changes}
    tensors = [t for t in (Q, K, *arguments.values()) if isinstance(t, Tensor) and not t.is_meta]
    before = [t.clone() for t in tensors]
    with pytest.raises(error, match=message):
        qk_clip_(**arguments)
    assert all(t.allclose(was, rtol=0, atol=0, equal_nan=True) for t, was in zip(tensors, before, strict=True))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("workspace", [1, 4000, 1 << 20])
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "length", "keys"),
    [((2,), 4, 4, 17, 17), ((2, 3), 6, 2, 9, 9), ((), 4, 1, 8, 13), ((1,), 2, 2, 13, 8), ((2,), 3, 1, 1, 1)],
)
def test_largest_logits(
    batch: tuple[int, ...], heads: int, kv_heads: int, length: int, keys: int, workspace: int, causal: bool
) -> None:
    q, k = weights(*batch, heads, length, DIM), weights(*batch, kv_heads, keys, DIM, seed=1)
    expected = []
    for head in range(heads):
        a, b = q[..., head, :, :].double(), k[..., head * kv_heads // heads, :, :].double()
        expected.append(
            max(
                float((a[..., i, :] * b[..., j, :]).sum(-1).max()) / math.sqrt(DIM)
                for i in range(length)
                for j in range(min(i + 1, keys) if causal else keys)
            )
        )
    found = max_logits(q, k, causal=causal, max_workspace_bytes=workspace)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=0)
    strided = max_logits(q.mT.contiguous().mT, k.mT.contiguous().mT, causal=causal, scale=3.0)
    torch.testing.assert_close(strided, found * 3 * math.sqrt(DIM))


def test_largest_logits_in_half_precision_and_out_of_its_range() -> None:
    q, k = weights(1, 2, 50, 64, dtype=torch.float16), weights(1, 2, 50, 64, dtype=torch.float16, seed=1)
    for a, b in ((q, k), (q * 200, k * 200), (q.bfloat16(), k.bfloat16())):
        expected = (a.double() @ b.double().mT).amax((0, 2, 3)) / 8
        found = max_logits(a, b)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    assert max_logits(q.double(), k.double()).dtype == torch.float64


def test_largest_logits_under_autocast_are_not_rounded() -> None:
    q, k = weights(2, 4, 9, DIM), weights(2, 4, 9, DIM, seed=1)
    expected = max_logits(q, k)
    with torch.autocast("cpu"):
        assert max_logits(q, k).equal(expected)


@pytest.mark.parametrize("causal", [False, True])
def test_largest_logits_inside_a_compiled_model(causal: bool) -> None:
    q, k = weights(2, 4, 9, DIM), weights(2, 2, 9, DIM, seed=1)

    @torch.compile(backend="eager", fullgraph=True)
    def forward(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return max_logits(q, k, causal=causal, max_workspace_bytes=2000), (q * q).sum()

    found, loss = forward(q.requires_grad_(), k)
    same_blocks = max_logits(q, k, causal=causal, max_workspace_bytes=2000)  # of others, sums in another order
    assert found.equal(same_blocks) and not found.requires_grad
    loss.backward()


def test_largest_logits_where_there_are_none_or_no_numbers() -> None:
    q = weights(2, 3, 5, DIM)
    for empty in (q[:0], q[:, :, :0]):
        assert max_logits(empty, empty).tolist() == [-math.inf] * 3
    assert max_logits(q, q[:, :, :0]).tolist() == [-math.inf] * 3
    q.requires_grad_()
    assert not max_logits(q, q).requires_grad
    with torch.no_grad():
        q[1, 2, 3, 0] = math.nan
    assert max_logits(q, q.nan_to_num()).isnan().tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("q", "k", "options", "error", "message"),
    [
        (torch.ones(3, 2), torch.ones(3, 2), {}, ValueError, r"q should have size .* but has: \(3, 2\)"),
        (torch.ones(4, 3, 2), torch.ones(3, 3, 2), {}, ValueError, r"divisor of heads, but have: \(4, 3, 2\) and"),
        (torch.ones(4, 3, 2), torch.ones(0, 3, 2), {}, ValueError, "divisor of heads"),
        (torch.ones(4, 3, 2), torch.ones(4, 3, 1), {}, ValueError, "divisor of heads"),
        (torch.ones(1, 4, 3, 2), torch.ones(2, 4, 3, 2), {}, ValueError, "divisor of heads"),
        (torch.ones(4, 3, 2), torch.ones(4, 3, 2).double(), {}, TypeError, "k should be torch.float32 on cpu, as q is"),
        (torch.ones(4, 3, 2), [1.0], {}, TypeError, "k should be a tensor of a floating-point dtype but is: list"),
        (torch.ones(4, 3, 2).int(), torch.ones(4, 3, 2), {}, TypeError, "q should be .* but is: torch.int32"),
        (torch.ones(4, 3, 2), torch.ones(4, 3, 2), {"scale": -1.0}, ValueError, "scale should be > 0"),
        (torch.ones(4, 3, 2), torch.ones(4, 3, 2), {"max_workspace_bytes": 0}, ValueError, "positive int"),
    ],
)
def test_largest_logits_of_what_does_not_fit(
    q: Tensor, k: Tensor, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        max_logits(q, k, **options)
