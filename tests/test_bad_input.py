"""Whatever cannot be used raises, says what was expected and what came, and changes nothing."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checks import needs
from torch import Tensor, nn

from muon_kernels import Muon, MuonAdamW, SpectralMomentum, backends, orthogonalize
from muon_kernels.backends import cpu
from muon_kernels.coefficients import resolve
from muon_kernels.distributed import ZeroMuon
from muon_kernels.step.operands import Operand
from muon_kernels.step.options import StepOptions
from muon_kernels.step.plan import plan_for_shapes
from muon_kernels.step.prepare import prepare

NAN = float("nan")

# Options, the exception, and what its message must contain: what was expected and what came; torch's own sentence where
# torch has one.
OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"lr": -1.0}, ValueError, "Learning rate should be >= 0 but is: -1.0"),
    ({"lr": NAN}, ValueError, "Learning rate should be >= 0 but is: nan"),
    ({"lr": torch.tensor(-1.0)}, ValueError, "Learning rate should be >= 0 but is: -1.0"),
    ({"lr": torch.tensor([0.1, 0.2])}, ValueError, "Tensor lr must be 1-element"),
    ({"momentum": -0.5}, ValueError, "momentum should be >= 0 but is: -0.5"),
    ({"momentum": NAN}, ValueError, "momentum should be >= 0 but is: nan"),
    ({"weight_decay": -0.1}, ValueError, "weight decay should be >= 0 but is: -0.1"),
    ({"weight_decay": NAN}, ValueError, "weight decay should be >= 0 but is: nan"),
    ({"lr": math.inf}, ValueError, "Learning rate should be finite but is: inf"),
    ({"lr": torch.tensor(math.inf)}, ValueError, "Learning rate should be finite but is: inf"),
    ({"momentum": math.inf}, ValueError, "momentum should be finite but is: inf"),
    ({"weight_decay": math.inf}, ValueError, "weight decay should be finite but is: inf"),
    ({"eps": 5.0}, ValueError, "eps should be < 1, the smallest norm that it is compared with, but is: 5.0"),
    ({"eps": -1e-7}, ValueError, "eps should be >= 0 but is: -1e-07"),
    ({"eps": NAN}, ValueError, "eps should be >= 0 but is: nan"),
    ({"adjust_lr_fn": "adam"}, ValueError, "Adjust learning rate function adam is not supported"),
    ({"adjust_lr_fn": "adam"}, ValueError, "expected one of 'original', 'match_rms_adamw'"),
    ({"ns_coefficients": "kelle"}, ValueError, "should be one of 'keller', 'you5'"),
    ({"ns_coefficients": "kelle"}, ValueError, "but is: 'kelle'"),
    ({"ns_coefficients": (1.0, 2.0)}, ValueError, "Coefficients must be a tuple of exactly 3 values"),
    ({"ns_coefficients": (1.0, 2.0)}, ValueError, "(1.0, 2.0)"),
    ({"ns_coefficients": [(1, 2, 3), (1, 2)], "ns_steps": 2}, ValueError, "exactly 3 values (a, b, c) but are: (1, 2)"),
    ({"ns_coefficients": [(1, 2, 3)] * 2, "ns_steps": 3}, ValueError, "has 2 steps but ns_steps is: 3"),
    ({"ns_coefficients": (1.0, NAN, 2.0)}, ValueError, "should be finite but are: (1.0, nan, 2.0)"),
    ({"ns_coefficients": (1.0, "b", 2.0)}, TypeError, "three numbers (a, b, c)"),
    ({"ns_coefficients": (1.0, "b", 2.0)}, TypeError, "has: (1.0, 'b', 2.0)"),
    ({"ns_coefficients": 3.0}, TypeError, "has: 3.0"),
    ({"ns_coefficients": None}, TypeError, "has: None"),
    ({"ns_steps": 0}, ValueError, "ns_steps should be >= 1 but is: 0"),
    ({"ns_steps": 100}, ValueError, "Number of steps must be less than 100 for computational efficiency but is: 100"),
    ({"ns_steps": True}, TypeError, "ns_steps should be an int or None but is: True"),
    ({"ns_steps": 2.5}, TypeError, "ns_steps should be an int or None but is: 2.5"),
    ({"ns_algorithm": "gramm"}, ValueError, "'auto' or one of 'standard', 'gram' but is: 'gramm'"),
    ({"ns_algorithm": ["gram"]}, ValueError, "'auto' or one of 'standard', 'gram' but is: ['gram']"),
    ({"backend": ["cpu"]}, ValueError, "'auto' or one of 'cuda', 'triton', 'cpu', 'eager' but is: ['cpu']"),
    ({"backend": "gpu"}, ValueError, "backend should be 'auto' or one of 'cuda', 'triton', 'cpu', 'eager'"),
    ({"backend": "gpu"}, ValueError, "but is: 'gpu'"),
    (
        {"workspace_dtype": torch.float32},
        ValueError,
        "workspace_dtype should be torch.bfloat16 or torch.float16, or a name of these, but is",
    ),
    (
        {"workspace_dtype": "fp16"},
        ValueError,
        "workspace_dtype should be torch.bfloat16 or torch.float16, or a name of these, but is: 'fp16'",
    ),
    ({"max_workspace_bytes": 0}, ValueError, "max_workspace_bytes should be a positive int or None but is: 0"),
    ({"max_workspace_bytes": -1}, ValueError, "max_workspace_bytes should be a positive int or None but is: -1"),
    ({"max_workspace_bytes": 1e9}, TypeError, "should be a positive int or None but is: 1000000000.0"),
    ({"max_workspace_bytes": True}, TypeError, "should be a positive int or None but is: True"),
    ({"max_workspace_bytes": "1G"}, TypeError, "should be a positive int or None but is: '1G'"),
    ({"momentum_dtype": torch.int16}, ValueError, "torch.int8, a name of these, or None but is: 'int16'"),
    (
        {"momentum_dtype": torch.complex64},
        ValueError,
        "torch.int8, a name of these, or None but is: 'complex64'",
    ),
    ({"momentum_dtype": "bf16"}, ValueError, "torch.int8, a name of these, or None but is: 'bf16'"),
    ({"adjust_lr_fn": lambda rows, cols: 1.0}, ValueError, "found by its name, which is what a checkpoint has of it"),
    ({"adjust_lr_fn": "no.such.module:rule"}, ValueError, "a module that has been imported"),
    ({"transposed": "fc.weight"}, TypeError, "transposed should be True, False, or a list of names and patterns"),
    ({"transposed": ["fc.weight"]}, ValueError, "transposed by name should be of parameters that have one"),
]


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((6, 8), (8, 6), (2, 6, 8))]


class Unchanged:
    """Parameters and state of an optimizer, to be compared with what they are later."""

    def __init__(self, optimizer: Muon) -> None:
        self.optimizer = optimizer
        self.groups = [set(group) for group in optimizer.param_groups]
        self.params = {p: p.detach().clone() for group in optimizer.param_groups for p in group["params"]}
        self.buffers = {p: state["momentum_buffer"].clone() for p, state in optimizer.state.items()}

    def check(self) -> None:
        assert [set(group) for group in self.optimizer.param_groups] == self.groups
        assert all(torch.equal(p, before) for p, before in self.params.items())
        state = self.optimizer.state
        assert set(state) == set(self.buffers)
        assert all(torch.equal(state[p]["momentum_buffer"], before) for p, before in self.buffers.items())


def stepped(**options: Any) -> tuple[list[nn.Parameter], Muon]:
    """One that has made a step and is ready for the next, with a group after the one that tests spoil."""
    params = parameters()
    optimizer = Muon([{"params": params[1:]}, {"params": params[:1]}], **options)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p) if p.grad is None else torch.full_like(p, 0.5)
    optimizer.step()
    return params, optimizer


# Without addresses, which differ between the processes of pytest -n.
ids = [re.sub(" at 0x[0-9a-f]+", "", f"{options}: {sentence[:12]}") for options, _, sentence in OPTIONS]


def test_torchs_own_sentences_are_kept() -> None:
    """Of the bad options above, those that torch refuses too."""
    same = 0
    for options, error, _ in OPTIONS:
        try:
            torch.optim.Muon(parameters()[:1], **options)
        except ValueError as theirs:
            with pytest.raises(error) as ours:
                Muon(parameters(), **options)
            assert str(theirs) in str(ours.value)
            same += 1
        except TypeError:  # an option that torch does not have
            pass
    assert same >= 8


@pytest.mark.parametrize(("options", "error", "sentence"), OPTIONS, ids=ids)
def test_options(options: dict[str, Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error) as caught:
        Muon(parameters(), **options)
    assert sentence in str(caught.value)

    _, optimizer = stepped()
    before = Unchanged(optimizer)
    extra = nn.Parameter(torch.ones(3, 4))
    with pytest.raises(error) as caught:
        optimizer.add_param_group({"params": [extra], **options})
    assert sentence in str(caught.value)
    before.check()
    optimizer.step()


@pytest.mark.parametrize("group", [0, 1])
@pytest.mark.parametrize(("options", "error", "sentence"), OPTIONS, ids=ids)
def test_options_set_after_construction(
    options: dict[str, Any], error: type[Exception], sentence: str, group: int
) -> None:
    fresh = parameters()
    for params, optimizer in (stepped(), (fresh, Muon([{"params": [p]} for p in fresh]))):
        for p in params:
            p.grad = torch.ones_like(p)
        before = Unchanged(optimizer)
        kept = dict(optimizer.param_groups[group])
        optimizer.param_groups[group].update(options)
        with pytest.raises(error) as caught:
            optimizer.step()
        assert sentence in str(caught.value)
        before.check()
        optimizer.param_groups[group].update(kept)
        optimizer.step()


def test_a_misspelt_option_of_a_group() -> None:
    params = parameters()
    with pytest.raises(ValueError, match=r"'weigth_decay', .* did you mean 'weight_decay'"):
        Muon([{"params": params, "weigth_decay": 0.1}])
    optimizer = Muon(params[:1])
    with pytest.raises(ValueError, match="did you mean 'nesterov'"):
        optimizer.add_param_group({"params": params[1:], "nestrov": False, "betas": (0.9, 0.99)})
    for word, name in {"spilt": "split", "LR": "lr", "learning_rate": "lr", "wd": "weight_decay"}.items():
        with pytest.raises(ValueError, match=f"did you mean '{name}'"):
            optimizer.add_param_group({"params": params[1:], word: None})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": params[1:]})
    with pytest.raises(TypeError, match="wd"):
        Muon(params, wd=0.1)  # type: ignore[call-arg]


def test_a_parameter_with_a_name_is_called_by_it() -> None:
    with pytest.raises(ValueError, match=r"norm\.weight should have at least 2 dimensions but has size: \(5,\)"):
        Muon([("fc.weight", nn.Parameter(torch.ones(3, 4))), ("norm.weight", nn.Parameter(torch.ones(5)))])


PARAMETERS: dict[str, tuple[Callable[[], Tensor], type[Exception], list[str]]] = {
    "vector": (lambda: torch.ones(5), ValueError, ["at least 2 dimensions", "has size: (5,)", "AdamW"]),
    "scalar": (lambda: torch.ones(()), ValueError, ["at least 2 dimensions", "has size: ()"]),
    "complex": (
        lambda: torch.ones(3, 4, dtype=torch.complex64),
        TypeError,
        ["floating-point dtype among float32", "torch.complex64"],
    ),
    "integer": (
        lambda: torch.ones(3, 4, dtype=torch.int32),
        TypeError,
        ["floating-point dtype among float32", "torch.int32"],
    ),
    "fp8": (
        lambda: torch.ones(3, 4).to(torch.float8_e4m3fn),
        TypeError,
        ["among float32, bfloat16, float16, float64", "torch.float8_e4m3fn"],
    ),
    "strides that meet": (
        lambda: torch.ones(200).as_strided((10, 20), (1, 3)),
        ValueError,
        ["size (10, 20)", "strides (1, 3)", "clone it"],
    ),
    "expanded": (lambda: torch.ones(1, 4).expand(3, 4), ValueError, ["strides (0, 1)", "clone it"]),
    "bool": (lambda: torch.ones(3, 4, dtype=torch.bool), TypeError, ["floating-point", "torch.bool"]),
    "sparse": (lambda: torch.eye(4).to_sparse(), TypeError, ["dense, not sparse", "torch.sparse_coo"]),
}


@pytest.mark.parametrize("kind", PARAMETERS)
def test_parameters(kind: str) -> None:
    bad, error, parts = PARAMETERS[kind]
    optimizer = Muon(good := parameters())
    for act in (
        lambda: Muon([nn.Parameter(bad(), requires_grad=False)]),
        lambda: optimizer.add_param_group({"params": [nn.Parameter(bad(), requires_grad=False)]}),
    ):
        with pytest.raises(error) as caught:
            act()
        assert all(part in str(caught.value) for part in parts), caught.value
    assert len(optimizer.param_groups) == 1
    assert len(optimizer.param_groups[0]["params"]) == len(good)


def test_not_parameters() -> None:
    with pytest.raises(TypeError, match="str"):
        Muon(["weight"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="empty parameter list"):
        Muon([])
    with pytest.raises(TypeError, match="iterable"):
        Muon(parameters()[0])


@pytest.mark.parametrize("at", [0, 1, 2])
def test_sparse_gradient(backend: str, at: int) -> None:
    params, optimizer = stepped(backend=backend)
    before = Unchanged(optimizer)
    params[at].grad = torch.ones_like(params[at]).to_sparse()
    with pytest.raises(TypeError, match=r"gradient should be dense, not sparse, but has layout: torch\.sparse_coo"):
        optimizer.step()
    before.check()


@pytest.mark.parametrize("group", [True, "gloo", dist.GroupMember.NON_GROUP_MEMBER, object], ids=repr)
def test_what_is_no_process_group(group: Any) -> None:
    """A rank that a new group leaves out gets torch's number for it in the place of a group."""
    params = parameters()
    for act in (
        lambda: Muon(params, process_group=group),
        lambda: SpectralMomentum(params, process_group=group),
        lambda: MuonAdamW([{"params": params, "use_muon": True}], muon_options={"process_group": group}),
        lambda: ZeroMuon(params, process_group=group),
    ):
        with pytest.raises(
            TypeError, match=rf"should be a torch\.distributed\.ProcessGroup .* is: {re.escape(repr(group))}$"
        ):
            act()


