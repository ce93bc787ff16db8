// A fault for each of the emulator's detectors, and a correct kernel beside it. The comment names the line of the fault.
#include <stdexcept>
#include <string>

#include "common.cuh"
#include "mma.cuh"

namespace {

using namespace llava_fast;

constexpr int kThreads = 64;

using Kernel = void(float* out, const float* in);

__global__ void correct(float* out, const float* in) {
    __shared__ float values[kThreads];
    values[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = values[kThreads - 1 - threadIdx.x];
}

__global__ void read_too_early(float* out, const float* in) {
    __shared__ float values[kThreads];
    values[threadIdx.x] = 0.0f;
    __syncthreads();
    values[threadIdx.x] = in[threadIdx.x];              // the race, one way round
    out[threadIdx.x] = values[kThreads - 1 - threadIdx.x];  // the race, the other way round
}

__global__ void race_of_blocks(float* out, const float* in) {
    out[threadIdx.x] = in[threadIdx.x];  // both blocks
}

__global__ void unwritten(float* out, const float*) {
    __shared__ float values[kThreads];
    out[threadIdx.x] = values[threadIdx.x];  // unwritten
}

__global__ void shared_out_of_bounds(float*, const float*) {
    __shared__ float values[kThreads];
    values[threadIdx.x + 1] = 0.0f;  // out of bounds
}

__global__ void global_out_of_bounds(float* out, const float* in) {
    out[threadIdx.x] = in[threadIdx.x + 1];  // out of bounds
}

__global__ void before_the_beginning(float* out, const float*) {
    out[static_cast<int>(threadIdx.x) - 1] = 0.0f;  // out of bounds
}

__global__ void writes_an_input(float*, const float* in) {
    const_cast<float*>(in)[threadIdx.x] = 0.0f;  // input
}

__global__ void misaligned(float* out, const float* in) {
    using Pack = Vector<float, 4>;
    const Pack pack = *reinterpret_cast<const Pack*>(in + threadIdx.x % 8);  // misaligned
    *reinterpret_cast<Pack*>(out + 4 * (threadIdx.x % 8)) = pack;
}

__global__ void barrier_of_some(float*, const float*) {
    if (threadIdx.x < kThreads / 2) {
        __syncthreads();  // not reached by all
    }
}

__global__ void different_barriers(float*, const float*) {
    if (threadIdx.x < kThreads / 2) {
        __syncthreads();  // one barrier
    } else {
        __syncthreads();  // another one
    }
}

__global__ void shuffle_of_some(float* out, const float* in) {
    if (threadIdx.x % 2 == 0) {
        out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, in[threadIdx.x], 2);  // not reached by all
    }
}

__global__ void different_shuffles(float* out, const float* in) {
    if (threadIdx.x % 2 == 0) {
        out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, in[threadIdx.x], 1);  // one shuffle
    } else {
        out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, -in[threadIdx.x], 1);  // another one
    }
}

template <int kPending, bool kCommit, bool kBarrier>
__device__ void copy_and_read(float* out, const float* in) {
    __shared__ float values[2 * kThreads];
    values[threadIdx.x] = values[kThreads + threadIdx.x] = 0.0f;
    __syncthreads();
    for (int half = 0; half < 2; ++half) {
        copy_async<4>(values + half * kThreads + threadIdx.x, in + threadIdx.x, true);  // copied to
        if (kCommit) {
            commit_copies();
        }
    }
    wait_copies<kPending>();
    if (kBarrier) {
        __syncthreads();
    }
    out[threadIdx.x] = values[2 * kThreads - 1 - (threadIdx.x ^ !kBarrier)];  // copied
}

__global__ void correct_copy(float* out, const float* in) { copy_and_read<0, true, true>(out, in); }
__global__ void lower_wait(float* out, const float* in) { copy_and_read<1, true, true>(out, in); }
__global__ void no_commit(float* out, const float* in) { copy_and_read<0, false, true>(out, in); }
__global__ void no_barrier(float* out, const float* in) { copy_and_read<0, true, false>(out, in); }

__global__ void copy_over_a_copy(float*, const float* in) {
    __shared__ float values[kThreads];
    copy_async<4>(values + threadIdx.x, in + threadIdx.x, true);
    values[threadIdx.x] = 0.0f;  // while copying
}

__global__ void misaligned_copy(float*, const float* in) {
    __shared__ uint4 values[kThreads];
    copy_async<16>(values + threadIdx.x, in + threadIdx.x % 8, true);  // misaligned
}

__global__ void copy_out_of_bounds(float*, const float* in) {
    __shared__ uint4 values[kThreads];
    copy_async<16>(values + threadIdx.x, in + 4 * threadIdx.x, true);  // out of bounds
}

template <int kPitch>
__device__ void columns(float* out) {
    __shared__ float values[kWarp * kPitch];
    for (int i = 0; i < kWarp; ++i) {
        values[threadIdx.x % kWarp * kPitch + i] = 0.0f;  // by columns
        __syncthreads();
    }
    out[threadIdx.x] = values[threadIdx.x % kWarp];
}

