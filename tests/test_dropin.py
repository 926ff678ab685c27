"""In the place of a torch optimizer: what tools around optimizers do with groups, defaults, state and hooks."""

import copy
import io
import sys
from collections.abc import Callable
from enum import Enum
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, OneCycleLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from muon_kernels import Muon, MuonAdamW, SpectralAdam, SpectralMomentum, orthogonalize, param_groups
from muon_kernels.options import check_keys, plain
from muon_kernels.scaling import lr_ratio, rule_name
from muon_kernels.split import equal


def model_of(shapes: str = "all") -> nn.Sequential:
    """With `shapes` "matrices" only these have gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8), nn.Linear(8, 4))
    for p in model.parameters():
        p.requires_grad_(shapes == "all" or p.ndim == 2)
    return model


def backward(model: nn.Module, seed: int = 0) -> None:
    model.zero_grad()
    generator = torch.Generator().manual_seed(seed)
    model(torch.randn(4, 8, generator=generator)).square().sum().backward()


def own_rule(rows: int, cols: int) -> float:
    return rows / (cols + 1)


def other_rule(rows: int, cols: int) -> float:
    return 2.0


def trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


MATRICES: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "Muon": lambda m: Muon(trained(m)),
    "a dtype and a function": lambda m: Muon(trained(m), momentum_dtype=torch.bfloat16, adjust_lr_fn=own_rule),
    "int8": lambda m: Muon(trained(m), momentum_dtype="int8", workspace_dtype="float16"),
    "SpectralMomentum": lambda m: SpectralMomentum(trained(m)),
}
EVERYTHING: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "MuonAdamW": lambda m: MuonAdamW(param_groups(m)),
    "SpectralAdam": lambda m: SpectralAdam(m.named_parameters()),
}
OPTIMIZERS = {**MATRICES, **EVERYTHING}


def made(name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = model_of("matrices" if name in MATRICES else "all")
    return model, OPTIMIZERS[name](model)


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


# --------------------------------------------------------------------------------------------- values of groups


def is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(item) for key, item in value.items())
    return value is None or type(value) in (bool, int, float, str, Tensor)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_groups_hold_plain_values(name: str) -> None:
    """Also after an edit, and before the step that would see it."""
    _, optimizer = made(name)
    if name in MATRICES:
        optimizer.param_groups[0].update(workspace_dtype=torch.bfloat16, lr=np.float32(0.5), adjust_lr_fn=other_rule)
    for group in optimizer.state_dict()["param_groups"]:
        assert {key for key, value in group.items() if not is_plain(value)} == set()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"full_state_dict": True},
        {"cpu_offload": True},
        {"full_state_dict": True, "cpu_offload": True},
        {"flatten_optimizer_state_dict": True},
    ],
    ids=str,
)
def test_state_dicts_of_torch_distributed_checkpoint(name: str, options: dict[str, bool]) -> None:
    """With every option, through a file that torch.load reads by default, into an optimizer without state."""
    model, optimizer = made(name)
    backward(model)
    optimizer.step()
    file = io.BytesIO()
    torch.save(get_optimizer_state_dict(model, optimizer, options=StateDictOptions(**options)), file)
    file.seek(0)
    twin, loaded = made(name)
    twin.load_state_dict(model.state_dict())
    set_optimizer_state_dict(twin, loaded, torch.load(file), options=StateDictOptions(**options))
    assert same(model, twin)
    for m, o in ((model, optimizer), (twin, loaded)):
        backward(m, 1)
        o.step()
    assert same(model, twin)


NUMBERS = [np.float32(0.125), np.float64(0.125), np.float16(0.125), np.array(0.125), Fraction(1, 8)]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda x: type(x).__name__)
def test_numbers_that_are_not_pythons(number: Any) -> None:
    """In the constructor, and between steps; steps are those of Python's number."""
    for name, kind in (("Muon", Muon), ("SpectralMomentum", SpectralMomentum), ("SpectralAdam", SpectralAdam)):
        models = [model_of("matrices") for _ in range(2)]
        for model, lr in zip(models, (0.125, number), strict=True):
            optimizer = kind([p for _, p in trained(model)], lr=lr, weight_decay=lr)
            for seed in range(2):
                backward(model, seed)
                optimizer.param_groups[0]["lr"] = lr
                optimizer.step()
        assert same(*models), name
        assert type(optimizer.param_groups[0]["lr"]) is float
    models = [model_of() for _ in range(2)]
    for model, lr in zip(models, (0.125, number), strict=True):
        both = MuonAdamW(
            param_groups(model),
            muon_options={"momentum": lr, "nesterov": np.True_, "ns_steps": np.int64(4)},
            adamw_options={"betas": (lr, lr)},
        )
        for group in both.param_groups:
            group["lr"] = lr
        backward(model)
        both.step()
    assert same(*models)


