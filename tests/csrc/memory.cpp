// What a thread may touch: its stack, the block's shared memory, and the allocations that were announced. g++ calls
// __tsan_read4 and the like, below, before each access of the kernels (-fsanitize=thread, without its runtime).
//
// A byte of shared memory is NaN until it is written, and again while cp.async is copying to it. Two threads of a block
// race for a byte if one writes it and no barrier lies between their accesses; two blocks of a launch, in any case.
#include <algorithm>
#include <cstdlib>
#include <map>

#include "machine.h"

namespace emulator {
namespace {

enum class Content : std::uint8_t { nothing, data, on_its_way };

constexpr std::int16_t kNobody = -1, kSeveral = -2;

struct Byte {
    std::uint32_t write_time = 0, read_time = 0;  // the interval between barriers; they are counted over all launches
    std::int16_t writer = kNobody, reader = kNobody;
    Content content = Content::nothing;
};

struct Region {
    std::string name;
    std::uintptr_t begin;
    std::size_t bytes;
    bool writable, shared;
    std::vector<Byte> state;  // where it is writable
};

constexpr std::size_t kArena = 256 << 10, kGuard = 256;  // a region of shared memory begins at bank 0

char* const arena = static_cast<char*>(std::aligned_alloc(1024, kArena));
std::size_t arena_used;
std::vector<Region> shared_regions, global_regions;
std::map<int, std::uintptr_t> statics;  // by line
std::uintptr_t parameters;
std::size_t parameter_bytes;
std::uint32_t now = 1, block_began, launch_began;

using Lanes = std::array<std::vector<std::uintptr_t>, kWarp>;
struct Site {
    std::size_t bytes;
    std::array<Lanes, kWarp> warps;
};
// That have accessed shared memory since the warp last came together; with the thread's number of
// cp.async.commit_group before: it tells two calls of a loop apart, which some lanes leave earlier than others.
std::map<std::pair<void*, int>, Site> sites;
std::map<void*, int> most_ways;  // of an access of a warp: 1 where no two lanes need different words of a bank

bool inside(std::uintptr_t address, std::size_t bytes, std::uintptr_t begin, std::size_t length) {
    return address >= begin && address + bytes <= begin + length;
}

Region* region_of(std::uintptr_t address, std::size_t bytes) {
    for (auto* regions : {&shared_regions, &global_regions}) {
        for (Region& region : *regions) {
            if (inside(address, bytes, region.begin, region.bytes)) {
                return &region;
            }
        }
    }
    return nullptr;
}

void add_shared(const std::string& name, std::size_t bytes) {
    const auto begin = reinterpret_cast<std::uintptr_t>(arena) + arena_used + kGuard;
    shared_regions.push_back({name, begin, bytes, true, true, std::vector<Byte>(bytes)});
    arena_used += kGuard + (bytes + kGuard - 1) / kGuard * kGuard;
    if (arena_used + kGuard > kArena) {
        fail(name + " does not fit into shared memory", __builtin_return_address(0));
    }
}

std::string described(const char* verb, std::size_t bytes, const Region& region, std::uintptr_t address) {
    return std::string(verb) + " " + std::to_string(bytes) + " bytes at " + std::to_string(address - region.begin) +
           " of " + region.name;
}

bool is_concurrent(std::uint32_t time, std::int16_t who) {
    return time >= launch_began && (time < block_began || (time == now && who != current->index));
}

void read(Region& region, std::uintptr_t address, std::size_t bytes, void* site, bool poison_allowed) {
    const auto me = static_cast<std::int16_t>(current->index);
    for (std::size_t i = 0; i < bytes; ++i) {
        Byte& byte = region.state[address - region.begin + i];
        if (byte.content == Content::on_its_way) {
            fail(described("reads", bytes, region, address) + ", which cp.async has not been waited for to copy", site);
        }
        if (byte.content == Content::nothing && !poison_allowed) {
            fail(described("reads", bytes, region, address) + ", which nobody has written", site);
        }
        if (is_concurrent(byte.write_time, byte.writer)) {
            fail(described("reads", bytes, region, address) + ", which thread " + std::to_string(byte.writer) +
                     " has written with no barrier between: a race",
                 site);
        }
        byte.reader = byte.read_time == now && byte.reader != me ? kSeveral : me;
        byte.read_time = now;
    }
}

void write(Region& region, std::uintptr_t address, std::size_t bytes, void* site, Content content) {
    const auto me = static_cast<std::int16_t>(current->index);
    for (std::size_t i = 0; i < bytes; ++i) {
        Byte& byte = region.state[address - region.begin + i];
        if (byte.content == Content::on_its_way) {
            fail(described("writes", bytes, region, address) + ", to which cp.async is copying", site);
        }
        for (const auto& [time, who, verb] : {std::tuple(byte.write_time, byte.writer, "written"),
                                              std::tuple(byte.read_time, byte.reader, "read")}) {
            if (is_concurrent(time, who)) {
                fail(described("writes", bytes, region, address) + ", which " +
                         (who == kSeveral ? "other threads have " : "thread " + std::to_string(who) + " has ") + verb +
                         " with no barrier between: a race",
                     site);
            }
        }
        byte.writer = me;
        byte.write_time = now;
        byte.content = content;
    }
}

}  // namespace

void begin_launch(const void* arguments, std::size_t bytes) {
    parameters = reinterpret_cast<std::uintptr_t>(arguments);
    parameter_bytes = bytes;
    launch_began = ++now;
}

void begin_block(std::size_t dynamic_bytes) {
    block_began = ++now;
    std::fill(arena, arena + kArena, '\xff');  // NaN in every floating type
    shared_regions.clear();
    sites.clear();
    statics.clear();
    arena_used = 0;
    add_shared("dynamic shared memory", dynamic_bytes);
}

void end_interval() { ++now; }

void* dynamic_shared() { return reinterpret_cast<void*>(shared_regions[0].begin); }

void* static_shared(int line, std::size_t bytes) {
    if (statics.count(line) == 0) {
        add_shared("the shared array of line " + std::to_string(line), bytes);
        statics[line] = shared_regions.back().begin;
    }
    return reinterpret_cast<void*>(statics[line]);
}

std::uintptr_t shared_pointer(std::uint32_t address) { return reinterpret_cast<std::uintptr_t>(arena) + address; }

void check_access(std::uintptr_t address, std::size_t bytes, bool write_it, void* site, bool poison_allowed) {
    if (inside(address, bytes, reinterpret_cast<std::uintptr_t>(current->stack), kStack)) {
        return;
    }
    const auto is_in = [=](const auto& object) {
        return inside(address, bytes, reinterpret_cast<std::uintptr_t>(&object), sizeof object);
    };
    if (!write_it && (is_in(threadIdx) || is_in(blockIdx) || is_in(blockDim) || is_in(gridDim) ||
                      inside(address, bytes, parameters, parameter_bytes))) {
        return;
    }
    const std::string verb = write_it ? "writes" : "reads";
    Region* region = region_of(address, bytes);
    if (region == nullptr) {
        std::string nearest;
        std::uintptr_t least = 1 << 20;
        for (const auto* regions : {&shared_regions, &global_regions}) {
            for (const Region& other : *regions) {
                const std::uintptr_t end = other.begin + other.bytes;
                const std::uintptr_t distance = address < other.begin ? other.begin - address : address + bytes - end;
                if (distance < least) {
                    least = distance;
                    nearest = std::to_string(distance) + " bytes " +
                              (address < other.begin ? "before " : "past the end of ") + other.name;
                }
            }
        }
        fail(verb + " " + std::to_string(bytes) + " bytes out of bounds" +
                 (nearest.empty() ? "" : ", " + nearest),
             site);
    }
    if (write_it && !region->writable) {
        fail(described("writes", bytes, *region, address) + ", which is an input", site);
    }
    if (region->writable) {
        write_it ? write(*region, address, bytes, site, Content::data)
                 : read(*region, address, bytes, site, poison_allowed);
    }
}

void check_shared(std::uintptr_t address, std::size_t bytes, void* site) {
    const Region* region = region_of(address, bytes);
    if (region == nullptr || !region->shared) {
        fail("an address of " + std::to_string(bytes) + " bytes out of bounds of shared memory", site);
    }
    if (address % bytes != 0) {
        fail(described("a misaligned address:", bytes, *region, address), site);
    }
}

// ---- banks: 32 of 4 bytes; of 16-byte accesses 8 lanes go together, of 8-byte ones 16

int bank_ways(const std::vector<std::uintptr_t>& addresses, std::size_t bytes) {
    int most = 1;
    const std::size_t together = bytes == 16 ? 8 : bytes == 8 ? 16 : 32;
    for (std::size_t first = 0; first < addresses.size(); first += together) {
        std::array<std::vector<std::uintptr_t>, 32> words;
        for (std::size_t i = first; i < std::min(first + together, addresses.size()); ++i) {
            for (std::uintptr_t word = addresses[i] / 4; word <= (addresses[i] + bytes - 1) / 4; ++word) {
                auto& of_bank = words[word % 32];
                if (std::find(of_bank.begin(), of_bank.end(), word) == of_bank.end()) {
                    of_bank.push_back(word);
                    most = std::max(most, static_cast<int>(of_bank.size()));
                }
            }
        }
    }
    return most;
}

void note_ways(void* site, int ways) { most_ways[site] = std::max(most_ways[site], ways); }

void count_banks(std::uintptr_t address, std::size_t bytes, void* site) {
    Site& of = sites[{site, current->commits}];
    of.bytes = bytes;
    of.warps[current->warp][current->lane].push_back(address);
}

void end_warp_interval(int warp) {
    std::vector<std::uintptr_t> addresses;
    for (auto& [key, of] : sites) {
        Lanes& lanes = of.warps[warp];
        for (std::size_t time = 0;; ++time) {  // the lanes' first accesses, their second ones …
            addresses.clear();
            for (const auto& of_lane : lanes) {
                if (time < of_lane.size()) {
                    addresses.push_back(of_lane[time]);
                }
            }
            if (addresses.empty()) {
                break;
            }
            note_ways(key.first, bank_ways(addresses, of.bytes));
        }
        for (auto& of_lane : lanes) {
            of_lane.clear();
        }
    }
}

// ---- cp.async

void begin_copy(const Copy& copy) {
    check_shared(copy.shared, copy.bytes, copy.site);
    if (copy.global % copy.bytes != 0) {
        fail("cp.async of " + std::to_string(copy.bytes) + " bytes from a misaligned address", copy.site);
    }
    if (copy.read > 0) {
        check_access(copy.global, copy.read, false, copy.site);
    }
    count_banks(copy.shared, copy.bytes, copy.site);
    write(*region_of(copy.shared, copy.bytes), copy.shared, copy.bytes, copy.site, Content::on_its_way);
    std::memset(reinterpret_cast<void*>(copy.shared), 0xff, copy.bytes);
}

void finish_copy(const Copy& copy) {
    Region& region = *region_of(copy.shared, copy.bytes);
    for (int i = 0; i < copy.bytes; ++i) {
        Byte& byte = region.state[copy.shared - region.begin + i];
        byte.write_time = now;
        byte.content = Content::data;
    }
    std::memset(reinterpret_cast<void*>(copy.shared), 0, copy.bytes);
    std::memcpy(reinterpret_cast<void*>(copy.shared), reinterpret_cast<const void*>(copy.global), copy.read);
}

namespace {

void access(std::uintptr_t address, std::size_t bytes, std::size_t alignment, bool write_it, void* site) {
    if (current == nullptr) {
        return;  // host code
    }
    if (address % alignment != 0) {
        fail((write_it ? "writes " : "reads ") + std::to_string(bytes) + " bytes at a misaligned address", site);
    }
    check_access(address, bytes, write_it, site);
    if (inside(address, bytes, reinterpret_cast<std::uintptr_t>(arena), kArena)) {
        count_banks(address, bytes, site);
    }
}

}  // namespace
}  // namespace emulator

