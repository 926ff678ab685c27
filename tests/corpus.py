"""Records what every optimizer does with every option, or compares it with what was recorded: for moving code.

    python tests/corpus.py record FILE             before a change that must change no bit of any result
    python tests/corpus.py compare FILE            after it, on the same machine
    python tests/corpus.py compare FILE TEXT       the cases alone in whose names TEXT is: to look at one of them again

`compare` prints the cases that differ, with the tensors and the step where that begins, those that are missing and
those that are new, and returns 1 if there are any. Bits depend on the machine, by its instruction sets and by the
products that torch has for it, so the file is not committed. Cases are recorded by instruction set, and those of one
that this processor has not are counted as not stepped here. OMP_NUM_THREADS is how many threads a step has where ranks
do not share it, 2 if it is not set; what it changes, a plan, is to be compared with as many.

A case is an optimizer with some options, over a model, in a layout. It makes three steps, saves, loads into a new
optimizer and makes two more. Its entry has the plan, a hash of every parameter and of all state after each step, the
options and the state of the checkpoint, and the type and text of the error where it ends with one.

There are the defaults over every model, every option alone with each of its values, and the pairs of options of an
optimizer, each with its first value that is not the default. So that it takes some minutes on two cores,

- options alone, in one process, are stepped on every instruction set and on "eager"; all else on "eager" and on one
  instruction set, which the case's name draws;
- one in so many of the rest is kept, which its name draws too: `pairs` of them in one process, and `alone` of the
  options alone on several ranks, as the table of optimizers says.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import math
import operator
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

# Threads that spin for each other stand still when something else has the core; see conftest.py.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.distributed as dist
from distributed.ranks import world
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from muon_kernels import Muon, MuonAdamW, SpectralAdam, SpectralMomentum, paper_optimizer
from muon_kernels.backends import cpu
from muon_kernels.distributed import ZeroMuon, ZeroMuonAdamW

# ------------------------------------------------------------------------------------------------------------- options


class Option(NamedTuple):
    """An option of any optimizer that has one of that name.

    Attributes:
        values: to step with; pairs take the first that is not the default.
        wrong: a value that raises.
        model: over which it can show.
        beside: other options without which it does nothing.
    """

    values: Sequence[Any]
    wrong: Any
    model: str = "fp32"
    beside: Mapping[str, Any] = {}


SWITCH = True, False
SETS = "polar_express", "you5", "you6", "gram_newton_schulz", "cans", "cubic5", "deepseek_v4", "aol", "keller"
CUTS = "equal(2)", "heads(4, dim=1)", "qkv(2, 1)", "blocks(1, 1, interleaved=True)"
CUTS_BY_NAME = {"wide": "blocks(2, 6)", "t*": "qkv(4, 2, interleaved=True)"}
TRIPLES = [(4.0, -6.9, 2.9), (2.8, -3.1, 1.2)]
BLOCKS = {"strategy": "blocks"}

OPTIONS: dict[str, Option] = {
    # Muon's, in its order; most others have theirs of it.
    "lr": Option([0.001, torch.tensor(0.3)], -1.0),
    "weight_decay": Option([0.5, 0.0], math.nan),
    "momentum": Option([0.5, 0.0], math.inf),
    "nesterov": Option(SWITCH, 1),
    "ns_coefficients": Option([*SETS, (2.0, -1.5, 0.5), TRIPLES], "kelle", beside={"power": 0.0}),
    "eps": Option([0.5, 1e-12], 5.0, model="edges"),
    "ns_steps": Option([3, None], 0, beside={"power": 0.0}),
    "adjust_lr_fn": Option(
        ["match_rms_adamw", "original", "spectral", "spectral_unclamped", "none", operator.truediv], "adam"
    ),
    "use_addmm": Option(SWITCH, None),
    "dampened": Option(SWITCH, "no"),
    "flatten": Option(SWITCH, 2),
    "split": Option([*CUTS, CUTS_BY_NAME], "equal(0)"),
    "transposed": Option([True, ["t*", "W1"]], "tall", beside={"adjust_lr_fn": "spectral"}),
    "ns_algorithm": Option(["gram", "standard"], "gramm"),
    "backend": Option([], "gpu"),  # see VARIANTS
    "max_workspace_bytes": Option([64_000, 1 << 30], 1000),
    "workspace_dtype": Option([torch.float16, "bfloat16"], torch.float32),
    "momentum_dtype": Option([torch.int8, "bfloat16", "float16", "float32", "float64"], "bf16"),
    "maximize": Option(SWITCH, 0),
    "power": Option([0.5, 0.25, 0.3, 1.0, 0.0], 2.0),
    "weight_decay_form": Option(["scheduled", "independent", "decoupled"], "coupled", beside={"peak_lr": 0.2}),
    "peak_lr": Option([0.2, torch.tensor(0.1)], 0.0, beside={"weight_decay_form": "scheduled"}),
    "cautious": Option(SWITCH, None, beside={"weight_decay": 0.5}),
    "stochastic_rounding": Option(SWITCH, None, model="bf16"),
    "sign_momentum": Option(SWITCH, None),
    "master_weights": Option(SWITCH, None, model="bf16"),
    "second_moment": Option(["neuron", "element"], "row"),
    "exact_rms": Option(SWITCH, None),
    "beta2": Option([0.5, 0.99], 1.0, beside={"second_moment": "neuron"}),
    "strategy": Option(["blocks", "gram", "owner"], "nobody"),
    "block_period": Option([2, 1], 0, beside=BLOCKS),
    "block_lr_ratio": Option([0.5, 2.0], -1.0, beside=BLOCKS),
    # AdamW's beside.
    "betas": Option([(0.5, 0.9), (0.0, 0.99)], (0.9,)),
    "amsgrad": Option(SWITCH, None),
    "foreach": Option(SWITCH, 1),
    "fused": Option([False, True], 1),
    "capturable": Option(SWITCH, None),
    "differentiable": Option(SWITCH, None),
}


class Kind(NamedTuple):
    """An optimizer.

    Attributes:
        make: from groups of parameters and options.
        halves: of its options: the argument of `make` that a half's go to, or "", and whose signature has them.
        layouts: in which it can be, those of one process first.
        vectors: whether it takes any parameter, not matrices alone.
        thinned: where options are Muon's, one in so many cases is kept; see above.
    """

    make: Callable[..., Optimizer]
    halves: Mapping[str, Callable[..., Optimizer]]
    layouts: Sequence[str]
    vectors: bool = False
    thinned: int = 1


OPTIMIZERS: dict[str, Kind] = {
    "Muon": Kind(Muon, {"": Muon}, ["alone", "group", "fsdp"]),
    "SpectralMomentum": Kind(SpectralMomentum, {"": SpectralMomentum}, ["alone", "group", "fsdp"], thinned=4),
    "SpectralAdam": Kind(SpectralAdam, {"": SpectralAdam}, ["alone", "fsdp"], vectors=True),
    "MuonAdamW": Kind(
        MuonAdamW,
        {"muon_options": Muon, "adamw_options": torch.optim.AdamW},
        ["alone", "group", "fsdp"],
        vectors=True,
        thinned=4,
    ),
    "ZeroMuon": Kind(ZeroMuon, {"": ZeroMuon}, ["group"]),
    "ZeroMuonAdamW": Kind(
        ZeroMuonAdamW,
        {"muon_options": ZeroMuon, "adamw_options": torch.optim.AdamW},
        ["group"],
        vectors=True,
        thinned=8,
    ),
}
# Not options, or of a layout.
ARGUMENTS = {"params", "process_group", "muon_options", "adamw_options", "misplaced"}


def defaults(kind: Kind) -> dict[str, Any]:
    """Options of an optimizer and their defaults, those of a half of it as "half.option"."""
    found: dict[str, Any] = {}
    for half, of in kind.halves.items():
        for name, parameter in inspect.signature(of).parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD and name == "muon_options":
                found = {**defaults(OPTIMIZERS["Muon"]), **found}
            elif name not in ARGUMENTS:
                found[f"{half}.{name}" if half else name] = parameter.default
    return found


def row(name: str) -> Option:
    """The table's row for an option, which may be of a half."""
    return OPTIONS[name.rpartition(".")[2]]


