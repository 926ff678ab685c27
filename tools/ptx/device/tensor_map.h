// What a CUtensorMap holds here: the stand-in of cuTensorMapEncodeTiled writes it, tensor copies read it.
#pragma once

#include "launch.h"

namespace ptx {

constexpr u32 kTensorMapMagic = 0x70616d54;

struct TensorMap {
    u32 magic, rank : 8, element : 8, swizzle : 8, nan_fill : 8;
    u64 address;
    u64 dim[5], stride[5];  // innermost first; strides in bytes
    u16 box[5];
    u8 step[5];
};
static_assert(sizeof(TensorMap) <= 128);

}  // namespace ptx
