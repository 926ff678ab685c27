"""Faults that leave a step or a load half done, or let torch's defaults in; see plant.py."""

from __future__ import annotations

from plant import Fault

TESTS = ["tests/test_out_of_memory.py", "tests/test_garbled.py", "tests/test_foreign_defaults.py"]

MEMORY, DEFAULTS = "every_tensor", "steps or fits"
KEPT = "muon_kernels/memory.py"
PACKED, RUN, SAVED = "muon_kernels/stages/packed.py", "muon_kernels/step/run.py", "muon_kernels/checkpoint.py"
EAGER, STATE = "muon_kernels/backends/eager.py", "muon_kernels/optimizers/state.py"
CHECKS, BOTH = "muon_kernels/optimizers/adamw_checks.py", "muon_kernels/optimizers/muon_adamw.py"

FAULTS = [
    Fault(
        "codes' memory not had before",
        "= memory.take(x.device, *self._wanted(*x.shape))",
        "= (torch.empty(shape, dtype=dtype) for shape, dtype in self._wanted(*x.shape))",
        MEMORY,
        PACKED,
    ),
    Fault("packed: nothing reserved", "            part.reserve()\n", "            pass\n", MEMORY, PACKED),
    Fault("plain: a new product", "torch.mul(grad, scalars.grad_scale, out=scaled)", "-grad", MEMORY, RUN),
    Fault(
        "plain: not rehearsed",
        "            self._run_plain(seen, scalars)\n",
        "            pass\n",
        MEMORY,
        RUN,
    ),
    Fault(
        "eager: a new product",
        "torch.bmm(left.copy_(A), right.copy_(B), out=total)",
        "total.copy_(torch.bmm(left.copy_(A), right.copy_(B)))",
        MEMORY,
        EAGER,
    ),
    Fault("eager: a norm's copy", "else precise.copy_(g)", "else g.double()", MEMORY, EAGER),
    Fault(
        "AdamW makes its state",
        "                self.state[p].update(state)\n            _unhooked",
        "                pass\n            _unhooked",
        MEMORY,
        BOTH,
    ),
    Fault(
        "scales of torch's dtype",
        "torch.zeros(blocks, dtype=torch.float32, ",
        "torch.zeros(blocks, ",
        DEFAULTS,
        STATE,
    ),
    Fault("steps of torch's dtype", "torch.zeros((), dtype=torch.float32, ", "torch.zeros((), ", DEFAULTS, CHECKS),
    Fault(
        "steps on torch's device",
        'device=p.device if with_parameter else "cpu")',
        "device=p.device if with_parameter else None)",
        DEFAULTS,
        CHECKS,
    ),
    Fault(
        "fits on torch's device",
        '"dtype": torch.float64, "device": "cpu"',
        '"dtype": torch.float64',
        DEFAULTS,
        "muon_kernels/powers.py",
    ),
    Fault("bits on torch's device", "out=z.view(-1), device=z.device)", "out=z.view(-1))", DEFAULTS, EAGER),
    Fault(
        "moments that overlap themselves",
        "        if overlaps_itself(",
        "        if not p.numel() and overlaps_itself(",
        "moments or garbled_check",
        CHECKS,
    ),
    Fault(
        "layout of moments",
        '*(state.get(key) for key in (*MOMENTS, "max_exp_avg_sq"))',
        "None",
        "another_layout",
        CHECKS,
    ),
    Fault("gradient's size", "    if grad.shape != p.shape or", "    if", "another_size", CHECKS),
    Fault("number of steps", '    check_count("step" + of, step)\n', "", "garbled_check", CHECKS),
    Fault(
        "what AdamW groups lack",
        "{**{key: own[key] for key in adamw.defaults if key in own}, **group}",
        "{**adamw.defaults, **group}",
        "lacks or lack",
        BOTH,
    ),
    Fault("interrupted half-way", "    with interrupts.held():\n", "    if True:\n", "ctrl_c", RUN),
    Fault(
        "interrupted between groups",
        "        with interrupts.held() if alone else nullcontext():\n            for (groups, numbers)",
        "        with nullcontext():\n            for (groups, numbers)",
        "ctrl_c_between_groups",
        "muon_kernels/optimizers/muon.py",
    ),
    Fault(
        "a spectral optimizer is interrupted",
        "        with interrupts.held() if alone else nullcontext():\n            for group, grads",
        "        with nullcontext():\n            for group, grads",
        "ctrl_c_between_groups",
        "muon_kernels/optimizers/spectral.py",
    ),
    Fault(
        "Ctrl-C that nobody answers",
        "not callable(handler)",
        "handler is None",
        "ctrl_c",
        "muon_kernels/interrupts.py",
    ),
    Fault("rehearsed in another thread", "return _kept.mark", "return Mark", MEMORY, KEPT),
    Fault("rehearsed with memory that is lost", "        _kept.mark = Mark()  # if", "        # if", "lost", KEPT),
    Fault("rehearsed in another workspace", "*workspace.addresses(), *kind", "*kind", "moved", RUN),
    Fault("range of the dtype", "            _check_range(work, scalars)\n", "            pass\n", "beyond", RUN),
    Fault(
        "tensors without memory",
        "                _check_loadable(",
        "                str(",
        "no_tensor or garbled_check",
        SAVED,
    ),
    Fault(
        "state that is none",
        "        if key in state:\n            check_dense",
        "        if state.get(key) is not None:\n            check_dense",
        "no_tensor",
        SAVED,
    ),
]
