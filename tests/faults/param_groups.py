"""Faults in what sorts parameters and says so; see plant.py."""

from __future__ import annotations

from functools import partial

from plant import Fault

TESTS = ["tests/test_param_groups.py"]


def _fault(file: str, name: str, old: str, new: str, tests: str) -> Fault:
    return Fault(name, old, new, tests, f"muon_kernels/{file}")


_options = partial(_fault, "options.py")
_both = partial(_fault, "optimizers/muon_adamw.py")
_rules = partial(_fault, "rules.py")
_groups = partial(_fault, "optimizers/param_groups.py")

FAULTS = [
    _groups("options of the other half are kept", "check_half(half, options, OPTIONS)", "pass", "other_half"),
    _options(
        "the other half is not named", "for other in known if key in known[other]", "for other in ()", "other_half"
    ),
    _options("betas are far from beta2", "known[half], 0.8)", "known[half], 0.81)", "other_half"),
    _groups("ranks of a group", 'if "process_group" in options:', "if False:", "other_half"),
    _both(
        "not all options are known",
        'parameters.keys() - {"params", "process_group"}',
        'parameters.keys() - {"params", "process_group", "maximize"}',
        "every_option",
    ),
    _groups("no mend for a pattern", ", which missing_ok=True allows", "", "stage_lacks"),
    _groups("no mend for a cut", "; missing_ok=True allows that", "", "stage_lacks"),
    _rules(
        "scripts are of a class of their own",
        "return _imported(path) or type(path[-1], (nn.Module,), {})",
        "return type(module)",
        "scripts",
    ),
    _rules("mangled names", 'if not part.startswith("___torch_mangle_")', "", "scripts"),
    _groups(
        "lists of scripts",
        "issubclass(class_of(place.layers[depth]), (nn",
        "isinstance(place.layers[depth], (nn",
        "scripts",
    ),
    _rules("classes that are not there", "_imported(_path(module)) is None or", "", "lost"),
    _rules("traces know their convolutions", 'not hasattr(module, "groups")', "False", "lost"),
    _rules("layers of a graph", "return bare or isinstance", "return isinstance", "lost"),
    _rules("a graph is a layer", "bare or isinstance(module, torch.fx.GraphModule) or", "bare or", "lost"),
    _rules("what torch.export unflattens", 'startswith("torch.export.")', 'startswith("torch.exported")', "lost"),
    _groups("said after all", " of unknown class", "", "lost"),
    _groups("layers of other shapes together", "(name, at[1:]), []", "(name, at[2:]), []", "equal_layers"),
    _groups("layers before experts", "for depth in reversed(range(", "for depth in (range(", "equal_layers"),
    _groups("gaps are not told", "number == runs[-1][-1] + 1", "number > runs[-1][-1]", "summary or equal_layers"),
    _groups("numbers as words", "for number in sorted(int(", "for number in sorted(len(", "equal_layers"),
    _groups("how many are not counted", "sum(count for _, count in same)", "len(same)", "summary"),
    _groups("lines as long as they like", "names = min(names, ", "names = max(names, ", "readable"),
    _groups("long names in their line", "if len(name) > names:", "if False:", "readable"),
    _groups(
        "long reasons in their line",
        "textwrap.wrap(reason, _WIDTH - margin,",
        "textwrap.wrap(reason, _WIDTH,",
        "readable",
    ),
    _groups("no reason", 'texts or [""]', "texts", "readable"),
    _groups("all numbers, however many", "(?:\\d[\\d.]*,){2,}(", "(?:\\d[\\d.]*,){99,}(", "equal_layers"),
]