@pytest.mark.parametrize(
    ("role", "bad", "error", "sentence"),
    [
        (1, torch.ones(6, 8, device="meta"), ValueError, "should be on the parameter's device cpu but is on: meta"),
        (2, torch.ones(6, 8, device="meta"), ValueError, "should be on the parameter's device cpu but is on: meta"),
        (1, torch.ones(8, 6), ValueError, "gradient should have the parameter's size (6, 8) but has: (8, 6)"),
        (2, torch.ones(1, 48), ValueError, "momentum_buffer should have the parameter's size (6, 8) but has: (1, 48)"),
        (
            1,
            torch.ones(6, 8, dtype=torch.int64),
            TypeError,
            "gradient should be of a floating-point dtype among float32",
        ),
        (1, torch.ones(6, 8, dtype=torch.complex64), TypeError, "but is of: torch.complex64"),
        (
            1,
            torch.ones(6, 8).to_sparse(),
            TypeError,
            "gradient should be dense, not sparse, but has layout: torch.sparse_coo",
        ),
        (
            0,
            torch.ones(1, 8).expand(6, 8),
            ValueError,
            "parameter of size (6, 8) should have memory for every element but its strides (0, 1)",
        ),
        (
            2,
            torch.ones(1, 8).expand(6, 8),
            ValueError,
            "momentum_buffer of size (6, 8) should have memory for every element",
        ),
    ],
)
def test_operands(backend: str, role: int, bad: Tensor, error: type[Exception], sentence: str) -> None:
    operands = [torch.ones(6, 8) for _ in range(3)]
    operands[role] = bad
    p, g, buffer = operands
    with pytest.raises(error) as caught:
        prepare([Operand(p, g, buffer)], StepOptions(resolve("keller", 5), None, backend=backend))
    assert sentence in str(caught.value)