def test_plain() -> None:
    values = [torch.int8, np.int32(3), np.bool_(True), [np.float32(1.0)], (1, (np.array([1.0, 2.0]),)), {"a": "b"}]
    assert list(map(plain, values)) == ["int8", 3, True, [1.0], (1, ([1.0, 2.0],)), {"a": "b"}]
    assert [type(plain(x)) for x in values] == [str, int, bool, list, tuple, dict]
    tensor = torch.tensor(1.0)
    assert plain(tensor) is tensor
    G = torch.randn(4, 6)
    given = orthogonalize(G, np.array([3.0, -3.2, 1.2]), np.int64(4), np.float32(0.5), workspace_dtype="float16")  # type: ignore[arg-type]
    assert torch.equal(given, orthogonalize(G, (3.0, -3.2, 1.2), 4, 0.5, workspace_dtype=torch.float16))


# ---------------------------------------------------------------------------------------- functions by their name


def test_a_function_is_kept_by_its_name() -> None:
    name = f"{__name__}:own_rule"
    assert rule_name(own_rule) == name and lr_ratio(name, 3, 5) == 0.5
    p = torch.ones(3, 5)
    optimizer = Muon([p], adjust_lr_fn=own_rule)
    assert optimizer.param_groups[0]["adjust_lr_fn"] == name
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file))
    assert copy.deepcopy(optimizer).param_groups[0]["adjust_lr_fn"] == name
    for other in (None, other_rule):
        with pytest.raises(ValueError, match=r"the function that the group has already, but is: .*own_rule"):
            Muon([p], adjust_lr_fn=other).load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"write it with `def` at the top level of a module"):
        Muon([p], adjust_lr_fn=lambda rows, cols: 1.0)


@pytest.mark.parametrize("kind", ["Muon", "MuonAdamW", "SpectralAdam"])
def test_a_checkpoint_chooses_no_function(kind: str) -> None:
    """Nor is the module imported that it names."""
    module = "turtledemo"  # a package that nothing else imports
    assert module not in sys.modules
    _, optimizer = made(kind)
    checkpoint = optimizer.state_dict()
    before = copy.deepcopy(optimizer.param_groups[0]["adjust_lr_fn"])
    for name in (f"{module}:main", "os:abort"):
        checkpoint["param_groups"][0]["adjust_lr_fn"] = name
        with pytest.raises(ValueError, match=r"adjust_lr_fn of a checkpoint should be a rule of muon_kernels"):
            optimizer.load_state_dict(checkpoint)
    with pytest.raises(ValueError, match="a module that has been imported"):
        Muon([torch.ones(2, 2)], adjust_lr_fn=f"{module}:main")
    assert module not in sys.modules and optimizer.param_groups[0]["adjust_lr_fn"] == before


# ------------------------------------------------------------------------------------------------- keys of groups

# That frameworks write: timm, ultralytics, Lightning, Megatron, gaussian-splatting, DeepSpeed, torch's schedulers.
KEYS = (
    "lr_scale lr_mult wd_mult name group_name param_group layer_id is_expert initial_lr max_lr min_lr betas foreach "
    "fused capturable differentiable amsgrad max_momentum base_momentum base_lr decay_mult weight_decay_mult "
    "no_weight_decay is_decoupled_lr pre_lr warmup_momentum momentum_decay dampening rho param_group_name group_id "
    "layer swa_lr d d_coef k z r step_size algorithm muon_options adamw_options module_name weights"
).split()
MISSPELT = {
    "weigth_decay": "weight_decay",
    "weightdecay": "weight_decay",
    "momemtum": "momentum",
    "nestrov": "nesterov",
    "nesterow": "nesterov",
    "ns_step": "ns_steps",
    "ns_coeficients": "ns_coefficients",
    "flaten": "flatten",
    "splits": "split",
    "transpose": "transposed",
    "maximise": "maximize",
    "backends": "backend",
    "master_weight": "master_weights",
    "stocastic_rounding": "stochastic_rounding",
    "momentum_type": "momentum_dtype",
}


