"""Matmul of Triton's tutorials, by pointers and by tensor descriptors, compiled without a GPU."""

from functools import cache

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def matmul(
    a_ptr, b_ptr, c_ptr, M, N, K, stride_am, stride_bk, stride_cm,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    num_pid_m, num_pid_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    in_group = GROUP_M * num_pid_n
    first_m = pid // in_group * GROUP_M
    group_m = min(num_pid_m - first_m, GROUP_M)
    pid_m, pid_n = first_m + pid % in_group % group_m, pid % in_group // group_m
    offs_m = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M)) % M
    offs_n = (pid_n * BLOCK_N + tl.arange(0, BLOCK_N)) % N
    offs_k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + offs_m[:, None] * stride_am + offs_k[None, :]
    b_ptrs = b_ptr + offs_k[:, None] * stride_bk + offs_n[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, tl.cdiv(K, BLOCK_K)):
        a = tl.load(a_ptrs, mask=offs_k[None, :] < K - k * BLOCK_K, other=0.0)
        b = tl.load(b_ptrs, mask=offs_k[:, None] < K - k * BLOCK_K, other=0.0)
        acc = tl.dot(a, b, acc)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K * stride_bk
    rows, cols = pid_m * BLOCK_M + tl.arange(0, BLOCK_M), pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows[:, None] < M) & (cols[None, :] < N)
    tl.store(c_ptr + rows[:, None] * stride_cm + cols[None, :], acc.to(tl.bfloat16), mask=mask)


@triton.jit
def matmul_tma(a, b, c, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    pid = tl.program_id(0)
    num_pid_n = tl.cdiv(N, BLOCK_N)
    pid_m, pid_n = pid // num_pid_n, pid % num_pid_n
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, tl.cdiv(K, BLOCK_K)):
        x = a.load([pid_m * BLOCK_M, k * BLOCK_K])
        y = b.load([pid_n * BLOCK_N, k * BLOCK_K])
        acc = tl.dot(x, y.T, acc)
    c.store([pid_m * BLOCK_M, pid_n * BLOCK_N], acc.to(tl.bfloat16))


@cache
def compiled(tma: bool, arch: int, block_m: int, block_n: int, block_k: int) -> tuple[str, str, int]:
    """Compile a matmul; return its PTX, its name and its shared memory in bytes."""
    kernel = matmul_tma if tma else matmul
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k} | ({} if tma else {"GROUP_M": 8})
    if tma:
        shapes = [(block_m, block_k), (block_n, block_k), (block_m, block_n)]
        types = [f"tensordesc<bf16[{m},{n}]>" for m, n in shapes] + ["i32"] * 3
    else:
        types = ["*bf16"] * 3 + ["i32"] * 6
    signature = dict(zip(kernel.arg_names, types + ["constexpr"] * len(blocks), strict=True))
    attrs = {} if tma else {(i,): [["tt.divisibility", 16]] for i in range(9)}
    source = ASTSource(kernel, signature, constexprs=blocks, attrs=attrs)
    result = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 4, "num_stages": 3})
    return result.asm["ptx"], kernel.__name__, result.metadata.shared