def test_momentum_that_was_replaced_by_a_wrong_one(backend: str) -> None:
    params, optimizer = stepped(backend=backend)
    kept = optimizer.state[params[0]]["momentum_buffer"]
    for bad in (torch.zeros(3, 3), torch.zeros(6, 8, device="meta"), torch.zeros(1, 8).expand(6, 8)):
        optimizer.state[params[0]]["momentum_buffer"] = bad
        before = [p.detach().clone() for p in params]
        with pytest.raises(ValueError, match="momentum_buffer"):
            optimizer.step()
        assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    optimizer.state[params[0]]["momentum_buffer"] = kept
    optimizer.step()


@needs.cpu_kernels
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_backend_that_cannot_take_the_dtype(dtype: torch.dtype) -> None:
    p = nn.Parameter(torch.ones(4, 6, dtype=dtype))
    with pytest.raises(ValueError, match=rf"'cpu' .*expected float32 or bfloat16 tensors, got {dtype}; use backend="):
        Muon([p], backend="cpu")
    with pytest.raises(ValueError, match=f"expected float32 or bfloat16 tensors, got {dtype}"):
        orthogonalize(p.detach(), backend="cpu")
    p.grad = torch.ones_like(p)
    Muon([p]).step()  # "auto" finds one that can

    params = parameters()
    optimizer = Muon(params, backend="cpu", momentum_dtype=dtype)
    for q in params:
        q.grad = torch.ones_like(q)
    before = Unchanged(optimizer)
    with pytest.raises(ValueError, match=f"expected float32 or bfloat16 tensors, got {dtype}"):
        optimizer.step()
    before.check()


