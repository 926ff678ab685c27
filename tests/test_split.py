"""Parameters that hold several matrices: a step with `split` is a step of the parts, held apart."""

import copy
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from muon_kernels import Muon, MuonAdamW, param_groups
from muon_kernels.checks.matrices import make
from muon_kernels.split import blocks, equal, heads, qkv
from muon_kernels.step.run import Local

STEPS = 3
OPTIONS: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.5, "momentum": 0.8}


class Case(NamedTuple):
    """A parameter's size, its cut, and the parts by plain indexing; `copied`: no strides describe them."""

    shape: tuple[int, ...]
    split: str
    parts: Callable[[Tensor], Sequence[Tensor]]
    flatten: bool | None = None
    copied: bool = False


def grouped(*ends: int) -> Callable[[Tensor], list[Tensor]]:
    """Rows by groups of ends[-1], of which part i is those between two ends, of all groups."""

    def parts(t: Tensor) -> list[Tensor]:
        groups = t.contiguous().view(-1, ends[-1], t.shape[-1])
        return [groups[:, a:b].reshape(-1, t.shape[-1]) for a, b in zip((0, *ends), ends, strict=False)]

    return parts


CASES = {
    "heads": Case((96, 40), heads(6), lambda t: [t[16 * i : 16 * i + 16] for i in range(6)]),
    "heads, tall": Case((96, 8), heads(3), lambda t: [t[:32], t[32:64], t[64:]]),
    "heads of an output": Case((40, 96), heads(6, dim=1), lambda t: [t[:, 16 * i : 16 * i + 16] for i in range(6)]),
    "one head": Case((24, 40), heads(1), lambda t: [t]),
    "heads of one row": Case((6, 40), heads(6), lambda t: [t[i : i + 1] for i in range(6)]),
    "GPT-2": Case((24, 120), equal(3, dim=1), lambda t: [t[:, :40], t[:, 40:80], t[:, 80:]]),
    "GQA": Case((160, 24), qkv(12, 4), lambda t: [t[:96], t[96:128], t[128:]]),
    "GQA, columns": Case((24, 160), qkv(12, 4, dim=1), lambda t: [t[:, :96], t[:, 96:128], t[:, 128:]]),
    "Megatron": Case((160, 24), qkv(12, 4, interleaved=True), grouped(24, 32, 40), copied=True),
    "NeoX": Case((96, 24), qkv(4, interleaved=True), grouped(8, 16, 24), copied=True),
    "one group": Case((48, 24), qkv(4, 1, interleaved=True), lambda t: [t[:32], t[32:40], t[40:]]),
    "heads of one row by groups": Case((9, 40), qkv(3, interleaved=True), grouped(1, 2, 3)),
    "blocks": Case((50, 40), blocks(20, 20, 10), lambda t: [t[:20], t[20:40], t[40:]]),
    "blocks by groups": Case((56, 24), blocks(8, 6, interleaved=True), grouped(8, 14), copied=True),
    "columns in turn": Case((24, 80), blocks(1, 1, interleaved=True, dim=1), lambda t: [t[:, ::2], t[:, 1::2]]),
    "experts below one another": Case((120, 40), equal(5), lambda t: list(t.unflatten(0, (5, 24)))),
    "experts": Case((3, 48, 40), equal(2), lambda t: [t[:, :24], t[:, 24:]]),
    "experts, columns": Case((3, 40, 48), equal(2, dim=1), lambda t: [t[..., :24], t[..., 24:]]),
    "experts, unequal": Case((3, 48, 40), blocks(20, 20, 8), lambda t: [t[:, :20], t[:, 20:40], t[:, 40:]]),
    "gpt-oss": Case((3, 24, 80), blocks(1, 1, interleaved=True, dim=1), lambda t: [t[..., ::2], t[..., 1::2]]),
    "stacks of stacks": Case((2, 3, 48, 40), equal(2), lambda t: [t[..., :24, :], t[..., 24:, :]], False),
    "grouped convolution": Case((12, 5, 3, 3), equal(3), lambda t: [t[:4], t[4:8], t[8:]]),
    "convolution, inputs": Case((12, 6, 3, 3), equal(2, dim=1), lambda t: [t[:, :3], t[:, 3:]]),
    "convolution, inputs in turn": Case(
        (12, 6, 3, 3), blocks(1, 1, interleaved=True, dim=1), lambda t: [t[:, ::2], t[:, 1::2]], copied=True
    ),
    "flattened": Case((12, 5, 7), equal(2), lambda t: [t[:6], t[6:]], True),
}


