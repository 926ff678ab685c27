"""Which parameter goes to which optimizer, and that the groups work with torch's optimizers."""

import copy
import io
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from muon_kernels import Muon, MuonAdamW
from muon_kernels import rules as book
from muon_kernels.optimizers.assignments import ParamGroups
from muon_kernels.optimizers.param_groups import param_groups
from muon_kernels.rules import ROUTER, RULES, Place, Rule
from muon_kernels.split import blocks, check_split, equal, heads


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
    backwards = nested({"anything": nn.Linear(8, 6, bias=False), "tokens": nn.Embedding(6, 8), "last": nn.Linear(8, 8)})
    backwards.anything.weight = backwards.tokens.weight
    assert went(param_groups(backwards))["anything.weight"] == ("AdamW", "embedding, tied with tokens.weight")
    shared = nn.Sequential(linear := nn.Linear(4, 4, bias=False), nn.ReLU(), linear)
    assert went(param_groups(shared)) == {"0.weight": ("Muon", "matrix in Linear, tied with 2.weight")}


def test_convolutions() -> None:
    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(3, 8, 3),
            "batch_norm": nn.BatchNorm2d(8),
            "depthwise": nn.Conv2d(8, 8, 3, groups=8, bias=False),
            "grouped": nn.Conv2d(8, 8, 3, groups=2, bias=False),
            "audio": nn.Conv1d(8, 4, 3, bias=False),
            "volume": nn.ConvTranspose3d(2, 4, 3, bias=False),
            "pointwise": nn.Conv2d(1, 4, 1, bias=False),
            "fc": nn.Linear(8, 4, bias=False),
        }
    )
    groups = param_groups(model)
    check_complete(model, groups)
    assert went(groups) == {
        "conv.weight": ("AdamW", "stem or patch embedding"),
        "conv.bias": ("AdamW", "bias"),
        "batch_norm.weight": ("AdamW", "norm"),
        "batch_norm.bias": ("AdamW", "norm"),
        "depthwise.weight": ("AdamW", "depthwise convolution"),
        "grouped.weight": ("Muon", "flattened to a matrix in Conv2d"),
        "audio.weight": ("AdamW", "3-D convolution weight"),
        "volume.weight": ("Muon", "flattened to a matrix in ConvTranspose3d, transposed"),
        "pointwise.weight": ("AdamW", "vector"),
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
        "position_embed": ("AdamW", "position table"),
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


def output_heads(model: nn.Module) -> list[str]:
    return [a.name for a in param_groups(model).assignments if a.reason == "output head"]


def linears(*shapes: tuple[int, int]) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(*shape, bias=False) for shape in shapes))


def test_output_heads() -> None:
    assert output_heads(nn.ModuleDict({"classifier": linears((9, 8), (8, 8), (8, 3))})) == ["classifier.2.weight"]
    each = nn.ModuleDict({"heads": nn.ModuleList([linears((8, 8), (8, 3)), nn.Linear(8, 5)])})
    assert output_heads(each) == ["heads.0.1.weight", "heads.1.weight"]
    # The name decides even where the head is registered first.
    first = nn.ModuleDict({"head": nn.Linear(8, 6), "tokens": nn.Embedding(6, 8), "out": nn.Linear(6, 6)})
    assert output_heads(first) == ["head.weight"]
    # By size only the last, and a table of positions is no reason against it.
    by_size = nn.ModuleDict({"tokens": nn.Embedding(6, 8), "positions": nn.Embedding(8, 8), "up": nn.Linear(8, 6)})
    by_size["mid"], by_size["logit_map"] = nn.Linear(8, 8), nn.Linear(8, 6)
    assert output_heads(by_size) == ["logit_map.weight"]
    # Nothing tells: the docstring says so, and a pattern decides.
    assert output_heads(linears((9, 8), (8, 3))) == []


def nested(names: dict[str, nn.Module]) -> nn.Module:
    """A model with modules at dotted paths."""
    model = nn.Module()
    for path, module in names.items():
        at = model
        *above, last = path.split(".")
        for part in above:
            if part not in dict(at.named_children()):
                at.add_module(part, nn.Module())
            at = at.get_submodule(part)
        at.add_module(last, module)
    return model


@pytest.mark.parametrize(
    "path",
    [
        *("lm_head", "lm_head_a", "value_head", "score_head", "head_dist", "decode_head.classifier", "v_head.summary"),
        *("class_labels_classifier.layers.2", "bbox_predictor.layers.1", "cls.seq_relationship", "qa_outputs"),
        *("conv_out", "final_layer.linear", "classifier.1", "embed_out", "box_head.cls_score", "to_logits", "head.fc"),
    ],
)
@pytest.mark.parametrize("layer", [nn.Linear(8, 5), nn.Conv2d(8, 5, 1)], ids=["linear", "convolution"])
def test_heads_of_every_spelling(path: str, layer: nn.Module) -> None:
    """Also where a hidden matrix of the same head comes before it, and the model goes on after it."""
    prefix = path.rpartition(".")[0]
    before = {f"{prefix}.hidden": nn.Linear(8, 8)} if prefix and "layers" not in path else {}
    model = nested({"body": nn.Linear(8, 8), **before, path: layer, "after": nn.Linear(8, 8)})
    assert output_heads(model) == [f"{path}.weight"]


