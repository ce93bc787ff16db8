// PIL's resize of a ragged batch of uint8 images: what the kernels are asked for, and the host side of them.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>

namespace llava_fast {

// What is known of one image, in the order of FIELDS in llava_fast/ops/resize.py, which says what each means.
struct ResizeImage {
    std::int64_t pixels, line_bytes, pixel_bytes, length, margin, lines, first_line, lines_before;
    std::int64_t first, first_taps, second, second_taps, by_columns;
};

// `images` points to `num_images` ResizeImages and `tables` to int32, both made by the plan in
// llava_fast/ops/resize.py; `pixels`, `between` [lines, size, 3] and `output` [num_images, size, size, 3] to bytes. All
// in the memory of the current device.
struct ResizeArguments {
    std::uintptr_t output, between, pixels, images, tables;
    std::int64_t num_images, lines, size;
    std::array<int, 3> fill;
};

// Threads of a block, and blocks of the two passes.
struct ResizePlan {
    int threads;
    std::int64_t first_blocks, second_blocks;
};

// Checks the arguments; throws std::invalid_argument with one line that names the wrong one.
ResizePlan plan_resize(const ResizeArguments& arguments);

// Checks the arguments and queues both passes on `stream`; no images, no launch.
cudaError_t launch_resize(const ResizeArguments& arguments, cudaStream_t stream);

}  // namespace llava_fast