std::size_t __cvta_generic_to_shared(const void* pointer) {
    const auto address = reinterpret_cast<std::uintptr_t>(pointer);
    emulator::check_shared(address, 1, __builtin_return_address(0));
    return address - reinterpret_cast<std::uintptr_t>(emulator::arena);
}

extern "C" {

// Memory of the device, which the caller has allocated. `is_written`: whether it has contents already.
void emulator_allocate(const char* name, std::uintptr_t address, std::size_t bytes, bool writable, bool is_written) {
    using namespace emulator;
    Byte byte;
    byte.content = is_written ? Content::data : Content::nothing;
    global_regions.push_back({name, address, bytes, writable, false, std::vector<Byte>(writable ? bytes : 0, byte)});
}

void emulator_forget() {
    emulator::global_regions.clear();
    emulator::most_ways.clear();
}

// Calls `take` for each place in the code that accesses shared memory, with the most ways of a bank conflict there.
void emulator_bank_conflicts(void (*take)(std::size_t site, int ways)) {
    for (const auto& [site, ways] : emulator::most_ways) {
        take(emulator::offset(site), ways);
    }
}

#define ACCESSES(BYTES)                                                                                       \
    void __tsan_read##BYTES(void* address) {                                                                  \
        emulator::access(reinterpret_cast<std::uintptr_t>(address), BYTES, BYTES, false,                      \
                         __builtin_return_address(0));                                                        \
    }                                                                                                         \
    void __tsan_write##BYTES(void* address) {                                                                 \
        emulator::access(reinterpret_cast<std::uintptr_t>(address), BYTES, BYTES, true,                       \
                         __builtin_return_address(0));                                                        \
    }                                                                                                         \
    void __tsan_unaligned_read##BYTES(void* address) {                                                        \
        emulator::access(reinterpret_cast<std::uintptr_t>(address), BYTES, 1, false,                          \
                         __builtin_return_address(0));                                                        \
    }                                                                                                         \
    void __tsan_unaligned_write##BYTES(void* address) {                                                       \
        emulator::access(reinterpret_cast<std::uintptr_t>(address), BYTES, 1, true,                           \
                         __builtin_return_address(0));                                                        \
    }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)

void __tsan_read_range(void* address, std::size_t bytes) {
    emulator::access(reinterpret_cast<std::uintptr_t>(address), bytes, 1, false, __builtin_return_address(0));
}
void __tsan_write_range(void* address, std::size_t bytes) {
    emulator::access(reinterpret_cast<std::uintptr_t>(address), bytes, 1, true, __builtin_return_address(0));
}
void __tsan_init() {}
}
