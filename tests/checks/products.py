"""What every batched product must get right: the package's checks, and what only the executor is asked."""

from __future__ import annotations

from typing import Any

import torch

from checks.vast import far_apart
from muon_kernels.checks.products import *  # noqa: F403
from muon_kernels.checks.products import Run, exact, integers


def offsets_have_64_bits(run: Run) -> None:
    """Rows and matrices four and eight GiB apart, of which only a few pages exist."""
    strides = 2**32 + 64, 2**31 + 8, 1
    A, X, C = (far_apart(integers(2, 2, 2), strides) for _ in range(3))
    out = far_apart(torch.full((2, 2, 2), torch.nan).bfloat16(), strides)
    run(A, X, out, c=C, beta=1.0)
    assert torch.equal(out, (A.double() @ X.double() + C.double()).bfloat16())


MANY = 70_000  # matrices: more than a grid has rows
SOME = [0, 1, 65_535, 65_536, MANY - 1]  # of them, that are executed


def many_matrices(run: Run) -> None:
    """In one launch, of which a few blocks, one a matrix, are executed."""
    X, out = integers(MANY, 2, 8), torch.full((MANY, 2, 2), torch.nan).bfloat16()
    run(X, X, out, b_transposed=True, symmetric=True, blocks=SOME)
    assert torch.equal(out[SOME], exact(X[SOME], X[SOME], True).bfloat16())
    assert int(out.isfinite().sum()) == 4 * len(SOME)


def unfit() -> list[dict[str, Any]]:
    """Arguments of products that there are not."""
    A, X, out = torch.ones(2, 8, 8).bfloat16(), torch.ones(2, 8, 9).bfloat16(), torch.ones(2, 8, 9).bfloat16()
    diagonal = torch.ones(2, 9)
    return [
        dict(a=A, b=torch.ones(2, 7, 9).bfloat16(), out=out),
        dict(a=A, b=X[:1], out=out),
        dict(a=A, b=X, out=out, c=A),
        dict(a=A, b=X, out=out, b_transposed=True),
        dict(a=A, b=X, out=out, symmetric=True),
        dict(a=A, b=X, out=out, b_diagonal=diagonal),
        dict(a=A, b=X, out=out, c_diagonal=diagonal),
        dict(a=A, b=X, out=out, out_diagonal=diagonal),
    ]