def test_heads_within_heads() -> None:
    """The certain ones decide, whatever else is registered, and in whatever order."""
    several = {"roi_heads.box.cls_score": nn.Linear(8, 5), "roi_heads.box.bbox_pred": nn.Linear(8, 9)}
    model = nested({**several, "roi_heads.fuse": nn.Conv2d(8, 8, 3)})
    assert output_heads(model) == ["roi_heads.box.cls_score.weight", "roi_heads.box.bbox_pred.weight"]
    modulated = nested({"final_layer.linear": nn.Linear(8, 5), "final_layer.adaLN_modulation": linears((8, 16))})
    assert output_heads(modulated) == ["final_layer.linear.weight"]
    hidden = nested({"head.pre_logits.fc": nn.Linear(8, 8), "head.fc": nn.Linear(8, 5)})
    assert output_heads(hidden) == ["head.fc.weight"]
    early = nested({"iou_prediction_head.proj_out": nn.Linear(8, 5), "iou_prediction_head.layers.0": nn.Linear(8, 8)})
    assert output_heads(early) == ["iou_prediction_head.proj_out.weight"]


@pytest.mark.parametrize(
    "modules",
    [
        {"cross_attention.attention.output.dense": nn.Linear(8, 8)},
        {"attn.output": nn.Linear(8, 8)},
        {"stage.se.fc": linears((8, 2), (2, 8))},
        {"mlp.fc": nn.Linear(8, 8)},
        {"head.dense": nn.Linear(8, 8), "head.norm": nn.LayerNorm(8)},
        {"layers.0.output": nn.Linear(8, 8)},
        {"conv_head": nn.Conv2d(8, 16, 1)},
        {"blocks.3.router.classifier": nn.Linear(8, 4)},
        {"tokens": nn.Embedding(60, 8), "embed_positions": nn.Embedding(34, 8), "fc2": nn.Linear(8, 34)},
    ],
    ids=lambda modules: list(modules)[-1],
)
def test_what_is_no_head(modules: dict[str, nn.Module]) -> None:
    assert output_heads(nested(modules)) == []


def bare(**parameters: torch.Tensor) -> nn.Module:
    model = nn.Module()
    for name, value in parameters.items():
        model.register_parameter(name, nn.Parameter(value))
    return model


def examples() -> dict[str, nn.Module]:
    """Something for every rule of the book to decide."""
    marked = bare(kernel=torch.zeros(4, 5))
    marked.kernel._no_weight_decay = True  # type: ignore[union-attr]
    xlnet = type("XLNetRelativeAttention", (nn.Module,), {})()
    xlnet.q = nn.Parameter(torch.zeros(8, 2, 4))
    return {
        "embedding": nn.Embedding(6, 8),
        "head": nn.Linear(8, 5, bias=False),
        "norm": nn.LayerNorm([4, 5]),
        "bias": bare(relative_bias_table=torch.zeros(9, 4)),
        "vector": bare(scale=torch.zeros(1, 1, 5)),
        "complex": bare(spectrum=torch.zeros(4, 5, dtype=torch.complex64)),
        "marked": marked,
        "stem": nn.Conv2d(8, 8, 3, bias=False),
        "first": nn.Conv2d(3, 8, 3, bias=False),
        "time_embedder": nn.Linear(8, 8, bias=False),
        "pos": bare(rel_pos_h=torch.zeros(7, 4)),
        "words": bare(word_emb=torch.zeros(7, 4)),
        "prompts": bare(soft_prompt=torch.zeros(7, 4)),
        "learned": bare(whatever=torch.zeros(1, 7, 4)),
        "ssm": bare(A_log=torch.zeros(8, 4)),
        "lora": bare(oft_R=torch.zeros(4, 6)),
        "orthogonal": parametrizations.orthogonal(nn.Linear(4, 4, bias=False)),
        "depthwise": nn.Conv2d(8, 8, 3, groups=8, bias=False),
        "audio": nn.Conv1d(8, 4, 3, bias=False),
        "stacks": bare(stack_of_stacks=torch.zeros(2, 3, 5, 7)),
        "rows": bare(stack_of_rows=torch.zeros(5, 1, 7)),
        "xlnet": xlnet,
        "gate": nn.Linear(8, 4, bias=False),
    }


@pytest.mark.parametrize("idle", RULES, ids=lambda rule: f"{rule.reason}-{RULES.index(rule)}")
def test_every_rule_decides_something(idle: Rule) -> None:
    """Without it the table is another, so none is there in vain; and it says why it is there."""
    model = nn.ModuleDict(examples())
    told = went(param_groups(model))
    without = went(param_groups(model, rules=[rule for rule in RULES if rule is not idle]))
    changed = {name for name in told if told[name] != without[name]}
    assert len(idle.why) > 10 and {told[name] for name in changed} == {(idle.optimizer, idle.reason)}


def test_the_book_on_its_examples() -> None:
    told = went(param_groups(nn.ModuleDict(examples())))
    assert {optimizer for name, (optimizer, _) in told.items() if name != "gate.weight"} == {"AdamW"}
    assert {reason for _, reason in told.values()} == {rule.reason for rule in RULES}


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        *[(name, (7, 8), "position table") for name in ("pos", "rel_pos_w", "abs_pos", "positional_encoding", "pe")],
        *[(name, (1, 7, 8), "position table") for name in ("pos_emb", "position_ids_table", "posenc")],
        *[(name, (7, 8), "learned tokens") for name in ("reg_token", "query_tokens", "latents", "codebook", "null_kv")],
        *[(name, (7, 8), "learned tokens") for name in ("memory_tokens", "soft_prompt", "object_queries", "slots")],
        *[(name, (8, 4), "state-space table") for name in ("A_log", "A_logs", "log_dt", "Ds", "time_faaaa")],
        *[(name, (8, 4), "embedding by name") for name in ("token_emb", "label_embs", "my_embedding")],
        ("anything", (1, 7, 8), "learned tokens"),
        ("anything", (7, 1, 8), "stack of vectors"),
        ("anything", (7, 8, 1), "stack of vectors"),
    ],
    ids=str,
)
def test_tables_are_no_matrices(name: str, shape: tuple[int, ...], reason: str) -> None:
    assert went(param_groups(bare(**{name: torch.zeros(shape)}))) == {name: ("AdamW", reason)}


