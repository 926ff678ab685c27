"""Faults that leave a step or a load half done, or let torch's defaults in; see planting.py."""

from __future__ import annotations

from planting import Mutant

TESTS = ["tests/test_out_of_memory.py", "tests/test_garbled.py", "tests/test_foreign_defaults.py"]

MEMORY, DEFAULTS = "every_tensor", "steps or fits"
KEPT = "muon_kernels/memory.py"
PACKED, RUN, SAVED = "muon_kernels/stages/packed.py", "muon_kernels/step/run.py", "muon_kernels/checkpoint.py"
EAGER, STATE = "muon_kernels/backends/eager.py", "muon_kernels/optimizers/state.py"
CHECKS, BOTH = "muon_kernels/optimizers/adamw_checks.py", "muon_kernels/optimizers/muon_adamw.py"

MUTANTS = [
    Mutant(
        "codes' memory not had before",
        "= memory.take(x.device, *self._wanted(*x.shape))",
        "= (torch.empty(shape, dtype=dtype) for shape, dtype in self._wanted(*x.shape))",
        MEMORY,
        PACKED,
    ),
    Mutant("packed: nothing reserved", "            part.reserve()\n", "            pass\n", MEMORY, PACKED),
    Mutant("plain: a new product", "torch.mul(grad, scalars.grad_scale, out=scaled)", "-grad", MEMORY, RUN),
    Mutant(
        "plain: not rehearsed",
        "            self._run_plain(seen, scalars)\n",
        "            pass\n",
        MEMORY,
        RUN,
    ),
    Mutant(
        "eager: a new product",
        "torch.bmm(left.copy_(A), right.copy_(B), out=total)",
        "total.copy_(torch.bmm(left.copy_(A), right.copy_(B)))",
        MEMORY,
        EAGER,
    ),
    Mutant("eager: a norm's copy", "else precise.copy_(g)", "else g.double()", MEMORY, EAGER),
    Mutant(
        "AdamW makes its state",
        "                self.state[p].update(state)\n            _unhooked",
        "                pass\n            _unhooked",
        MEMORY,
        BOTH,
    ),
    Mutant(
        "scales of torch's dtype",
        "torch.zeros(blocks, dtype=torch.float32, ",
        "torch.zeros(blocks, ",
        DEFAULTS,
        STATE,
    ),
    Mutant("steps of torch's dtype", "torch.zeros((), dtype=torch.float32, ", "torch.zeros((), ", DEFAULTS, CHECKS),
    Mutant(
        "steps on torch's device",
        'device=p.device if with_parameter else "cpu")',
        "device=p.device if with_parameter else None)",
        DEFAULTS,
        CHECKS,
    ),
    Mutant(
        "fits on torch's device",
        '"dtype": torch.float64, "device": "cpu"',
        '"dtype": torch.float64',
        DEFAULTS,
        "muon_kernels/powers.py",
    ),
    Mutant("bits on torch's device", "out=z.view(-1), device=z.device)", "out=z.view(-1))", DEFAULTS, EAGER),
    Mutant(
        "moments that overlap themselves",
        "        if overlaps_itself(",
        "        if not p.numel() and overlaps_itself(",
        "moments or garbled_check",
        CHECKS,
    ),
    Mutant(
        "layout of moments",
        '*(state.get(key) for key in (*MOMENTS, "max_exp_avg_sq"))',
        "None",
        "another_layout",
        CHECKS,
    ),
    Mutant("gradient's size", "    if grad.shape != p.shape or", "    if", "another_size", CHECKS),
    Mutant("number of steps", '    check_count("step" + of, step)\n', "", "garbled_check", CHECKS),
    Mutant(
        "what AdamW groups lack",
        "{**{key: own[key] for key in adamw.defaults if key in own}, **group}",
        "{**adamw.defaults, **group}",
        "lacks or lack",
        BOTH,
    ),
    Mutant("interrupted half-way", "    with interrupts.held():\n", "    if True:\n", "ctrl_c", RUN),
    Mutant(
        "Ctrl-C that nobody answers",
        "not callable(handler)",
        "handler is None",
        "ctrl_c",
        "muon_kernels/interrupts.py",
    ),
    Mutant("rehearsed in another thread", "return _kept.mark", "return Mark", MEMORY, KEPT),
    Mutant("rehearsed with memory that is lost", "        _kept.mark = Mark()  # if", "        # if", "lost", KEPT),
    Mutant("rehearsed in another workspace", "*workspace.addresses(), *kind", "*kind", "moved", RUN),
    Mutant("range of the dtype", "            _check_range(work, scalars)\n", "            pass\n", "beyond", RUN),
    Mutant(
        "tensors without memory",
        "                _check_loadable(",
        "                str(",
        "no_tensor or garbled_check",
        SAVED,
    ),
    Mutant(
        "state that is none",
        "        if key in state:\n            check_dense",
        "        if state.get(key) is not None:\n            check_dense",
        "no_tensor",
        SAVED,
    ),
]
