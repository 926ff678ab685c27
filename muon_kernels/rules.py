r"""The rules of `param_groups`: which parameters go to which optimizer, and how known layers hold their weights.

They are data, to be read from top to bottom and to be extended:

- RULES, one `Rule` a line. A parameter goes where the first rule that holds sends it; without one, to Muon. Rules of
  your own come first:

      from muon_kernels.rules import ROUTER, RULES, Rule

      spline = Rule("spline knots", name=r"\.knots$", why="rows are points, and no map multiplies them")
      param_groups(model, rules=[spline, *RULES])
      param_groups(model, rules=[ROUTER._replace(optimizer="AdamW"), *RULES])  # routers to AdamW

- HEADS, the names that tell an output head.
- LAYERS, one `Layer` a line: weights that hold several matrices, with the split that `split="auto"` takes, and weights
  that are stored as (inputs, outputs), so that Muon is told that they are `transposed`.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from .layout import flattens
from .split import blocks, equal, pieces, qkv

__all__ = [
    "HEADS",
    "LAYERS",
    "ROUTER",
    "RULES",
    "Heads",
    "Layer",
    "Place",
    "Rule",
    "class_of",
    "is_unknown",
    "known_layers",
]


def class_of(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module; of a script or a trace, the class that it was made of.

    If no module that has been imported has that class, returns one of its name that inherits from nn.Module alone.
    """
    if not isinstance(module, torch.jit.ScriptModule):
        return type(module)
    path = _path(module)
    return _imported(path) or type(path[-1], (nn.Module,), {})


def _path(script: Any) -> list[str]:
    """Return module and name of the class that a script was made of.

    torch calls it, for example, `__torch__.torch.nn.modules.sparse.Embedding`.
    """
    parts = script._c._type().qualified_name().split(".")[1:]
    return [part for part in parts if not part.startswith("___torch_mangle_")]


def _imported(path: list[str]) -> type[nn.Module] | None:
    found = getattr(sys.modules.get(".".join(path[:-1]) or "__main__"), path[-1], None)
    return found if isinstance(found, type) and issubclass(found, nn.Module) else None


def is_unknown(place: Place) -> bool:
    """Whether a tool has taken from a parameter's layer its class, or from a convolution its settings."""
    module = place.module
    if isinstance(module, torch.jit.ScriptModule):
        return _imported(_path(module)) is None or (_convolves(place) and not hasattr(module, "groups"))
    bare = type(module) is nn.Module and any(isinstance(layer, torch.fx.GraphModule) for layer in place.layers)
    return bare or isinstance(module, torch.fx.GraphModule) or type(module).__module__.startswith("torch.export.")


class Place(NamedTuple):
    """A parameter at one place where it is registered: the subject of rules.

    Attributes:
        name: full name. That of a parametrized weight is the weight's: `fc.weight` and not
            `fc.parametrizations.weight.original1`.
        param: the parameter.
        layers: the modules that it is in, from the model to the layer that it belongs to.
        head: whether it is the last matrix of an output head, see HEADS.
        flatten: the option of Muon.
        full_name: the name that `named_parameters` gives it.
    """

    name: str
    param: nn.Parameter
    layers: tuple[nn.Module, ...]
    head: bool
    flatten: bool | None
    full_name: str

    @property
    def module(self) -> nn.Module:
        """The layer that the parameter belongs to."""
        return self.layers[-1]

    @property
    def leaf(self) -> str:
        """The last part of the name."""
        return self.name.rpartition(".")[2]