@pytest.mark.parametrize(
    "path",
    [
        *("linear_pos", "pos_proj", "resnets.0.time_emb_proj", "token_mixer", "memory_proj", "queries", "dt_proj"),
        *(
            "text_embedder.layers.0.fc1",
            "patch_embed.backbone.stages.0.conv1",
            "composer",
            "decomposition",
            "gate_proj",
        ),
        *("layers.0.weight_pe_r.fc1", "system.latent_to_hidden"),
    ],
)
def test_layers_with_names_like_tables_are_matrices(path: str) -> None:
    assert went(param_groups(nested({path: nn.Linear(8, 8, bias=False)}))) == {
        f"{path}.weight": ("Muon", "matrix in Linear")
    }


def test_stems_and_patch_embeddings_are_judged_alike() -> None:
    """Whatever they are called; a convolution deeper down is hidden."""
    pixels = ("conv1", "features.0.0", "stem.0", "conv_stem", "patch_embed.proj", "embeddings.patch_embeddings")
    for path in pixels:
        model = nested({path: nn.Conv2d(3, 8, 4, bias=False), "layer1.conv1": nn.Conv2d(8, 8, 3, bias=False)})
        assert went(param_groups(model)) == {
            f"{path}.weight": ("AdamW", "stem or patch embedding"),
            "layer1.conv1.weight": ("Muon", "flattened to a matrix in Conv2d"),
        }
    stages = nested({f"stages.{i}.patch_embeddings.proj": nn.Conv2d(n, 8, 3, bias=False) for i, n in ((0, 3), (1, 8))})
    assert [a.optimizer for a in param_groups(stages).assignments] == ["AdamW", "Muon"]
    later = nested({"stem.conv2": nn.Conv2d(8, 8, 3, bias=False), "se.reduce": nn.Conv2d(8, 4, 1, bias=False)})
    later.se.expand = nn.Conv2d(4, 8, 1, bias=False)  # type: ignore[union-attr]
    assert [a.optimizer for a in param_groups(later).assignments] == ["AdamW", "Muon", "Muon"]


@pytest.mark.parametrize("mark", ["_no_weight_decay", "_no_reinit", "_optim"])
def test_marks_of_the_model(mark: str) -> None:
    model = bare(kernel=torch.zeros(4, 5), other=torch.zeros(4, 5))
    setattr(model.kernel, mark, {"lr": 0.001} if mark == "_optim" else True)
    setattr(model.other, mark, {} if mark == "_optim" else False)
    assert went(param_groups(model)) == {
        "kernel": ("AdamW", "marked by the model"),
        "other": ("Muon", "matrix in Module"),
    }


def test_parametrized_weights_are_judged_as_what_they_stand_for() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the older weight_norm
        model = nn.ModuleDict(
            {
                "new": parametrizations.weight_norm(nn.Linear(8, 6, bias=False)),
                "old": weight_norm(nn.Linear(8, 6, bias=False)),
                "spectral": parametrizations.spectral_norm(nn.Linear(8, 6, bias=False)),
                "old_spectral": spectral_norm(nn.Linear(8, 6, bias=False)),
                "rotation": parametrizations.orthogonal(nn.Linear(8, 8, bias=False)),
                "table": parametrizations.spectral_norm(nn.Embedding(9, 8)),
                "depthwise": parametrizations.weight_norm(nn.Conv2d(8, 8, 3, groups=8, bias=False)),
                "conv": parametrizations.weight_norm(nn.Conv1d(8, 8, 3, bias=False)),
                "gate": parametrizations.spectral_norm(nn.Linear(8, 4, bias=False)),
                "one_gain": parametrizations.weight_norm(nn.Linear(8, 6, bias=False), dim=None),
                "head": parametrizations.weight_norm(nn.Linear(8, 6, bias=False)),
                "classifier": weight_norm(nn.Linear(8, 6, bias=False)),
            }
        )
    vector, matrix = ("AdamW", "vector"), ("Muon", "matrix in ParametrizedLinear")
    head = ("AdamW", "output head")
    assert went(param_groups(model)) == {
        "new.parametrizations.weight.original0": vector,
        "new.parametrizations.weight.original1": matrix,
        "old.weight_g": vector,
        "old.weight_v": ("Muon", "matrix in Linear"),
        "spectral.parametrizations.weight.original": matrix,
        "old_spectral.weight_orig": ("Muon", "matrix in Linear"),
        "rotation.parametrizations.weight.original": ("AdamW", "rotation generator"),
        "table.parametrizations.weight.original": ("AdamW", "embedding"),
        "depthwise.parametrizations.weight.original0": vector,
        "depthwise.parametrizations.weight.original1": ("AdamW", "depthwise convolution"),
        "conv.parametrizations.weight.original0": vector,
        "conv.parametrizations.weight.original1": ("AdamW", "3-D convolution weight"),
        "gate.parametrizations.weight.original": ("Muon", "router"),
        "one_gain.parametrizations.weight.original0": vector,
        "one_gain.parametrizations.weight.original1": matrix,
        "head.parametrizations.weight.original0": vector,
        "head.parametrizations.weight.original1": head,
        "classifier.weight_g": vector,
        "classifier.weight_v": head,
    }


