"""Faults in the strategies of distributed steps: sums of Gram matrices, blocks, flat slices; see plant.py."""

from __future__ import annotations

from plant import Fault

TESTS = ["tests/distributed/test_strategies.py"]


def _gram(name: str, old: str, new: str, tests: str) -> Fault:
    return Fault(name, old, new, tests, "muon_kernels/distributed/strategies/gram.py")


def _blocks(name: str, old: str, new: str, tests: str) -> Fault:
    return Fault(name, old, new, tests, "muon_kernels/distributed/strategies/blocks.py")


def _divide(name: str, old: str, new: str, tests: str) -> Fault:
    return Fault(name, old, new, tests, "muon_kernels/distributed/exchange.py")


def _zero(name: str, old: str, new: str, tests: str) -> Fault:
    return Fault(name, old, new, tests, "muon_kernels/distributed/zero.py")


FAULTS = [
    # Sums
    _gram("left not shifted", "    down = rows - m\n", "    down = 0\n", "packed"),
    _gram(
        "triangle without its last rows",
        "square.high[:, h:, h:].mT.triu()",
        "square.high[:, h:, h:].mT.triu(1)",
        "packed",
    ),
    _gram(
        "what was rounded is forgotten",
        "pack([square, rest], scale, packed)",
        "pack([square], scale, packed)",
        "squares",
    ),
    _gram("rest added, not left", "beta=-1.0, out=self._rest", "beta=1.0, out=self._rest", "accuracy_rule and keller"),
    _gram(
        "rest of the scaled sum",
        "self._ops.syrk(A, C=out, beta=-1.0, out=self._rest)",
        "self._ops.syrk(A, C=out, beta=-1.0, out=self._rest, scale=scale)",
        "squares",
    ),
    _gram(
        "scaled once",
        "packed.mul_(scale[:, None, None]).mul_(scale[:, None, None])",
        "packed.mul_(scale[:, None, None])",
        "packed",
    ),
    _gram(
        "squared scale underflows",
        "packed.mul_(scale[:, None, None]).mul_(scale[:, None, None])",
        "packed.mul_(scale[:, None, None] ** 2)",
        "no_fp32_number",
    ),
    _gram(
        "not symmetric",
        "high.copy_(high.tril() + high.tril(-1).mT)",
        "high.copy_(high.tril() + high.triu(1))",
        "packed",
    ),
    _gram("diagonal not summed", "right.diagonal(dim1=1, dim2=2).add_(square.diagonal[:, h:])", "pass", "packed"),
    _gram(
        "diagonal not split",
        "torch.sub(exact, high.diagonal(dim1=1, dim2=2).float(), out=square.diagonal)",
        "square.diagonal.zero_()",
        "packed",
    ),
    _gram(
        "norm of this part only",
        'self.pending = self._sum(self._squares, "norms")',
        'self.pending = self._sum(self._squares.clone(), "norms")',
        "gram_is_muon and cpu and 3",
    ),
    _gram(
        "norms not squared", "self._squares = own.square()", "self._squares = own.clone()", "gram_is_muon and cpu and 3"
    ),
    _gram("shift of the whole", "shift_of(own)", "shift_of(norms)", "any_scale"),
    _gram(
        "eager: parts as if wholes",
        "(own / norms).where(norms != 0, 0.0)",
        "(norms / norms).where(norms != 0, 0.0)",
        "gram_is_muon and eager and 3",
    ),
    _gram("eager: zero is no number", "(own / norms).where(norms != 0, 0.0)", "own / norms", "any_scale"),
    _gram(
        "norms of empty parts are old",
        "own.zero_()  # where this rank has nothing",
        "own.fill_(7)",
        "gram_is_muon and cpu and 4",
    ),
    _gram("squares of empty parts are old", "_clear(out, self._rest)", "None", "gram_is_muon and cpu and 4"),
    _gram(
        "cut rows are summed", "all(key.shards[rank].rows == m for rank in holders(key))", "True", "cannot_be_summed"
    ),
    _gram(
        "square matrices not turned",
        "return all(shard.left == 0 and shard.cols == found[0].cols for shard in found)",
        "return False",
        "gram_is_muon and cpu and 3",
    ),
    _gram(
        "square matrices always turned",
        "return all(shard.left == 0 and shard.cols == found[0].cols for shard in found)",
        "return True",
        "gram_is_muon and cpu and 3",
    ),
    _gram(
        "every rank owns",
        "return [replica * team.shard_count for replica in range(team.replica_count)]",
        "return list(range(team.ranks))",
        "gram_is_muon and cpu and 3",
    ),
    _gram("all replicas do all", "return team.replica * team.shard_count\n", "return 0\n", "plan_counts"),
    _gram(
        "standard form always",
        'return "gram" if backends.get(backend).precise_squares else "standard"',
        'return "standard"',
        "squares",
    ),
    _gram("visits miscounted", "return visited.visits,", "return visited.visits + 1,", "gram_is_muon and cpu and 3"),
    _gram(
        "bytes of half a ring",
        "2 * (team.shard_count - 1) * size // team.shard_count",
        "(team.shard_count - 1) * size // team.shard_count",
        "gram_is_muon and cpu and 3",
    ),
    _gram("power without the norm", "stacks.blend.norms.copy_(norms)", "stacks.blend.norms.copy_(own)", "powers"),
    # Blocks
    _blocks(
        "whole step last",
        'bool(group.get("step", 0) % group["block_period"])',
        'bool((group.get("step", 0) + 1) % group["block_period"])',
        "blocks_between and 3",
    ),
    _blocks("never whole", 'bool(group.get("step", 0) % group["block_period"])', "True", "blocks_between and 3"),
    _blocks(
        "shape of the whole",
        "yield piece, (batch, shard.rows, shard.cols)",
        "yield piece, (batch, *placement.whole)",
        "blocks_between and 3",
    ),
    _blocks("another rank's part", "rectangles[placement.team.shard]", "rectangles[0]", "blocks_between and (4 or 3)"),
    _divide("ratio of blocks forgotten", "pieces=own, lr_factor=shard_lr_factor", "pieces=own", "blocks_between and 3"),
    Fault(
        "either kind of step is the other",
        "cache.get((id(group), steps_shards),",
        "cache.get(id(group),",
        "blocks_between and 3",
        "muon_kernels/optimizers/muon.py",
    ),
    _divide(
        "copies in blocks",
        "elif steps_shards and placement.team.shards is not None:",
        "elif steps_shards:",
        "copies_have",
    ),
    _divide(
        "blocks of what is not orthogonalized",
        "elif options.power == 1:",
        "elif options.power == 1 and not (steps_shards and placement.team.shards is not None):",
        "momentum_alone",
    ),
    _divide("strategy forgotten", "STRATEGIES[strategy]", 'STRATEGIES["owner"]', "squares"),
    Fault(
        "steps not counted",
        'if numbers.seed is not None or group["strategy"] == "blocks":',
        "if numbers.seed is not None:",
        "knows_when",
        "muon_kernels/optimizers/muon.py",
    ),
    # Flat slices
    _zero("sum, not mean", "return gradient.div_(ranks)", "return gradient", "mean_gradient and 3"),
    _zero("dampened alike", "buffer.mul_(mu).add_(g)", "buffer.mul_(mu).add_(g, alpha=1 - mu)", "options_of_flat"),
    _zero("no look ahead", "g.lerp(buffer, mu) if group", "buffer if group", "options_of_flat or mean_gradient"),
    _zero(
        "slices not rounded up",
        "self.share = -(-self.elements // ranks)",
        "self.share = max(1, self.elements // ranks)",
        "mean_gradient and 3",
    ),
    _zero("first matrix only", "touched[-1][1]) if touched", "touched[0][1]) if touched", "mean_gradient and 2"),
    _zero("begins with its slice", "(touched[0][0], touched", "(own[0], touched", "mean_gradient and 3"),
    _zero(
        "everything is sent",
        "(touched[0][0], touched[-1][1]) if touched else (own[0], own[0])",
        "(0, self.elements)",
        "matrices_are_sent",
    ),
    _zero(
        "slice of the result from its start",
        "result.reshape(-1)[begin - m.at[0] : end - m.at[0]]",
        "result.reshape(-1)[: end - begin]",
        "mean_gradient and 3",
    ),
    _zero(
        "decay with the ratio",
        "mul_(1 - lr * weight_decay)",
        "mul_(1 - lr * weight_decay * ratios[m.shape])",
        "mean_gradient and 2",
    ),
    _zero(
        "master of no use",
        "updated = local(state[_MASTER]) if _MASTER in state else self._slice(params, flat)",
        "updated = self._slice(params, flat)",
        "mean_gradient and 2",
    ),
    _zero("parameters without gradient decay", "if grads[m.param] is not None and length", "if length", "some_ranks"),
    _zero(
        "scale of the gradient forgotten",
        "self._averaged(flat, grads, device).mul_(grad_scale)",
        "self._averaged(flat, grads, device)",
        "some_ranks or options_of_flat",
    ),
    Fault(
        "NaN: each for itself",
        "return Agreed(verdict == _FOUND_INF, ",
        "return Agreed(found_inf is not None and bool(found_inf), ",
        "some_ranks",
        "muon_kernels/distributed/consensus.py",
    ),
    _zero("descends", '-grad_scale if group["maximize"] else grad_scale', "grad_scale", "options_of_flat"),
    _zero(
        "one group's rate",
        'lr, weight_decay = float(group["lr"])',
        'lr, weight_decay = float(self.defaults["lr"])',
        "mean_gradient and 2",
    ),
    _zero(
        "rows and columns exchanged",
        "count, rows, cols = split_shape(tuple(p.shape), flatten)\n            size",
        "count, cols, rows = split_shape(tuple(p.shape), flatten)\n            size",
        "mean_gradient and 2",
    ),
    _zero("bytes of a bf16 reduction", "flat.share * (4 + group", "flat.share * (2 + group", "mean_gradient and 2"),
    _zero(
        "slice of a whole checkpoint", "return value[own[0] : own[1]]", "return value[: own[1] - own[0]]", "refuse_what"
    ),
    _zero("slices of others are taken", "if local(value).numel() != length(own):", "if False:", "refuse_what"),
    _zero("state forgotten when loaded", "        self.state.update(kept)\n", "", "any_number_of_ranks or refuse"),
    _zero(
        "master is the rounded parameter",
        "        for own, value in found:\n            own.copy_(value)\n",
        "",
        "any_number_of_ranks or refuse",
    ),
]