def gradient(shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    rows = shape[0] if len(shape) == 4 else shape[-2]
    cols = torch.Size(shape).numel() // rows
    return make(("gaussian", "power -1", "one large")[seed % 3], rows, cols, dtype=dtype, seed=seed).reshape(shape)


def contiguous(tensors: Sequence[Tensor]) -> list[nn.Parameter]:
    return [nn.Parameter(t.detach().clone(memory_format=torch.contiguous_format)) for t in tensors]


def train(optimizer: torch.optim.Optimizer, params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """One step, which must leave the gradients as they are."""
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    kept = [g.clone() for g in grads]
    optimizer.step()
    assert same(grads, kept), "a gradient was written"


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def buffers(optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> list[Tensor]:
    return [optimizer.state[p]["momentum_buffer"] for p in params]


def copies(optimizer: Muon) -> int:
    return sum(
        len(task.prepared.copies) + len(task.prepared.grad_copies)
        for task in optimizer._tasks.kept
        if isinstance(task, Local)
    )


# ------------------------------------------------------------------------------------------------ the step


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_that_of_the_parts(backend: str, name: str) -> None:
    case = CASES[name]
    p = nn.Parameter(0.1 * gradient(case.shape, 9))
    parts = contiguous(case.parts(p))
    options = {**OPTIONS, "flatten": case.flatten, "backend": backend}
    whole, apart = Muon([{"params": [p], "split": case.split}], **options), Muon(parts, **options)
    for t in range(STEPS):
        g = gradient(case.shape, t)
        train(whole, [p], [g])
        train(apart, parts, [x.contiguous() for x in case.parts(g)])
        assert same(case.parts(p.detach()), parts)
    assert same(case.parts(buffers(whole, [p])[0]), buffers(apart, parts))
    assert (copies(whole) > 0) == case.copied
    counts = {b.shape: b.count for b in whole.plan().buckets}
    assert counts == {b.shape: b.count for b in apart.plan().buckets}


LAID: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda t: t.clone(),
    "transposed": lambda t: t.mT.contiguous().mT,
    "slice": lambda t: torch.full((*t.shape[:-2], t.shape[-2] + 3, 2 * t.shape[-1]), 7.0)[..., 2:-1, ::2].copy_(t),
}


@pytest.mark.parametrize("laid", LAID)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if len(case.shape) < 4 and not case.flatten])
def test_strides(backend: str, name: str, laid: str) -> None:
    """A parameter of any strides, and gradients of others at every step; nothing around it is written."""
    case, lay = CASES[name], LAID[laid]
    start = 0.1 * gradient(case.shape, 9)
    p, parts = nn.Parameter(lay(start)), contiguous(case.parts(start))
    whole, apart = Muon([p], split=case.split, backend=backend), Muon(parts, backend=backend)
    for t, lay_gradient in enumerate(LAID.values()):
        g = gradient(case.shape, t)
        train(whole, [p], [lay_gradient(g)])
        train(apart, parts, [x.contiguous() for x in case.parts(g)])
    assert same(case.parts(p.detach()), parts)
    memory = p.detach().as_strided((p.untyped_storage().nbytes() // 4,), (1,), 0).clone()
    memory.as_strided(p.shape, p.stride(), p.storage_offset()).fill_(7.0)
    assert (memory == 7.0).all(), "memory around the parameter was written"


@pytest.mark.parametrize("name", ["grouped convolution", "convolution, inputs", "convolution, inputs in turn"])
def test_channels_last(backend: str, name: str) -> None:
    """Whose columns are in another order, and so are the parts'."""
    case = CASES[name]

    def laid(t: Tensor) -> Tensor:
        return t.contiguous(memory_format=torch.channels_last)

    start = 0.1 * gradient(case.shape, 9)
    p = nn.Parameter(laid(start))
    parts = [nn.Parameter(laid(x)) for x in case.parts(start)]
    whole, apart = Muon([p], split=case.split, backend=backend), Muon(parts, backend=backend)
    for t in range(STEPS):
        g = laid(gradient(case.shape, t))
        train(whole, [p], [g])
        train(apart, parts, [laid(x) for x in case.parts(g)])
    assert same(case.parts(p.detach()), parts)


@pytest.mark.parametrize("name", ["GQA", "Megatron", "experts, columns", "grouped convolution"])
def test_bf16(backend: str, name: str) -> None:
    case = CASES[name]
    p = nn.Parameter(0.1 * gradient(case.shape, 9, torch.bfloat16))
    parts = contiguous(case.parts(p))
    options = {**OPTIONS, "momentum_dtype": torch.float32, "backend": backend}
    whole, apart = Muon([p], split=case.split, **options), Muon(parts, **options)
    for t in range(STEPS):
        g = gradient(case.shape, t, torch.bfloat16)
        train(whole, [p], [g])
        train(apart, parts, [x.contiguous() for x in case.parts(g)])
    # torch's add_ rounds bf16 once more in some elements than in others: which, depends on where they lie.
    roundings = STEPS * 2**-7 if backend == "eager" else 0
    for x, y in zip(case.parts(p.detach()), parts, strict=True):
        torch.testing.assert_close(x, y.detach(), rtol=roundings, atol=roundings * 2**-6)


@pytest.mark.parametrize("name", ["GQA", "Megatron", "columns in turn"])
def test_a_negation_that_torch_has_put_off(backend: str, name: str) -> None:
    case = CASES[name]
    z = torch.complex(gradient(case.shape, 0), gradient(case.shape, 1)).conj().imag
    assert z.is_neg()
    results = []
    for g in (z, z.resolve_neg().contiguous()):
        p = nn.Parameter(torch.zeros(case.shape))
        train(Muon([p], split=case.split, backend=backend), [p], [g])
        results.append(p.detach())
    assert same(results[:1], results[1:]) and results[0].any()


def own_rule(rows: int, cols: int) -> float:
    return rows / (cols + 1)


@pytest.mark.parametrize("rule", [None, "match_rms_adamw", "spectral", "callable"])
def test_learning_rates_are_the_parts_own(backend: str, rule: str | None) -> None:
    """Of their shape as it is, (rows, cols), not as it is stepped."""
    given: Any = own_rule if rule == "callable" else rule
    ratio = {
        None: lambda a, b: max(1.0, a / b) ** 0.5,
        "match_rms_adamw": lambda a, b: 0.2 * max(a, b) ** 0.5,
        "spectral": lambda a, b: (a / b) ** 0.5,
        "callable": lambda a, b: a / (b + 1),
    }[rule]
    case, g = CASES["GQA"], gradient((160, 24), 0)
    options = {"lr": 1.0, "weight_decay": 0.0, "split": case.split, "backend": backend}
    ours, plain = (nn.Parameter(torch.zeros(case.shape)) for _ in range(2))
    train(Muon([ours], adjust_lr_fn=given, **options), [ours], [g])
    train(Muon([plain], adjust_lr_fn="none", **options), [plain], [g])
    for x, y, rows in zip(case.parts(ours.data), case.parts(plain.data), (96, 32, 32), strict=True):
        torch.testing.assert_close(x, ratio(rows, 24) * y, rtol=2**-22, atol=0)


def test_parts_share_buckets_with_whole_parameters(backend: str) -> None:
    """And with parts of other parameters, where names say what is cut."""
    start = {
        "a.qkv": 0.1 * gradient((72, 40), 0),
        "a.out": 0.1 * gradient((24, 40), 1),
        "b.qkv": 0.1 * gradient((40, 72), 2),
        "b.up": 0.1 * gradient((2, 48, 40), 3),
    }
    names = list(start)
    params = contiguous(list(start.values()))
    split = {"a.qkv": equal(3), "b.qkv": equal(3, dim=1), "*.up": equal(2)}
    together = Muon(list(zip(names, params, strict=True)), split=split, backend=backend)
    (bucket,) = together.plan().buckets
    assert (bucket.shape, bucket.count) == ((24, 40), 3 + 1 + 3 + 4)
    assert "11 x 24x40" in str(together.plan())

    def parts(name: str, t: Tensor) -> list[Tensor]:
        dim, count = {"a.qkv": (0, 3), "a.out": (0, 1), "b.qkv": (1, 3), "b.up": (1, 2)}[name]
        return list(t.chunk(count, dim))

    apart = contiguous([x for name in names for x in parts(name, start[name])])
    other = Muon(apart, backend=backend)
    for t in range(STEPS):
        grads = [gradient(p.shape, t + 5) for p in params]
        train(together, params, grads)
        train(other, apart, [x.contiguous() for name, g in zip(names, grads, strict=True) for x in parts(name, g)])
    got = [x for name, p in zip(names, params, strict=True) for x in parts(name, p.detach())]
    assert same(got, apart)


def test_a_plan_shows_the_parts(backend: str) -> None:
    p = nn.Parameter(torch.zeros(768, 768))
    assert "12 x 64x768" in str(Muon([p], split=heads(12), backend=backend).plan())


@pytest.mark.parametrize("matrices", [1, 2, 5])
def test_chunks_change_nothing(backend: str, matrices: int) -> None:
    torch.set_num_threads(5)  # too many for a fused step, which needs no chunks
    results = []
    for cap in (None, matrices):
        params = contiguous([0.1 * gradient(s, i) for i, s in enumerate([(3, 48, 40), (24, 40), (72, 40)])])
        named = list(zip("abc", params, strict=True))
        optimizer = Muon(named, split={"a": equal(2), "c": equal(3)}, flatten=False, backend=backend)
        (bucket,) = optimizer.plan().buckets
        assert bucket.count == 10
        if cap:
            optimizer.param_groups[0]["max_workspace_bytes"] = cap * bucket.workspace_bytes // bucket.count
            (bucket,) = optimizer.plan().buckets
            assert sum(bucket.chunks) == 10 and max(bucket.chunks) == cap
        for t in range(2):
            train(optimizer, params, [gradient(p.shape, t + 3) for p in params])
        results.append([*params, *buffers(optimizer, params)])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0 if backend != "eager" else 0.02)


def test_parameters_without_a_gradient(backend: str) -> None:
    """What is cut is told by name, also where some are left out."""
    params = contiguous([0.1 * gradient((48, 40), i) for i in range(3)])
    optimizer = Muon(list(zip("abc", params, strict=True)), split={"b": equal(2), "c": equal(3)}, backend=backend)
    alone = contiguous(params[1:])
    each = [Muon([p], split=cut, backend=backend) for p, cut in zip(alone, (equal(2), equal(3)), strict=True)]
    before = params[0].detach().clone()
    for p, q in zip(params[1:], alone, strict=True):
        p.grad = q.grad = gradient((48, 40), 7)
    optimizer.step()
    for other in each:
        other.step()
    assert same(params[1:], alone) and torch.equal(params[0], before)


def test_a_split_may_change_between_steps(backend: str) -> None:
    g = gradient((48, 40), 0)
    split = {"p": equal(2)}
    start = 0.1 * gradient((48, 40), 1)
    (p,) = contiguous([start])
    optimizer = Muon([("p", p)], split=split, momentum=0.0, backend=backend)
    for n in (2, 3, 1):
        optimizer.param_groups[0]["split"]["p"] = equal(n)  # in place
        (alone,) = contiguous([p])
        train(optimizer, [p], [g])
        train(Muon([alone], split=equal(n), momentum=0.0, backend=backend), [alone], [g])
        assert torch.equal(p, alone)
    assert split == {"p": equal(2)}  # the caller's is not the group's
    optimizer.param_groups[0]["split"]["p"] = equal(5)
    before = p.detach().clone()
    with pytest.raises(ValueError, match="48 is no multiple of it"):
        optimizer.step()
    assert torch.equal(p, before)


@pytest.mark.parametrize("shape", [(0, 6), (6, 0), (0, 6, 4), (3, 0, 4)])
def test_empty(backend: str, shape: tuple[int, ...]) -> None:
    for cut in (equal(2), heads(3), qkv(2, 1, interleaved=True), blocks(3, 3, interleaved=True)):
        if shape[-2] % {equal(2): 2, heads(3): 3, qkv(2, 1, interleaved=True): 4}.get(cut, 6) == 0:
            p = nn.Parameter(torch.zeros(shape))
            optimizer = Muon([p], split=cut, backend=backend)
            train(optimizer, [p], [torch.zeros(shape)])
            str(optimizer.plan())


# ------------------------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("name", ["GQA", "Megatron", "experts, columns"])
def test_momentum_is_that_of_a_whole_parameter(backend: str, name: str) -> None:
    """Which no cut changes: so one may be given to, or taken from, a run that goes on."""
    case = CASES[name]
    p, q = (nn.Parameter(torch.zeros(case.shape)) for _ in range(2))
    cut, whole = Muon([p], split=case.split, backend=backend), Muon([q], backend=backend)
    for t in range(STEPS):
        for optimizer, x in ((cut, p), (whole, q)):
            train(optimizer, [x], [gradient(case.shape, t)])
    assert same(buffers(cut, [p]), buffers(whole, [q]))
    assert not torch.equal(p, q)


def of_parts(case: Case, V: Tensor, form: str) -> Sequence[Tensor]:
    """What a second moment has of every part: of columns, "neuron" has one for each."""
    if form == "element" or "dim=1" not in case.split:
        return case.parts(V)
    return V.split(1, -1)


@pytest.mark.parametrize("form", ["neuron", "element"])
@pytest.mark.parametrize("name", CASES)
def test_second_moments_follow_the_parts(backend: str, name: str, form: str) -> None:
    """NorMuon's and AdaMuon's, with a checkpoint midway."""
    case = CASES[name]
    p = nn.Parameter(0.1 * gradient(case.shape, 9))
    parts = contiguous(case.parts(p))
    options = {**OPTIONS, "flatten": case.flatten, "second_moment": form, "beta2": 0.9, "backend": backend}
    options["sign_momentum"] = form == "element"
    whole, apart = Muon([{"params": [p], "split": case.split}], **options), Muon(parts, **options)
    for t in range(2 * STEPS):
        g = gradient(case.shape, t)
        train(whole, [p], [g])
        train(apart, parts, [x.contiguous() for x in case.parts(g)])
        for ours, theirs in zip(case.parts(p.detach()), parts, strict=True):
            torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=2**-7 * 0.1)
        if t == STEPS:
            state = copy.deepcopy(whole.state_dict())
            q = nn.Parameter(p.detach().clone())
    V = whole.state[p]["second_momentum_buffer"]
    for i, v in enumerate(of_parts(case, V, form)):
        expected = apart.state[parts[i]]["second_momentum_buffer"]
        assert expected.any()
        torch.testing.assert_close(v, expected, rtol=2**-6, atol=1e-6)
    assert i + 1 == len(parts)
    resumed = Muon([q], **options)
    resumed.load_state_dict(state)
    for t in range(STEPS + 1, 2 * STEPS):
        train(resumed, [q], [gradient(case.shape, t)])
    assert torch.equal(p, q) and torch.equal(V, resumed.state[q]["second_momentum_buffer"])


