"""Faults in steps that several ranks take together; see plant.py."""

from plant import Fault

TESTS = ["tests/distributed/test_options.py", "tests/distributed/test_faults.py", "tests/distributed/test_layouts.py"]

OWNER, REPLICAS = (f"muon_kernels/distributed/strategies/{name}.py" for name in ("owner", "replicas"))
SLICES, SHARDS, LOTS = (f"muon_kernels/distributed/{name}.py" for name in ("slices", "shards", "lots"))
CONSENSUS = "muon_kernels/distributed/consensus.py"
PLACEMENT = "muon_kernels/distributed/placement.py"
RANKS = "muon_kernels/distributed/ranks.py"
MOMENTS = "muon_kernels/distributed/second_moment.py"
CUT = "test_options and 2-rows"
COPIES = "test_options and 2-group"
EVERY = "test_options and 4-copies"

FAULTS = [
    Fault("norms: of one part", ".square_().sum(0).sqrt_()", ".square_().amax(0).sqrt_()", CUT, SLICES),
    Fault("shift: none", "return (1 - exponent).where(outside, 0)", "return (1 - exponent) * 0", CUT, SLICES),
    Fault("power of two of the whole", "shift - shift_of(of_slice)", "shift", CUT, SLICES),
    Fault("scale: eps forgotten", ".clamp_min(eps) * margin)", ".clamp_min(1.9) * margin)", CUT, SLICES),
    Fault(
        "rectangle: left",
        "X[:, top : top + rows, left : left + cols]",
        "X[:, top : top + rows, :cols]",
        "2-columns",
        SLICES,
    ),
    Fault("blend: old norms", "stacks.blend.norms.copy_(norms)", "pass", CUT, OWNER),
    Fault("buffers: one set", "IN_FLIGHT = AHEAD + 1 + LATE", "IN_FLIGHT = AHEAD + LATE", CUT, SLICES),
    Fault(
        "overlap from the other's start",
        "return (start - a[0], stop - a[0])",
        "return (start - b[0], stop - b[0])",
        CUT,
        SHARDS,
    ),
    Fault(
        "momenta of other replicas stay",
        "if not self.params[replica] or (",
        "if replica != team.replica or (",
        EVERY,
        OWNER,
    ),
    Fault(
        "owner's own momentum only",
        "if not entries or (rank != self.team.replica and not momenta):",
        "if not entries or rank != self.team.replica:",
        EVERY,
        REPLICAS,
    ),
    Fault("second moments: before and after", "own[i] *= factor", "own[i] /= factor", CUT, LOTS),
    Fault(
        "second moments: kept numbers of copies",
        'ratios = array("d", map(mul, ratios, place.norms(results).tolist()))',
        "pass",
        COPIES,
        REPLICAS,
    ),
    Fault("sums of this part alone", "        dist.all_reduce(sums, group=group)", "        pass", CUT, MOMENTS),
    Fault(
        "rows of this part alone",
        "            dist.all_reduce(of_all, group=group)",
        "            pass",
        "2-columns",
        MOMENTS,
    ),
    Fault("mean of a row of this part", "lerp_(square / width,", "lerp_(square / X.shape[-1],", "2-columns", MOMENTS),
    Fault(
        "chunks rounded down",
        "size = -(-(stop - start) // count)",
        "size = max(1, (stop - start) // count)",
        "test_layouts and fsdp-3",
        PLACEMENT,
    ),
    Fault(
        "strided shards first",
        "for i, coordinate in (*first, *reversed(later)):",
        "for i, coordinate in (*later, *first):",
        "test_layouts and tp-4",
        PLACEMENT,
    ),
    Fault(
        "gradients that some lack: skipped",
        "if grad is None and p in present else grad",
        "if False else grad",
        "lack",
        CONSENSUS,
    ),
    Fault("a refusal that nobody hears", "    if verdict == _REFUSED:", "    if False:", "cannot_step", CONSENSUS),
    Fault("differences unnoticed", "    if other == first:", "    if True:", "differ", CONSENSUS),
    Fault("patience unlimited", "here.wait(_PATIENCE)", "here.wait()", "asked_for_on_one", CONSENSUS),
    Fault(
        "flatten as it was",
        'if is_dtensor(p) and self._flatten.get(p, "unseen") is not group["flatten"]:',
        "if False:",
        "changes",
        RANKS,
    ),
    Fault(
        "owned by all",
        "return at is not None and at.owner is not None and at.owner != at.team.rank",
        "return False",
        "test_layouts and ddp-2",
        RANKS,
    ),
]
