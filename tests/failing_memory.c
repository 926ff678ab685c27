// Preloaded, lets the k-th tensor's memory on the processor be missing: libc10 asks posix_memalign for it.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

static long before_failure, asked = -1;

int posix_memalign(void** out, size_t alignment, size_t size) {
  static int (*real)(void**, size_t, size_t);
  if (real == NULL) real = (int (*)(void**, size_t, size_t))dlsym(RTLD_NEXT, "posix_memalign");
  Dl_info who;
  // torch makes a tensor of every number that a tensor is multiplied by or added to; those can always be had.
  if (asked >= 0 && size > 16 && dladdr(__builtin_return_address(0), &who) && strstr(who.dli_fname, "libc10") != NULL) {
    if (asked++ == before_failure) return ENOMEM;
  }
  return real(out, alignment, size);
}

// From now on the k-th, counted from 0, fails; none if k is below 0.
void failing_memory_begin(long k) {
  before_failure = k;
  asked = 0;
}

// Returns how many were asked for.
long failing_memory_end(void) {
  const long found = asked;
  asked = -1;
  return found;
}
