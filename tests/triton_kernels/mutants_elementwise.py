"""Plants faults in momentum_update and apply_update of Triton, one at a time, and sees whether the tests notice.

    python tests/triton/mutants_elementwise.py [--only NAME] [--log FILE]

A fault costs a compilation or two.
"""

from mutate import Mutant, main

FILE, TABLES = "elementwise.py", "tables.py"
RAGGED = "test_ragged_sizes and sm_80-1"
UPDATE = "test_momentum_update and float32-torch.float32-torch.bfloat16"
DECAY = "test_apply_update and float32-torch.bfloat16"

MUTANTS = [
    # Momentum and direction.
    Mutant("nesterov ignored", FILE, "look_ahead(direction, new, mu, DAMPENED) if NESTEROV else new", "new", RAGGED),
    Mutant("lerp: one branch", FILE, "near = weight < 0.5", "near = weight < 2.0", RAGGED),
    Mutant("grad_scale forgotten", FILE, ".to(tl.float32) * grad_scale", ".to(tl.float32)", UPDATE),
    Mutant("the compiler fuses", FILE, '"enable_fp_fusion": False', '"enable_fp_fusion": True', UPDATE),
    Mutant("lines beyond the matrix", FILE, "    inside = (line[:, None] < lines) & (along[None, :] < vectors_of(tl.where(tall, M, N), WIDTH))\n\n",
           "    inside = (line[:, None] < lines + 1) & (along[None, :] < vectors_of(tl.where(tall, M, N), WIDTH))\n\n", RAGGED),
    Mutant("a tall tile not transposed", FILE, "tl.trans(direction.to(X))", "direction.to(X)", RAGGED),
    Mutant("tall tiles in the order of wide ones", FILE, "tl.where(tall, pid // down, pid % across)", "tl.where(tall, pid // across, pid % across)", UPDATE),
    # Norms.
    Mutant("squares in fp32", FILE, "precise = direction.to(tl.float64)", "precise = direction", "digits and 1e-30"),
    Mutant("partial sums beyond a chunk", FILE, "range(0, tiles, CHUNK)", "range(0, 1, CHUNK)", "norm_in_double"),
    Mutant("f16: no power of two", FILE, "direction = times_power(direction, tile_power(square, True))", "direction = direction", "digits and 1e+25"),
    Mutant("bf16: no power of two", FILE, "whole = tl.where(outside, -exponent(tl.sqrt(total)), 0)", "whole = tl.where(outside, 0, 0)", "digits and 1e+25"),
    Mutant("tiles left as they were", FILE, "e = whole - tile_power(square, HALF)", "e = whole * 0", "different_sizes"),
    Mutant("smallest tile not looked at", FILE, "tile_power(smallest, HALF) != whole", "tile_power(largest, HALF) != whole", "different_sizes"),
    Mutant("programs rescale the same tiles", FILE, "for tile in range(share, tiles, shares)", "for tile in range(0, tiles, shares)", "different_sizes"),
    Mutant("infinity has a scale", FILE, "sound = (total > 0) & (total < float(\"inf\"))", "sound = total > 0", "no_norm"),
    Mutant("margin forgotten", FILE, "tl.where(norm > eps, norm, eps) * margin", "tl.where(norm > eps, norm, eps)", "no_norm"),
    # Tables.
    Mutant("vectors at any address", TABLES, " and address % 16 == 0", "", UPDATE),
    Mutant("x taken for aligned", TABLES, " and (X is None or X.data_ptr() % 16 == 0)", "", UPDATE),
    Mutant("lines cut through vectors", TABLES, " and cols % n == 0", "", UPDATE),
    Mutant("operands of two directions", TABLES, "all(t.tall == tall for t in tables)", "True", UPDATE),
    # The parameters.
    Mutant("decays against the update's sign", FILE, "-update, update) >= 0", "-update, update) <= 0", DECAY),
    Mutant("cautious by a product", FILE, "tl.where(param.to(tl.int32, bitcast=True) < 0, -update, update) >= 0", "param * update >= 0", "underflows"),
    Mutant("weight decay of the host", FILE, "weight_decay = tl.load(weight_decay_at).to(tl.float64)", "weight_decay = weight_decay", DECAY),
    Mutant("step size without the ratio", FILE, "tl.cast(lr * ratio, tl.float32)", "tl.cast(lr, tl.float32)", DECAY),
    # Stochastic rounding.
    Mutant("seed ignored", FILE, "state = mixed(seed.to(tl.uint64))", "state = mixed(seed.to(tl.uint64) * 0)", "seed_and_place"),
    Mutant("half of the random bits", FILE, "& 0xFFFF", "& 0x7FFF", "unbiased"),
    Mutant("matrices share their numbers", FILE, "matrix.to(tl.uint64) * ((M + 1)", "0 * ((M + 1)", "seed_and_place"),
    Mutant("NaN becomes a number", FILE, "tl.where(value == value, bits", "tl.where(value == value * 0 + value, bits", "special"),
    # Compilations.
    Mutant("a compilation for a size", FILE, '@triton.jit(do_not_specialize=["x", "partial", "M", "N",', '@triton.jit(do_not_specialize=["x", "partial", "M",', "launches_and_compilations and sm_80"),
]  # fmt: skip

if __name__ == "__main__":
    main(MUTANTS, "test_elementwise_triton.py", __doc__)
