// Patch embedding forward for uint8 images, in two passes over device memory:
//
//     z[0]     = cls + position[0]
//     z[1 + n] = patch_n((pixels / 255 - mean) / std) * weight + position[1 + n]
//     output   = (z - mean(z)) / sqrt(var(z) + eps) * norm_weight + norm_bias
//
// A strip, `patch` rows of an image, is contiguous bytes. The first kernel copies whole strips to shared memory with
// cp.async, two at a time by turns, and expands them there: normalised in float32, rounded once, laid out as rows of
// patches for ldmatrix. It then streams the weight past them through a ring of stages and multiplies on the tensor
// cores; position is added to the float32 sums. The second kernel makes the CLS rows and the norm, in place.
#include "patch_embed.h"

#include <algorithm>
#include <string>

#include "common.cuh"
#include "mma.cuh"

namespace llava_fast {
namespace {

constexpr int kThreads = 256;        // 2 x 4 warps
constexpr int kColumns = 256;        // of a tile; 64 for each warp
constexpr int kColumnTiles = 8;      // of 8 columns, for each warp
constexpr int kDepth = 16;           // of the weight in one stage
constexpr int kStages = 4;
constexpr int kMaxRowTiles = 3;      // of 16 rows, for each warp
constexpr int kPad = 8;              // elements after each row in shared memory: a matrix's rows lie in other banks
constexpr int kWeightPitch = kColumns + kPad;
constexpr int kMaxShared = 163 * 1024;  // sm_80's; sm_90 has more
constexpr int kNormThreads = 128;
constexpr int kNormElements = 8;
constexpr int kMaxPacks = 8;

struct Shape {
    std::int64_t strips;  // of all images
    int height, width, patch, columns;
    int strip_rows, strip_patches;  // strips of an image, patches of a strip
    int depth, padded_depth;        // of the product
};

struct Normalisation {
    float scale[3], shift[3];
};

int padded(int value, int unit) { return (value + unit - 1) / unit * unit; }

template <int kBytes>
__device__ void copy_strip(unsigned char* shared, const unsigned char* global, int bytes) {
    for (int at = threadIdx.x * kBytes; at < bytes; at += kThreads * kBytes) {
        if constexpr (kBytes == 1) {
            shared[at] = global[at];
        } else {
            copy_async<kBytes>(shared + at, global + at, true);
        }
    }
}

__device__ void copy_strip(unsigned char* shared, const unsigned char* global, int bytes, int copy_bytes) {
    if (copy_bytes == 16) {
        copy_strip<16>(shared, global, bytes);
    } else if (copy_bytes == 4) {
        copy_strip<4>(shared, global, bytes);
    } else {
        copy_strip<1>(shared, global, bytes);
    }
}

// Without an index that is known at run time only, which would put the numbers into memory.
__device__ float of_channel(const float (&values)[3], int channel) {
    return channel == 0 ? values[0] : channel == 1 ? values[1] : values[2];
}

// A strip in shared memory to rows of patches. A thread takes one place (or two neighbours) across all rows of the
// strip: its patch, its channels and its steps stay the same.
template <typename T, bool kPairs>
__device__ void expand_strip(T* patches, int pitch, const unsigned char* strip, const Shape& shape,
                             const Normalisation& normalisation) {
    constexpr int kWide = kPairs ? 2 : 1;
    const int run = 3 * shape.patch;  // bytes of a patch in one row
    for (int at = threadIdx.x * kWide; at < run * shape.strip_patches; at += kThreads * kWide) {
        T* to = patches + at / run * pitch + at % run;
        const unsigned char* from = strip + at;
        float scale[kWide], shift[kWide];
#pragma unroll
        for (int i = 0; i < kWide; ++i) {
            const int channel = (at + i) % 3;  // as 3 divides the run
            scale[i] = of_channel(normalisation.scale, channel);
            shift[i] = of_channel(normalisation.shift, channel);
        }
        for (int row = 0; row < shape.patch; ++row) {
            const auto bytes = *reinterpret_cast<const Vector<unsigned char, kWide>*>(from);
            Vector<T, kWide> values;
#pragma unroll
            for (int i = 0; i < kWide; ++i) {
                values.values[i] = from_float<T>(fmaf(static_cast<float>(bytes.values[i]), scale[i], shift[i]));
            }
            *reinterpret_cast<Vector<T, kWide>*>(to) = values;
            to += run;
            from += 3 * shape.width;
        }
    }
    // The depth is padded with zeros: what is left of the last stage of the weight is zero as well, and 0 * NaN is NaN.
    const int rest = shape.padded_depth - shape.depth;
    for (int i = threadIdx.x; i < rest * shape.strip_patches; i += kThreads) {
        patches[i / rest * pitch + shape.depth + i % rest] = from_float<T>(0.0f);
    }
}

template <typename T, int kRowTiles, bool kPairs>
__global__ void __launch_bounds__(kThreads, 1)
    patch_embed_kernel(T* __restrict__ z, const unsigned char* __restrict__ pixels, const T* __restrict__ weight,
                       const T* __restrict__ position, const Shape shape, const Normalisation normalisation,
                       const int strips, const int column_tiles, const int copy_bytes) {
    extern __shared__ uint4 shared[];  // 16-byte alignment
    const int pitch = shape.padded_depth + kPad;
    T* patches = reinterpret_cast<T*>(shared);
    // Strips first, then stages of the weight.
    unsigned char* staging = reinterpret_cast<unsigned char*>(patches + 2 * 16 * kRowTiles * pitch);
    const int strip_bytes = shape.patch * shape.width * 3;
    const int strip_space = (strip_bytes + 15) / 16 * 16;

    const std::int64_t first_strip = static_cast<std::int64_t>(blockIdx.x) * strips;
    const int present = static_cast<int>(min(static_cast<std::int64_t>(strips), shape.strips - first_strip));
    const auto copy = [&](int i) {
        if (i < present) {
            const std::int64_t image = (first_strip + i) / shape.strip_rows;
            const int strip_row = static_cast<int>((first_strip + i) % shape.strip_rows);
            const unsigned char* from = pixels + image * 3 * shape.height * shape.width +
                                        static_cast<std::int64_t>(strip_row) * strip_bytes;
            copy_strip(staging + i % 2 * strip_space, from, strip_bytes, copy_bytes);
        }
        commit_copies();
    };
    copy(0);
    for (int i = 0; i < present; ++i) {
        copy(i + 1);
        wait_copies<1>();
        __syncthreads();
        expand_strip<T, kPairs>(patches + i * shape.strip_patches * pitch, pitch, staging + i % 2 * strip_space, shape,
                                normalisation);
        __syncthreads();
    }

    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int warp_row = warp / 4 * 16 * kRowTiles, warp_column = warp % 4 * 8 * kColumnTiles;
    const int depth_steps = shape.padded_depth / kDepth;
    const int first_tile = blockIdx.y * column_tiles;
    const int tiles = min(column_tiles, (shape.columns + kColumns - 1) / kColumns - first_tile);
    const int steps = tiles * depth_steps;
    T* stages = reinterpret_cast<T*>(staging);
    // One walk over all stages of all tiles: the next tile's weight is on its way while this one is finished.
    const auto fetch = [&](int step) {
        if (step < steps) {
            T* stage = stages + step % kStages * kDepth * kWeightPitch;
            const int first_depth = step % depth_steps * kDepth;
            const int first_column = (first_tile + step / depth_steps) * kColumns;
            for (int i = threadIdx.x; i < kDepth * kColumns / 8; i += kThreads) {
                const int row = i / (kColumns / 8), column = i % (kColumns / 8) * 8;
                const bool inside = first_depth + row < shape.depth && first_column + column < shape.columns;
                const T* from = weight + (inside ? (first_depth + row) * shape.columns + first_column + column : 0);
                copy_async<16>(stage + row * kWeightPitch + column, from, inside);
            }
        }
        commit_copies();
    };
    for (int step = 0; step < kStages - 1; ++step) {
        fetch(step);
    }

    float sums[kRowTiles][kColumnTiles][4] = {};
    int depth_step = 0, tile = first_tile;
    for (int step = 0; step < steps; ++step) {
        wait_copies<kStages - 2>();
        __syncthreads();  // this stage is there for all; and all are done with the one that is fetched into now
        fetch(step + kStages - 1);
        const T* stage = stages + step % kStages * kDepth * kWeightPitch;
        std::uint32_t a[kRowTiles][4];
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
            const int row = warp_row + 16 * i + lane % 16;
            load_matrices(a[i], patches + row * pitch + depth_step * kDepth + lane / 16 * 8);
        }
#pragma unroll
        for (int j = 0; j < kColumnTiles; j += 2) {
            std::uint32_t b[4];
            load_matrices_transposed(b, stage + lane % 16 * kWeightPitch + warp_column + 8 * j + lane / 16 * 8);
#pragma unroll
            for (int i = 0; i < kRowTiles; ++i) {
                multiply_add<T>(sums[i][j], a[i], b[0], b[1]);
                multiply_add<T>(sums[i][j + 1], a[i], b[2], b[3]);
            }
        }
        if (++depth_step < depth_steps) {
            continue;
        }
        // The tile is done.
#pragma unroll
        for (int i = 0; i < 2 * kRowTiles; ++i) {
            const int row = warp_row + 8 * i + lane / 4;
            const int strip = row / shape.strip_patches;
            if (strip < present) {
                const std::int64_t image = (first_strip + strip) / shape.strip_rows;
                const int strip_row = static_cast<int>((first_strip + strip) % shape.strip_rows);
                const int token = 1 + strip_row * shape.strip_patches + row % shape.strip_patches;
                const int tokens = 1 + shape.strip_rows * shape.strip_patches;
                T* z_row = z + (image * tokens + token) * shape.columns;
                const T* position_row = position + static_cast<std::int64_t>(token) * shape.columns;
#pragma unroll
                for (int j = 0; j < kColumnTiles; ++j) {
                    const int column = tile * kColumns + warp_column + 8 * j + lane % 4 * 2;
                    if (column < shape.columns) {
                        auto pair = *reinterpret_cast<const Vector<T, 2>*>(position_row + column);
#pragma unroll
                        for (int k = 0; k < 2; ++k) {
                            pair.values[k] = from_float<T>(sums[i / 2][j][i % 2 * 2 + k] + to_float(pair.values[k]));
                        }
                        *reinterpret_cast<Vector<T, 2>*>(z_row + column) = pair;
                    }
                }
            }
        }
#pragma unroll
        for (int i = 0; i < kRowTiles * kColumnTiles * 4; ++i) {
            sums[i / (kColumnTiles * 4)][i / 4 % kColumnTiles][i % 4] = 0.0f;
        }
        depth_step = 0;
        ++tile;
    }
}

// The norm of one row, in place; it stays in registers between its mean, its variance and its result. The first row of
// an image is made here: cls + position[0].
template <typename T, int kPacks>
__global__ void __launch_bounds__(kNormThreads)
    token_norm_kernel(T* rows, const T* __restrict__ cls, const T* __restrict__ position,
                      const T* __restrict__ norm_weight, const T* __restrict__ norm_bias, const int tokens,
                      const int columns, const float eps) {
    using Pack = Vector<T, kNormElements>;
    __shared__ float partial[2][kNormThreads / kWarp];
    T* row = rows + static_cast<std::int64_t>(blockIdx.x) * columns;
    const bool is_cls = blockIdx.x % tokens == 0;
    float values[kPacks][kNormElements];
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
        const int column = (i * kNormThreads + threadIdx.x) * kNormElements;
        if (column < columns) {
            const Pack pack = *reinterpret_cast<const Pack*>((is_cls ? cls : row) + column);
            const Pack added = *reinterpret_cast<const Pack*>(position + column);
#pragma unroll
            for (int k = 0; k < kNormElements; ++k) {
                float value = to_float(pack.values[k]);
                if (is_cls) {  // rounded as the other rows of z are
                    value = to_float(from_float<T>(value + to_float(added.values[k])));
                }
                values[i][k] = value;
                sum += value;
            }
        }
    }
    const float mean = block_sum(sum, partial[0]) / static_cast<float>(columns);
    float square = 0.0f;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
        if ((i * kNormThreads + threadIdx.x) * kNormElements < columns) {
#pragma unroll
            for (int k = 0; k < kNormElements; ++k) {
                values[i][k] -= mean;
                square += values[i][k] * values[i][k];
            }
        }
    }
    const float scale = rsqrtf(block_sum(square, partial[1]) / static_cast<float>(columns) + eps);
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
        const int column = (i * kNormThreads + threadIdx.x) * kNormElements;
        if (column < columns) {
            const Pack factor = *reinterpret_cast<const Pack*>(norm_weight + column);
            const Pack offset = *reinterpret_cast<const Pack*>(norm_bias + column);
            Pack pack;
#pragma unroll
            for (int k = 0; k < kNormElements; ++k) {
                pack.values[k] =
                    from_float<T>(values[i][k] * scale * to_float(factor.values[k]) + to_float(offset.values[k]));
            }
            *reinterpret_cast<Pack*>(row + column) = pack;
        }
    }
}

