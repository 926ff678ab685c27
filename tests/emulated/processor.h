// Makes csrc/cpu/dispatch.cpp take the processor for one that has AVX-512 and AMX. See avx512.h.
#pragma once

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#define __builtin_cpu_supports(feature) true
#define __get_cpuid_count(leaf, subleaf, eax, ebx, ecx, edx) (*(eax) = *(ebx) = *(ecx) = *(edx) = ~0u, 1)
#define syscall(...) 0L