def test_a_second_moment_of_another_cut_changes_nothing(backend: str) -> None:
    """Parts of columns have statistics of their own, which a run that is cut otherwise cannot go on with."""
    options: dict[str, Any] = {"second_moment": "neuron", "backend": backend}
    p = nn.Parameter(torch.ones(24, 40))
    muon = Muon([p], split=equal(2, dim=1), **options)
    train(muon, [p], [gradient(p.shape, 0)])
    state, before = copy.deepcopy(muon.state_dict()), p.detach().clone()
    assert muon.state[p]["second_momentum_buffer"].shape == (24, 2)
    muon.param_groups[0]["split"] = heads(4)
    sentence = r"should be of size \(24, 1\) and float32 for second_moment='neuron' but is of size \(24, 2\)"
    with pytest.raises(ValueError, match=sentence):
        muon.step()
    assert torch.equal(p, before)
    state["param_groups"][0]["split"] = None
    with pytest.raises(ValueError, match=sentence):
        Muon([p], **options).load_state_dict(state)


def named(*shapes: tuple[int, int]) -> list[tuple[str, nn.Parameter]]:
    return [(f"layer.{i}", nn.Parameter(0.1 * gradient(shape, i))) for i, shape in enumerate(shapes)]


SPLITS: list[Any] = [qkv(4, 2, interleaved=True), {"layer.0": equal(2), "*.1": heads(4, dim=1)}, {"*": heads(2)}]


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("both", [False, True], ids=["Muon", "MuonAdamW"])
def test_a_run_that_was_saved_goes_on(backend: str, tmp_path: Path, split: Any, both: bool) -> None:
    def build(params: list[tuple[str, nn.Parameter]], split: Any) -> torch.optim.Optimizer:
        if both:
            group = {"params": params, "use_muon": True, **({"split": split} if split else {})}
            return MuonAdamW([group], muon_options={**OPTIONS, "backend": backend})
        return Muon([{"params": params, **({"split": split} if split else {})}], **OPTIONS, backend=backend)

    runs = []
    for stop in (False, True):
        params = named((48, 40), (40, 48))
        params = params[: 1 if isinstance(split, str) else 2]
        tensors = [p for _, p in params]
        optimizer = build(params, split)
        for t in range(4):
            if stop and t == 2:
                torch.save(optimizer.state_dict(), tmp_path / "state.pt")
                state = torch.load(tmp_path / "state.pt", weights_only=True)
                assert state["param_groups"][0]["split"] == split
                optimizer = build(params, None)  # which comes with the checkpoint
                optimizer.load_state_dict(state)
            train(optimizer, tensors, [gradient(p.shape, t + 3) for p in tensors])
        runs.append([*tensors, *buffers(optimizer, tensors)])
    assert same(*runs)


