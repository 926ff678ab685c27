"""MuonAdamW is Muon and torch's AdamW, bit for bit, behind one optimizer."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from muon_kernels.optimizers.muon import Muon
from muon_kernels.optimizers.muon_adamw import MuonAdamW
from muon_kernels.optimizers.param_groups import param_groups

MUON = {"lr": 0.02, "momentum": 0.9}
ADAMW = {"lr": 3e-3, "betas": (0.8, 0.95)}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.LayerNorm(8))
        self.head = nn.Linear(8, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        logits = self.head(self.layers(self.tokens(tokens)))
        return nn.functional.cross_entropy(logits, tokens.roll(1))


def make() -> tuple[Model, MuonAdamW]:
    torch.manual_seed(0)
    model = Model()
    return model, MuonAdamW(param_groups(model), muon_options=MUON, adamw_options=ADAMW)


def backward(model: Model, step: int) -> Tensor:
    tokens = torch.randint(11, (32,), generator=torch.Generator().manual_seed(step))
    loss = model(tokens)
    loss.backward()
    return loss


def train(model: Model, *optimizers: Any, steps: range) -> None:
    for step in steps:
        backward(model, step)
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            if isinstance(optimizer, Optimizer):
                optimizer.zero_grad()


def assert_same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def snapshot(model: Model, optimizer: Optimizer) -> Any:
    return copy.deepcopy((dict(model.named_parameters()), optimizer.state_dict()["state"]))


def assert_unchanged(model: Model, optimizer: Optimizer, before: Any) -> None:
    params, state = snapshot(model, optimizer)
    assert_same(params, before[0])
    assert state.keys() == before[1].keys()
    assert_same(state, before[1])


def test_same_as_the_two_optimizers() -> None:
    model, optimizer = make()
    train(model, optimizer, steps=range(5))

    torch.manual_seed(0)
    expected = Model()
    muon, adamw = param_groups(expected, muon_options=MUON, adamw_options=ADAMW)
    pair = Muon([muon]), AdamW([adamw], fused=True)
    train(expected, *pair, steps=range(5))

    assert_same(dict(model.named_parameters()), dict(expected.named_parameters()))
    for name, p in model.named_parameters():
        other = expected.get_parameter(name)
        both = next(inner.state[other] for inner in pair if other in inner.state)
        assert_same(optimizer.state[p], both)


def test_one_list_of_groups_and_one_state() -> None:
    model, optimizer = make()
    groups = param_groups(model)
    optimizer = MuonAdamW(groups, muon_options=MUON, adamw_options=ADAMW)
    assert all(mine is given for mine, given in zip(optimizer.param_groups, groups, strict=True))
    assert [group["lr"] for group in optimizer.param_groups] == [MUON["lr"], ADAMW["lr"]]
    train(model, optimizer, steps=range(1))
    kinds = {p.shape: set(optimizer.state[p]) for p in model.parameters()}
    assert kinds[torch.Size([16, 8])] == {"momentum_buffer"}
    assert kinds[torch.Size([11, 8])] == {"step", "exp_avg", "exp_avg_sq"}
    assert set(optimizer.state_dict()["state"]) == set(range(len(list(model.parameters()))))
    assert "use_muon: True" in repr(optimizer) and "use_muon: False" in repr(optimizer)


def test_options_of_a_group_win() -> None:
    model = Model()
    groups = param_groups(model, muon_options={"lr": 0.5}, adamw_options={"fused": False})
    optimizer = MuonAdamW(groups, muon_options=MUON, adamw_options=ADAMW)
    muon, adamw = optimizer.param_groups
    assert muon["lr"] == 0.5 and muon["momentum"] == MUON["momentum"]
    assert adamw["fused"] is False and adamw["betas"] == ADAMW["betas"]


def halve(optimizer: Optimizer) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: 0.5**step)


def test_scheduler_reaches_both_also_after_a_load() -> None:
    model, optimizer = make()
    scheduler = halve(optimizer)
    train(model, optimizer, scheduler, steps=range(3))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, scheduler, steps=range(3, 6))

    torch.manual_seed(0)
    expected = Model()
    muon, adamw = param_groups(expected, muon_options=MUON, adamw_options=ADAMW)
    pair = Muon([muon]), AdamW([adamw], fused=True)
    train(expected, *pair, *map(halve, pair), steps=range(6))

    assert_same(dict(model.named_parameters()), dict(expected.named_parameters()))
    assert scheduler.get_last_lr() == [MUON["lr"] / 64, ADAMW["lr"] / 64]


def saved_and_loaded(model: Model, optimizer: MuonAdamW) -> tuple[Model, MuonAdamW]:
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    checkpoint = torch.load(file, weights_only=True)
    model = Model()
    model.load_state_dict(checkpoint["model"])
    # The options come from the checkpoint, not from this constructor.
    optimizer = MuonAdamW(param_groups(model))
    optimizer.load_state_dict(checkpoint["optimizer"])
    return model, optimizer


def deep_copied(model: Model, optimizer: MuonAdamW) -> tuple[Model, MuonAdamW]:
    return copy.deepcopy((model, optimizer))


def pickled(model: Model, optimizer: MuonAdamW) -> tuple[Model, MuonAdamW]:
    result: tuple[Model, MuonAdamW] = pickle.loads(pickle.dumps((model, optimizer)))
    return result


@pytest.mark.parametrize("duplicate", [saved_and_loaded, deep_copied, pickled])
def test_training_goes_on_bit_for_bit(
    duplicate: Callable[[Model, MuonAdamW], tuple[Model, MuonAdamW]],
) -> None:
    model, optimizer = make()
    train(model, optimizer, steps=range(3))
    other, resumed = duplicate(model, optimizer)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in resumed.state}
    for one in ((model, optimizer), (other, resumed)):
        train(*one, steps=range(3, 6))
    assert_unchanged(model, optimizer, snapshot(other, resumed))
    steps = [s["step"] for s in resumed.state.values() if "step" in s]
    assert len(steps) == 7 and all(step == 6 for step in steps)
    assert [g["lr"] for g in resumed.param_groups] == [MUON["lr"], ADAMW["lr"]]


@pytest.mark.parametrize("duplicate", [deep_copied, pickled])
def test_copies_keep_the_defaults(
    duplicate: Callable[[Model, MuonAdamW], tuple[Model, MuonAdamW]],
) -> None:
    _, optimizer = duplicate(*make())
    for use_muon in (True, False):
        late = nn.Parameter(torch.ones(4, 4))
        optimizer.add_param_group({"params": [("late", late)], "use_muon": use_muon})
    *_, muon, adamw = optimizer.param_groups
    assert (muon["lr"], muon["momentum"]) == (MUON["lr"], MUON["momentum"])
    assert (adamw["lr"], adamw["betas"]) == (ADAMW["lr"], ADAMW["betas"])


def test_load_refuses_groups_of_other_kinds() -> None:
    model, optimizer = make()
    swapped = MuonAdamW(param_groups(model)[::-1])
    with pytest.raises(ValueError, match=r"should be \[False, True\] but is: \[True, False\]"):
        swapped.load_state_dict(optimizer.state_dict())
    alone = AdamW(model.parameters())
    with pytest.raises(ValueError, match="checkpoint of MuonAdamW should have use_muon in every group but has: "):
        optimizer.load_state_dict(alone.state_dict())


def test_load_that_raises_changes_nothing() -> None:
    model, optimizer = make()
    train(model, optimizer, steps=range(2))
    before, groups = snapshot(model, optimizer), [dict(g) for g in optimizer.param_groups]
    for side in (0, 1):
        checkpoint = copy.deepcopy(optimizer.state_dict())
        for group in checkpoint["param_groups"]:
            group["lr"] = 9.0
        checkpoint["param_groups"][side]["params"].pop()
        with pytest.raises(ValueError, match="size"):
            optimizer.load_state_dict(checkpoint)
        assert_unchanged(model, optimizer, before)
        assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in groups]
    train(model, optimizer, steps=range(2, 3))


def test_load_keeps_the_precision_of_the_momentum() -> None:
    model, _ = make()
    model.bfloat16()
    optimizer = MuonAdamW(param_groups(model), muon_options={"momentum_dtype": torch.float32})
    train(model, optimizer, steps=range(2))
    expected = copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert expected[0]["momentum_buffer"].dtype == torch.float32
    assert_same(optimizer.state_dict()["state"], expected)


def test_load_hooks_run_once_and_in_order() -> None:
    _, optimizer = make()
    checkpoint = optimizer.state_dict()
    calls: list[str] = []

    def before(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        calls.append("before")
        return {**state_dict, "param_groups": [{**g, "lr": 7.0} for g in state_dict["param_groups"]]}

    optimizer.register_load_state_dict_pre_hook(before)
    optimizer.register_load_state_dict_post_hook(lambda _: calls.append("after"))
    optimizer.load_state_dict(checkpoint)
    assert calls == ["before", "after"]
    assert [g["lr"] for g in optimizer.param_groups] == [7.0, 7.0]
    assert checkpoint["param_groups"][0]["lr"] == MUON["lr"]


def test_add_param_group() -> None:
    model, optimizer = make()
    train(model, optimizer, steps=range(2))
    late = {use_muon: nn.Parameter(torch.ones(4, 4)) for use_muon in (True, False)}
    for use_muon, p in late.items():
        optimizer.add_param_group({"params": [("late", p)], "use_muon": use_muon, "lr": 0.5})
        p.grad = torch.eye(4)
    optimizer.step()
    assert set(optimizer.state[late[True]]) == {"momentum_buffer"}
    assert set(optimizer.state[late[False]]) == {"step", "exp_avg", "exp_avg_sq"}
    # AdamW's first step is lr * sign(gradient) after the decay of 1 - lr * 0.01.
    torch.testing.assert_close(late[False].detach(), 0.995 - 0.5 * torch.eye(4))


def test_refused_groups_leave_the_optimizer_as_it_was() -> None:
    model, optimizer = make()
    p = nn.Parameter(torch.ones(4, 4))
    twice = optimizer.param_groups[0]["params"][0]
    refused: list[tuple[dict[str, Any], str]] = [
        ({"params": [p]}, "use_muon"),
        ({"params": [twice], "param_names": ["twice"], "use_muon": False}, "more than one"),
        ({"params": [p], "use_muon": True}, "names"),
    ]
    for group, message in refused:
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 2
    before = snapshot(model, optimizer)
    train(model, optimizer, steps=range(1))
    with pytest.raises(AssertionError):
        assert_unchanged(model, optimizer, before)
    assert set(optimizer.state[twice]) == {"momentum_buffer"}

    with pytest.raises(ValueError, match="param_groups"):
        MuonAdamW(model.parameters())  # type: ignore[arg-type]


@pytest.mark.parametrize("wanted", [True, False])
def test_one_side_may_be_empty(wanted: bool) -> None:
    p = nn.Parameter(torch.ones(4, 4))
    optimizer = MuonAdamW([{"params": [p], "use_muon": wanted}])
    p.grad = torch.eye(4)
    optimizer.step()
    assert ("momentum_buffer" in optimizer.state[p]) is wanted
    optimizer.load_state_dict(optimizer.state_dict())


def test_closure_zero_grad_and_hooks() -> None:
    model, optimizer = make()
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure() -> Tensor:
        calls.append("closure")
        optimizer.zero_grad()
        return backward(model, 0)

    loss = optimizer.step(closure)  # type: ignore[arg-type]
    assert calls == ["before", "closure", "after"]
    assert isinstance(loss, Tensor) and loss.requires_grad
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    before = snapshot(model, optimizer)
    assert optimizer.step() is None  # type: ignore[func-returns-value]
    assert_unchanged(model, optimizer, before)


def test_plan_covers_the_muon_groups() -> None:
    _, optimizer = make()
    shapes = {tuple(bucket.shape) for bucket in optimizer.plan().buckets}
    assert shapes == {(8, 16)}


def sparse(p: Tensor) -> Tensor:
    return torch.eye(*p.shape).to_sparse()


@pytest.mark.parametrize("name", ["tokens.weight", "layers.0.weight"])
def test_a_step_that_raises_changes_nothing(name: str) -> None:
    model, optimizer = make()
    train(model, optimizer, steps=range(2))
    before = snapshot(model, optimizer)
    backward(model, 2)
    p = model.get_parameter(name)
    p.grad = sparse(p)
    with pytest.raises((RuntimeError, TypeError), match="sparse"):
        optimizer.step()
    assert_unchanged(model, optimizer, before)


def test_a_moment_of_the_wrong_shape_changes_nothing() -> None:
    model, optimizer = make()
    train(model, optimizer, steps=range(2))
    checkpoint = copy.deepcopy(optimizer.state_dict())
    index = len(optimizer.param_groups[0]["params"])
    checkpoint["state"][index]["exp_avg_sq"] = torch.zeros(3)
    before = snapshot(model, optimizer)
    sentence = r"should have the parameter's size \(11, 8\) but has: \(3,\)"
    with pytest.raises(ValueError, match=f"exp_avg_sq of parameter {index} {sentence}"):
        optimizer.load_state_dict(checkpoint)
    assert_unchanged(model, optimizer, before)

    state = optimizer.state[optimizer.param_groups[1]["params"][0]]
    kept, state["exp_avg_sq"] = state["exp_avg_sq"], torch.zeros(3)
    before = snapshot(model, optimizer)
    backward(model, 2)
    with pytest.raises(ValueError, match=f"exp_avg_sq {sentence}"):
        optimizer.step()
    assert_unchanged(model, optimizer, before)
    state["exp_avg_sq"] = kept
    optimizer.param_groups[1]["amsgrad"] = True
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match="state should have exp_avg, exp_avg_sq, max_exp_avg_sq but has: "):
        optimizer.step()
    assert_unchanged(model, optimizer, before)


def test_load_refuses_the_state_of_another_optimizer() -> None:
    model, optimizer = make()
    train(model, optimizer, steps=range(2))
    before = snapshot(model, optimizer)
    for change, sentence in (
        (lambda c, _: c.pop("state"), "'state' and 'param_groups'"),
        (lambda c, _: c["param_groups"][1].pop("betas"), "a checkpoint of AdamW should have betas"),
        (lambda c, i: c["state"].update({i: {"momentum_buffer": 1}}), "state of parameter {i} should have exp_avg"),
        (lambda c, _: c["param_groups"][1].update(betas="x"), "AdamW's betas should be two numbers but are: 'x'"),
    ):
        checkpoint = copy.deepcopy(optimizer.state_dict())
        index = len(optimizer.param_groups[0]["params"])
        change(checkpoint, index)
        with pytest.raises((ValueError, TypeError), match=sentence.replace("{i}", str(index))):
            optimizer.load_state_dict(checkpoint)
        assert_unchanged(model, optimizer, before)
    train(model, optimizer, steps=range(2, 3))


BAD_ADAMW: list[tuple[dict[str, Any], str]] = [
    ({"betas": "x"}, "AdamW's betas should be two numbers but are: 'x'"),
    ({"betas": (0.9, 0.99, 0.9)}, "AdamW's betas should be two numbers but are: "),
    ({"betas": (0.9, 1.0)}, "each of AdamW's betas should be < 1 but is: 1.0"),
    ({"betas": (0.9, None)}, "each of AdamW's betas should be a number but is: None"),
    ({"lr": "a"}, "AdamW's lr should be a number but is: 'a'"),
    ({"lr": float("inf")}, "AdamW's lr should be finite but is: inf"),
    ({"eps": -1e-8}, "AdamW's eps should be >= 0 but is: -1e-08"),
    ({"weight_decay": None}, "AdamW's weight_decay should be a number but is: None"),
]


@pytest.mark.parametrize(("options", "sentence"), BAD_ADAMW, ids=str)
def test_a_bad_option_of_adamw_changes_nothing(options: dict[str, Any], sentence: str) -> None:
    """Muon steps first, so it must be found before."""
    model, optimizer = make()
    with pytest.raises((ValueError, TypeError), match=sentence):
        MuonAdamW(param_groups(model), adamw_options=options)
    with pytest.raises((ValueError, TypeError), match=sentence):
        MuonAdamW(param_groups(model, adamw_options=options))
    late = {"params": [("late", nn.Parameter(torch.ones(3)))], "use_muon": False, **options}
    with pytest.raises((ValueError, TypeError), match=sentence):
        optimizer.add_param_group(late)
    for _ in range(2):
        backward(model, 0)
        before = snapshot(model, optimizer)
        kept = dict(optimizer.param_groups[1])
        optimizer.param_groups[1].update(options)
        with pytest.raises((ValueError, TypeError), match=sentence):
            optimizer.step()
        assert_unchanged(model, optimizer, before)
        optimizer.param_groups[1].update(kept)
        optimizer.step()


def test_options_of_a_group_that_contradict_each_other() -> None:
    model = Model()
    with pytest.raises(ValueError, match="fused and foreach"):
        MuonAdamW(param_groups(model, adamw_options={"fused": True, "foreach": True}))


def test_misplaced_options_say_where_they_belong() -> None:
    with pytest.raises(TypeError, match=r"muon_options=\{\.\.\.\} or adamw_options=\{\.\.\.\} but .* lr, betas"):
        MuonAdamW(param_groups(Model()), lr=0.1, betas=(0.9, 0.99))  # type: ignore[arg-type]


def test_nothing_to_train() -> None:
    with pytest.raises(ValueError, match=r"empty parameter list.*frozen"):
        MuonAdamW(param_groups(Model().requires_grad_(False)))
    with pytest.raises(ValueError, match="empty parameter list"):
        MuonAdamW([])


def test_complex_parameters_have_complex_moments() -> None:
    p = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    optimizer = MuonAdamW([{"params": [p], "use_muon": False}])
    for _ in range(2):
        p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())


def test_fused_is_chosen_where_it_is_right() -> None:
    def fused(p: Tensor, **options: Any) -> Any:
        group = {"params": [nn.Parameter(p)], "use_muon": False, **options}
        return MuonAdamW([group]).param_groups[0]["fused"]

    assert fused(torch.zeros(3)) is True
    assert fused(torch.zeros(3), fused=False) is False
    assert fused(torch.zeros(3), foreach=True) is None
    assert fused(torch.zeros(3, dtype=torch.complex64)) is None
    assert fused(torch.zeros(3, 4).t()) is None
    assert fused(torch.zeros(3, device="meta")) is None


def test_gradients_of_any_layout() -> None:
    """torch's fused AdamW pairs the wrong elements where the gradient is a transposed view."""
    gradient = torch.arange(12.0).reshape(3, 4) - 5
    results = []
    for grad in (gradient, gradient.t().contiguous().t()):
        p = nn.Parameter(torch.zeros(3, 4))
        optimizer = MuonAdamW([{"params": [p], "use_muon": False}])
        p.grad = grad
        optimizer.step()
        results.append(p.detach())
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("unscale_first", [True, False])
def test_grad_scaler(fused: bool | None, unscale_first: bool) -> None:
    model, _ = make()
    optimizer = MuonAdamW(param_groups(model), muon_options=MUON, adamw_options={**ADAMW, "fused": fused})
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    other = copy.deepcopy(model)
    expected = MuonAdamW(param_groups(other), muon_options=MUON, adamw_options={**ADAMW, "fused": fused})
    for step in range(3):
        tokens = torch.randint(11, (32,), generator=torch.Generator().manual_seed(step))
        scaler.scale(model(tokens)).backward()
        other(tokens).backward()
        before = snapshot(model, optimizer)
        if step == 1:
            # One infinity anywhere skips the step of both kinds.
            p = model.get_parameter("tokens.weight" if fused is None else "layers.0.weight")
            assert p.grad is not None
            p.grad[0, 0] = float("inf")
        if unscale_first:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if step == 1:
            assert_unchanged(model, optimizer, before)
            assert scaler.get_scale() == 512.0
        else:
            expected.step()
        optimizer.zero_grad()
        expected.zero_grad()
    assert_same(dict(model.named_parameters()), dict(other.named_parameters()))
    assert_same(optimizer.state_dict()["state"], expected.state_dict()["state"])


def test_a_model_is_no_list_of_groups() -> None:
    with pytest.raises(TypeError, match=r"give muon_kernels\.param_groups"):
        MuonAdamW(Model())  # type: ignore[arg-type]