@pytest.mark.parametrize("kind", [Muon, SpectralMomentum, SpectralAdam])
def test_keys_of_others_are_kept(kind: Any) -> None:
    """As by torch's optimizers; in groups made later and checkpoints, too."""
    model = model_of("matrices")
    params = [p for _, p in trained(model)]
    mine = {key: f"of {key}" for key in KEYS if key not in kind(params).defaults and key != "initial_lr"}
    optimizer = kind([{"params": params[:1], **mine}])
    optimizer.add_param_group({"params": params[1:], **mine})
    backward(model)
    optimizer.step()
    loaded = kind([{"params": params[:1]}, {"params": params[1:]}])
    loaded.load_state_dict(optimizer.state_dict())
    for group in (*optimizer.param_groups, *loaded.param_groups):
        assert mine.items() <= group.items()


def test_both_halves_keep_keys_of_others() -> None:
    model = model_of()
    groups = [{**group, "lr_scale": 0.5, "name": str(i)} for i, group in enumerate(param_groups(model))]
    optimizer = MuonAdamW(groups)
    assert [(g["lr_scale"], g["name"]) for g in optimizer.param_groups] == [(0.5, "0"), (0.5, "1")]
    for use_muon, key in ((True, "nestrov"), (False, "amsgrd")):
        with pytest.raises(ValueError, match=key):
            MuonAdamW([{**g, key: True} if g["use_muon"] is use_muon else g for g in param_groups(model)])


@pytest.mark.parametrize(("key", "option"), MISSPELT.items())
def test_a_misspelt_option_is_not(key: str, option: str) -> None:
    known = Muon([torch.ones(2, 2)]).defaults
    assert option in known
    with pytest.raises(ValueError, match=f"has '{key}', .*did you mean '{option}'"):
        check_keys({key: 1}, known)


# ------------------------------------------------------------------------------------------------------ schedulers


def cycled(optimizer: torch.optim.Optimizer, scheduler: Any, model: nn.Module) -> list[tuple[float, float]]:
    """What momentum of both halves was in each step."""
    seen = []
    for seed in range(8):
        backward(model, seed)
        optimizer.step()
        muon, adamw = optimizer.param_groups
        seen.append((muon["momentum"], adamw["betas"][0]))
        scheduler.step()
    return seen


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda optimizer: OneCycleLR(optimizer, max_lr=0.02, total_steps=9),
        lambda optimizer: CyclicLR(optimizer, 1e-3, 0.02, step_size_up=3),
    ],
    ids=["OneCycleLR", "CyclicLR"],
)
def test_schedulers_that_cycle_momentum_cycle_both_halves(scheduler: Any) -> None:
    """As they cycle that of Muon, and the first beta of torch.optim.AdamW; no group gets the other's key."""
    model = model_of()
    both = MuonAdamW(param_groups(model))
    seen = cycled(both, scheduler(both), model)
    weight = nn.Parameter(torch.randn(4, 4))
    expected = []
    alone = Muon([weight])
    its = scheduler(alone)
    for _ in range(8):
        weight.grad = torch.randn(4, 4)
        alone.step()
        expected.append(alone.param_groups[0]["momentum"])
        its.step()
    assert [m for m, _ in seen] == [b for _, b in seen] == expected and min(expected) < 0.88 < max(expected)
    muon, adamw = both.param_groups
    assert "betas" not in muon and adamw["betas"][1] == 0.999
    again = MuonAdamW(param_groups(model))
    again.load_state_dict(both.state_dict())
    assert again.param_groups[1]["betas"] == adamw["betas"]


def test_no_momentum_in_a_group_for_adamw_without_a_scheduler() -> None:
    """And betas can be edited there."""
    model = model_of()
    optimizer = MuonAdamW(param_groups(model))
    assert "momentum" not in optimizer.param_groups[1]
    optimizer.param_groups[1]["betas"] = (0.5, 0.6)
    backward(model)
    optimizer.step()
    assert optimizer.param_groups[1]["betas"] == (0.5, 0.6)
    groups = param_groups(model)
    with pytest.raises(ValueError, match="should have betas or momentum"):
        MuonAdamW([groups[0], {**groups[1], "momentum": 0.8, "betas": (0.9, 0.99)}])