# -------------------------------------------------------------------------------------------------------------- models

# Nine that are equal but for their orientation and strides, so that one call steps all, and fewer where a gradient is
# missing; one whose rows are padded in the workspace; one with int8 blocks that end in a row; a convolution.
MATRICES = {
    "stack": (6, 24, 40),
    "W1": (24, 40),
    "W2": (40, 24),
    "strided": (24, 40),
    "wide": (8, 512),
    "tall": (96, 40),
    "conv": (8, 4, 3, 3),
}
VECTORS = {"bias": (40,), "scale": (1,), "embedding": (16, 6)}
EDGES = {"row": (1, 7), "column": (5, 1), "no rows": (0, 8), "no matrices": (0, 4, 4)}
# What multiplies the gradient of some parameters.
SCALES = {"zero": 0.0, "tiny": 1e-25, "huge": 1e25, "nan": math.nan}


def normal(shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, Tensor]:
    """Random numbers of these sizes."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


def matrices() -> dict[str, Tensor]:
    """Of many shapes."""
    return {**normal(MATRICES, 1), "strided": normal({"": (24, 80)}, 2)[""][:, ::2]}


def halves() -> dict[str, Tensor]:
    """Every other in another dtype."""
    return {name: t.bfloat16() if i % 2 else t for i, (name, t) in enumerate(matrices().items())}


def edges() -> dict[str, Tensor]:
    """Sizes and gradients that there rarely are."""
    return normal({**EDGES, **dict.fromkeys(SCALES, (6, 8)), "negative": (6, 8)}, 3)


def strides() -> dict[str, Tensor]:
    """Memory in many orders."""
    whole = normal({"turned": (24, 16), "last": (8, 4, 3, 3), "both": (32, 24), "stack": (4, 10, 6)}, 4)
    return {
        "turned": whole["turned"].T,
        "channels last": whole["last"].contiguous(memory_format=torch.channels_last),
        "even rows": whole["both"][::2],
        "odd rows": whole["both"][1::2],
        "turned stack": whole["stack"].permute(2, 0, 1),
    }


def cast(dtype: torch.dtype) -> Callable[[], dict[str, Tensor]]:
    """The matrices in another dtype."""
    return lambda: {name: t.to(dtype) for name, t in matrices().items()}


MODELS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "fp32": matrices,
    "bf16": cast(torch.bfloat16),
    "fp16": cast(torch.float16),
    "fp64": cast(torch.float64),
    "two dtypes": halves,
    "edges": edges,
    "strides": strides,
    "three groups": matrices,
    "no names": matrices,
}


def gradient(name: str, p: Tensor, number: int, step: int, seed: int) -> Tensor | None:
    """One of a parameter, with the rows of some in columns; of four parameters one has none in a step."""
    if (number + step) % 4 == 0:
        return None
    generator = torch.Generator().manual_seed(1000 * step + 100 * seed + number)
    found = (torch.randn(p.shape, generator=generator) * SCALES.get(name, 1.0)).to(p.dtype)
    if name in ("W2", "tall"):
        found = found.T.contiguous().T
    if isinstance(p, DTensor):
        return distribute_tensor(found, p.device_mesh, p.placements, src_data_rank=None)
    return found


# ------------------------------------------------------------------------------------------------------------- layouts


def plain(tensors: dict[str, Tensor]) -> dict[str, nn.Parameter]:
    """Whole parameters."""
    return {name: nn.Parameter(t) for name, t in tensors.items()}


def sharded(tensors: dict[str, Tensor]) -> dict[str, nn.Parameter]:
    """FSDP2's, rows cut: evenly for most with two ranks, and for few with three."""
    module = nn.Module()
    for name, t in tensors.items():
        module.register_parameter(name, nn.Parameter(t.contiguous()))
    return dict(fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),))).named_parameters())


