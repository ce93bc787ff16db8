// RMSNorm forward: what the kernel is asked for, and the host side of it.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common.h"

namespace llava_fast {

int element_bytes(DType dtype);

// Rows of `columns` elements; strides are in elements, from one row to the next. Every pointer is to the
// memory of the device that is current, except that the two residuals may be null, both together.
struct RmsNormArguments {
    std::uintptr_t output, input, weight;
    std::uintptr_t residual, residual_output;
    std::int64_t rows, columns;
    std::int64_t output_stride, input_stride, residual_stride, residual_output_stride;
    double eps;
    DType dtype;
};

// How a launch is laid out: elements per load, threads per block, one block per row.
struct RmsNormPlan {
    int vector_elements, threads;
    std::int64_t blocks;
};

// Checks the arguments; throws std::invalid_argument with one line that names the wrong one.
RmsNormPlan plan_rms_norm(const RmsNormArguments& arguments);

// Checks the arguments and queues the kernel on `stream`; no rows, no launch.
cudaError_t launch_rms_norm(const RmsNormArguments& arguments, cudaStream_t stream);

}  // namespace llava_fast
