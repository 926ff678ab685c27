// The part of the headers that does not depend on a kernel.
#define PTX_RUNTIME
#include "async.h"
