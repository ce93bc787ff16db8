// RMSNorm forward, with an optional residual add in front, in one pass over device memory:
//
//     s = residual + input           (only with a residual; s is stored, rounded to the dtype)
//     output = weight * round(s / sqrt(mean(s^2) + eps))
//
// The sum and the mean are float32 whatever the dtype. Rounding the normalised value before the weight is
// what transformers' LlamaRMSNorm does, so the results agree with it. One block per row: the block reads the
// row once from memory, and a second time from cache to write the output, which keeps registers free of the
// row's width, so any number of columns works.
#include "rms_norm.h"

#include <algorithm>
#include <string>

#include "common.cuh"

namespace llava_fast {
namespace {

constexpr int kMaxThreads = 512;

// No __restrict__ on the rows: writing the output over the input, or the new residual over the old, is allowed.
template <typename T, int kElements, bool kResidual>
__global__ void __launch_bounds__(kMaxThreads)
    rms_norm_kernel(T* output, const T* input, const T* __restrict__ weight, const T* residual,
                    T* residual_output, std::int64_t columns, std::int64_t output_stride,
                    std::int64_t input_stride, std::int64_t residual_stride,
                    std::int64_t residual_output_stride, float eps) {
    using Pack = Vector<T, kElements>;
    __shared__ float partial[kMaxThreads / kWarp];
    // 64-bit base of the row, 32-bit steps inside it.
    const std::int64_t row = blockIdx.x;
    const int packs = static_cast<int>(columns / kElements);
    const Pack* input_row = reinterpret_cast<const Pack*>(input + row * input_stride);
    const Pack* weight_row = reinterpret_cast<const Pack*>(weight);
    const Pack* residual_row = reinterpret_cast<const Pack*>(residual + row * residual_stride);
    Pack* sum_row = reinterpret_cast<Pack*>(residual_output + row * residual_output_stride);
    Pack* output_row = reinterpret_cast<Pack*>(output + row * output_stride);

    float square = 0.0f;
    for (int index = threadIdx.x; index < packs; index += blockDim.x) {
        Pack pack = input_row[index];
        if (kResidual) {
            const Pack added = residual_row[index];
#pragma unroll
            for (int i = 0; i < kElements; ++i) {
                pack.values[i] = from_float<T>(to_float(added.values[i]) + to_float(pack.values[i]));
            }
            sum_row[index] = pack;
        }
#pragma unroll
        for (int i = 0; i < kElements; ++i) {
            const float value = to_float(pack.values[i]);
            square += value * value;
        }
    }
    const float scale = rsqrtf(block_sum(square, partial) / static_cast<float>(columns) + eps);

    // Each thread reads back what it wrote or read itself, so no barrier is needed here.
    const Pack* source = kResidual ? sum_row : input_row;
    for (int index = threadIdx.x; index < packs; index += blockDim.x) {
        Pack pack = source[index];
        const Pack factor = weight_row[index];
#pragma unroll
        for (int i = 0; i < kElements; ++i) {
            const T normalised = from_float<T>(to_float(pack.values[i]) * scale);
            pack.values[i] = from_float<T>(to_float(factor.values[i]) * to_float(normalised));
        }
        output_row[index] = pack;
    }
}

template <typename T, int kElements, bool kResidual>
void launch(const RmsNormArguments& a, const RmsNormPlan& plan, cudaStream_t stream) {
    rms_norm_kernel<T, kElements, kResidual><<<static_cast<unsigned>(plan.blocks), plan.threads, 0, stream>>>(
        reinterpret_cast<T*>(a.output), reinterpret_cast<const T*>(a.input), reinterpret_cast<const T*>(a.weight),
        reinterpret_cast<const T*>(a.residual), reinterpret_cast<T*>(a.residual_output), a.columns,
        a.output_stride, a.input_stride, a.residual_stride, a.residual_output_stride, static_cast<float>(a.eps));
}

template <typename T>
void launch(const RmsNormArguments& a, const RmsNormPlan& plan, cudaStream_t stream) {
    constexpr int kWide = kVectorBytes / sizeof(T);
    const bool residual = a.residual != 0;
    if (plan.vector_elements == kWide) {
        residual ? launch<T, kWide, true>(a, plan, stream) : launch<T, kWide, false>(a, plan, stream);
    } else {
        residual ? launch<T, 1, true>(a, plan, stream) : launch<T, 1, false>(a, plan, stream);
    }
}

void check_matrix(const char* name, std::uintptr_t pointer, std::int64_t stride, const RmsNormArguments& a) {
    const int bytes = element_bytes(a.dtype);
    require(pointer != 0, std::string(name) + " is a null pointer");
    require(pointer % bytes == 0,
            std::string(name) + " is not aligned to its elements of " + std::to_string(bytes) + " bytes");
    require(a.rows == 1 || stride >= a.columns, std::string(name) + "_stride is " + std::to_string(stride) +
                                                    ", less than the " + std::to_string(a.columns) +
                                                    " columns of a row");
}

}  // namespace

int element_bytes(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

RmsNormPlan plan_rms_norm(const RmsNormArguments& a) {
    require(a.rows >= 0, "rows is " + std::to_string(a.rows) + ", less than 0");
    require(a.rows <= INT32_MAX, "rows is " + std::to_string(a.rows) + ", more than 2147483647");
    require(a.columns >= 1, "columns is " + std::to_string(a.columns) + ", less than 1");
    require(a.columns <= INT32_MAX / 2, "columns is " + std::to_string(a.columns) + ", more than 1073741823");
    require(a.eps >= 0, "eps is " + std::to_string(a.eps) + "; it must be 0 or more");  // NaN fails, too
    require((a.residual == 0) == (a.residual_output == 0),
            "residual and residual_output go together; one of them is a null pointer");
    if (a.rows == 0) {
        return {1, kWarp, 0};  // empty tensors have null pointers
    }
    check_matrix("output", a.output, a.output_stride, a);
    check_matrix("input", a.input, a.input_stride, a);
    check_matrix("weight", a.weight, a.columns, a);
    bool wide = true;
    const int bytes = element_bytes(a.dtype);
    const auto consider = [&](std::uintptr_t pointer, std::int64_t stride) {
        wide = wide && pointer % kVectorBytes == 0 && (a.rows == 1 || stride * bytes % kVectorBytes == 0);
    };
    consider(a.output, a.output_stride);
    consider(a.input, a.input_stride);
    consider(a.weight, a.columns);
    if (a.residual != 0) {
        check_matrix("residual", a.residual, a.residual_stride, a);
        check_matrix("residual_output", a.residual_output, a.residual_output_stride, a);
        consider(a.residual, a.residual_stride);
        consider(a.residual_output, a.residual_output_stride);
    }
    wide = wide && a.columns * bytes % kVectorBytes == 0;

    const int elements = wide ? kVectorBytes / bytes : 1;
    const std::int64_t packs = a.columns / elements;
    const std::int64_t threads = std::min<std::int64_t>((packs + kWarp - 1) / kWarp * kWarp, kMaxThreads);
    return {elements, static_cast<int>(threads), a.rows};
}

cudaError_t launch_rms_norm(const RmsNormArguments& arguments, cudaStream_t stream) {
    const RmsNormPlan plan = plan_rms_norm(arguments);
    if (plan.blocks == 0) {
        return cudaSuccess;
    }
    switch (arguments.dtype) {
        case DType::float32:
            launch<float>(arguments, plan, stream);
            break;
        case DType::float16:
            launch<__half>(arguments, plan, stream);
            break;
        case DType::bfloat16:
            launch<__nv_bfloat16>(arguments, plan, stream);
            break;
    }
    return cudaGetLastError();
}

}  // namespace llava_fast