class Layout(NamedTuple):
    """Where parameters are: on how many ranks, how they are made there, and whether all are copies."""

    ranks: Sequence[int]
    place: Callable[[dict[str, Tensor]], dict[str, nn.Parameter]]
    copies: bool = False


LAYOUTS: dict[str, Layout] = {
    "alone": Layout([1], plain),
    "group": Layout([1, 2, 3], plain, copies=True),
    "fsdp": Layout([1, 2, 3], sharded),
}

# --------------------------------------------------------------------------------------------------------------- cases

INSTRUCTION_SETS = "avx2", "avx512", "avx512bf16", "amx"
# What steps: the "cpu" backend with an instruction set, or another backend.
VARIANTS = [*INSTRUCTION_SETS, "eager"]


class Case(NamedTuple):
    """What is stepped."""

    optimizer: str
    layout: str
    ranks: int
    model: str
    options: dict[str, Any]
    variants: Sequence[str]

    @property
    def name(self) -> str:
        """In words."""
        options = ", ".join(f"{key}={written(value)}" for key, value in self.options.items())
        ranks = f" of {self.ranks}" if self.ranks > 1 else ""
        return f"{self.optimizer}, {self.layout}{ranks}, {self.model}: {options or 'defaults'}"


def written(value: Any) -> str:
    """A value as text that has no address in it."""
    return value.__qualname__ if callable(value) else repr(value)