def test_groups_that_a_scheduler_has_cycled_make_another_optimizer() -> None:
    """They have betas and momentum, which say the same."""
    model = model_of()
    optimizer = MuonAdamW(param_groups(model))
    OneCycleLR(optimizer, max_lr=0.02, total_steps=9)
    backward(model)
    optimizer.step()
    groups = [dict(group) for group in optimizer.param_groups]
    assert groups[1]["momentum"] == groups[1]["betas"][0] == 0.95
    again = MuonAdamW(groups)
    assert [again.param_groups[1][key] for key in ("momentum", "betas")] == [0.95, (0.95, 0.999)]


def test_defaults_have_what_schedulers_read() -> None:
    """transformers' polynomial and cosine_with_min_lr ask for the learning rate there."""
    optimizer = MuonAdamW(param_groups(model_of()), muon_options={"lr": 0.03, "momentum": 0.8})
    assert optimizer.defaults["lr"] == 0.03 and optimizer.defaults["momentum"] == 0.8
    LambdaLR(optimizer, lambda t: 0.5 if optimizer.defaults["lr"] > 0.01 else 1.0)
    assert [group["lr"] for group in optimizer.param_groups] == [0.015, 0.0005]


# --------------------------------------------------------------------------------------------- GradScaler, hooks


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_grad_scaler_unscales_as_for_torch_optim_muon(name: str) -> None:
    """Lightning refuses to clip where this is true; and it may be set."""
    _, optimizer = made(name)
    assert not getattr(optimizer, "_step_supports_amp_scaling", False)
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["Muon", "MuonAdamW"])
def test_clipped_between_unscaling_and_the_step(name: str) -> None:
    """The steps of unscaled gradients; one that overflowed is left out."""
    models = []
    for scale in (1.0, 1024.0):
        model, optimizer = made(name)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=100)
        for step in range(3):
            model.zero_grad()
            inputs = torch.ones(4, 8) * (torch.inf if step == 1 else 1 + step)
            scaler.scale(model(inputs).square().sum()).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update(scale)
        models.append(model)
    assert same(*models) and not same(models[0], made(name)[0])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_counted_once(name: str) -> None:
    model, optimizer = made(name)
    backward(model)
    seen: list[str] = []
    hooks = [
        register(lambda optimizer, *_: seen.append(type(optimizer).__name__))  # type: ignore[arg-type, func-returns-value]
        for register in (register_optimizer_step_pre_hook, register_optimizer_step_post_hook)
    ]
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
            optimizer.step()
    finally:
        for hook in hooks:
            hook.remove()
    kind = type(optimizer).__name__
    assert seen == [kind, kind]
    assert [e.key for e in profiled.key_averages() if e.key.startswith("Optimizer.step")] == [
        f"Optimizer.step#{kind}.step"
    ]


def test_inference_mode_leaves_state_that_trains_on() -> None:
    """Of both halves."""
    model, optimizer = made("MuonAdamW")
    backward(model)
    with torch.inference_mode():
        optimizer.step()
    backward(model, 1)
    optimizer.step()
    assert not any(t.is_inference() for state in optimizer.state.values() for t in state.values())


# ---------------------------------------------------------------------------------------------------------- state


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_loading_copies_state(name: str) -> None:
    model, optimizer = made(name)
    backward(model)
    optimizer.step()
    _, other = made(name)
    other.load_state_dict(optimizer.state_dict())
    ours = [t for state in optimizer.state.values() for t in state.values()]
    theirs = [t for state in other.state.values() for t in state.values()]
    assert len(ours) == len(theirs) > 0
    assert not {t.data_ptr() for t in ours} & {t.data_ptr() for t in theirs}


def test_state_that_others_keep_beside_ours() -> None:
    """As schedulefree's wrapper does, before the first step."""
    model, optimizer = made("MuonAdamW")
    twin, expected = made("MuonAdamW")
    for p in model.parameters():
        optimizer.state[p]["z"] = p.detach().clone()
    for m, o in ((model, optimizer), (twin, expected)):
        for seed in range(2):
            backward(m, seed)
            o.step()
    assert same(model, twin)
    assert all("z" in optimizer.state[p] and len(optimizer.state[p]) > 1 for p in model.parameters())