def test_routers_go_to_muon_or_where_one_says() -> None:
    routers = {"layers.0.mlp.gate": nn.Linear(8, 4, bias=False), "layers.0.moe.router.layer": nn.Linear(8, 4)}
    others = {"layers.0.mlp.gate_proj": (8, 4), "layers.0.attn.gate": (8, 4), "layers.0.unit.gate": (8, 8)}
    model = nested({**routers, **{path: nn.Linear(*shape, bias=False) for path, shape in others.items()}})
    router, matrix = ("Muon", "router"), ("Muon", "matrix in Linear")
    told = went(param_groups(model))
    assert {name: by for name, by in told.items() if not name.endswith("bias")} == {
        **{f"{path}.weight": router for path in routers},
        **{f"{path}.weight": matrix for path in others},
    }
    told = went(param_groups(model, rules=[ROUTER._replace(optimizer="AdamW"), *RULES]))
    assert told["layers.0.mlp.gate.weight"] == told["layers.0.moe.router.layer.weight"] == ("AdamW", "router")
    assert told["layers.0.mlp.gate_proj.weight"] == matrix
    assert went(param_groups(model, adamw="*.gate.weight"))["layers.0.mlp.gate.weight"][0] == "AdamW"


@pytest.mark.parametrize(
    ("rules", "error", "sentence"),
    [
        (Rule("knots"), TypeError, r"a list of them, \[rule, \*RULES\], but is one rule: 'knots'"),
        ([("x", "y")], TypeError, r"rules\[0\] should be a muon_kernels.rules.Rule but is: \('x', 'y'\)"),
        ([Rule("x", "Adam", name="x")], ValueError, r"rules\[0\].optimizer should be 'Muon' or 'AdamW' but is: 'Adam'"),
        ([*RULES[:1], Rule("x", name="*.knots")], ValueError, r"rules\[1\] should have regular expressions"),
    ],
    ids=["one", "tuple", "optimizer", "pattern"],
)
def test_what_is_no_rule(rules: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        param_groups(nn.Linear(3, 3), rules=rules)


def test_rules_of_ones_own() -> None:
    model = nested({"spline": bare(knots=torch.zeros(4, 5)), "embed": nn.Embedding(6, 5), "fc1": nn.Linear(5, 5)})
    knots = Rule("spline knots", name=r"\.knots$")
    rows = Rule("tokens by Muon", "Muon", layer="Embedding", when=lambda place: place.param.shape[0] == 6)
    told = went(param_groups(model, rules=(rule for rule in [knots, rows, *RULES])))
    assert told == went(param_groups(model, rules=[knots, rows, *RULES]))
    assert told["spline.knots"] == ("AdamW", "spline knots") and told["embed.weight"] == ("Muon", "tokens by Muon")
    assert went(param_groups(model))["spline.knots"] == ("Muon", "matrix in Module")
    # All conditions hold, and what the user says by name is heard first.
    assert not rows._replace(when=lambda place: False).holds(place_of(model, "embed.weight"))
    assert went(
        param_groups(model, adamw="fc1.*", rules=[Rule("all", "Muon", when=lambda p: p.param.ndim > 1), *RULES])
    )["fc1.weight"] == ("AdamW", "adamw='fc1.*'")
    with pytest.raises(ValueError, match=r"Muon takes parameters of 2 or more dimensions, but all matches fc1\.bias"):
        param_groups(model, rules=[Rule("all", "Muon")])


def place_of(model: nn.Module, name: str) -> Place:
    """What rules are asked of a parameter."""
    seen = {}
    param_groups(model, rules=[Rule("look", when=lambda place: bool(seen.update({place.full_name: place})))])
    return seen[name]


# ------------------------------------------------------------------------------------------------ flat and empty


@pytest.fixture
def process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("original", [False, True], ids=["flat", "use_orig_params"])
def test_fsdp1_is_refused(process_group: None, original: bool) -> None:
    model = FullyShardedDataParallel(linears((8, 8), (8, 8)), device_id=torch.device("cpu"), use_orig_params=original)
    with pytest.raises(ValueError, match=r"should be whole but FSDP1 has flattened it to size .*fully_shard"):
        param_groups(model)
    with pytest.raises(ValueError, match=r"should be whole but FSDP1 has flattened it to size .*fully_shard"):
        Muon(model.parameters())
    model.requires_grad_(False)
    assert {optimizer for optimizer, _ in went(param_groups(model)).values()} == {"none"}


def test_zero3_is_refused() -> None:
    layer = nn.Linear(16, 16)
    for p in layer.parameters():
        p.ds_shape, p.data = p.shape, torch.empty(0)  # what DeepSpeed leaves
    with pytest.raises(ValueError, match=r"^weight should be of size \(16, 16\) but ZeRO-3 leaves \(0,\).*fully_shard"):
        param_groups(layer)
    with pytest.raises(ValueError, match=r"parameter should be of size \(16, 16\) but ZeRO-3 leaves \(0,\)"):
        Muon([layer.weight])
    layer.weight.data, layer.bias.data = torch.zeros(16, 16), torch.zeros(16)  # while they are gathered
    assert went(param_groups(layer))["weight"] == ("Muon", "matrix in Linear")


def test_what_has_no_size() -> None:
    layer = nn.Linear(4, 4)
    layer.weight.data = torch.zeros(9)
    with pytest.raises(ValueError, match=r"weight should be a matrix, as the weight of Linear is, but has size \(9,\)"):
        param_groups(layer)
    with pytest.raises(ValueError, match="weight should have a size but is not made yet"):
        param_groups(nn.LazyLinear(4))
    with pytest.warns(UserWarning, match=r"weight of size \(4, 0\) has no elements") as caught:
        groups = param_groups(nn.Linear(0, 4))
    (ours,) = (warning for warning in caught if "no elements" in str(warning.message))
    assert ours.filename == __file__ and went(groups)["weight"][0] == "Muon"


# ------------------------------------------------------------------------------------------------ classes that are lost


class Words(nn.Embedding):
    """By no name an embedding."""


class Scripted(nn.Module):
    def __init__(self, words: type[nn.Embedding] = Words, groups: int = 4) -> None:
        super().__init__()
        self.words = words(4, 8)
        self.mix = nn.Conv2d(4, 4, 3, padding=1, groups=groups)
        self.sound = nn.Conv1d(8, 8, 1)
        self.grow = nn.ConvTranspose2d(4, 4, 1)
        self.score = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 4)])
        self.fc1 = nn.Linear(8, 8, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.fc1(self.words(tokens))
        x = self.sound(self.grow(self.mix(x))[0].mT).mT
        for layer in self.score:
            x = layer(x[..., :8])
        return x


TOKENS = torch.zeros(4, 8, dtype=torch.int64)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripts_are_judged_as_what_they_were_made_of() -> None:
    expected = went(param_groups(Scripted(), split="auto"))
    assert expected["words.weight"] == ("AdamW", "embedding") and expected["mix.weight"][1] == "depthwise convolution"
    assert expected["grow.weight"] == ("Muon", "flattened to a matrix in ConvTranspose2d, transposed")
    scripted = torch.jit.script(Scripted())
    torch.jit.save(scripted, file := io.BytesIO())
    file.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for model in (scripted, torch.jit.load(file)):
            assert went(param_groups(model, split="auto")) == expected
        traced = went(param_groups(torch.jit.trace(Scripted(), TOKENS), adamw="mix.weight", muon="grow.weight"))
    assert {name for name in expected if traced[name] != expected[name]} == {"mix.weight", "grow.weight"}


def local() -> type[nn.Embedding]:
    """A class that no import finds."""

    class Own(nn.Embedding):
        pass

    return Own


def exported() -> nn.Module:
    module: nn.Module = torch.export.export(Scripted(), (TOKENS,)).module()
    return module


LOST: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "trace": (lambda: torch.jit.trace(Scripted(), TOKENS), "mix.weight, grow.weight"),
    "script": (lambda: torch.jit.script(Scripted(local())), "words.weight"),
    "export": (exported, "words.weight, score.0.weight, fc1.weight"),
    "unflattened": (
        lambda: torch.export.unflatten(torch.export.export(Scripted(), (TOKENS,))),
        "words.weight, score.0.weight, fc1.weight",
    ),
    "of many layers": (
        lambda: torch.export.export(linears(*[(8, 8)] * 4), (torch.ones(8),)).module(),
        "0.weight, 1.weight, 2.weight, ...",
    ),
    "fx": (lambda: torch.fx.symbolic_trace(Scripted()), "words.weight"),
    "of one layer": (lambda: torch.export.export(Words(4, 8), (TOKENS,)).module(), "weight"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("how", LOST)
def test_layers_that_have_lost_their_classes(how: str) -> None:
    make, names = LOST[how]
    model = make()
    with pytest.warns(
        UserWarning, match=rf"layers have lost the classes .* leave them: {re.escape(names)}; call param_groups"
    ) as caught:
        groups = param_groups(model)
    (ours,) = (warning for warning in caught if "lost the classes" in str(warning.message))
    assert ours.filename == __file__
    lost = [name for name, (_, reason) in went(groups).items() if " of unknown class" in reason]
    assert ", ".join([*lost[:3], *["..."] * (len(lost) > 3)]) == names
    # Who says where they go has no need of the warning.
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        param_groups(model, muon=lost[1:], adamw=lost[:1])
        for p in model.parameters():
            p.requires_grad_(False)
        param_groups(model)


# ------------------------------------------------------------------------------------------------ what layers hold


def cuts(groups: ParamGroups) -> dict[str, str]:
    """What Muon is told, and that the table tells the same."""
    told = {name: cut for group in groups.muon for name, cut in group.get("split", {}).items()}
    assert told == {
        a.name: a.reason.partition("split: ")[2].partition(", tied")[0]
        for a in groups.assignments
        if "split: " in a.reason
    }
    return told


def test_split_auto_cuts_torchs_own_layers() -> None:
    model = nn.ModuleDict(
        {
            "attention": nn.MultiheadAttention(8, 2),
            "lstm": nn.LSTM(8, 8, bidirectional=True),
            "gru": nn.GRUCell(8, 8),
            "rnn": nn.RNN(8, 8),
            "grouped": nn.Conv2d(8, 16, 3, groups=2),
            "up": nn.ConvTranspose2d(8, 16, 3, groups=4),
            "conv": nn.Conv2d(8, 8, 3),
        }
    )
    gates = [f"lstm.weight_{of}_l0{way}" for way in ("", "_reverse") for of in ("ih", "hh")]
    expected = {
        "attention.in_proj_weight": equal(3),
        **dict.fromkeys(gates, equal(4)),
        "gru.weight_ih": equal(3),
        "gru.weight_hh": equal(3),
        "grouped.weight": equal(2),
        "up.weight": equal(4),
    }
    assert cuts(param_groups(model, split="auto")) == expected
    assert "split" not in param_groups(model)[0]
    # Muon takes them, and steps the parts: 8 of 8x8 for the LSTM and direction, 6, 3 and so on.
    shapes = {b.shape: b.count for b in MuonAdamW(param_groups(model, split="auto")).plan().buckets}
    assert shapes[8, 8] == 3 + 1 + 16 + 6 + 2 and shapes[8, 36] == 2 and shapes[2, 36] == 4
    # The user's word counts, and "auto" is a cut as well.
    said = {"attention.in_proj_weight": heads(6), "lstm.*": "auto"}
    assert cuts(param_groups(model, split=said)) == {
        "attention.in_proj_weight": heads(6),
        **dict.fromkeys(gates, equal(4)),
    }
    both = cuts(param_groups(model, split={"*": "auto", "gru.*_hh": blocks(8, 16)}))
    assert both == {**expected, "gru.weight_hh": blocks(8, 16)}
    # A convolution that is not flattened is another stack of matrices.
    plain = cuts(param_groups(model, split="auto", muon_options={"flatten": False}))
    assert plain == {name: cut for name, cut in expected.items() if "grouped" not in name and "up" not in name}


def test_the_cuts_are_where_the_layer_cuts() -> None:
    """Queries, keys and values of attention, and the gates of an LSTM: what each part alone computes."""
    attention = nn.MultiheadAttention(8, 2, bias=False)
    x = torch.randn(5, 8)
    parts = attention.in_proj_weight.chunk(3)
    mine = (
        nn.functional.scaled_dot_product_attention(*((x @ w.T).reshape(5, 2, 4).transpose(0, 1) for w in parts))
        .transpose(0, 1)
        .reshape(5, 8)
        @ attention.out_proj.weight.T
    )
    torch.testing.assert_close(attention(x, x, x)[0], mine)


def library(package: str, name: str, **parameters: torch.Tensor) -> nn.Module:
    """A layer as a library has it."""
    module = type(name, (nn.Module,), {"__module__": package})()
    for key, value in parameters.items():
        module.register_parameter(key, nn.Parameter(value))
    return module  # type: ignore[no-any-return]


def test_weights_that_lie_the_other_way() -> None:
    lie = {
        "c_fc": library("transformers.pytorch_utils", "Conv1D", weight=torch.zeros(8, 32), bias=torch.zeros(32)),
        "up": nn.ConvTranspose2d(8, 16, 2),
        "gpt_oss": library(
            "transformers.x", "GptOssExperts", gate_up_proj=torch.zeros(4, 8, 24), down_proj=torch.zeros(4, 12, 8)
        ),
    }
    upright = {
        "mixtral": library(
            "transformers.y", "MixtralExperts", gate_up_proj=torch.zeros(4, 24, 8), down_proj=torch.zeros(4, 8, 12)
        ),
        "linear": nn.Linear(8, 32),
        "Conv1D": library("my.layers", "Conv1D", weight=torch.zeros(8, 32)),
    }
    groups = param_groups(nn.ModuleDict({**lie, **upright}), split="auto")
    turned = ["c_fc.weight", "up.weight", "gpt_oss.gate_up_proj", "gpt_oss.down_proj"]
    assert sorted(groups[0]["transposed"]) == sorted(turned)
    assert sorted(turned) == sorted(a.name for a in groups.assignments if ", transposed" in a.reason)
    assert cuts(groups) == {
        "gpt_oss.gate_up_proj": blocks(1, 1, interleaved=True, dim=1),
        "mixtral.gate_up_proj": equal(2),
    }
    MuonAdamW(groups)
    # Nothing is said where nothing lies so, and the user's word counts.
    assert "transposed" not in param_groups(nn.ModuleDict(upright))[0]
    assert param_groups(nn.ModuleDict(lie), muon_options={"transposed": False})[0]["transposed"] is False


def test_a_transposed_weight_moves_as_torchs_linear_does() -> None:
    """c_fc, (8, 32) for 8 inputs, gets the factor of an nn.Linear of 32 outputs from torch.optim.Muon."""
    torch.manual_seed(0)
    linear = nn.Linear(8, 32, bias=False)
    conv1d = library("transformers.pytorch_utils", "Conv1D", weight=linear.weight.detach().T.clone())
    start = linear.weight.detach().clone()
    linear.weight.grad = torch.randn(32, 8)
    conv1d.weight.grad = linear.weight.grad.T.clone()
    torch.optim.Muon(param_groups(linear).muon, lr=0.1).step()
    Muon(param_groups(conv1d).muon, lr=0.1).step()
    torch.testing.assert_close(conv1d.weight.T - start, linear.weight - start, rtol=0, atol=5e-3)
    assert (linear.weight - start).norm() > 0.1


def test_the_table_of_layers_is_well_formed() -> None:
    """Its cuts are cuts, no entry is there twice or says nothing; tests/integrations has the libraries' layers."""
    for layer in book.LAYERS:
        assert layer.split is not None or layer.transposed, layer
        if isinstance(layer.split, str):
            check_split(layer.split)
    assert len(set(book.LAYERS)) == len(book.LAYERS)


# ------------------------------------------------------------------------------------------------ lr and decay by name


def test_decay_and_learning_rate_by_name() -> None:
    model = LanguageModel()
    groups = param_groups(
        model,
        lr={"layers.0.*": "0.5x", "*.experts": 0.3},
        weight_decay={"*.bias": 0.0, "*norm*": 0, "layers.1.output.weight": 0.25},
        muon_options={"lr": 0.02},
        adamw_options={"lr": 0.001, "betas": (0.9, 0.95)},
    )
    named = dict(model.named_parameters())
    seen = {}
    for group in groups:
        assert group["use_muon"] or group["betas"] == (0.9, 0.95)
        assert [id(p) for p in group["params"]] == [id(named[name]) for name in group["param_names"]]
        for name in group["param_names"]:
            seen[name] = group["use_muon"], group["lr"], group.get("weight_decay")
    assert sorted(seen) == sorted(named)
    for name, (muon, lr, decay) in seen.items():
        base = 0.02 if muon else 0.001
        expected = base / 2 if name.startswith("layers.0.") else 0.3 if name.endswith("experts") else base
        assert lr == pytest.approx(expected, rel=1e-12), name
        plain = name.endswith(".bias") or "norm" in name
        assert decay == (0.0 if plain else 0.25 if name == "layers.1.output.weight" else None), name
    # The halves in order, each with the group first that has nothing of its own.
    assert [group["use_muon"] for group in groups] == [True] * len(groups.muon) + [False] * len(groups.adamw)
    assert groups.muon[0]["lr"] == 0.02 and "weight_decay" not in groups.muon[0]
    told = went(groups)
    assert told["layers.0.norm.bias"] == ("AdamW", "norm, lr 0.0005, weight_decay 0")
    assert told["layers.1.experts"] == ("Muon", "stack of matrices in Layer, lr 0.3")
    optimizer = MuonAdamW(groups)
    assert [group["lr"] for group in optimizer.param_groups] == [group["lr"] for group in groups]
    torch.optim.Muon([g for g in param_groups(linears((8, 8)), lr={"*": 0.3}).muon])
    torch.optim.AdamW(groups.adamw)


def test_a_half_without_a_plain_parameter() -> None:
    """Still two groups to unpack where all of a half have the same of their own."""
    muon, adamw = param_groups(LanguageModel(), weight_decay={"*": 0.5})
    assert muon["use_muon"] and muon["weight_decay"] == adamw["weight_decay"] == 0.5 and not adamw["use_muon"]
    muon, adamw = param_groups(nn.LayerNorm(4), weight_decay={"*": 0.5})
    assert muon == {"params": [], "param_names": [], "use_muon": True} and adamw["weight_decay"] == 0.5


def test_a_decay_by_name_is_torchs() -> None:
    """Biases and norms without decay: the same parameters after a step of AdamW with groups by hand."""
    torch.manual_seed(0)
    model = LanguageModel()
    other = copy.deepcopy(model)
    groups = param_groups(model, weight_decay={"*bias": 0.0, "*norm*": 0.0})
    _, plain = param_groups(other)
    apart = [name.endswith("bias") or "norm" in name for name in plain["param_names"]]
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    torch.optim.AdamW(groups.adamw, lr=0.1, weight_decay=0.5).step()
    decayed = [p for p, out in zip(plain["params"], apart, strict=True) if not out]
    rest = [p for p, out in zip(plain["params"], apart, strict=True) if out]
    torch.optim.AdamW([{"params": decayed}, {"params": rest, "weight_decay": 0.0}], lr=0.1, weight_decay=0.5).step()
    assert decayed and rest
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": {"*.bias": "0.5"}}, ValueError, r"lr\['\*\.bias'\] should be a number or a multiple such as '0\.5x'"),
        ({"lr": {"*.bias": "2x"}}, ValueError, r"lr\['\*\.bias'\] is a multiple, so adamw_options should hold lr"),
        ({"lr": {"*.bias": -1.0}}, ValueError, r"lr\['\*\.bias'\] should be >= 0 but is: -1"),
        ({"lr": 0.1}, TypeError, "lr should be a mapping of patterns to numbers but is: 0.1"),
        ({"weight_decay": {"*.bias": "2x"}}, TypeError, r"weight_decay\['\*\.bias'\] should be a number but is: '2x'"),
        ({"weight_decay": {"*.bais": 0.0}}, ValueError, r"weight_decay='\*\.bais' matches no parameter"),
        ({"weight_decay": 0.0}, TypeError, "weight_decay should be a mapping of patterns to numbers but is: 0.0"),
        ({"split": "thirds"}, TypeError, "split should be a mapping of patterns to cuts but is: 'thirds'"),
    ],
    ids=str,
)
def test_errors_of_what_goes_by_name(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        param_groups(LanguageModel(), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"muon": ["*.absent"]},
        {"adamw": "*.absent"},
        {"split": {"*.absent": equal(2)}},
        {"split": {"*.bias": equal(2)}},
        {"lr": {"*.absent": 0.1}},
        {"weight_decay": {"*.absent": 0.1}},
    ],
    ids=str,
)
def test_patterns_that_a_stage_lacks(options: dict[str, Any]) -> None:
    """The first stage of a pipeline has an embedding and a norm, and the patterns are for the whole model."""
    stage = nn.ModuleDict({"tokens": nn.Embedding(8, 8), "norm": nn.LayerNorm(8)})
    with pytest.raises(
        ValueError,
        match=r"matches no parameter of the model, which missing_ok=True allows|goes to Muon .*; missing_ok=True",
    ):
        param_groups(stage, **options)
    groups = param_groups(stage, missing_ok=True, **options)
    assert went(groups) == went(param_groups(stage))
    MuonAdamW(groups)


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