def test_a_model_in_place_of_its_matrices() -> None:
    with pytest.raises(
        TypeError, match=r"but is a module: Linear; give .*MuonAdamW\(muon_kernels.param_groups\(model\)"
    ):
        Muon(nn.Linear(3, 4))


@needs.cpu_kernels
def test_a_step_that_the_parameters_dtype_has_not() -> None:
    """The learning rate times what adjust_lr_fn says: 4 of a matrix of 400 columns."""
    p = nn.Parameter(torch.zeros(2, 400).half())
    p.grad = torch.ones_like(p)
    optimizer = Muon([p], lr=4e4, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    before = Unchanged(optimizer)
    with pytest.raises(
        ValueError, match=r"should be at most 65504\.0, the largest number of torch\.float16.*lr is: 40000"
    ):
        optimizer.step()
    before.check()
    optimizer.param_groups[0]["lr"] = 1e4
    optimizer.step()
    assert p.isfinite().all()


@needs.cpu_kernels
def test_backend_that_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = torch.device("cpu"), [torch.float32], torch.bfloat16, (3, 4)
    params, optimizer = stepped(backend="cpu")
    before = Unchanged(optimizer)
    monkeypatch.setattr(cpu, "unavailable", lambda: "the compiled module is missing; reinstall")
    for act in (
        lambda: Muon(params, backend="cpu"),
        lambda: orthogonalize(torch.ones(3, 4), backend="cpu"),
        lambda: backends.choose("cpu", *kind),
    ):
        with pytest.raises(RuntimeError, match="backend 'cpu' cannot run here: the compiled module is missing"):
            act()
    params[0].grad = params[1].grad = None  # so that the step is prepared anew
    with pytest.raises(RuntimeError, match="cannot run here"):
        optimizer.step()
    before.check()
    name, notes = backends.choose("auto", *kind)  # eager may remark how it multiplies here
    assert name == "eager" and notes[0] == "cpu was not chosen: the compiled module is missing; reinstall"


@needs.cpu_kernels
@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_forced_instruction_set_that_is_not_there(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor may "auto" pass over a misspelt name in silence."""
    monkeypatch.setenv("MUON_KERNELS_CPU_ISA", "neon")
    for act in (
        lambda: Muon(parameters(), backend=backend),
        lambda: orthogonalize(torch.ones(3, 4), backend=backend),
    ):
        with pytest.raises(ValueError, match=r"MUON_KERNELS_CPU_ISA should be one of .*'avx2'.* but is: 'neon'"):
            act()
    Muon(parameters(), backend="eager")


def test_cap_that_holds_no_matrix(backend: str) -> None:
    params = parameters()
    optimizer = Muon(params, backend=backend)
    need = optimizer.plan().buckets[0].workspace_bytes // 4  # of 4 matrices
    sentence = f"max_workspace_bytes should be at least {need} to hold one matrix but is: {need - 1}"
    with pytest.raises(ValueError, match=sentence):
        Muon(params, backend=backend, max_workspace_bytes=need - 1)
    optimizer.param_groups[0]["max_workspace_bytes"] = need - 1
    for p in params:
        p.grad = torch.ones_like(p)
    before = Unchanged(optimizer)
    with pytest.raises(ValueError, match=sentence):
        optimizer.step()
    with pytest.raises(ValueError, match=sentence):
        optimizer.plan()
    before.check()
    optimizer.param_groups[0]["max_workspace_bytes"] = need
    optimizer.step()


def minus_one(rows: int, cols: int) -> float:
    return -1.0


def no_number(rows: int, cols: int) -> float:
    return NAN


def text(rows: int, cols: int) -> str:
    return "x"


@pytest.mark.parametrize(
    ("ratio", "error", "sentence"),
    [
        (minus_one, ValueError, "finite number >= 0 but returned: -1.0"),
        (no_number, ValueError, "finite number >= 0 but returned: nan"),
        (text, TypeError, "should return a number but returned: 'x'"),
    ],
)
def test_function_that_returns_no_ratio(backend: str, ratio: Any, error: type[Exception], sentence: str) -> None:
    _, optimizer = stepped(backend=backend)
    before = Unchanged(optimizer)
    optimizer.param_groups[1]["adjust_lr_fn"] = ratio
    with pytest.raises(error, match=sentence):
        optimizer.step()
    before.check()


@pytest.mark.parametrize(
    ("G", "options", "error", "sentence"),
    [
        ([[1.0, 2.0]], {}, TypeError, "G should be a Tensor but is: list"),
        (None, {}, TypeError, "G should be a Tensor but is: NoneType"),
        (torch.ones(5), {}, ValueError, "at least 2 dimensions"),
        (torch.ones(()), {}, ValueError, "G should have at least 2 dimensions but has size: ()"),
        (torch.ones(3, 4).to(torch.float8_e5m2), {}, TypeError, "G should be of a floating-point dtype among float32"),
        (torch.ones(3, 4, dtype=torch.int64), {}, TypeError, "torch.int64"),
        (torch.ones(3, 4, dtype=torch.complex64), {}, TypeError, "torch.complex64"),
        (torch.eye(4).to_sparse(), {}, TypeError, "torch.sparse_coo"),
        (torch.ones(3, 4), {"ns_steps": 0}, ValueError, "ns_steps should be >= 1 but is: 0"),
        (torch.ones(3, 4), {"ns_steps": 100}, ValueError, "must be less than 100"),
        (torch.ones(3, 4), {"ns_steps": True}, TypeError, "should be an int or None but is: True"),
        (torch.ones(3, 4), {"ns_steps": 2.5}, TypeError, "should be an int or None but is: 2.5"),
        (torch.ones(0, 4), {"ns_steps": 2.5}, TypeError, "should be an int or None but is: 2.5"),
        (torch.ones(3, 4), {"ns_coefficients": "no"}, ValueError, "but is: 'no'"),
        (torch.ones(3, 4), {"ns_algorithm": "no"}, ValueError, "'auto' or one of 'standard', 'gram' but is: 'no'"),
        (torch.ones(3, 4), {"backend": "no"}, ValueError, "but is: 'no'"),
        (torch.ones(3, 4), {"max_workspace_bytes": 1}, ValueError, "to hold one matrix but is: 1"),
        (torch.ones(3, 4), {"max_workspace_bytes": 0}, ValueError, "but is: 0"),
        (torch.ones(3, 4), {"max_workspace_bytes": "1M"}, TypeError, "should be a positive int or None but is: '1M'"),
        (
            torch.ones(3, 4),
            {"max_workspace_bytes": 1e6},
            TypeError,
            "should be a positive int or None but is: 1000000.0",
        ),
        (
            torch.ones(0, 4),
            {"max_workspace_bytes": 1e6},
            TypeError,
            "should be a positive int or None but is: 1000000.0",
        ),
        (torch.ones(3, 4), {"eps": 5.0}, ValueError, "eps should be < 1"),
        (torch.ones(3, 4), {"eps": "a"}, TypeError, "eps should be a number but is: 'a'"),
        (torch.ones(3, 4), {"eps": -1.0}, ValueError, "eps should be >= 0 but is: -1.0"),
        (torch.ones(3, 4), {"eps": NAN}, ValueError, "eps should be >= 0 but is: nan"),
    ],
    ids=str,
)
def test_orthogonalize(G: Any, options: dict[str, Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error) as caught:
        orthogonalize(G, **options)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("option", ["nesterov", "dampened", "maximize", "flatten"])
def test_switch_that_is_none(option: str) -> None:
    with pytest.raises(TypeError, match=rf"{option} should be True.*'no'"):
        Muon([nn.Parameter(torch.ones(3, 4))], **{option: "no"})


def test_switch_set_after_construction_leaves_the_groups_before_it_alone() -> None:
    p, q = parameters = [nn.Parameter(torch.ones(3, 4)) for _ in range(2)]
    optimizer = Muon([{"params": [p]}, {"params": [q]}])
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.param_groups[1]["nesterov"] = "no"
    with pytest.raises(TypeError, match="nesterov"):
        optimizer.step()
    assert torch.equal(p, torch.ones(3, 4))
    assert not optimizer.state


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_parameter_that_is_repeated() -> None:
    p = nn.Parameter(torch.ones(3, 4))
    with pytest.raises(ValueError, match="repeated"):
        Muon([p, p])


@pytest.mark.parametrize("value", [torch.ones(2), "0.1", None, True])
@pytest.mark.parametrize("option", ["lr", "weight_decay", "momentum", "eps"])
def test_scalar_that_is_none(option: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"should be|1-element"):
        Muon([nn.Parameter(torch.ones(3, 4))], **{option: value})


@pytest.mark.parametrize("buffer", [torch.ones(3, 4, dtype=torch.int32), torch.ones(3, 4).to_sparse(), [1.0]])
def test_checkpoint_whose_momentum_is_none(buffer: Any) -> None:
    optimizer = Muon([nn.Parameter(torch.ones(3, 4))])
    saved = optimizer.state_dict()
    saved["state"] = {0: {"momentum_buffer": buffer}}
    with pytest.raises(TypeError, match=r"momentum_buffer of parameter 0 should be (a Tensor|dense|of a dtype)"):
        optimizer.load_state_dict(saved)
    assert not optimizer.state


@pytest.mark.parametrize("transform", [torch.vmap, torch.func.grad])
def test_orthogonalize_inside_a_transform(backend: str, transform: Callable[..., Any]) -> None:
    function = transform(lambda G: orthogonalize(G, backend=backend).sum())
    with pytest.raises(TypeError, match=r"G should be a tensor with memory.*give matrices as \(\.\.\., m, n\)"):
        function(torch.ones(3, 4, 5))


def shared(kind: str) -> tuple[Tensor, Tensor]:
    base = torch.ones(8, 24)
    return {
        "the same": lambda: (base, base.detach()),
        "transposed": lambda: (base, base.T),
        "columns": lambda: (base[:, :12], base[:, 6:18]),
        "one corner": lambda: (base[:3, :3], base[2:, 2:]),
        "another dtype": lambda: (base, base.view(torch.bfloat16)[:, 20:24]),
    }[kind]()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", ["the same", "transposed", "columns", "one corner", "another dtype"])
def test_parameters_that_share_memory(kind: str, groups: int) -> None:
    params = [nn.Parameter(t) for t in shared(kind)]
    with pytest.raises(ValueError, match=r"parameter of size \(.*\) should have memory of its own but shares"):
        Muon(params if groups == 1 else [{"params": [p]} for p in params])
    with pytest.raises(ValueError, match="should have memory of its own but shares"):
        MuonAdamW([{"params": [p], "use_muon": True} for p in params])
    # Whatever is made to share later is seen when the step is prepared.
    apart = [nn.Parameter(p.detach().clone()) for p in params]
    optimizer = Muon(apart)
    for p, q in zip(apart, params, strict=True):
        p.data = q.data
        p.grad = torch.ones_like(p)
    before = Unchanged(optimizer)
    with pytest.raises(ValueError, match="should have memory of its own but shares"):
        optimizer.step()
    before.check()


def test_momentum_that_shares_memory() -> None:
    params, optimizer = stepped()
    optimizer.state[params[1]]["momentum_buffer"] = params[2].detach()[0].view(8, 6)
    with pytest.raises(ValueError, match="should have memory of its own but shares"):
        optimizer.step()


def test_slices_that_interleave_share_nothing(backend: str) -> None:
    """Also strides that do not nest and yet meet nowhere."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(8, 12, generator=generator)
    loose = torch.randn(8, generator=generator).as_strided((3, 2), (2, 3))
    slices = [base[:, :4], base[:, 4:10], base[::2, 10:], base[1::2, 10:], loose]
    views, copies = ([nn.Parameter(t) for t in ts] for ts in (slices, [t.clone() for t in slices]))
    for params in (views, copies):
        optimizer = Muon(params, lr=0.1, backend=backend)
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        optimizer.step()
    for view, copy in zip(views, copies, strict=True):
        torch.testing.assert_close(view, copy, rtol=0, atol=1e-6)


def test_tensors_without_memory_are_refused(backend: str) -> None:
    """torch's wrappers, such as DTensor, have none at data_ptr()."""
    nothing = torch._efficientzerotensor(4, 5)
    with pytest.raises(TypeError, match="G should be a tensor with memory of its own but is a Tensor without"):
        orthogonalize(nothing, backend=backend)
    p = torch.ones(4, 5)
    optimizer = Muon([p], backend=backend)
    p.grad = torch.ones(4, 5)
    optimizer.step()
    before = p.clone()
    p.grad = nothing
    with pytest.raises(TypeError, match="gradient should be a tensor with memory of its own"):
        optimizer.step()
    assert torch.equal(p, before)


@pytest.mark.parametrize("shapes", [[(3, 5)], [(3, 5, -1)], [(3, 5, True)], [(3.0, 5, 1)]], ids=str)
def test_shapes_of_a_plan(shapes: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"shapes should be \(rows, cols, count\), three integers >= 0, but one is: "):
        plan_for_shapes(shapes)
