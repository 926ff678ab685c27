"""The stages in their order: how long each takes of ten minutes, and what it answers."""

from __future__ import annotations

from .correct import check_products, check_steps
from .facts import ceilings, look
from .models import time_steps
from .stage import Stage
from .sweeps import crossovers, sweep
from .tools import profile, sanitize
from .traces import fused, gaps, passes

STAGES = (
    Stage("facts", 10, "what is here?", look, timed=False),
    Stage("ceilings", 20, "what can this GPU do at best?", ceilings),
    Stage("products", 60, "are products right?", check_products, timed=False, decides=True),
    Stage("steps", 50, "are whole steps right?", check_steps, timed=False, decides=True),
    Stage("sweep", 70, "what does a tile cost, and what a launch besides?", sweep),
    Stage("crossovers", 60, "which backend from which size on?", crossovers),
    Stage("models", 90, "how fast are steps of real models?", time_steps),
    Stage("gaps", 40, "how long does the GPU wait between kernels?", gaps),
    Stage("passes", 25, "how near to a copy are the passes over memory?", passes),
    Stage("fused", 20, "what do fused steps take?", fused),
    Stage("sanitizer", 90, "does NVIDIA's checker find errors?", sanitize, apart=True, explains=True),
    Stage("ncu", 45, "what do kernels wait for?", profile, apart=True),
)