def described(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What each parameter has in the state."""
    return {
        name: {key: (t.shape, t.dtype) for key, t in optimizer.state.get(p, {}).items()}
        for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_init_state_is_the_state_of_a_first_step(name: str) -> None:
    """Nothing moves, what is there stays, and steps are the same after it."""
    model, optimizer = made(name)
    twin, plain_one = made(name)
    optimizer.init_state()  # type: ignore[attr-defined]
    assert same(model, twin) and all(p.grad is None for p in model.parameters())
    made_early = described(model, optimizer)
    for seed in range(2):
        for m, o in ((model, optimizer), (twin, plain_one)):
            backward(m, seed)
            o.step()
        before = copy.deepcopy(optimizer.state_dict())
        optimizer.init_state()  # type: ignore[attr-defined]
        after = optimizer.state_dict()
        for key, state in before["state"].items():
            assert all(torch.equal(t, after["state"][key][k]) for k, t in state.items())
    assert same(model, twin)
    assert made_early == described(twin, plain_one)


STILL: dict[str, dict[str, Any]] = {
    "plain": {},
    "independent": {"weight_decay_form": "independent"},
    "scheduled": {"weight_decay_form": "scheduled", "peak_lr": 0.1},
    "cautious": {"cautious": True},
    "cautious, independent": {"cautious": True, "weight_decay_form": "independent"},
    "stochastic rounding": {"stochastic_rounding": True},
    "stochastic rounding, independent": {"stochastic_rounding": True, "weight_decay_form": "independent"},
    "masters": {"master_weights": True},
    "masters, independent": {"master_weights": True, "weight_decay_form": "independent"},
    "int8": {"momentum_dtype": torch.int8},
    "neuron": {"second_moment": "neuron"},
    "element": {"second_moment": "element", "sign_momentum": True},
    "power": {"power": 0.5},
    "power 1": {"power": 1.0, "weight_decay_form": "independent"},
}


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("case", STILL)
def test_nothing_moves_at_a_learning_rate_of_zero(backend: str, case: str, tensor: bool) -> None:
    start = [torch.randn(6, 8, dtype=torch.bfloat16), torch.randn(8, 6, dtype=torch.bfloat16)]
    params = [nn.Parameter(t.clone()) for t in start]
    lr = torch.tensor(0.0) if tensor else 0.0
    optimizer = Muon(params, lr=lr, weight_decay=0.5, backend=backend, **STILL[case])
    for step in range(2):
        for p in params:
            p.grad = torch.randn_like(p) if step else torch.zeros_like(p)
        optimizer.step()
    assert all(torch.equal(p, t) for p, t in zip(params, start, strict=True))


def test_a_fresh_optimizer_asked_for_its_state_by_torch_moves_nothing() -> None:
    """torch.distributed.checkpoint steps it with lr = 0."""
    model = model_of("matrices")
    optimizer = Muon([p for _, p in trained(model)], weight_decay_form="independent")
    assert get_optimizer_state_dict(model, optimizer)["state"] and same(model, model_of())


# ------------------------------------------------------------------------------------------------------ transposed


@pytest.mark.parametrize("rule", [None, "match_rms_adamw", "spectral", own_rule])
def test_transposed_swaps_the_shape_of_the_factor(backend: str, rule: Any) -> None:
    """A (in, out) weight is stepped as its transpose is: Conv1D, experts (E, in, out)."""
    for shape in ((16, 64), (64, 16), (3, 16, 32)):
        weight, grad = torch.randn(shape), torch.randn(shape)
        stored, usual = nn.Parameter(weight.clone()), nn.Parameter(weight.mT.clone())
        stored.grad, usual.grad = grad.clone(), grad.mT.clone()
        Muon([stored], lr=0.1, adjust_lr_fn=rule, transposed=True, backend=backend).step()
        Muon([usual], lr=0.1, adjust_lr_fn=rule, backend=backend).step()
        moved, expected = stored.detach() - weight, (usual.detach() - weight.mT).mT
        assert (moved - expected).norm() <= 0.02 * expected.norm()


def test_transposed_by_name() -> None:
    params = [(f"layer.{i}.weight", nn.Parameter(torch.zeros(4, 16))) for i in range(3)]

    def moved(**options: Any) -> list[float]:
        fresh = [(name, nn.Parameter(p.detach().clone())) for name, p in params]
        for _, p in fresh:
            p.grad = torch.eye(4, 16)
        Muon([{"params": fresh, **options}], lr=1.0).step()
        return [float(p.detach().norm()) for _, p in fresh]

    one, two, three = moved(transposed=["layer.0.*", "layer.2.weight"])
    (plain_one, *_), (turned, *_) = moved(), moved(transposed=True)
    assert two == plain_one and one == three == turned == pytest.approx(2 * plain_one)
    with pytest.raises(ValueError, match=r"transposed='layer\.3\.weight' matches no parameter"):
        moved(transposed=["layer.3.weight"])


# -------------------------------------------------------------------------------------------------- buckets, groups


@pytest.mark.parametrize("tensor", [False, True])
def test_groups_alike_are_stepped_as_one(backend: str, tensor: bool) -> None:
    """With the bits of one group; a tensor for lr has to be the same one."""
    start = [torch.randn(6, 8) for _ in range(6)]
    grads = [torch.randn(6, 8) for _ in range(6)]
    lr = torch.tensor(0.1) if tensor else 0.1

    def stepped(groups: Callable[[list[nn.Parameter]], Any]) -> tuple[Muon, list[nn.Parameter]]:
        params = [nn.Parameter(t.clone()) for t in start]
        optimizer = Muon(groups(params), lr=lr, backend=backend)
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer.step()
        return optimizer, params

    one, together = stepped(lambda params: params)
    each, apart = stepped(lambda params: [{"params": [p], "name": str(i)} for i, p in enumerate(params)])
    assert len(each.plan().buckets) == len(one.plan().buckets) == 1
    assert all(torch.equal(p, q) for p, q in zip(together, apart, strict=True))
    differing: list[dict[str, Any]] = [
        {"momentum": 0.9},
        {"lr": lr.clone() if isinstance(lr, Tensor) else 0.2},
        {"ns_steps": 4},
        {"momentum_dtype": "bfloat16"},
        {"maximize": True},
    ]
    several, _ = stepped(lambda params: [{"params": [p], **x} for p, x in zip(params, [{}, *differing], strict=True)])
    assert len(several.plan().buckets) == 6


def test_groups_alike_whose_options_change(backend: str) -> None:
    """A group is stepped with its own numbers again when they differ, by name or not."""
    start = [torch.randn(6, 8) for _ in range(3)]
    grads = [torch.randn(6, 8) for _ in range(3)]
    params = [nn.Parameter(t.clone()) for t in start]
    optimizer = Muon([{"params": [p]} for p in params], lr=0.1, backend=backend)
    alone = [nn.Parameter(t.clone()) for t in start]
    each = [Muon([p], lr=0.1, backend=backend) for p in alone]
    for changes in ({}, {"lr": 0.3}, {"split": equal(2)}, {"lr": 0.1}, {"transposed": True}):
        for optimizer_ in (optimizer, each[1]):
            optimizer_.param_groups[-1 if len(optimizer_.param_groups) == 1 else 1].update(changes)
        for p, q, g in zip(params, alone, grads, strict=True):
            p.grad, q.grad = g.clone(), g.clone()
        optimizer.step()
        for other in each:
            other.step()
        for p, q in zip(params, alone, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=5e-3)  # rounding of stacks of other sizes


@pytest.mark.parametrize("option", [{"transposed": True}, {"split": equal(2)}], ids=str)
def test_a_parameter_that_moves_between_groups_alike(option: dict[str, Any]) -> None:
    """It is stepped by the options of the group that it is in, in a place among all that is the same."""
    params = [nn.Parameter(torch.ones(16, 8)) for _ in range(3)]
    alone = nn.Parameter(torch.ones(16, 8))
    optimizer = Muon([{"params": params[:2]}, {"params": params[2:], **option}], lr=0.1)
    other = Muon([{"params": [alone]}], lr=0.1)
    for step in range(2):
        for p in (*params, alone):
            p.grad = torch.eye(16, 8)
        optimizer.step()
        other.step()
        if step == 0:
            optimizer.param_groups[1]["params"].insert(0, optimizer.param_groups[0]["params"].pop())
            other.param_groups[0].update(option)
    torch.testing.assert_close(params[1], alone, rtol=0, atol=1e-3)


def test_what_looks_like_plain_text_or_numbers_becomes_plain() -> None:
    class Rule(str, Enum):
        moonlight = "match_rms_adamw"

    group = {"params": [nn.Parameter(torch.ones(4, 4))], "ns_coefficients": np.array([3.4445, -4.775, 2.0315])}
    optimizer = Muon([group], adjust_lr_fn=Rule.moonlight)
    kept = optimizer.param_groups[0]
    assert type(kept["adjust_lr_fn"]) is str and kept["adjust_lr_fn"] == "match_rms_adamw"
    assert kept["ns_coefficients"] == [3.4445, -4.775, 2.0315] and kept["ns_steps"] == 5


# ------------------------------------------------------------------------------------------------ torch's test data


def torchs_own() -> Any:
    """What torch tests its Muon with."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch has no Muon before 2.9")
    pytest.importorskip("expecttest", reason="torch's own test data import it")
    from torch.testing._internal.common_optimizers import optim_db

    return next(info for info in optim_db if info.optim_cls is torch.optim.Muon)