def drawn(name: str, one_in: int) -> int:
    """A number below `one_in`, the same for a name in all runs, which other cases do not change."""
    return zlib.crc32(name.encode()) % one_in


def differs(value: Any, default: Any) -> bool:
    """Whether an option's value is another than its default."""
    return isinstance(value, Tensor) or value != default


def beside(name: str, kind: Kind) -> dict[str, Any]:
    """The options that an option needs, as far as the optimizer has them."""
    half, dot, _ = name.rpartition(".")
    return {half + dot + key: value for key, value in row(name).beside.items() if half + dot + key in defaults(kind)}


def cases() -> Iterator[Case]:
    """All, in order."""
    for optimizer, kind in OPTIMIZERS.items():
        options = defaults(kind)
        for layout in kind.layouts:
            for ranks in LAYOUTS[layout].ranks:
                alone = ranks == 1 and layout == kind.layouts[0]
                for model, given in singles(kind, options):
                    case = Case(optimizer, layout, ranks, model, given, VARIANTS if given else [*VARIANTS, "auto"])
                    if alone and kind.thinned == 1:
                        yield case
                    elif alone:
                        yield case._replace(variants=two(case))
                    elif not given or not drawn(case.name, kind.thinned):
                        yield case._replace(variants=[VARIANTS[drawn(case.name, len(VARIANTS))]])
        for model, given in pairs(kind, options):
            case = Case(optimizer, kind.layouts[0], 1, model, given, [])
            if not drawn(case.name, kind.thinned):
                yield case._replace(variants=two(case))
        for name in options:
            yield Case(optimizer, kind.layouts[0], 1, "fp32", {name: row(name).wrong}, ["eager"])


