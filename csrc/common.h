// The element types of every kernel's arguments.
#pragma once

namespace llava_fast {

enum class DType { float32, float16, bfloat16 };

}  // namespace llava_fast