def unfolded(text: str) -> list[str]:
    """The names that a name of the table stands for."""
    parts = []
    for part in re.split(r"\.(?!\.)(?<!\.\.)", text):
        runs = [run.partition("..") for run in part.split(",")]
        numbers = (
            [str(i) for first, _, last in runs for i in range(int(first), int(last or first) + 1)]
            if part[0].isdigit()
            else [part]
        )
        parts.append(numbers)
    return [".".join(name) for name in product(*parts)]


def mixture() -> nn.Module:
    """Layers 0 and 3 are dense; the last has fewer experts than others; 1 is frozen; 4 and 5 have a tied weight."""
    layers = nn.ModuleList()
    for i in range(6):
        experts = nn.ModuleList(nn.Linear(8, 16) for _ in range(3 if i == 5 else 4))
        layers.append(nn.ModuleDict({"norm": nn.LayerNorm(8), "mlp": nn.Linear(8, 24) if i in (0, 3) else experts}))
    layers[1].requires_grad_(False)
    layers[5]["mlp"][0].weight = layers[4]["mlp"][0].weight  # type: ignore[index,union-attr]
    return nn.ModuleDict(
        {
            "tokens": nn.Embedding(9, 8),
            "layers": layers,
            "ff": nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)),
        }
    )


@pytest.mark.parametrize(
    "make", [lambda: LanguageModel(tied=True), mixture, lambda: linears((8, 8))], ids=["tied", "mixture", "one"]
)
def test_summary_names_every_parameter_and_adds_up(make: Callable[[], nn.Module]) -> None:
    """Each on one line, with what is said of it, and equal layers together."""
    groups = param_groups(make())
    lines = re.sub(r"\n +", " ", str(groups)).splitlines()  # a long reason goes on
    assert lines[0].split() == ["parameter", "shape", "optimizer", "reason"]
    *rows, muon = [line for line in lines[1:] if not line.startswith(("AdamW:", "none:"))]
    told = {}
    for row in rows:
        name, shape, optimizer, reason = re.split(r" {2,}", row)
        names = unfolded(name)
        count, _, shape = shape.rpartition(" x ")
        assert len(names) == int(count or 1)
        told.update({name: (shape, optimizer, reason) for name in names})
    assert told == {a.name: ("x".join(map(str, a.shape)), a.optimizer, a.reason) for a in groups.assignments}
    for half, text in ((groups.muon, muon), (groups.adamw, next((t for t in lines if t.startswith("AdamW:")), ""))):
        params = [p for group in half for p in group["params"]]
        assert (
            not params
            or text.split(": ")[1] == f"{len(params)} parameters, {sum(p.numel() for p in params):,} elements"
        )


