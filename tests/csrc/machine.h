// Inside of the emulator: threads as fibers (threads.cpp), memory with its checks (memory.cpp), PTX (ptx.cpp).
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <array>
#include <cstdint>
#include <deque>
#include <random>
#include <string>
#include <vector>

#include "emulator.h"

namespace emulator {

constexpr int kWarp = 32;

// A copy that cp.async has begun.
struct Copy {
    std::uintptr_t shared, global;
    int bytes, read;  // the rest is zeros
    void* site;
};

// Where all lanes of a warp must come together, and what they bring.
struct Request {
    const void* what = nullptr;  // an instruction; or null: a shuffle
    int line = 0;                // of a shuffle
    const Operand* operands = nullptr;
    std::uint32_t bits = 0;
    int source = 0;
    void* site = nullptr;
};

enum class State { ready, at_barrier, in_warp, done };

struct Thread {
    int index, warp, lane;
    dim3 threadIdx;
    State state;
    int barrier_line;
    Request request;
    int commits;  // of cp.async
    std::vector<Copy> begun;                // not committed yet
    std::deque<std::vector<Copy>> groups;  // committed, oldest first
    char* stack = nullptr;
    bool started = false;
    ucontext_t start;
    jmp_buf context;
};

constexpr std::size_t kStack = 1 << 16;

// ---- threads.cpp

extern Thread* current;                // the thread that runs; null in host code
extern std::vector<Thread> threads;  // of the block
extern std::mt19937 random_order;

std::size_t offset(void* site);  // in the library that it is in
[[noreturn]] void fail(const std::string& what, void* site);  // ends the launch; from a thread or for it
void wait_for_warp();                                           // returns when all lanes have, and the warp's work is done

// ---- memory.cpp: each byte of shared memory and of an output knows who wrote and read it last

void begin_launch(const void* arguments, std::size_t bytes);
void begin_block(std::size_t dynamic_bytes);
void end_interval();            // a barrier of the block
void end_warp_interval(int warp);  // its lanes have come together: counts bank conflicts

std::uintptr_t shared_pointer(std::uint32_t address);
// Before a thread's access; `poison_allowed` where unwritten bytes may be read, as NaN.
void check_access(std::uintptr_t address, std::size_t bytes, bool write, void* site, bool poison_allowed = false);
void check_shared(std::uintptr_t address, std::size_t bytes, void* site);
void count_banks(std::uintptr_t address, std::size_t bytes, void* site);
int bank_ways(const std::vector<std::uintptr_t>& addresses, std::size_t bytes);
void note_ways(void* site, int ways);
void begin_copy(const Copy& copy);
void finish_copy(const Copy& copy);

// ---- ptx.cpp

void run_warp(int warp);  // the request that all its lanes have made

}  // namespace emulator