def test_torchs_own_configurations() -> None:
    """With gradients of full rank: in others the smallest singular values are noise of bf16, which both amplify."""
    for case in torchs_own().optim_inputs_func("cpu", torch.float32):
        torch.manual_seed(0)
        start = [torch.randn(12, 32), torch.randn(32, 12)]
        params = [[nn.Parameter(t.clone()) for t in start] for _ in range(2)]
        optimizers = [kind(own, **case.kwargs) for kind, own in zip((torch.optim.Muon, Muon), params, strict=True)]
        for _ in range(10):
            for p, q in zip(*params, strict=True):
                p.grad = torch.randn_like(p)
                q.grad = p.grad.clone()
            for optimizer in optimizers:
                optimizer.step()
        for p, q, t in zip(*params, start, strict=True):
            off = ((p - q).norm() / (p - t).norm()).item()
            assert off <= 0.04, f"{case.desc}: {off:.3f}"
        theirs, ours = (optimizer.param_groups[0] for optimizer in optimizers)
        assert theirs.keys() <= ours.keys(), case.desc
        assert {k: ours[k] for k in theirs if k != "params"} == {k: v for k, v in theirs.items() if k != "params"}
        optimizers[1].load_state_dict(optimizers[0].state_dict())
        optimizers[0].load_state_dict(optimizers[1].state_dict())