def test_equal_layers_are_one_line() -> None:
    lines = [" ".join(line.split()) for line in str(param_groups(mixture())).splitlines()]
    for line in (
        "layers.0,2..5.norm.weight 5 x 8 AdamW norm",
        "layers.1.norm.weight 8 none frozen",
        "layers.0,3.mlp.weight 2 x 24x8 Muon matrix in Linear",
        "layers.2.mlp.0..3.weight 4 x 16x8 Muon matrix in Linear",
        "layers.4.mlp.0.weight 16x8 Muon matrix in Linear, tied with layers.5.mlp.0.weight",
        "layers.4.mlp.1..3.weight 3 x 16x8 Muon matrix in Linear",
        "layers.2,4.mlp.0..3.bias 8 x 16 AdamW bias",
        "ff.0,2.weight 2 x 8x8 Muon matrix in Linear",
    ):
        assert line in lines
    assert len(str(param_groups(linears(*[(8, 8)] * 96))).splitlines()) == 3
    alternating = linears(*[(8, 8 if i % 3 else 16) for i in range(30)])
    assert [line.split()[0] for line in str(param_groups(alternating)).splitlines()[1:3]] == [
        "0,3,...,27.weight",
        "1..2,4..5,...,28..29.weight",
    ]
    others = [
        [nn.Linear(8, 8, bias=False) if i in at else nn.ReLU() for i in range(11)]
        for at in ({0, 2, 4, 6, 10}, {0, 2, 4, 8, 10})
    ]
    lines = str(param_groups(nn.Sequential(*(nn.Sequential(*layers) for layers in others)))).splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["0.0,2,...,10.weight", "1.0,2,...,10.weight"]