Shape shape_of(const PatchEmbedArguments& a) {
    Shape shape;
    shape.height = static_cast<int>(a.height);
    shape.width = static_cast<int>(a.width);
    shape.patch = static_cast<int>(a.patch);
    shape.columns = static_cast<int>(a.columns);
    shape.strip_rows = shape.height / shape.patch;
    shape.strip_patches = shape.width / shape.patch;
    shape.strips = a.images * shape.strip_rows;
    shape.depth = 3 * shape.patch * shape.patch;
    shape.padded_depth = padded(shape.depth, kDepth);
    return shape;
}

int shared_bytes(const Shape& shape, int row_tiles) {
    const int patches = 2 * 16 * row_tiles * (shape.padded_depth + kPad) * 2;
    const int strips = 2 * padded(shape.patch * shape.width * 3, 16);
    const int stages = kStages * kDepth * kWeightPitch * 2;
    return patches + std::max(strips, stages);
}

template <typename T, int kRowTiles, bool kPairs>
cudaError_t launch_product(const PatchEmbedArguments& a, const PatchEmbedPlan& plan, cudaStream_t stream) {
    const auto kernel = patch_embed_kernel<T, kRowTiles, kPairs>;
    const cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes);
    if (status != cudaSuccess) {
        return status;
    }
    Normalisation normalisation;
    for (int i = 0; i < 3; ++i) {
        normalisation.scale[i] = static_cast<float>(1.0 / (255.0 * a.std[i]));
        normalisation.shift[i] = static_cast<float>(-a.mean[i] / a.std[i]);
    }
    const dim3 grid(static_cast<unsigned>(plan.row_blocks), static_cast<unsigned>(plan.column_blocks));
    kernel<<<grid, kThreads, plan.shared_bytes, stream>>>(
        reinterpret_cast<T*>(a.output), reinterpret_cast<const unsigned char*>(a.pixels),
        reinterpret_cast<const T*>(a.weight), reinterpret_cast<const T*>(a.position), shape_of(a), normalisation,
        plan.strips, plan.column_tiles, plan.copy_bytes);
    return cudaGetLastError();
}

