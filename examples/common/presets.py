"""Learning rates and lengths of train_gpt.py's trainings: what it takes where nothing else is asked for."""

from __future__ import annotations

from typing import NamedTuple


class Rates(NamedTuple):
    """Learning rate of matrices, that of what else there is, and the weight decay."""

    lr: float
    lr_vector: float
    weight_decay: float


# For GPT-2 124M. Of the eight: the configurations of arXiv 2602.04669's authors. Of AdamW: nanoGPT's, which Muon takes
# over by match_rms_adamw, as arXiv 2502.16982 does.
RATES = {
    "muon": Rates(6e-4, 6e-4, 0.1),
    "adamw": Rates(6e-4, 6e-4, 0.1),
    "msgd": Rates(5.0, 3e-4, 0.0),
    "msgd_s": Rates(0.2, 3e-4, 0.0),
    "msgd_q": Rates(0.04, 3e-4, 0.0),
    "msgd_z": Rates(7e-3, 3e-4, 0.0),
    "adam": Rates(4e-3, 3e-4, 0.0),
    "adam_s": Rates(1e-2, 3e-4, 0.0),
    "adam_q": Rates(2e-2, 6e-4, 0.0),
    "adam_z": Rates(7e-3, 3e-4, 0.0),
}

# For --tiny: rates that train, of one or two tried over 100 steps. They are not tuned, so they compare no optimizers.
TINY_RATES = {
    "muon": Rates(2e-2, 1e-2, 0.1),
    "adamw": Rates(4e-3, 1e-2, 0.1),
    "msgd": Rates(0.3, 3e-3, 0.0),
    "msgd_s": Rates(0.1, 3e-3, 0.0),
    "msgd_q": Rates(0.1, 3e-3, 0.0),
    "msgd_z": Rates(2e-2, 3e-3, 0.0),
    "adam": Rates(4e-3, 3e-3, 0.0),
    "adam_s": Rates(1e-2, 3e-3, 0.0),
    "adam_q": Rates(2e-2, 3e-3, 0.0),
    "adam_z": Rates(2e-2, 3e-3, 0.0),
}

# A step of GPT-2 124M is 491,520 tokens, as in the paper, which has 200,000 of them.
RUN = {"steps": 20_000, "warmup": 1000, "batch_size": 12, "accumulate": 40, "eval_every": 1000, "eval_batches": 200}
TINY_RUN = {"steps": 300, "warmup": 20, "batch_size": 8, "accumulate": 2, "eval_every": 100, "eval_batches": 16}