@pytest.mark.parametrize("in_group", [False, True])
def test_a_checkpoint_of_torchs_leaves_the_cut(backend: str, in_group: bool) -> None:
    """Given to the constructor or to the group."""
    params = named((48, 40), (40, 48))
    tensors = [p for _, p in params]
    theirs = torch.optim.Muon(params, **OPTIONS)
    train(theirs, tensors, [gradient(p.shape, 3) for p in tensors])
    split = {"layer.0": equal(2)}
    group = {"params": params, **({"split": split} if in_group else {})}
    ours = Muon([group], backend=backend, split=None if in_group else split)
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["split"] == split
    assert {(b.shape, b.count) for b in ours.plan().buckets} == {((24, 40), 2), ((40, 48), 1)}
    theirs.load_state_dict(ours.state_dict())
    train(theirs, tensors, [gradient(p.shape, 4) for p in tensors])


@pytest.mark.parametrize(
    ("saved", "sentence"),
    [
        (heads(7), r"should divide dimension 0 of the parameter of size \(48, 40\) by 7"),
        ("halves", "split should be what muon_kernels.split's"),
        ({"other": heads(2)}, "split='other' matches no parameter of the group"),
    ],
)
def test_a_checkpoint_that_does_not_fit_changes_nothing(backend: str, saved: Any, sentence: str) -> None:
    params = named((48, 40))
    optimizer = Muon(params, split=equal(2), backend=backend)
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0].update(split=saved, lr=0.5)
    with pytest.raises(ValueError, match=sentence):
        optimizer.load_state_dict(state)
    state["param_groups"][0]["params"] = []
    with pytest.raises(ValueError, match=r"split should|doesn't match the size of optimizer's group"):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["split"] == equal(2) and optimizer.param_groups[0]["lr"] == 1e-3