class Rule(NamedTuple):
    """A rule that sends parameters to an optimizer. All conditions that it gives have to hold.

    Attributes:
        reason: the words in the table for such a parameter.
        optimizer: "AdamW" or "Muon".
        name: regular expression to be found in `Place.name`.
        layer: regular expression to be found in the name of the layer's class or of a class that it inherits from.
        when: function of a `Place`, for what names do not tell.
        why: the reason at length, for readers of the rules.
    """

    reason: str
    optimizer: str = "AdamW"
    name: str | None = None
    layer: str | None = None
    when: Callable[[Place], bool] | None = None
    why: str = ""

    def holds(self, place: Place) -> bool:
        """Whether the rule applies to this parameter."""
        return (
            (self.name is None or re.search(self.name, place.name) is not None)
            and (
                self.layer is None or any(re.search(self.layer, cls.__name__) for cls in class_of(place.module).__mro__)
            )
            and (self.when is None or self.when(place))
        )


# ------------------------------------------------------------------------------------------------ what rules ask

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_TRANSPOSED_CONVOLUTIONS = CONVOLUTIONS[3:]
_MULTIPLIES = re.compile(r"(?i)linear|conv|dense|proj")


def is_vector(place: Place) -> bool:
    """Whether all elements of a parameter are along one dimension, as those of (1, 1, 768) are."""
    return place.param.numel() == max(place.param.shape, default=1)


def is_table(place: Place) -> bool:
    """Whether a parameter is not the weight of a linear layer or a convolution."""
    return place.leaf != "weight" or not any(_MULTIPLIES.search(cls.__name__) for cls in class_of(place.module).__mro__)


def _convolves(place: Place, kinds: tuple[type[nn.Module], ...] = CONVOLUTIONS) -> bool:
    return issubclass(class_of(place.module), kinds)


def _is_depthwise(place: Place) -> bool:
    module: Any = place.module
    return _convolves(place) and 1 < getattr(module, "groups", 1) == module.in_channels  # a trace has no groups


def _reads_pixels(place: Place) -> bool:
    module: Any = place.module
    return (
        _convolves(place)
        and not _convolves(place, _TRANSPOSED_CONVOLUTIONS)
        and getattr(module, "in_channels", math.inf) <= 4
        and module.groups == 1
        and max(module.kernel_size) > 1
    )


_MARKS = ("_no_weight_decay", "_no_reinit", "_optim")


def _is_marked(place: Place) -> bool:
    return any(getattr(place.param, mark, False) for mark in _MARKS)


def _is_generator(place: Place) -> bool:
    lists: Any = getattr(place.module, "parametrizations", {})
    return place.leaf in lists and any("Orthogonal" in type(by).__name__ for by in lists[place.leaf])


def _is_learned_rows(place: Place) -> bool:
    shape = place.param.shape
    return len(shape) > 2 and shape[0] == 1 and is_table(place)


def _is_stack_of_vectors(place: Place) -> bool:
    shape = place.param.shape
    return len(shape) > 2 and not flattens(shape, place.flatten) and 1 in shape[-2:]


def _is_batch_of_filters(place: Place) -> bool:
    return place.param.ndim == 3 and not place.flatten and _convolves(place)


def _is_of_more_dimensions(place: Place) -> bool:
    return place.param.ndim > 3 and place.flatten is None and not _convolves(place)


def _is_for_einsum(place: Place) -> bool:
    return place.param.ndim == 3 and not place.flatten


def _is_wide(place: Place) -> bool:
    return place.param.ndim == 2 and place.param.shape[0] < place.param.shape[1]


def _word(*words: str) -> str:
    """Return a pattern for a word in the last part of a name, or in the part before where the last is `weight`."""
    return rf"(?i)(?<![a-z])(?:{'|'.join(words)})(?![a-z])[^.]*(?:\.weight)?$"


# A numbered layer inside a module that is called an embedding is still a layer, as in
# `text_embedder.layers.0.mlp.fc1.weight`; and the beginning of a numbered stage is no stem.
_LAYER = r"\b(?:layers?|blocks?|stages?|resblocks|h)\.\d"

# ------------------------------------------------------------------------------------------------ rules

EMBEDDING = Rule(
    "embedding",
    layer=r"^Embedding(Bag)?$",
    why="A row is the vector of one token, and a step sees few of them. An output head tied to it is one too.",
)

