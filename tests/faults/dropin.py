"""Faults in what tools around optimizers see: groups, defaults, names, hooks, state; see plant.py."""

from __future__ import annotations

from functools import partial

from plant import Fault

TESTS = ["tests/test_dropin.py", "tests/test_bad_input.py"]


def _fault(file: str, name: str, old: str, new: str, tests: str) -> Fault:
    return Fault(name, old, new, tests, f"muon_kernels/{file}")


_options = partial(_fault, "options.py")
_scaling = partial(_fault, "scaling.py")
_both = partial(_fault, "optimizers/muon_adamw.py")
_operands = partial(_fault, "step/operands.py")
_groups = partial(_fault, "step/options.py")
_tensors = partial(_fault, "tensors.py")
_muon = partial(_fault, "optimizers/muon.py")
_placed = partial(_fault, "distributed/placement.py")

FAULTS = [
    _placed(
        "anything is a process group",
        "if not isinstance(process_group, dist.ProcessGroup):",
        "if False:",
        "no_process_group",
    ),
    _options("dtypes stay in groups", 'return str(value).removeprefix("torch.")', "return value", "plain"),
    _options("numpy's numbers stay", "return value.tolist()", "return value", "plain or numbers"),
    _options("torch's name not written", 'group["adjust_lr_fn"] = "spectral_unclamped"', "pass", "spectral_by"),
    _scaling("functions that cannot be found", "if _found(name) is not rule:", "if False:", "function_is_kept"),
    _options(
        "a checkpoint chooses a function",
        'if isinstance(rule, str) and ":" in rule and rule != own:',
        "if False:",
        "chooses_no_function",
    ),
    _scaling(
        "a checkpoint imports a module",
        "found: Any = sys.modules.get(module)",
        "import importlib; found: Any = importlib.import_module(module)",
        "chooses_no_function or function",
    ),
    _options("misspellings pass", "_CLOSE = 0.87", "_CLOSE = 0.9", "misspelt"),
    _options("keys of others are taken for misspellings", "_CLOSE = 0.87", "_CLOSE = 0.8", "keys_of_others"),
    _options("a word more is a misspelling", ' and f"_{near}_" not in f"_{key}_"', "", "keys_of_others"),
    _both(
        "momentum in every group",
        '            del param_group["momentum"]  # which',
        "            pass  # which",
        "no_momentum",
    ),
    _both("a cycled momentum is not beta", 'group["betas"] = (group["momentum"], *betas[1:])', "pass", "cycle"),
    _both("betas and an equal momentum", ' and param_group["momentum"] != betas[0]', "", "cycled"),
    _both(
        "defaults without momentum",
        'defaults={key: self._muon.defaults[key] for key in ("lr", "momentum")}',
        "defaults={}",
        "defaults_have",
    ),
    _both("a step counted twice", "_unhooked_step(self._adamw)", "self._adamw.step()", "counted"),
    _both("moments shared when loaded", "part = deepcopy(part)  # torch", "pass  # torch", "loading_copies"),
    _both(
        "state of others refused",
        "if not self.state.get(p, {}).keys() & ADAMW_STATE",
        "if not self.state.get(p, {})",
        "beside_ours",
    ),
    _both(
        "state of inference mode",
        "        with torch.inference_mode(False), torch.no_grad():\n            new: dict",
        "        with torch.no_grad():\n            new: dict",
        "inference",
    ),
    _scaling(
        "decay at a learning rate of zero", "max(lr, 1e-30) if lr else 0.0", "max(lr, 1e-30)", "nothing_moves or fresh"
    ),
    _operands(
        "rows and columns as stored",
        "shape = (cols, rows) if self.transposed else (rows, cols)",
        "shape = rows, cols",
        "transposed_swaps",
    ),
    _groups(
        "names of transposed ignored",
        "return [name in chosen for name in names]",
        "return [True for name in names]",
        "transposed_by",
    ),
    _groups(
        "transposed of the first group",
        "[_of_parameters(group, key) for group in groups]",
        "[_of_parameters(group, key) for group in groups[:1]]",
        "options_change",
    ),
    _groups("groups alike but for the momentum's dtype", ', "momentum_dtype")\n', ",)\n", "alike"),
    _muon(
        "groups alike but for numbers", "by_numbers.setdefault(scalars, [])", "by_numbers.setdefault(None, [])", "alike"
    ),
    _muon("groups never stepped as one", "if batch is not None:", "if False:", "alike"),
    _muon(
        "the step unscales",
        "self._steps = 0\n        if isinstance(params",
        "self._steps, self._step_supports_amp_scaling = 0, True\n        if isinstance(params",
        "unscales_as or clipped",
    ),
    _muon(
        "no state before a step",
        "trained = lambda p: p if p.requires_grad else None",
        "trained = lambda p: None",
        "init_state",
    ),
    _tensors("fake tensors not told", 'if type(t).__name__ == "FakeTensor":', "if False:", "fake"),
]