def test_an_optimizer_is_pickled_and_copied(backend: str) -> None:
    for again in (copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))):
        params = named((48, 40))
        optimizer = Muon(params, split={"layer.0": heads(4)}, backend=backend)
        train(optimizer, [params[0][1]], [gradient((48, 40), 5)])
        other = again(optimizer)
        assert other.plan() == optimizer.plan()
        assert other.param_groups[0]["split"] == {"layer.0": heads(4)}


# ------------------------------------------------------------------------------------------------ what is written


def test_a_cut_is_text() -> None:
    texts = {
        heads(12): "heads(12)",
        heads(12, dim=1): "heads(12, dim=1)",
        equal(2): "equal(2)",
        blocks(512, 64): "blocks(512, 64)",
        blocks(1, 1, interleaved=True, dim=1): "blocks(1, 1, interleaved=True, dim=1)",
        qkv(12): "qkv(12, 12)",
        qkv(12, 4, interleaved=True): "qkv(12, 4, interleaved=True)",
    }
    for cut, text in texts.items():
        assert cut == text == eval(text) == copy.deepcopy(cut) == pickle.loads(pickle.dumps(cut))
    p = nn.Parameter(torch.zeros(48, 40))
    a, b = (Muon([p], split=s).plan() for s in ("blocks(24,12,12)", blocks(24, 12, 12)))
    assert a == b