NORM = Rule("norm", layer=r"(?i)norm(\dd|gated)?$", why="Gains and biases of a normalisation, whatever their shape.")

ROUTER = Rule(
    "router",
    "Muon",
    name=r"(?i)(?<!attn\.)(?<!attention\.)(?<![a-z])(?:router|gate)(?![a-z_])(?:\.\w+)?\.weight$",
    when=_is_wide,
    why="A hidden matrix, experts by width, multiplied like any other: Moonlight and GLM-4.5 train it with Muon. "
    'Others give it to AdamW, as a classifier of tokens: put `ROUTER._replace(optimizer="AdamW")` first in `rules`, or '
    'say adamw="*.gate.weight".',
)

RULES: tuple[Rule, ...] = (
    EMBEDDING,
    Rule(
        "output head",
        when=lambda place: place.head,
        why="Its rows are classes, whose gradients differ in size by frequency, which orthogonalizing would undo.",
    ),
    NORM,
    Rule("bias", name=r"bias[^.]*$", why="Added, not multiplied; tables of relative position biases among them."),
    Rule("vector", when=is_vector, why="Has one singular value: orthogonalized, only its direction is left."),
    Rule("complex", when=lambda place: place.param.is_complex(), why="The iteration is of real matrices."),
    Rule(
        "marked by the model",
        when=_is_marked,
        why="`_no_weight_decay`, `_no_reinit` and `_optim` are how state-space models mark what is trained otherwise.",
    ),
    Rule(
        "stem or patch embedding",
        name=rf"(?i)^(?!.*{_LAYER})(?:.*[._])?(?:stem|patchify|patch_?embed\w*|to_patch\w*|conv_in|conv_first)(?![a-z])",
        why="The first layer, which reads pixels or patches as an embedding reads tokens. Muon is for hidden layers.",
    ),
    Rule(
        "stem or patch embedding",
        when=_reads_pixels,
        why="The same, of any name: a convolution over more than one pixel of at most four channels.",
    ),
    Rule(
        "position table",
        name=_word("(?:rel_?|abs_?)?pos(?:_?(?:emb|enc))?", r"(?:rel|abs)?_?position(?:s|al)?\w*", "pe"),
        when=is_table,
        why="A row is the vector of one position. A linear layer on positions, as `linear_pos`, is a matrix.",
    ),
    Rule(
        "embedding by name",
        name=rf"(?<!patch_)(?<!patch)embed(?!.*{_LAYER})|\bw[tp]e\b",
        why="Embeddings that are no nn.Embedding, of time steps, classes, images.",
    ),
    Rule(
        "embedding by name",
        name=_word("embs?"),
        when=is_table,
        why="The same, abbreviated; `time_emb_proj` of a residual block is a linear layer, and hidden.",
    ),
    Rule(
        "learned tokens",
        name=_word(
            *("tokens?", "latents?", "prompts?", "queries", "registers?", "slots?", "memory", "memories", "anchors?"),
            *("codebooks?", "codevectors?", "prototypes?", "centroids?", "inducing_points?", r"null_\w+"),
        ),
        when=is_table,
        why="A row is a vector that is looked up, attended to or compared with: nothing is multiplied by the whole.",
    ),
    Rule(
        "learned tokens",
        when=_is_learned_rows,
        why="The same, of any name: what broadcasts over a batch is stored as (1, n, d).",
    ),
    Rule(
        "state-space table",
        name=r"(?:^|[._])(?:A_logs?|log_A_real|A_real|A_imag|(?:log_|inv_)?dt|Ds?|"
        r"time_(?:decay|first|faaaa|mi?x_?\w*|maa\w*))$",
        when=is_table,
        why="Rates of decay and steps of time, channel by state, each used by itself.",
    ),
    Rule(
        "rotation generator",
        name=r"(?<![a-z])b?oft_R(?![a-z])",
        why="peft's OFT holds a skew-symmetric matrix by its upper triangle.",
    ),
    Rule(
        "rotation generator",
        when=_is_generator,
        why="torch's orthogonal parametrization: a matrix exponential or reflections are made of it.",
    ),
    Rule("depthwise convolution", when=_is_depthwise, why="One small filter per channel is no matrix."),
    Rule(
        "3-D convolution weight",
        when=_is_batch_of_filters,
        why="Muon reads three dimensions as a stack of matrices, unless it is told to flatten them.",
    ),
    Rule(
        "more than 3-D",
        when=_is_of_more_dimensions,
        why="Muon would flatten it like a convolution, but which of its dimensions are outputs nothing tells.",
    ),
    Rule("stack of vectors", when=_is_stack_of_vectors, why="Each of its matrices has one singular value."),
    Rule(
        "einsum weight",
        layer="^XLNetRelativeAttention$",
        when=_is_for_einsum,
        why="(width, heads, head width) is one matrix, but looks like a stack of matrices to Muon.",
    ),
    ROUTER,
)

