// What a kernel of csrc/ sees of the emulated GPU. emulated.py includes this file in every source that it translates,
// and turns the syntax that g++ does not know (launches, inline PTX, shared memory) into calls of what is here.
#pragma once

#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

template <typename T>
T min(T a, T b) {
    return b < a ? b : a;
}
template <typename T>
T max(T a, T b) {
    return a < b ? b : a;
}
inline float rsqrtf(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }

void __syncthreads(int line = __builtin_LINE());
std::size_t __cvta_generic_to_shared(const void* pointer);

namespace emulator {

// ---- launches

void run(dim3 grid, dim3 block, std::size_t shared_bytes, const void* kernel, void (*call)(const void*),
         const void* arguments, std::size_t argument_bytes);

struct Configuration {
    dim3 grid, block;
    std::size_t shared_bytes;

    template <typename... Parameters, typename... Arguments>
    void operator()(void (*kernel)(Parameters...), Arguments... arguments) const {
        using Call = std::pair<void (*)(Parameters...), std::tuple<Parameters...>>;
        const Call call(kernel, std::tuple<Parameters...>(arguments...));
        run(
            grid, block, shared_bytes, reinterpret_cast<const void*>(kernel),
            [](const void* of) {
                const Call call = *static_cast<const Call*>(of);  // each thread has its own parameters
                std::apply(call.first, call.second);
            },
            &call, sizeof(call));
    }
};

inline Configuration configured(dim3 grid, dim3 block, std::size_t shared_bytes, cudaStream_t) {
    return {grid, block, shared_bytes};
}

// ---- shared memory

void* dynamic_shared();
void* static_shared(int line, std::size_t bytes);  // the same for all threads of a block

// ---- warps

std::uint32_t shuffle(std::uint32_t bits, int lane, unsigned mask, int line);
int lane();

// ---- inline PTX

struct Operand {
    void* address;
    bool readable = false, writable = false;
};

template <char kConstraint, typename T>
Operand operand(T& value, bool readable, bool writable) {
    static_assert(kConstraint == 'r'   ? sizeof(T) == 4 && !std::is_floating_point_v<T>
                  : kConstraint == 'f' ? std::is_same_v<std::remove_const_t<T>, float>
                  : kConstraint == 'l' ? sizeof(T) == 8
                                       : kConstraint == 'n' && std::is_same_v<std::remove_const_t<T>, int>);
    return {const_cast<void*>(static_cast<const void*>(&value)), readable, writable};
}
template <char kConstraint, typename T>
Operand output(T& value) {
    return operand<kConstraint>(value, false, true);
}
template <char kConstraint, typename T>
Operand in_out(T& value) {
    return operand<kConstraint>(value, true, true);
}
template <char kConstraint, typename T>
Operand input(const T& value) {
    return operand<kConstraint>(value, true, false);
}

struct Parsed;

// One instruction, read from its text once.
class Instruction {
  public:
    explicit Instruction(const char* text);
    ~Instruction();

    template <typename... Operands>
    [[gnu::always_inline]] void operator()(Operands... operands) const {
        const Operand list[sizeof...(operands) + 1] = {operands...};
        execute(list);
    }

    const Parsed& form() const { return *parsed; }

  private:
    void execute(const Operand* operands) const;

    const Parsed* parsed;
};

}  // namespace emulator

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int line = __builtin_LINE()) {
    static_assert(sizeof(T) == 4);
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    bits = emulator::shuffle(bits, emulator::lane() ^ lane_mask, mask, line);
    std::memcpy(&value, &bits, 4);
    return value;
}