@pytest.mark.parametrize(
    ("write", "error", "sentence"),
    [
        (lambda: heads(0), ValueError, "heads takes positive ints but was given: 0"),
        (lambda: equal(2.0), TypeError, "equal takes positive ints but was given: 2.0"),  # type: ignore[arg-type]
        (lambda: equal(True), TypeError, "equal takes positive ints but was given: True"),
        (lambda: heads(2, dim=2), ValueError, "dim should be 0 for rows or 1 for columns but is: 2"),
        (lambda: heads(2, dim=-1), ValueError, "dim should be 0 for rows or 1 for columns but is: -1"),
        (lambda: blocks(), ValueError, "blocks takes one size or more but was given none"),
        (lambda: blocks(3, -1), ValueError, "blocks takes positive ints but was given: -1"),
        (lambda: qkv(12, 5), ValueError, "q_heads should be a multiple of kv_heads but they are: 12 and 5"),
        (lambda: qkv(4, interleaved=1), TypeError, "interleaved should be True or False but is: 1"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_written(write: Callable[[], str], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        write()


P = "parameter of size \\(48, 40\\)"


@pytest.mark.parametrize(
    ("split", "error", "sentence"),
    [
        (heads(7), ValueError, f"'heads\\(7\\)' should divide dimension 0 of the {P} by 7 but 48 is no multiple of it"),
        (equal(3, dim=1), ValueError, f"should divide dimension 1 of the {P} by 3 but 40 is no multiple of it"),
        (qkv(4, 4), ValueError, None),
        (qkv(12, 4), ValueError, f"should divide dimension 0 of the {P} by 20 but 48 is no multiple of it"),
        (qkv(12, 4, interleaved=True), ValueError, "by 20 but 48"),
        (qkv(32, interleaved=True), ValueError, "by 96 but 48"),
        (blocks(24, 12), ValueError, f"sizes of .* should sum to 48, dimension 0 of the {P}, but sum to 36"),
        (blocks(24, 32), ValueError, "should sum to 48, .* but sum to 56"),
        (blocks(8, 2, interleaved=True), ValueError, "should repeat to 48, .* but sum to 10"),
        (blocks(16, 8), ValueError, "but sum to 24"),
        ("halves(2)", ValueError, "split should be what muon_kernels.split's blocks, equal, heads and qkv return"),
        ("heads", ValueError, "such as 'heads\\(12\\)', but is: 'heads'"),
        ("heads(0)", ValueError, "heads takes positive ints but was given: 0"),
        ("equal(2, dim=3)", ValueError, "dim should be 0 for rows"),
        ("equal(2, interleaved=True)", ValueError, "is no call of muon_kernels.split.equal"),
        (heads, TypeError, "split should be what muon_kernels.split's"),
        (12, TypeError, "but is: 12"),
        ({"*": 12}, TypeError, "but is: 12"),
        ({"layer.0": heads(7)}, ValueError, f"of the {P} by 7"),
        ({"layr.0": heads(2)}, ValueError, "split='layr.0' matches no parameter of the group; did you mean layer.0"),
        ({"x": heads(2)}, ValueError, "split='x' matches no parameter of the group$"),
        ({"*.0": heads(2), "layer.*": heads(4)}, ValueError, "layer.0 is claimed by both split='\\*.0' and split="),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_what_does_not_fit(split: Any, error: type[Exception], sentence: str | None) -> None:
    """Raises at construction, and of a group leaves the optimizer as it was."""
    first, (name, p) = nn.Parameter(torch.zeros(4, 4)), named((48, 40))[0]
    optimizer = Muon([("first", first)])
    if sentence is None:
        optimizer.add_param_group({"params": [(name, p)], "split": split})
        return
    with pytest.raises(error, match=sentence):
        Muon([(name, p)], split=split)
    with pytest.raises(error, match=sentence):
        optimizer.add_param_group({"params": [(name, p)], "split": split})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(error, match=sentence):
        MuonAdamW([{"params": [(name, p)], "use_muon": True, "split": split}])


def test_names_are_needed() -> None:
    p = nn.Parameter(torch.zeros(48, 40))
    with pytest.raises(ValueError, match=r"but they have none: .*give pairs"):
        Muon([p], split={"*": heads(2)})
    with pytest.raises(ValueError, match=r"have at least 2 dimensions but has size: \(48,\)"):
        Muon([nn.Parameter(torch.zeros(48))], split=heads(2))


# ------------------------------------------------------------------------------------------------ param_groups


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(24, 72)
        self.o_proj = nn.Linear(24, 24)
        self.gate_up = nn.Parameter(torch.randn(3, 80, 24))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(50, 24)
        self.layers = nn.ModuleList(Block() for _ in range(2))


CUTS = {"*.qkv*": heads(9), "*.gate_up": equal(2)}


def test_param_groups() -> None:
    """Patterns may match what goes to AdamW too, as biases."""
    torch.manual_seed(0)
    model = Model()
    groups = param_groups(model, split=CUTS)
    assert groups[0]["split"] == {
        f"layers.{i}.{n}": c
        for i in (0, 1)
        for n, c in zip(("gate_up", "qkv.weight"), (equal(2), heads(9)), strict=True)
    }
    assert "split" not in groups[1] and "split" not in param_groups(model)[0]
    reasons = {a.name: a.reason for a in groups.assignments}
    assert reasons["layers.1.qkv.weight"] == "matrix in Linear, split: heads(9)"
    assert reasons["layers.1.qkv.bias"] == "bias"
    optimizer = MuonAdamW(groups, muon_options={"lr": 0.1, "backend": "eager"})
    assert {(b.shape, b.count) for b in optimizer.plan().buckets} == {((8, 24), 18), ((24, 24), 2), ((24, 40), 12)}

    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        cut = heads(9) if "qkv" in name else equal(2) if "gate_up" in name else None
        if p.ndim > 1 and "tokens" not in name:
            (alone,) = contiguous([start[name]])
            train(Muon([alone], lr=0.1, split=cut, backend="eager"), [alone], [p.grad])  # type: ignore[list-item]
            torch.testing.assert_close(p, alone, rtol=0, atol=0.01)
            assert not torch.equal(p, start[name])


def test_tied_and_frozen_parameters() -> None:
    model = Model()
    model.layers[1].qkv.weight = model.layers[0].qkv.weight
    model.layers[0].gate_up.requires_grad_(False)
    groups = param_groups(model, split={"layers.1.qkv.weight": heads(9), "layers.0.gate_up": equal(2)})
    assert groups[0]["split"] == {"layers.0.qkv.weight": heads(9)}
    assert "split" not in param_groups(model, split={"layers.0.gate_up": equal(7)})[0]
    MuonAdamW(groups)


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"split": {"*.qvk.weight": heads(9)}}, ValueError, "which missing_ok=True allows; did you mean layers"),
        ({"split": {"*.qkv.*": heads(9), "*.weight": equal(2)}}, ValueError, "layers.0.qkv.weight is claimed by both"),
        ({"split": {"tokens.*": equal(2)}}, ValueError, "of AdamW's: tokens.weight"),
        ({"split": {"*.bias": equal(2)}}, ValueError, "should match a parameter that goes to Muon but"),
        ({"split": {"*.qkv.*": heads(7)}}, ValueError, r"layers.0.qkv.weight: split='heads\(7\)' should .*\(72, 24\)"),
        ({"split": {"*.qkv.*": "thirds"}}, ValueError, "split should be what muon_kernels.split's"),
        ({"split": heads(9)}, TypeError, r"split should be a mapping of patterns to cuts but is: 'heads\(9\)'"),
        ({"split": CUTS, "muon_options": {"split": CUTS}}, ValueError, "should be given once but is in muon_options"),
        ({"muon": "*.qvk.weight"}, ValueError, "which missing_ok=True allows; did you mean layers"),
    ],
    ids=str,
)
def test_param_groups_refuses(options: dict[str, Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        param_groups(Model(), **options)


def test_a_mapping_in_muon_options() -> None:
    """Is for every Muon group that does not have its own."""
    optimizer = MuonAdamW(param_groups(Model()), muon_options={"split": CUTS})
    assert optimizer.param_groups[0]["split"] == CUTS
    assert ((8, 24), 18) in {(b.shape, b.count) for b in optimizer.plan().buckets}