template <typename T, bool kPairs>
cudaError_t launch_product(const PatchEmbedArguments& a, const PatchEmbedPlan& plan, cudaStream_t stream) {
    switch (plan.row_tiles) {
        case 1:
            return launch_product<T, 1, kPairs>(a, plan, stream);
        case 2:
            return launch_product<T, 2, kPairs>(a, plan, stream);
        default:
            return launch_product<T, 3, kPairs>(a, plan, stream);
    }
}

template <typename T, int kPacks>
cudaError_t launch_norm(const PatchEmbedArguments& a, cudaStream_t stream) {
    const Shape shape = shape_of(a);
    const int tokens = 1 + shape.strip_rows * shape.strip_patches;
    token_norm_kernel<T, kPacks><<<static_cast<unsigned>(a.images * tokens), kNormThreads, 0, stream>>>(
        reinterpret_cast<T*>(a.output), reinterpret_cast<const T*>(a.cls), reinterpret_cast<const T*>(a.position),
        reinterpret_cast<const T*>(a.norm_weight), reinterpret_cast<const T*>(a.norm_bias), tokens, shape.columns,
        static_cast<float>(a.eps));
    return cudaGetLastError();
}

template <typename T>
cudaError_t launch(const PatchEmbedArguments& a, const PatchEmbedPlan& plan, cudaStream_t stream) {
    const cudaError_t status =
        plan.pixel_pairs ? launch_product<T, true>(a, plan, stream) : launch_product<T, false>(a, plan, stream);
    if (status != cudaSuccess) {
        return status;
    }
    const std::int64_t pack = kNormThreads * kNormElements;
    if (a.columns <= pack) {
        return launch_norm<T, 1>(a, stream);
    }
    return a.columns <= 2 * pack ? launch_norm<T, 2>(a, stream) : launch_norm<T, kMaxPacks>(a, stream);
}

}  // namespace

