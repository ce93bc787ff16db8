// What kernels share: element types, wide loads, the sum over a block; and the refusal of a wrong argument.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace llava_fast {

constexpr int kWarp = 32;
constexpr int kVectorBytes = 16;  // the widest load there is

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ T from_float(float value);
template <>
__device__ inline float from_float<float>(float value) {
    return value;
}
template <>
__device__ inline __half from_float<__half>(float value) {
    return __float2half_rn(value);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
    return __float2bfloat16_rn(value);
}

template <typename T, int kElements>
struct alignas(sizeof(T) * kElements) Vector {
    T values[kElements];
};

// The sum over the block, in every thread. `partial` has a float per warp and serves one sum only, which is why there
// is no second barrier.
__device__ inline float block_sum(float value, float* partial) {
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        value += __shfl_xor_sync(0xffffffffu, value, offset);
    }
    if (threadIdx.x % kWarp == 0) {
        partial[threadIdx.x / kWarp] = value;
    }
    __syncthreads();
    // Every thread adds the same few numbers in the same order: no second shuffle, no broadcast.
    float sum = 0.0f;
    for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) {
        sum += partial[warp];
    }
    return sum;
}

inline void require(bool condition, const std::string& message) {
    if (!condition) {
        throw std::invalid_argument(message);
    }
}

inline void check_pointer(const char* name, std::uintptr_t pointer, int alignment) {
    require(pointer != 0, std::string(name) + " is a null pointer");
    require(pointer % alignment == 0,
            std::string(name) + " is not aligned to " + std::to_string(alignment) + " bytes");
}

inline void check_range(const char* name, std::int64_t value, std::int64_t least, std::int64_t most) {
    const std::string found = std::string(name) + " is " + std::to_string(value);
    require(value >= least, found + ", less than " + std::to_string(least));
    require(value <= most, found + ", more than " + std::to_string(most));
}

}  // namespace llava_fast
