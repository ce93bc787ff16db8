// PIL's resize of a ragged batch of uint8 images in two passes, one launch for each:
//
//     between[line, o] = round(sum over j of weight[o, j] * line[start[o] + j])
//     output[o, p]     = round(sum over j of weight[o, j] * between[start[o] + j, p])
//
// Weights are integers with 22 fractional bits, sums are int32 and results are cut off to 8 bits, as in PIL, so the
// results are PIL's. What lies outside of an image is the fill. A block of the first pass makes one line; one of the
// second pass makes one row of results (or one column, where PIL resizes columns first).
#include "resize.h"

#include <string>

#include "common.cuh"

namespace llava_fast {
namespace {

constexpr int kThreads = 128;
constexpr int kFractionBits = 22;

struct Fill {
    int values[3];
};

__device__ unsigned char rounded(int sum) {
    return static_cast<unsigned char>(min(max(sum >> kFractionBits, 0), 255));
}

// The image that a line belongs to: the last one that starts at or before it and has lines.
__device__ int image_of(const ResizeImage* images, int num_images, std::int64_t line) {
    int low = 0, high = num_images - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (images[middle].lines_before <= line) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    return low;
}

__global__ void __launch_bounds__(kThreads)
    resize_first_kernel(unsigned char* __restrict__ between, const unsigned char* __restrict__ pixels,
                        const ResizeImage* __restrict__ images, const int* __restrict__ tables, const int num_images,
                        const int size, const Fill fill) {
    const std::int64_t line = blockIdx.x;
    const ResizeImage image = images[image_of(images, num_images, line)];
    const unsigned char* from = pixels + image.pixels + (line - image.lines_before) * image.line_bytes;
    const int taps = static_cast<int>(image.first_taps), length = static_cast<int>(image.length);
    for (int o = threadIdx.x; o < size; o += kThreads) {
        const int* weights = tables + image.first + static_cast<std::int64_t>(o) * (1 + taps);
        const int start = weights[0] - static_cast<int>(image.margin);
        int sums[3] = {1 << (kFractionBits - 1), 1 << (kFractionBits - 1), 1 << (kFractionBits - 1)};
        for (int j = 0; j < taps; ++j) {
            const int weight = weights[1 + j], at = start + j;
            const bool inside = at >= 0 && at < length;
            const unsigned char* pixel = from + (inside ? at : 0) * image.pixel_bytes;
#pragma unroll
            for (int channel = 0; channel < 3; ++channel) {
                sums[channel] += weight * (inside ? pixel[channel] : fill.values[channel]);
            }
        }
#pragma unroll
        for (int channel = 0; channel < 3; ++channel) {
            between[(line * size + o) * 3 + channel] = rounded(sums[channel]);
        }
    }
}

__global__ void __launch_bounds__(kThreads)
    resize_second_kernel(unsigned char* __restrict__ output, const unsigned char* __restrict__ between,
                         const ResizeImage* __restrict__ images, const int* __restrict__ tables, const int size,
                         const Fill fill) {
    const std::int64_t index = blockIdx.x / size;
    const int o = static_cast<int>(blockIdx.x % size);
    const ResizeImage image = images[index];
    const int taps = static_cast<int>(image.second_taps), lines = static_cast<int>(image.lines);
    const int* weights = tables + image.second + static_cast<std::int64_t>(o) * (1 + taps);
    const int start = weights[0] - static_cast<int>(image.first_line);
    const unsigned char* from = between + image.lines_before * size * 3;
    unsigned char* to = output + index * size * size * 3;
    for (int i = threadIdx.x; i < size * 3; i += kThreads) {
        const int channel = i % 3;
        const int outside = channel == 0 ? fill.values[0] : channel == 1 ? fill.values[1] : fill.values[2];
        int sum = 1 << (kFractionBits - 1);
        for (int j = 0; j < taps; ++j) {
            const int at = start + j;
            const bool inside = at >= 0 && at < lines;
            sum += weights[1 + j] * (inside ? from[static_cast<std::int64_t>(at) * size * 3 + i] : outside);
        }
        to[image.by_columns ? (i / 3 * size + o) * 3 + channel : o * size * 3 + i] = rounded(sum);
    }
}

}  // namespace

ResizePlan plan_resize(const ResizeArguments& a) {
    check_range("num_images", a.num_images, 0, INT32_MAX);
    check_range("lines", a.lines, a.num_images, INT32_MAX);
    check_range("size", a.size, 1, 1 << 14);
    check_range("num_images * size", a.num_images * a.size, 0, INT32_MAX);
    for (int value : a.fill) {
        check_range("fill", value, 0, 255);
    }
    if (a.num_images > 0) {  // empty tensors have null pointers
        check_pointer("output", a.output, 1);
        check_pointer("between", a.between, 1);
        check_pointer("pixels", a.pixels, 1);
        check_pointer("images", a.images, 8);
        check_pointer("tables", a.tables, 4);
    }
    return {kThreads, a.num_images > 0 ? a.lines : 0, a.num_images * a.size};
}

cudaError_t launch_resize(const ResizeArguments& a, cudaStream_t stream) {
    const ResizePlan plan = plan_resize(a);
    if (a.num_images == 0) {
        return cudaSuccess;
    }
    const Fill fill{{a.fill[0], a.fill[1], a.fill[2]}};
    const int num_images = static_cast<int>(a.num_images), size = static_cast<int>(a.size);
    const auto images = reinterpret_cast<const ResizeImage*>(a.images);
    const auto tables = reinterpret_cast<const int*>(a.tables);
    const auto between = reinterpret_cast<unsigned char*>(a.between);
    resize_first_kernel<<<static_cast<unsigned>(plan.first_blocks), kThreads, 0, stream>>>(
        between, reinterpret_cast<const unsigned char*>(a.pixels), images, tables, num_images, size, fill);
    const cudaError_t status = cudaGetLastError();
    if (status != cudaSuccess) {
        return status;
    }
    resize_second_kernel<<<static_cast<unsigned>(plan.second_blocks), kThreads, 0, stream>>>(
        reinterpret_cast<unsigned char*>(a.output), between, images, tables, size, fill);
    return cudaGetLastError();
}

}  // namespace llava_fast