def test_the_table_is_readable_in_100_columns() -> None:
    deep = {
        f"vision_tower.transformer.encoder_of_patches.layers.{i}.attention.projection": nn.Linear(8, 8, bias=False)
        for i in range(3)
    }
    groups = param_groups(nested({"fc1": nn.Linear(8, 8), **deep}), split={"*.projection.weight": blocks(*[1] * 8)})
    lines = str(groups).splitlines()
    at = lines.index("vision_tower.transformer.encoder_of_patches.layers.0..2.attention.projection.weight")
    margin = lines[0].index("reason")
    assert lines[at + 1].split() == ["3", "x", "8x8", "Muon", "matrix", "in", "Linear,", "split:"]
    assert lines[at + 1].index("matrix") == margin and lines[at + 2] == " " * margin + "blocks(1, 1, 1, 1, 1, 1,"
    assert max(map(len, lines)) <= 100 and lines[1].startswith("fc1.weight  ")
    assert str(ParamGroups([], [])).split() == ["parameter", "shape", "optimizer", "reason"]
    assert "fc1.weight  8x8    Muon" in str(
        param_groups(nested({"fc1": nn.Linear(8, 8)}), rules=[Rule("", "Muon", name="weight")])
    )


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"adamw_options": {"lr": 0.1, "ns_steps": 5}},
            r"options of AdamW but have 'ns_steps'; it is Muon's: put it into muon_options$",
        ),
        ({"muon_options": {"amsgrad": True}}, r"of Muon but have 'amsgrad'; it is AdamW's: put it into adamw_options$"),
        ({"adamw_options": {"beta2": 0.9}}, r"it is Muon's: put it into muon_options, or did you mean 'betas'\?"),
        ({"muon_options": {"momentun": 0.9}}, r"options of Muon but have 'momentun'; did you mean 'momentum'\?"),
        ({"adamw_options": {"wd": 0.0}}, r"options of AdamW but have 'wd'; did you mean 'weight_decay'\?"),
        ({"muon_options": {"name": "hidden"}}, r"have 'name'; put a key of your own into the groups that you get"),
        (
            {"muon_options": {"process_group": None}},
            r"'process_group' is for a whole optimizer: give it to Muon, or in",
        ),
    ],
    ids=str,
)
def test_options_of_the_other_half(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        param_groups(LanguageModel(), **options)


def test_every_option_of_a_group_is_one_here() -> None:
    """What either optimizer writes into its groups may be said of them before."""
    model = LanguageModel()
    own = {"params", "param_names", "use_muon", "decoupled_weight_decay"}
    muon, adamw = (
        {key: v for key, v in g.items() if key not in own} for g in MuonAdamW(param_groups(model)).param_groups
    )
    again = MuonAdamW(param_groups(model, muon_options=muon, adamw_options=adamw))
    assert [group.keys() for group in again.param_groups] == [
        g.keys() for g in MuonAdamW(param_groups(model)).param_groups
    ]
