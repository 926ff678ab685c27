// The asynchronous machinery of sm_90: mbarriers, bulk and tensor copies, wgmma.
#pragma once

#include "warp.h"

namespace ptx {}  // namespace ptx
