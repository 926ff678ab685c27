"""How the learning rate of a matrix follows from its shape, and weight decay from the learning rate."""

import math
from collections.abc import Callable
from numbers import Real

from torch import Tensor

AdjustLr = Callable[[int, int], float]

# An orthogonal rows x cols matrix has RMS 1 / sqrt(max(rows, cols)), whatever the gradient was.
# Each rule undoes a part of that. max(cols, 1) is for parameters without elements.
ADJUST_LR: dict[str, AdjustLr] = {
    # sqrt(max(1, rows / cols)): https://github.com/KellerJordan/Muon
    "original": lambda rows, cols: math.sqrt(max(1.0, rows / max(cols, 1))),
    # 0.2 sqrt(max(rows, cols)), the RMS of AdamW's updates: https://arxiv.org/abs/2502.16982, eq. 4
    "match_rms_adamw": lambda rows, cols: 0.2 * math.sqrt(max(rows, cols)),
    # sqrt(rows / cols), the RMS-to-RMS operator norm is lr: https://arxiv.org/abs/2310.17813
    "spectral": lambda rows, cols: math.sqrt(rows / max(cols, 1)),
    "none": lambda rows, cols: 1.0,
}


def lr_ratio(adjust_lr_fn: str | AdjustLr | None, rows: int, cols: int) -> float:
    """The factor on the learning rate of a rows x cols matrix; weight decay goes without it.

    Args:
        adjust_lr_fn: a name in ADJUST_LR, None for "original", or a function of (rows, cols).
        rows: of the matrix as the parameter has it, that is outputs. May be 0.
        cols: likewise, that is inputs. May be 0.

    Raises:
        ValueError: an unknown name, or a function that returned a negative, infinite or NaN number.
        TypeError: a function that returned something other than a number.
    """
    if not callable(adjust_lr_fn):
        name = "original" if adjust_lr_fn is None else adjust_lr_fn
        if not isinstance(name, str) or name not in ADJUST_LR:
            raise ValueError(
                f"Adjust learning rate function {name} is not supported; "
                f"expected one of {', '.join(map(repr, ADJUST_LR))} or a function of (rows, cols)"
            )
        return ADJUST_LR[name](rows, cols)
    ratio = adjust_lr_fn(rows, cols)
    if not isinstance(ratio, Real):
        raise TypeError(f"adjust_lr_fn({rows}, {cols}) should return a number but returned: {ratio!r}")
    if not 0.0 <= ratio < math.inf:
        raise ValueError(f"adjust_lr_fn({rows}, {cols}) should return a finite number >= 0 but returned: {ratio}")
    return float(ratio)


Number = float | Tensor

# What of a parameter decays in a step, from (lr, weight_decay, peak_lr).
WEIGHT_DECAY_FORMS = (
    "decoupled",  # lr·weight_decay: https://arxiv.org/abs/1711.05101 as torch writes it
    "independent",  # weight_decay, whatever lr is: the same as its authors write it
    "scheduled",  # lr·weight_decay·lr/peak_lr, AdamC and MuonC: https://arxiv.org/abs/2506.02285
)


def decayed(form: str, lr: Number, weight_decay: Number, peak_lr: Number) -> tuple[Number, Number]:
    """The (lr, weight_decay) whose product is what decays in a form; backends know no other.

    Tensors stay on their device, and nothing waits for them.

    Args:
        form: in WEIGHT_DECAY_FORMS.
        lr: of this step. "independent" decays at 0 too: there lr is at least 1e-30, which no update shows.
        weight_decay: as the user gave it.
        peak_lr: the largest lr of the schedule.
    """
    if form == "independent":
        lr = lr.clamp(min=1e-30) if isinstance(lr, Tensor) else max(lr, 1e-30)
        return lr, weight_decay / lr
    if form == "scheduled":
        return lr, weight_decay * lr / peak_lr
    return lr, weight_decay