# ------------------------------------------------------------------------------------------------ output heads


class Heads(NamedTuple):
    """Names that tell an output head: regular expressions for whole parts of a path, outside of numbered layers.

    Attributes:
        ends: modules that end in an output head: a module of such a name inside another one, or else their last matrix,
            unless a norm follows it.
        heads: modules whose last matrix is an output head. Inside a module of `ends` they count, and its last matrix
            not.
        never: modules that have none of `ends` below them.
        beside: parts of a head that are not its last matrix, whatever their order.
        positions: to be found in the names of embeddings whose number of rows is no number of classes.
    """

    ends: re.Pattern[str]
    heads: re.Pattern[str]
    never: re.Pattern[str]
    beside: re.Pattern[str]
    positions: re.Pattern[str]


HEADS = Heads(
    ends=re.compile(
        r"(?!conv_)(?:\w+_)?heads?(?:_?[a-z0-9]|_dist)?|fc|output|output_(?:layer|projection)|score|(?:\w+_)?pred|\w+_predictor|"
        r"conv_out|proj_out|to_rgb|final_(?:layer|conv|proj|linear)|last_layer"
    ),
    heads=re.compile(
        r"(?:\w+_)?lm_head(?:_\w+)?|(?:\w+_)?classifier(?:_\w+)?|(?!pre_)(?:\w+_)?logits|cls_score|bbox_pred|embed_out|"
        r"unembed(?:ding)?|qa_outputs|seq_relationship|vocab_projector|conv_seg|head_dist"
    ),
    never=re.compile(r"(?i)(?:\w+_)?(?:attn|se|squeeze\w*|mlp|ffn)(?:_\w+)?|\w*attention"),
    beside=re.compile(r"(?i)adaln\w*|\w*modulation"),
    positions=re.compile(r"(?i)(?<![a-z])(?:pos|w?pe(?![a-z]))"),
)

# ------------------------------------------------------------------------------------------------ known layers


class Layer(NamedTuple):
    """A library's layer and how it holds one of its weights.

    Attributes:
        package: package or module of the class.
        layer: regular expression for the whole name of the class or of one that it inherits from.
        weight: regular expression for the whole name of the parameter below that layer.
        split: the split that `split="auto"` takes, None for none; or a function of the layer that returns it.
        transposed: whether it is stored as (inputs, outputs), or a function of the layer that returns this.
    """

    package: str
    layer: str
    weight: str
    split: str | Callable[[Any], str | None] | None = None
    transposed: bool | Callable[[Any], bool] = False

    def names(self, cls: type) -> bool:
        """Whether the entry is about this class."""
        inside = f"{cls.__module__}.".startswith(f"{self.package}.")
        return inside and re.fullmatch(self.layer, cls.__name__) is not None


def _experts_lie_turned(experts: Any) -> bool:
    """Whether gate_up_proj is (experts, width, 2 · inner), so that down_proj is (experts, inner, width)."""
    (_, rows, cols), (_, down_rows, down_cols) = experts.gate_up_proj.shape, experts.down_proj.shape
    return bool(cols == 2 * down_rows and rows == down_cols)


