"""Which parameter goes to which optimizer, and that the groups work with torch's optimizers."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from muon_kernels.param_groups import ParamGroups, param_groups


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.experts = nn.Parameter(torch.randn(3, 8, 16))
        self.output = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.ones(1, 1, 8))


class LanguageModel(nn.Module):
    """Width and vocabulary agree, so size alone cannot tell the head from a hidden matrix."""

    def __init__(self, tied: bool = False, head: str = "lm_head", vocabulary: int = 8) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, 8)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.norm = nn.RMSNorm(8)
        setattr(self, head, nn.Linear(8, vocabulary, bias=False))
        if tied:
            getattr(self, head).weight = self.tokens.weight


LAYER = {
    "scale": ("AdamW", "vector"),
    "norm.weight": ("AdamW", "norm"),
    "norm.bias": ("AdamW", "norm"),
    "attention.in_proj_weight": ("Muon", "matrix in MultiheadAttention"),
    "attention.in_proj_bias": ("AdamW", "bias"),
    "attention.out_proj.weight": ("Muon", "matrix in NonDynamicallyQuantizableLinear"),
    "attention.out_proj.bias": ("AdamW", "bias"),
    "experts": ("Muon", "stack of matrices in Layer"),
    "output.weight": ("Muon", "matrix in Linear"),
    "output.bias": ("AdamW", "bias"),
}
LAYERS = {f"layers.{i}.{name}": went for i in range(2) for name, went in LAYER.items()}
NORM = {"norm.weight": ("AdamW", "norm")}


def went(groups: ParamGroups) -> dict[str, tuple[str, str]]:
    return {a.name: (a.optimizer, a.reason) for a in groups.assignments}


def check_complete(model: nn.Module, groups: ParamGroups) -> None:
    """Every trainable parameter is in exactly one group, under its own name."""
    named = dict(model.named_parameters())
    names = [name for group in groups for name in group["param_names"]]
    params = [param for group in groups for param in group["params"]]
    assert [id(p) for p in params] == [id(named[name]) for name in names]
    assert sorted(names) == sorted(name for name, p in named.items() if p.requires_grad)
    assert [group["use_muon"] for group in groups] == [True, False]


@pytest.mark.parametrize("head", ["lm_head", "whatever"])
@pytest.mark.parametrize("tied", [False, True])
def test_language_model(tied: bool, head: str) -> None:
    model = LanguageModel(tied, head)
    groups = param_groups(model)
    check_complete(model, groups)
    if tied:
        ends = {"tokens.weight": ("AdamW", f"embedding, tied with {head}.weight")}
    else:
        ends = {
            "tokens.weight": ("AdamW", "embedding"),
            f"{head}.weight": ("AdamW", "output head"),
        }
    assert went(groups) == {**LAYERS, **NORM, **ends}


def test_weight_tied_across_layers_counts_once_and_is_told() -> None:
    model = LanguageModel()
    model.layers[1].output.weight = model.layers[0].output.weight
    groups = param_groups(model)
    check_complete(model, groups)
    assert went(groups)["layers.0.output.weight"] == (
        "Muon",
        "matrix in Linear, tied with layers.1.output.weight",
    )
    shared = nn.Sequential(linear := nn.Linear(4, 4, bias=False), nn.ReLU(), linear)
    assert went(param_groups(shared)) == {"0.weight": ("Muon", "matrix in Linear, tied with 2.weight")}


def test_convolutions() -> None:
    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(3, 8, 3),
            "batch_norm": nn.BatchNorm2d(8),
            "depthwise": nn.Conv2d(8, 8, 3, groups=8, bias=False),
            "grouped": nn.Conv2d(8, 8, 3, groups=2, bias=False),
            "audio": nn.Conv1d(2, 4, 3, bias=False),
            "volume": nn.ConvTranspose3d(2, 4, 3, bias=False),
            "single_channel": nn.Conv2d(1, 4, 3, bias=False),
            "fc": nn.Linear(8, 4, bias=False),
        }
    )
    groups = param_groups(model)
    check_complete(model, groups)
    assert went(groups) == {
        "conv.weight": ("Muon", "flattened to a matrix in Conv2d"),
        "conv.bias": ("AdamW", "bias"),
        "batch_norm.weight": ("AdamW", "norm"),
        "batch_norm.bias": ("AdamW", "norm"),
        "depthwise.weight": ("AdamW", "depthwise convolution"),
        "grouped.weight": ("Muon", "flattened to a matrix in Conv2d"),
        "audio.weight": ("AdamW", "3-D convolution weight"),
        "volume.weight": ("Muon", "flattened to a matrix in ConvTranspose3d"),
        "single_channel.weight": ("Muon", "flattened to a matrix in Conv2d"),
        "fc.weight": ("AdamW", "output head"),
    }
    flattened = param_groups(model, muon_options={"flatten": True})
    assert went(flattened)["audio.weight"] == ("Muon", "flattened to a matrix in Conv1d")


def test_what_is_no_matrix() -> None:
    model = nn.Module()
    model.scalar = nn.Parameter(torch.tensor(1.0))
    model.vector = nn.Parameter(torch.zeros(5))
    model.class_token = nn.Parameter(torch.zeros(1, 1, 5))
    model.position_embed = nn.Parameter(torch.zeros(1, 7, 5))
    model.relative_bias_table = nn.Parameter(torch.zeros(9, 4))
    model.stack_of_stacks = nn.Parameter(torch.zeros(2, 3, 5, 7))
    model.norm = nn.LayerNorm([4, 5])
    model.bag = nn.EmbeddingBag(6, 5)
    model.wte = nn.Linear(6, 5, bias=False)
    model.spectrum = nn.Parameter(torch.zeros(4, 5, dtype=torch.complex64))
    model.matrix = nn.Parameter(torch.zeros(4, 5))
    assert went(param_groups(model)) == {
        "scalar": ("AdamW", "vector"),
        "vector": ("AdamW", "vector"),
        "class_token": ("AdamW", "vector"),
        "position_embed": ("AdamW", "embedding by name"),
        "relative_bias_table": ("AdamW", "bias"),
        "stack_of_stacks": ("AdamW", "more than 3-D"),
        "norm.weight": ("AdamW", "norm"),
        "norm.bias": ("AdamW", "norm"),
        "bag.weight": ("AdamW", "embedding"),
        "wte.weight": ("AdamW", "embedding by name"),
        "spectrum": ("AdamW", "complex"),
        "matrix": ("Muon", "matrix in Module"),
    }
    batched = param_groups(model, muon_options={"flatten": False})
    assert went(batched)["stack_of_stacks"] == ("Muon", "stack of matrices in Module")


def heads(model: nn.Module) -> list[str]:
    return [a.name for a in param_groups(model).assignments if a.reason == "output head"]


def linears(*shapes: tuple[int, int]) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(*shape, bias=False) for shape in shapes))


def test_output_heads() -> None:
    assert heads(nn.ModuleDict({"classifier": linears((9, 8), (8, 8), (8, 3))})) == ["classifier.2.weight"]
    each = nn.ModuleDict({"heads": nn.ModuleList([linears((8, 8), (8, 3)), nn.Linear(8, 5)])})
    assert heads(each) == ["heads.0.1.weight", "heads.1.weight"]
    # The name decides even where the head is registered first.
    first = nn.ModuleDict({"head": nn.Linear(8, 6), "tokens": nn.Embedding(6, 8), "out": nn.Linear(6, 6)})
    assert heads(first) == ["head.weight"]
    # By size only the last, and a table of positions is no reason against it.
    by_size = nn.ModuleDict({"tokens": nn.Embedding(6, 8), "positions": nn.Embedding(8, 8), "up": nn.Linear(8, 6)})
    by_size["mid"], by_size["logit_map"] = nn.Linear(8, 8), nn.Linear(8, 6)
    assert heads(by_size) == ["logit_map.weight"]
    # Nothing tells: the docstring says so, and a pattern decides.
    assert heads(linears((9, 8), (8, 3))) == []


def test_frozen_parameters_are_left_out_and_told() -> None:
    model = LanguageModel()
    model.layers[0].requires_grad_(False)
    groups = param_groups(model, muon=["layers.0.output.weight"])
    check_complete(model, groups)
    assert went(groups)["layers.0.output.weight"] == ("none", "frozen")
    assert went(groups)["layers.1.output.weight"] == ("Muon", "matrix in Linear")


def test_patterns() -> None:
    model = LanguageModel(tied=True)
    groups = param_groups(model, muon=["lm_head.weight"], adamw=["layers.*.experts", "layers.0.output.*"])
    check_complete(model, groups)
    told = went(groups)
    assert told["tokens.weight"] == ("Muon", "muon='lm_head.weight', tied with lm_head.weight")
    assert told["layers.1.experts"] == ("AdamW", "adamw='layers.*.experts'")
    assert told["layers.0.output.weight"] == ("AdamW", "adamw='layers.0.output.*'")
    assert told["layers.1.output.weight"] == ("Muon", "matrix in Linear")
    assert went(param_groups(model, adamw="*.experts")) == went(param_groups(model, adamw=["*.experts"]))


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"muon": ["*.router.weight"]}, r"muon='\*\.router\.weight' matches no parameter"),
        ({"adamw": ["Layers.*"]}, r"adamw='Layers\.\*' matches no parameter"),
        ({"muon": ["layers.*.bias"]}, r"muon='layers\.\*\.bias' matches layers\.0\.norm\.bias"),
        (
            {"muon": ["*.experts"], "adamw": ["layers.1.*"]},
            r"layers\.1\.experts is claimed by both muon='\*\.experts' and adamw='layers\.1\.\*'",
        ),
    ],
)
def test_pattern_errors(patterns: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        param_groups(LanguageModel(), **patterns)


def test_groups_work_with_torchs_optimizers() -> None:
    model = nn.ModuleDict({"hidden": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    muon, adamw = param_groups(model, muon_options={"lr": 0.02}, adamw_options={"lr": 3e-4, "betas": (0.9, 0.95)})
    optimizers = [torch.optim.Muon([muon]), torch.optim.AdamW([adamw])]
    assert optimizers[0].param_groups[0]["lr"] == 0.02
    assert optimizers[1].param_groups[0]["betas"] == (0.9, 0.95)
    model["head"](model["hidden"](torch.ones(1, 4))).sum().backward()
    before = copy.deepcopy(model.state_dict())
    for optimizer in optimizers:
        optimizer.step()
        assert optimizer.state_dict()["param_groups"][0]["param_names"]
    assert all(not torch.equal(before[name], p) for name, p in model.state_dict().items())


def test_a_side_may_stay_empty() -> None:
    muon, adamw = param_groups(nn.LayerNorm(4))
    assert muon["params"] == [] and len(adamw["params"]) == 2


def test_summary_names_every_parameter_and_adds_up() -> None:
    groups = param_groups(LanguageModel(tied=True))
    lines = str(groups).splitlines()
    assert lines[0].split() == ["parameter", "shape", "optimizer", "reason"]
    assert "layers.0.experts 3x8x16 Muon stack of matrices in Layer" in [" ".join(line.split()) for line in lines]
    for assignment, line in zip(groups.assignments, lines[1:], strict=False):
        assert line.startswith(assignment.name) and line.endswith(assignment.reason)
    count = {group["use_muon"]: (len(group["params"]), sum(p.numel() for p in group["params"])) for group in groups}
    assert lines[-2] == "Muon: {} parameters, {:,} elements".format(*count[True])
    assert lines[-1] == "AdamW: {} parameters, {:,} elements".format(*count[False])


def test_copies_keep_the_assignments() -> None:
    groups = param_groups(LanguageModel())
    for other in (copy.deepcopy(groups), pickle.loads(pickle.dumps(groups))):
        assert isinstance(other, ParamGroups) and str(other) == str(groups)


@pytest.mark.parametrize(
    "model", [[torch.ones(3, 4)], None, nn.Linear(3, 4).parameters()], ids=["list", "None", "parameters"]
)
def test_what_is_no_model(model: Any) -> None:
    with pytest.raises(
        TypeError, match=r"model should be an nn\.Module.* but is: (list|NoneType|generator); give Muon"
    ):
        param_groups(model)


@pytest.mark.parametrize("key", ["params", "param_names", "use_muon"])
def test_options_that_are_no_options(key: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=f"muon_options should hold options, but '{key}' is for param_groups to say"):
        param_groups(model, muon_options={key: []})
    with pytest.raises(TypeError, match="adamw_options should be a mapping of options but is: 3"):
        param_groups(model, adamw_options=3)  # type: ignore[arg-type]