def singles(kind: Kind, options: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The defaults over every model, and every option alone over its own."""
    for model in MODELS:
        yield model, {}
    for name in options:
        for value in row(name).values:
            yield row(name).model, {**beside(name, kind), name: value}


def pairs(kind: Kind, options: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every two options, each with its first value that is not the default; the second's model, if it has its own."""
    first = {}
    for name, default in options.items():
        others = [value for value in row(name).values if differs(value, default)]
        if others:
            first[name] = others[0]
    for a, b in combinations(first, 2):
        if a in beside(b, kind) or b in beside(a, kind):
            continue  # the one alone has the other
        model = row(a).model if row(b).model == "fp32" else row(b).model
        yield model, {**beside(a, kind), **beside(b, kind), a: first[a], b: first[b]}


def two(case: Case) -> list[str]:
    """Of the variants, an instruction set and "eager"."""
    return [INSTRUCTION_SETS[drawn(case.name, len(INSTRUCTION_SETS))], "eager"]


# --------------------------------------------------------------------------------------------------------------- steps


def made(case: Case, params: Mapping[str, nn.Parameter], variant: str) -> Optimizer:
    """The optimizer of a case, over parameters that exist."""
    kind, arguments = OPTIMIZERS[case.optimizer], {half: {} for half in OPTIMIZERS[case.optimizer].halves}
    for half, of in kind.halves.items():
        arguments[half]["lr"] = 0.05  # so that bf16 parameters move
        if of is not torch.optim.AdamW:
            arguments[half]["backend"] = "cpu" if variant in INSTRUCTION_SETS else variant
    if LAYOUTS[case.layout].copies:
        arguments[next(iter(kind.halves))]["process_group"] = dist.group.WORLD
    for name, value in case.options.items():
        half, _, option = name.rpartition(".")
        arguments[half][option] = value
    return kind.make(groups(case, params), **arguments.pop("", {}), **arguments)


def groups(case: Case, params: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
    """Matrices in one group, or in three of which the first and the last have the same options; vectors in another."""
    named = lambda names: [params[name] if case.model == "no names" else (name, params[name]) for name in names]
    matrices = [name for name in params if name not in VECTORS]
    found = [{"params": named(matrices)}]
    if case.model == "three groups":
        found = [{"params": named(matrices[i::3])} for i in range(3)]
        found[1] |= {"lr": 0.02, "weight_decay": 0.3}
    if OPTIMIZERS[case.optimizer].vectors:
        found.append({"params": named(VECTORS)})
    if case.optimizer.endswith("MuonAdamW"):
        for i, group in enumerate(found):
            group["use_muon"] = i + 1 < len(found)
    return found


def entry(case: Case, variant: str) -> dict[str, str]:
    """What a case does, as texts by what they are of."""
    found: dict[str, str] = {}
    try:
        stepped(case, variant, found)
    except Exception as error:  # whatever it is, it should be the same
        found["error"] = f"{type(error).__name__}: {error}"
    return found


def stepped(case: Case, variant: str, found: dict[str, str]) -> None:
    """Step a case and write down what it does."""
    tensors = {**MODELS[case.model](), **(normal(VECTORS, 5) if OPTIMIZERS[case.optimizer].vectors else {})}
    params = LAYOUTS[case.layout].place(tensors)
    # Those of ZeRO-1 average the gradients of their ranks.
    seed = dist.get_rank() if case.optimizer.startswith("Zero") else 0
    optimizer = made(case, params, variant)
    if hasattr(optimizer, "plan"):
        found["plan"] = str(optimizer.plan())
    for step in range(1, 6):
        for number, (name, p) in enumerate(params.items()):
            p.grad = gradient(name, p, number + seed, step, seed)
        optimizer.step()
        for name, p in params.items():
            found[f"step {step}: {name}"] = hashed(p)
            for key, value in optimizer.state.get(p, {}).items():
                found[f"step {step}: {name}.{key}"] = hashed(value)
        if step == 3:
            checkpoint = copy.deepcopy(optimizer.state_dict())
            found |= described(checkpoint)
            optimizer = made(case, params, variant)
            optimizer.load_state_dict(checkpoint)


def hashed(value: Any) -> str:
    """Of the bytes of a tensor, or of this rank's part of it."""
    if not isinstance(value, Tensor):
        return repr(value)
    local = value.to_local() if isinstance(value, DTensor) else value
    numbers = local.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(numbers.tobytes()).hexdigest()[:16]


def described(checkpoint: Mapping[str, Any]) -> dict[str, str]:
    """The options that a checkpoint has, and the dtype and size of its state."""
    found = {}
    for i, group in enumerate(checkpoint["param_groups"]):
        found[f"checkpoint: group {i}"] = ", ".join(f"{key}={written(group[key])}" for key in sorted(group))
    for i, state in checkpoint["state"].items():
        for key, value in state.items():
            text = f"{value.dtype}, {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            found[f"checkpoint: {i}.{key}"] = text
    return found


# -------------------------------------------------------------------------------------------------------------- errors


def matrix() -> nn.Parameter:
    """One that could be stepped."""
    return nn.Parameter(torch.ones(4, 6))


def loaded(optimizer: Optimizer, checkpoint: Any) -> None:
    """Load it."""
    optimizer.load_state_dict(checkpoint)


def overlapping() -> list[Tensor]:
    """Two parameters that share elements."""
    p = torch.ones(4, 6)
    return [p[:3], p[2:]]


# What is wrong with arguments that are no options.
MISUSES: dict[str, Callable[[], object]] = {
    "a module": lambda: Muon(nn.Linear(4, 6)),
    "nothing": lambda: Muon([]),
    "a vector": lambda: Muon([("bias", nn.Parameter(torch.ones(4)))]),
    "integers": lambda: Muon([nn.Parameter(torch.ones(4, 6, dtype=torch.int32), requires_grad=False)]),
    "parameters that overlap": lambda: Muon(overlapping()),
    "a misspelt key of a group": lambda: Muon([{"params": [matrix()], "momentun": 0.9}]),
    "a pattern that matches nothing": lambda: Muon([("W", matrix())], split={"V*": "equal(2)"}),
    "a cut that does not fit": lambda: Muon([matrix()], split="equal(3)"),
    "a process group that is none": lambda: Muon([matrix()], process_group=3),  # type: ignore[arg-type]
    "another optimizer's checkpoint": lambda: loaded(Muon([matrix()]), torch.optim.SGD([matrix()]).state_dict()),
    "a checkpoint of more parameters": lambda: loaded(Muon([matrix()]), Muon([matrix(), matrix()]).state_dict()),
    "a checkpoint that is none": lambda: loaded(SpectralAdam([matrix()]), {"state": {}}),
    "a checkpoint of other halves": lambda: loaded(
        MuonAdamW([{"params": [matrix()], "use_muon": True}]),
        MuonAdamW([{"params": [matrix()], "use_muon": False}]).state_dict(),
    ),
    "a group of no half": lambda: MuonAdamW([{"params": [matrix()]}]),
    "an option of no half": lambda: MuonAdamW([{"params": [matrix()], "use_muon": True}], lr=0.1),
    "betas and another momentum": lambda: MuonAdamW(
        [{"params": [matrix()], "use_muon": False, "betas": (0.9, 0.99), "momentum": 0.8}]
    ),
    "a name that the paper has not": lambda: paper_optimizer("adam_x", [matrix()], 0.1),
    "ZeroMuon over two dtypes": lambda: ZeroMuon([matrix(), nn.Parameter(torch.ones(4, 6).bfloat16())]),
}


def misused(name: str) -> dict[str, str]:
    """What a misuse raises."""
    try:
        MISUSES[name]()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"error": "none"}


# ------------------------------------------------------------------------------------------------------ all of a corpus

# Of every case, by its name and the variant, what is of what.
Corpus = dict[str, dict[str, dict[str, str]]]


def here() -> list[str]:
    """The variants that this processor has."""
    return [*cpu.instruction_sets(), "eager", "auto"]


def corpus_of(chosen: Sequence[Case], misuses: Sequence[str] = ()) -> Corpus:
    """That of some cases, on this rank."""
    if dist.get_world_size() == 1:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    torch.use_deterministic_algorithms(True, warn_only=True)
    found: Corpus = {f"misuse: {name}": {"eager": misused(name)} for name in misuses}
    for case in chosen:
        found[case.name] = {}
        for variant in case.variants:
            if variant in here():
                with cpu.forced(variant) if variant in INSTRUCTION_SETS else nullcontext():
                    found[case.name][variant] = entry(case, variant)
    return found


def together(of_ranks: Sequence[Corpus]) -> Corpus:
    """What several ranks did, in one."""
    return {
        name: {
            variant: {
                f"rank {i}, {what}": text for i, of in enumerate(of_ranks) for what, text in of[name][variant].items()
            }
            for variant in variants
        }
        for name, variants in of_ranks[0].items()
    }


def corpus(text: str) -> Corpus:
    """That of all cases in whose names `text` is; those of one rank in two processes, as there are two cores."""
    lacking = {option.rpartition(".")[2] for kind in OPTIMIZERS.values() for option in defaults(kind)} - OPTIONS.keys()
    if lacking:
        sys.exit(f"options without a row in OPTIONS: {', '.join(sorted(lacking))}")
    chosen = [case for case in cases() if text in case.name]
    misuses = [name for name in MISUSES if text in f"misuse: {name}"]
    alone = [case for case in chosen if case.ranks == 1]

    def process(part: int) -> Corpus:
        with world(1) as ranks:
            return ranks.run(1, corpus_of, alone[part::2], misuses[part::2])[0]

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(process, range(2))
    found = first | second
    with world(3) as ranks:
        for size in (2, 3):
            found |= together(ranks.run(size, corpus_of, [case for case in chosen if case.ranks == size]))
    return found


def differences(before: Corpus, after: Corpus) -> tuple[list[str], int]:
    """A line for every case and variant that differs, and how many of `before` this processor cannot step."""
    found, elsewhere = [], 0
    for name in dict.fromkeys([*before, *after]):
        old, new = before.get(name, {}), after.get(name, {})
        for variant in dict.fromkeys([*old, *new]):
            if variant not in here():
                elsewhere += 1
            elif variant not in new:
                found.append(f"missing: {name} [{variant}]")
            elif variant not in old:
                found.append(f"new: {name} [{variant}]")
            elif old[variant] != new[variant]:
                found.append(f"differs: {name} [{variant}] in {what_differs(old[variant], new[variant])}")
    return found, elsewhere


def what_differs(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    """The first three of what differs, errors in their words."""
    names = [what for what in dict.fromkeys([*old, *new]) if old.get(what) != new.get(what)]
    shown = [
        f"{what} ({old.get(what)!r} is now {new.get(what)!r})" if what.endswith("error") else what
        for what in sorted(names, key=lambda what: not what.endswith("error"))[:3]
    ]
    return "; ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def main(command: str, path: str, text: str = "") -> int:
    """Record or compare; 1 if anything differs."""
    if command not in ("record", "compare"):
        sys.exit(__doc__)
    start = time.monotonic()
    found = corpus(text)
    if not found:
        sys.exit(f"no case has {text!r} in its name")
    entries = sum(map(len, found.values()))
    used = os.times()
    processor = used.user + used.system + used.children_user + used.children_system
    print(f"{len(found)} cases, {entries} entries, {time.monotonic() - start:.0f} s, {processor:.0f} s of a processor")
    if command == "record":
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(variants)}" for name, variants in found.items())
        Path(path).write_text(f"{{\n{lines}\n}}\n")
        return 0
    before = {name: of for name, of in json.loads(Path(path).read_text()).items() if text in name}
    lines, elsewhere = differences(before, found)
    print("\n".join([*lines, f"{len(lines)} differ, are missing or new; {elsewhere} cannot be stepped here"]))
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