def _gate_and_up(experts: Any) -> str:
    """Return the split of fused gate and up projections.

    GPT-OSS's columns alternate; all others' halves follow one another.
    """
    dim = int(_experts_lie_turned(experts))
    if getattr(experts, "is_concatenated", not type(experts).__name__.startswith("GptOss")):
        return equal(2, dim=dim)
    return blocks(1, 1, interleaved=True, dim=dim)


def _falcon(attention: Any) -> str:
    return qkv(attention.num_heads, attention.num_kv_heads, interleaved=attention.num_kv_heads > 1)


def _delta_net(m: Any) -> str:
    values = m.num_v_heads // m.num_k_heads * m.head_v_dim
    return blocks(m.head_k_dim, m.head_k_dim, values, values, interleaved=True)


def _levit(attention: Any) -> str:
    return blocks(attention.key_dim, attention.key_dim, attention.val_dim, interleaved=True)


# Queries, keys and values become a matrix each, and so do gates, as if they were separate layers. Keller Jordan found
# that better than fused. Heads stay together: on single heads reports disagree.
LAYERS: tuple[Layer, ...] = (
    Layer("torch", "MultiheadAttention", "in_proj_weight", equal(3)),
    Layer("torch", "LSTM(Cell)?", r"weight_[ih]h(_l\d+(_reverse)?)?", equal(4)),
    Layer("torch", "GRU(Cell)?", r"weight_[ih]h(_l\d+(_reverse)?)?", equal(3)),
    Layer("torch", r"Conv(Transpose)?[23]d", "weight", lambda m: equal(m.groups) if m.groups > 1 else None),
    Layer("torch", r"ConvTranspose\dd", "weight", transposed=True),
    Layer("transformers", "Conv1D", "weight", transposed=True),
    # GPT-2 and models built like it. In cross-attention, c_attn holds keys and values.
    Layer(
        "transformers",
        "(GPT2|DecisionTransformerGPT2|ImageGPT)Attention",
        r"c_attn\.weight",
        lambda m: equal(2 if m.is_cross_attention else 3, dim=1),
    ),
    Layer(
        "transformers",
        "GPTBigCodeAttention",
        r"c_attn\.weight",
        lambda m: None if m.is_cross_attention else qkv(m.num_heads, m.kv_heads, interleaved=m.kv_heads > 1),
    ),
    Layer(
        "transformers",
        "(Phi3|Phi4Multimodal)Attention",
        r"qkv_proj\.weight",
        lambda m: qkv(m.config.num_attention_heads, m.num_key_value_heads),
    ),
    Layer("transformers", "DbrxAttention", r"Wqkv\.weight", lambda m: qkv(m.num_heads, m.num_key_value_heads)),
    Layer("transformers", "(Mpt|ModernBert)Attention", r"Wqkv\.weight", equal(3)),
    Layer(
        "transformers",
        "GPTNeoXAttention",
        r"query_key_value\.weight",
        lambda m: qkv(m.config.num_attention_heads, interleaved=True),
    ),
    Layer(
        "transformers",
        "(Bloom|Persimmon)Attention",
        r"query_key_value\.weight",
        lambda m: qkv(m.num_heads, interleaved=True),
    ),
    Layer("transformers", "FalconAttention", r"query_key_value\.weight", _falcon),
    Layer("transformers", r"(Blip|Blip2|Sam)\w*Attention|(Qwen\w*)?VisionAttention", r"qkv\.weight", equal(3)),
    Layer("transformers", r"\w*MLP", r"gate_up_proj\.weight", equal(2)),
    Layer("transformers", "ModernBertMLP", r"Wi\.weight", equal(2)),
    Layer("transformers", r"\w*Experts", "gate_up_proj", _gate_and_up, _experts_lie_turned),
    Layer("transformers", r"\w*Experts", "down_proj", transposed=_experts_lie_turned),
    # Latent attention: the latent and the shared rotary key; the rotated and the other rows of each head; its key and
    # its value.
    Layer(
        "transformers",
        r"DeepseekV\d+Attention",
        r"kv_a_proj_with_mqa\.weight",
        lambda m: blocks(m.kv_lora_rank, m.qk_rope_head_dim),
    ),
    Layer(
        "transformers",
        r"DeepseekV\d+Attention",
        r"kv_b_proj\.weight",
        lambda m: blocks(m.qk_nope_head_dim, m.v_head_dim, interleaved=True),
    ),
    Layer(
        "transformers",
        r"DeepseekV\d+Attention",
        r"q(_b)?_proj\.weight",
        lambda m: blocks(m.qk_nope_head_dim, m.qk_rope_head_dim, interleaved=True),
    ),
    # Queries, keys, values and gates are ordered by groups of heads.
    Layer("transformers", "Qwen3NextGatedDeltaNet", r"in_proj_qkvz\.weight", _delta_net),
    Layer(
        "transformers",
        "Qwen3NextAttention",
        r"q_proj\.weight",
        lambda m: blocks(m.head_dim, m.head_dim, interleaved=True),
    ),
    # State-space models: states and gate; time steps, and the maps B and C.
    Layer("transformers", "(Falcon|Jamba)?MambaMixer", r"in_proj\.weight", equal(2)),
    Layer(
        "transformers",
        "(Falcon|Jamba)?MambaMixer",
        r"x_proj\.weight",
        lambda m: blocks(m.time_step_rank, m.ssm_state_size, m.ssm_state_size),
    ),
    Layer("timm.layers.attention", r"Attention(Rope)?", r"qkv\.weight", equal(3)),
    Layer("timm.models.swin_transformer", "WindowAttention", r"qkv\.weight", equal(3)),
    Layer("timm.models.beit", "Attention", r"qkv\.weight", equal(3)),
    Layer("timm.models.eva", "EvaAttention", r"qkv\.weight", equal(3)),
    Layer("timm.models.xcit", "XCA", r"qkv\.weight", equal(3)),
    Layer("timm.models.cait", "TalkingHeadAttn", r"qkv\.weight", equal(3)),
    Layer("timm.models.levit", "Attention", r"qkv\.(linear|conv)\.weight", _levit),
    Layer(
        "timm.models.levit",
        "AttentionDownsample",
        r"kv\.(linear|conv)\.weight",
        lambda m: blocks(m.key_dim, m.val_dim, interleaved=True),
    ),
    Layer("timm.models.tiny_vit", "Attention", r"qkv\.weight", _levit),
    Layer("timm.models.efficientformer", "Attention", r"qkv\.weight", _levit),
)


def known_layers(place: Place) -> list[tuple[str | None, bool]]:
    """Return (split, transposed) of each entry of LAYERS that applies to a parameter."""
    parts = place.name.split(".")
    found = []
    for depth, module in enumerate(place.layers):
        weight = ".".join(parts[depth:])
        for layer in LAYERS:
            if re.fullmatch(layer.weight, weight) and any(layer.names(cls) for cls in class_of(module).__mro__):
                found.append((_split_of(layer, module, place), _lies_turned(layer, module)))
    return found


def _lies_turned(layer: Layer, module: nn.Module) -> bool:
    return layer.transposed(module) if callable(layer.transposed) else layer.transposed


def _split_of(layer: Layer, module: nn.Module, place: Place) -> str | None:
    """Return the split of a layer's weight.

    Returns None if the parameter does not fit it, or is not read as the layer means it.
    """
    try:
        split = layer.split(module) if callable(layer.split) else layer.split
        pieces(place.param.shape, None, split)
    except (AttributeError, ValueError):  # another version of the library
        return None
    return split if flattens(place.param.shape, place.flatten) == flattens(place.param.shape, None) else None
