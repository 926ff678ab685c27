"""The learning rate's adjustment to a matrix's shape."""

import math

import pytest
import torch

from muon_kernels.scaling import ADJUST_LR, lr_ratio


@pytest.mark.parametrize(
    ("adjust_lr_fn", "rows", "cols", "expected"),
    [
        (None, 400, 100, 2.0),
        (None, 100, 400, 1.0),
        ("original", 400, 100, 2.0),
        ("original", 100, 400, 1.0),
        ("match_rms_adamw", 400, 100, 4.0),
        ("match_rms_adamw", 100, 400, 4.0),
        ("spectral", 400, 100, 2.0),
        ("spectral", 100, 400, 0.5),
        ("none", 400, 100, 1.0),
        (lambda rows, cols: rows - cols, 400, 100, 300.0),
        (lambda rows, cols: 0, 400, 100, 0.0),
    ],
)
def test_formula(adjust_lr_fn, rows, cols, expected):
    ratio = lr_ratio(adjust_lr_fn, rows, cols)
    assert isinstance(ratio, float)
    assert math.isclose(ratio, expected, rel_tol=1e-15)


@pytest.mark.parametrize("adjust_lr_fn", [None, "original", "match_rms_adamw"])
@pytest.mark.parametrize("shape", [(30, 70), (70, 30), (1, 9), (9, 1)], ids=str)
def test_agrees_with_torch(adjust_lr_fn, shape):
    from torch.optim._muon import _adjust_lr

    assert lr_ratio(adjust_lr_fn, *shape) == _adjust_lr(1.0, adjust_lr_fn, torch.Size(shape))


@pytest.mark.parametrize("adjust_lr_fn", ADJUST_LR)
@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0)], ids=str)
def test_no_elements(adjust_lr_fn, shape):
    assert math.isfinite(lr_ratio(adjust_lr_fn, *shape))


@pytest.mark.parametrize("unknown", ["spectrum", "", 0.2, ["original"]], ids=repr)
def test_unknown_name(unknown):
    with pytest.raises(ValueError) as error:
        lr_ratio(unknown, 3, 4)
    message = str(error.value)
    assert message.startswith(f"Adjust learning rate function {unknown} is not supported")
    assert all(name in message for name in ADJUST_LR)


@pytest.mark.parametrize("ratio", [math.nan, math.inf, -math.inf, -1.0])
def test_function_must_return_a_usable_number(ratio):
    with pytest.raises(ValueError, match=rf"\(3, 4\) should return a finite .* returned: {ratio}"):
        lr_ratio(lambda rows, cols: ratio, 3, 4)


@pytest.mark.parametrize("ratio", [None, "1", torch.ones(1), 1j], ids=repr)
def test_function_must_return_a_number(ratio):
    with pytest.raises(TypeError, match=r"\(3, 4\) should return a number but returned"):
        lr_ratio(lambda rows, cols: ratio, 3, 4)
