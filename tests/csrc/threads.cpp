// A block's threads are fibers. A warp that may go on is drawn, and in it lane after lane, in random order, up to the
// next place where the warp or the block comes together. So does each block of a launch, in random order.
#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <map>
#include <sstream>
#include <stdexcept>

#include "machine.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

Thread* current;
std::vector<Thread> threads;
std::mt19937 random_order;

namespace {

constexpr std::size_t kDefaultShared = 48 << 10, kMostShared = 163 << 10;  // sm_80's

std::map<const void*, std::size_t> shared_limits;  // of the kernels that may have more than the default
cudaError_t last_error;
jmp_buf scheduler;
std::string failure;
void (*kernel_call)(const void*);
const void* kernel_arguments;

void leave(State state) {
    current->state = state;
    if (!_setjmp(current->context)) {
        _longjmp(scheduler, 1);
    }
}

void fiber() {
    for (;;) {
        kernel_call(kernel_arguments);
        leave(State::done);
    }
}

void enter(Thread& thread) {
    current = &thread;
    threadIdx = thread.threadIdx;
    if (!_setjmp(scheduler)) {
        if (thread.started) {
            _longjmp(thread.context, 1);
        }
        thread.started = true;
        setcontext(&thread.start);
    }
    current = nullptr;
    if (!failure.empty()) {
        const std::string message = failure;
        failure.clear();
        for (Thread& other : threads) {  // they never return
            other.started = false;
        }
        throw std::runtime_error(message);
    }
}

void make_threads(dim3 block) {
    const std::size_t count = block.x * block.y * block.z;
    while (threads.size() < count) {
        Thread thread{};
        thread.index = static_cast<int>(threads.size());
        thread.warp = thread.index / kWarp;
        thread.lane = thread.index % kWarp;
        thread.stack = static_cast<char*>(
            mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        threads.push_back(thread);
    }
    for (Thread& thread : threads) {
        const unsigned i = thread.index;
        thread.threadIdx = dim3(i % block.x, i / block.x % block.y, i / block.x / block.y);
        thread.state = i < count ? State::ready : State::done;
        thread.commits = 0;
        thread.begun.clear();
        thread.groups.clear();
        if (!thread.started) {
            getcontext(&thread.start);
            thread.start.uc_stack.ss_sp = thread.stack;
            thread.start.uc_stack.ss_size = kStack;
            thread.start.uc_link = nullptr;
            makecontext(&thread.start, fiber, 0);
        }
    }
}

bool all_of(int first, int count, State state) {
    return std::all_of(threads.begin() + first, threads.begin() + first + count,
                       [=](const Thread& thread) { return thread.state == state; });
}

// All lanes up to the next place where they wait; those that wait together go on together.
void advance(int warp) {
    std::array<int, kWarp> lanes;
    for (int i = 0; i < kWarp; ++i) {
        lanes[i] = warp * kWarp + i;
    }
    std::shuffle(lanes.begin(), lanes.end(), random_order);
    for (const int i : lanes) {
        if (threads[i].state == State::ready) {
            enter(threads[i]);
        }
    }
    if (!all_of(warp * kWarp, kWarp, State::in_warp)) {
        return;
    }
    const Request& first = threads[warp * kWarp].request;
    for (int i = 0; i < kWarp; ++i) {
        const Request& request = threads[warp * kWarp + i].request;
        if (request.what != first.what || request.line != first.line) {
            fail("the lanes of a warp are at different instructions", request.site);
        }
    }
    run_warp(warp);
    end_warp_interval(warp);
    for (int i = 0; i < kWarp; ++i) {
        threads[warp * kWarp + i].state = State::ready;
    }
}

void pass_barrier(int count) {
    for (int i = 0; i < count; ++i) {
        const Thread &thread = threads[i], &first = threads[0];
        if (thread.barrier_line != first.barrier_line) {
            fail("threads wait at different barriers, in lines " + std::to_string(first.barrier_line) + " and " +
                     std::to_string(thread.barrier_line),
                 thread.request.site);
        }
        threads[i].state = State::ready;
    }
    for (int warp = 0; warp < count / kWarp; ++warp) {
        end_warp_interval(warp);
    }
    end_interval();
}

void run_block(int count) {
    std::vector<int> ready;
    for (;;) {
        ready.clear();
        for (int warp = 0; warp < count / kWarp; ++warp) {
            const auto begin = threads.begin() + warp * kWarp;
            if (std::any_of(begin, begin + kWarp, [](const Thread& t) { return t.state == State::ready; })) {
                ready.push_back(warp);
            }
        }
        if (!ready.empty()) {
            advance(ready[random_order() % ready.size()]);
        } else if (all_of(0, count, State::at_barrier)) {
            pass_barrier(count);
        } else if (all_of(0, count, State::done)) {
            break;
        } else {
            const auto waiting =
                std::find_if(threads.begin(), threads.begin() + count,
                             [](const Thread& t) { return t.state == State::at_barrier || t.state == State::in_warp; });
            current = &*waiting;
            fail(waiting->state == State::at_barrier ? "a barrier that other threads of the block do not reach"
                                                     : "an instruction of the warp that other lanes do not reach",
                 waiting->request.site);
        }
    }
    for (int warp = 0; warp < count / kWarp; ++warp) {
        end_warp_interval(warp);
    }
}

}  // namespace

std::size_t offset(void* site) {
    Dl_info library;
    dladdr(site, &library);
    return static_cast<char*>(site) - static_cast<char*>(library.dli_fbase);
}

int lane() { return current->lane; }

void fail(const std::string& what, void* site) {
    std::string who;
    if (current != nullptr) {
        who = "thread " + std::to_string(current->index) + " of block (" + std::to_string(blockIdx.x) + ", " +
              std::to_string(blockIdx.y) + "): ";
    }
    std::ostringstream message;
    message << who << what << " at 0x" << std::hex << offset(site);
    const bool in_fiber = current != nullptr && current->state == State::ready;
    if (in_fiber) {
        failure = message.str();
        _longjmp(scheduler, 1);
    }
    current = nullptr;
    for (Thread& thread : threads) {
        thread.started = false;
    }
    throw std::runtime_error(message.str());
}

void wait_for_warp() { leave(State::in_warp); }

std::uint32_t shuffle(std::uint32_t bits, int source, unsigned mask, int line) {
    void* site = __builtin_return_address(0);
    if (mask != 0xffffffffu) {
        fail("a shuffle of some lanes only, which the emulator does not know", site);
    }
    current->request = {nullptr, line, nullptr, bits, source, site};
    wait_for_warp();
    return current->request.bits;
}

void run(dim3 grid, dim3 block, std::size_t shared_bytes, const void* kernel, void (*call)(const void*),
         const void* arguments, std::size_t argument_bytes) {
    const auto limit = shared_limits.find(kernel);
    const std::size_t most = limit == shared_limits.end() ? kDefaultShared : limit->second;
    const std::size_t count = block.x * block.y * block.z, blocks = std::size_t{grid.x} * grid.y * grid.z;
    if (count == 0 || count > 1024 || blocks == 0 || grid.y > 65535 || grid.z > 65535 || shared_bytes > most) {
        last_error = shared_bytes > most ? cudaErrorInvalidValue : cudaErrorInvalidConfiguration;
        return;
    }
    if (count % kWarp != 0) {
        throw std::runtime_error("a block of " + std::to_string(count) + " threads, which are not whole warps");
    }
    gridDim = grid;
    blockDim = block;
    kernel_call = call;
    kernel_arguments = arguments;
    begin_launch(arguments, argument_bytes);
    std::vector<std::size_t> order(blocks);
    for (std::size_t i = 0; i < blocks; ++i) {
        order[i] = i;
    }
    std::shuffle(order.begin(), order.end(), random_order);
    for (const std::size_t i : order) {
        blockIdx = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
        make_threads(block);
        begin_block(shared_bytes);
        run_block(static_cast<int>(count));
    }
}

}  // namespace emulator

void __syncthreads(int line) {
    emulator::current->barrier_line = line;
    emulator::current->request.site = __builtin_return_address(0);
    emulator::leave(emulator::State::at_barrier);
}

cudaError_t cudaGetDeviceCount(int* count) {
    *count = 1;
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
    *version = 13000;
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) { return cudaRuntimeGetVersion(version); }

cudaError_t cudaGetLastError() {
    const cudaError_t error = emulator::last_error;
    emulator::last_error = cudaSuccess;
    return error;
}

const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorInvalidConfiguration ? "invalid configuration argument" : "invalid argument";
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
    if (value < 0 || static_cast<std::size_t>(value) > emulator::kMostShared) {
        return cudaErrorInvalidValue;
    }
    emulator::shared_limits[kernel] = value;
    return cudaSuccess;
}

extern "C" void emulator_seed(unsigned seed) { emulator::random_order.seed(seed); }
