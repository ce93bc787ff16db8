// Patch embedding forward, pixels to tokens: what the kernels are asked for, and the host side of them.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>

#include "common.h"

namespace llava_fast {

// Images are uint8 [images, height, width, 3], one after the other; T = 1 + (height / patch) (width / patch) tokens
// each. `weight` is [patch * patch * 3, columns], in the order of an image's bytes (row, column, channel); `position`
// is [T, columns], `output` [images, T, columns]; `cls`, `norm_weight`, `norm_bias` [columns]. All of them contiguous,
// in the memory of the current device, and but for the pixels of type `dtype` (float16 or bfloat16).
struct PatchEmbedArguments {
    std::uintptr_t output, pixels, weight, cls, position, norm_weight, norm_bias;
    std::int64_t images, height, width, patch, columns;
    std::array<double, 3> mean, std;
    double eps;
    DType dtype;
    int multiprocessors;
};

// How the product is laid out. A block has `strips` strips of patches, which it expands in shared memory once and
// multiplies with `column_tiles` tiles of 256 columns.
struct PatchEmbedPlan {
    int strips, row_tiles, column_tiles;
    std::int64_t row_blocks, column_blocks;
    int shared_bytes;
    int copy_bytes;    // of each copy of pixels to shared memory: 16, 4 or 1, as their alignment allows
    bool pixel_pairs;  // whether bytes 2i and 2i + 1 of any row of an image belong to one patch
};

// Checks the arguments; throws std::invalid_argument with one line that names the wrong one.
PatchEmbedPlan plan_patch_embed(const PatchEmbedArguments& arguments);

// Checks the arguments and queues both kernels on `stream`; no images, no launch.
cudaError_t launch_patch_embed(const PatchEmbedArguments& arguments, cudaStream_t stream);

}  // namespace llava_fast