__global__ void conflicts(float* out, const float*) { columns<kWarp>(out); }
__global__ void no_conflicts(float* out, const float*) { columns<kWarp + 1>(out); }

// A warp's product, D = A B: in [32 lanes, 6 registers], out [32 lanes, 4].
__global__ void product(float* out, const float* in) {
    const auto* registers = reinterpret_cast<const std::uint32_t*>(in) + 6 * threadIdx.x;
    const std::uint32_t a[4] = {registers[0], registers[1], registers[2], registers[3]};
    float sums[4] = {};
    multiply_add<__half>(sums, a, registers[4], registers[5]);
    for (int i = 0; i < 4; ++i) {
        out[4 * threadIdx.x + i] = sums[i];
    }
}

// Four matrices of 8 x 8 halves: in [4, 8, 8], out [32 lanes, 4 registers].
template <bool kTransposed>
__device__ void fragments(float* out, const float* in) {
    __shared__ uint4 rows[kWarp];
    rows[threadIdx.x] = reinterpret_cast<const uint4*>(in)[threadIdx.x];
    __syncthreads();
    std::uint32_t registers[4];
    if (kTransposed) {
        load_matrices_transposed(registers, rows + threadIdx.x);
    } else {
        load_matrices(registers, rows + threadIdx.x);
    }
    for (int i = 0; i < 4; ++i) {
        reinterpret_cast<std::uint32_t*>(out)[4 * threadIdx.x + i] = registers[i];
    }
}

__global__ void loaded(float* out, const float* in) { fragments<false>(out, in); }
__global__ void loaded_transposed(float* out, const float* in) { fragments<true>(out, in); }

__global__ void unknown_ptx(float*, const float*) {
    asm volatile("cp.async.wait_all;\n" ::: "memory");  // unknown
}

__global__ void writes_an_operand_of_ptx_that_is_an_input(float*, const float*) {
    __shared__ uint4 rows[kWarp];
    const std::uint32_t to = 0, row = shared_address(rows + threadIdx.x % kWarp);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%0,%0,%0}, [%1];" ::"r"(to), "r"(row));  // input
}

__global__ void too_much_shared(float* out, const float*) { out[threadIdx.x] = 0.0f; }

struct Planted {
    const char* name;
    Kernel* kernel;
    int blocks, threads, shared_bytes;
};

std::string message;

const Planted kPlanted[] = {
    {"correct", correct, 1, kThreads, 0},
    {"read_too_early", read_too_early, 1, kThreads, 0},
    {"unwritten", unwritten, 1, kThreads, 0},
    {"shared_out_of_bounds", shared_out_of_bounds, 1, kThreads, 0},
    {"global_out_of_bounds", global_out_of_bounds, 1, kThreads, 0},
    {"before_the_beginning", before_the_beginning, 1, kThreads, 0},
    {"writes_an_input", writes_an_input, 1, kThreads, 0},
    {"misaligned", misaligned, 1, kThreads, 0},
    {"barrier_of_some", barrier_of_some, 1, kThreads, 0},
    {"different_barriers", different_barriers, 1, kThreads, 0},
    {"shuffle_of_some", shuffle_of_some, 1, kThreads, 0},
    {"different_shuffles", different_shuffles, 1, kThreads, 0},
    {"correct_copy", correct_copy, 1, kThreads, 0},
    {"lower_wait", lower_wait, 1, kThreads, 0},
    {"no_commit", no_commit, 1, kThreads, 0},
    {"no_barrier", no_barrier, 1, kThreads, 0},
    {"copy_over_a_copy", copy_over_a_copy, 1, kThreads, 0},
    {"misaligned_copy", misaligned_copy, 1, kThreads, 0},
    {"copy_out_of_bounds", copy_out_of_bounds, 1, kThreads, 0},
    {"unknown_ptx", unknown_ptx, 1, kThreads, 0},
    {"writes_an_operand_of_ptx_that_is_an_input", writes_an_operand_of_ptx_that_is_an_input, 1, kThreads, 0},
    {"race_of_blocks", race_of_blocks, 2, kThreads, 0},
    {"conflicts", conflicts, 1, kWarp, 0},
    {"no_conflicts", no_conflicts, 1, kWarp, 0},
    {"product", product, 1, kWarp, 0},
    {"loaded", loaded, 1, kWarp, 0},
    {"loaded_transposed", loaded_transposed, 1, kWarp, 0},
    {"too_much_shared", too_much_shared, 1, kThreads, (48 << 10) + 1},
};

}  // namespace

// Launches a kernel by name; gives what the emulator or CUDA says to it, "" where it is content.
extern "C" const char* plant(const char* name, float* out, const float* in) {
    message.clear();
    try {
        for (const Planted& planted : kPlanted) {
            if (name == std::string(planted.name)) {
                const auto kernel = planted.kernel;
                kernel<<<planted.blocks, planted.threads, planted.shared_bytes, nullptr>>>(out, in);
                const cudaError_t status = cudaGetLastError();
                return status == cudaSuccess ? "" : cudaGetErrorString(status);
            }
        }
        message = "there is no kernel of this name";
    } catch (const std::runtime_error& error) {
        message = error.what();
    }
    return message.c_str();
}