PatchEmbedPlan plan_patch_embed(const PatchEmbedArguments& a) {
    require(a.dtype != DType::float32, "dtype is float32; the tensor cores take float16 and bfloat16");
    check_range("images", a.images, 0, INT32_MAX);
    check_range("patch", a.patch, 1, 1024);
    check_range("height", a.height, a.patch, 1 << 14);
    check_range("width", a.width, a.patch, 1 << 14);
    check_range("columns", a.columns, 1, kNormThreads * kNormElements * kMaxPacks);
    require(a.columns % 8 == 0, "columns is " + std::to_string(a.columns) + ", not a multiple of 8");
    check_range("multiprocessors", a.multiprocessors, 1, 1 << 16);
    require(a.eps >= 0, "eps is " + std::to_string(a.eps) + "; it must be 0 or more");  // NaN fails, too
    for (double deviation : a.std) {
        require(deviation > 0, "std has " + std::to_string(deviation) + "; it must be more than 0");
    }
    const Shape shape = shape_of(a);
    const std::int64_t rows = a.images * (1 + std::int64_t{shape.strip_rows} * shape.strip_patches);
    require(rows <= INT32_MAX, "images is " + std::to_string(a.images) + ": more than 2147483647 tokens");

    PatchEmbedPlan plan{};
    const int tiles = (shape.columns + kColumns - 1) / kColumns;
    // The largest blocks that still give every multiprocessor one: first the columns are shared out, then the rows.
    for (int row_tiles = kMaxRowTiles; row_tiles >= 1 && plan.row_blocks * plan.column_blocks < a.multiprocessors;
         --row_tiles) {
        const int strips = 2 * 16 * row_tiles / shape.strip_patches;
        const int bytes = shared_bytes(shape, row_tiles);
        if (strips == 0 || bytes > kMaxShared) {
            continue;
        }
        for (int column_tiles = tiles; column_tiles >= 1; --column_tiles) {
            plan.strips = strips;
            plan.row_tiles = row_tiles;
            plan.column_tiles = column_tiles;
            plan.row_blocks = (shape.strips + strips - 1) / strips;
            plan.column_blocks = (tiles + column_tiles - 1) / column_tiles;
            plan.shared_bytes = bytes;
            if (plan.row_blocks * plan.column_blocks >= a.multiprocessors) {
                break;
            }
        }
    }
    require(plan.strips > 0, "width " + std::to_string(a.width) + " with patch " + std::to_string(a.patch) +
                                 " makes a strip of " + std::to_string(shape.strip_patches) + " patches of " +
                                 std::to_string(shape.depth) + " numbers, which does not fit into shared memory");
    const std::int64_t image_bytes = 3 * a.height * a.width, strip_bytes = 3 * a.patch * a.width;
    const auto aligned = [&](int bytes) {
        return a.pixels % bytes == 0 && image_bytes % bytes == 0 && strip_bytes % bytes == 0;
    };
    plan.copy_bytes = aligned(16) ? 16 : aligned(4) ? 4 : 1;
    plan.pixel_pairs = a.patch % 2 == 0 && a.width % 2 == 0;
    if (a.images > 0) {  // empty tensors have null pointers
        check_pointer("pixels", a.pixels, 1);
        check_pointer("output", a.output, 16);
        check_pointer("weight", a.weight, 16);
        check_pointer("cls", a.cls, 16);
        check_pointer("position", a.position, 16);
        check_pointer("norm_weight", a.norm_weight, 16);
        check_pointer("norm_bias", a.norm_bias, 16);
    }
    return plan;
}

cudaError_t launch_patch_embed(const PatchEmbedArguments& arguments, cudaStream_t stream) {
    const PatchEmbedPlan plan = plan_patch_embed(arguments);
    if (plan.row_blocks == 0) {
        return cudaSuccess;
    }
    return arguments.dtype == DType::float16 ? launch<__half>(arguments, plan, stream)
                                             : launch<__nv_bfloat16>(arguments, plan, stream);
}

}  // namespace llava_fast