# Where ours differ: torch only warns of duplicates, takes no 3-D parameters, and refuses complex ones in the step.
OTHERWISE: dict[str, tuple[type[Exception], str] | None] = {
    "a param group cannot have duplicate parameters": (ValueError, "repeated"),
    "only support 2D parameters": None,
    "does not support complex parameters": (TypeError, "complex64"),
}


@pytest.mark.filterwarnings("ignore:.*duplicate parameters")
def test_torchs_own_error_inputs() -> None:
    met = set()
    for case in torchs_own().optim_error_inputs_func("cpu", torch.float32):
        given = case.optimizer_error_input
        error, sentence = case.error_type, case.error_regex
        met.add(given.desc)
        if given.desc in OTHERWISE:
            if (expected := OTHERWISE[given.desc]) is None:
                Muon(given.params, **given.kwargs).step()
                continue
            error, sentence = expected
        with pytest.raises(error, match=sentence):
            Muon(given.params, **given.kwargs).step()
    assert set(OTHERWISE) <= met and len(met) > 6


def test_spectral_by_torchs_name() -> None:
    """So that torch, which has it from 2.14 on, steps alike with our checkpoint."""
    p = torch.randn(16, 64)
    groups = [Muon([p], adjust_lr_fn=name).param_groups[0] for name in ("spectral", "spectral_unclamped")]
    assert [group["adjust_lr_fn"] for group in groups] == ["spectral_unclamped"] * 2
    assert lr_ratio("spectral_unclamped", 16, 64) == 0.5


def test_fake_tensors_are_told_what_they_are() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        p = nn.Parameter(torch.empty(4, 4))
    with pytest.raises(TypeError, match="is a FakeTensor; to see what state an optimizer makes"):
        Muon([p])
    with torch.device("meta"):
        model = model_of()
    optimizer = MuonAdamW(param_groups(model))
    optimizer.init_state()
    assert len(optimizer.state) == len(list(model.parameters()))
