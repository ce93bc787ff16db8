// The PTX that csrc/ writes by hand: read from its text, and done as the PTX ISA says ("Data Movement and Conversion
// Instructions: cp.async, ldmatrix"; "Matrix Fragments for mma.m16n8k16 with floating point type").
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cctype>

#include "machine.h"

namespace emulator {

enum class Kind { copy, copy_16, commit, wait, load, load_transposed, multiply_bf16, multiply_f16, unknown };

struct Parsed {
    struct Term {
        bool is_register;
        int value;  // the number of an operand of the asm statement, or the constant itself
    };
    std::string opcode;
    Kind kind;
    std::vector<std::vector<Term>> operands;  // {%0, %1} is one operand of two registers
};

namespace {

struct Form {
    const char* opcode;
    Kind kind;
    std::vector<std::size_t> registers;  // of each operand
};

const Form kForms[] = {
    {"cp.async.ca.shared.global", Kind::copy, {1, 1, 1, 1}},
    {"cp.async.cg.shared.global", Kind::copy_16, {1, 1, 1, 1}},
    {"cp.async.commit_group", Kind::commit, {}},
    {"cp.async.wait_group", Kind::wait, {1}},
    {"ldmatrix.sync.aligned.m8n8.x4.shared.b16", Kind::load, {4, 1}},
    {"ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16", Kind::load_transposed, {4, 1}},
    {"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", Kind::multiply_bf16, {4, 4, 2, 4}},
    {"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", Kind::multiply_f16, {4, 4, 2, 4}},
};

Parsed parse(const std::string& text) {
    Parsed parsed;
    std::size_t at = text.find_first_of(" ;");
    parsed.opcode = text.substr(0, at);
    bool in_braces = false;
    for (; at < text.size() && text[at] != ';'; ++at) {
        if (text[at] == '{') {
            parsed.operands.emplace_back();
        }
        in_braces = text[at] == '{' || (in_braces && text[at] != '}');
        const bool is_register = text[at] == '%';
        if (is_register || std::isdigit(text[at])) {
            std::size_t digits;
            const int value = std::stoi(text.substr(at + is_register), &digits);
            if (!in_braces) {
                parsed.operands.emplace_back();
            }
            parsed.operands.back().push_back({is_register, value});
            at += is_register + digits - 1;
        }
    }
    std::vector<std::size_t> registers;
    for (const auto& operand : parsed.operands) {
        registers.push_back(operand.size());
    }
    for (const Form& form : kForms) {
        if (form.opcode == parsed.opcode && form.registers == registers) {
            parsed.kind = form.kind;
            return parsed;
        }
    }
    parsed.kind = Kind::unknown;
    return parsed;
}

template <typename T>
T& at(const Parsed& parsed, const Thread& thread, int operand, int part, bool write) {
    const Parsed::Term& term = parsed.operands[operand][part];
    const Operand& given = thread.request.operands[term.value];
    if (!(write ? given.writable : given.readable)) {
        fail(parsed.opcode + (write ? " writes an input, %" : " reads what is an output only, %") +
                 std::to_string(term.value),
             thread.request.site);
    }
    return *static_cast<T*>(given.address);
}

int integer(const Parsed& parsed, const Thread& thread, int operand) {
    const Parsed::Term& term = parsed.operands[operand][0];
    return term.is_register ? at<int>(parsed, thread, operand, 0, false) : term.value;
}

std::uintptr_t shared_operand(const Parsed& parsed, const Thread& thread, int operand) {
    return shared_pointer(at<std::uint32_t>(parsed, thread, operand, 0, false));
}

void finish_groups(Thread& thread, std::size_t pending) {
    while (thread.groups.size() > pending) {
        for (const Copy& copy : thread.groups.front()) {
            finish_copy(copy);
        }
        thread.groups.pop_front();
    }
}

// Lane 8m + r gives the address of row r of matrix m. Lane l gets, in register m, elements 2 (l % 4) and the next of row
// l / 4 of matrix m; transposed: of column l / 4.
void load_matrices(const Parsed& parsed, int warp, bool transposed) {
    Thread* lanes = &threads[warp * kWarp];
    std::uint16_t matrices[4][8][8];
    int ways = 1;
    for (int m = 0; m < 4; ++m) {
        std::vector<std::uintptr_t> rows;
        for (int r = 0; r < 8; ++r) {
            current = &lanes[8 * m + r];
            rows.push_back(shared_operand(parsed, *current, 1));
            check_shared(rows[r], 16, current->request.site);
            check_access(rows[r], 16, false, current->request.site, true);
            std::memcpy(matrices[m][r], reinterpret_cast<const void*>(rows[r]), 16);
        }
        ways = std::max(ways, bank_ways(rows, 16));
    }
    note_ways(lanes[0].request.site, ways);
    for (int l = 0; l < kWarp; ++l) {
        for (int m = 0; m < 4; ++m) {
            const int i = l / 4, j = l % 4 * 2;
            const std::uint32_t low = transposed ? matrices[m][j][i] : matrices[m][i][j];
            const std::uint32_t high = transposed ? matrices[m][j + 1][i] : matrices[m][i][j + 1];
            at<std::uint32_t>(parsed, lanes[l], 0, m, true) = low | high << 16;
        }
    }
}

float number(std::uint16_t bits, bool is_bf16) {
    static const std::vector<float> halves = [] {
        std::vector<float> values(1 << 16);
        for (std::size_t i = 0; i < values.size(); ++i) {
            values[i] = __half2float({static_cast<std::uint16_t>(i)});
        }
        return values;
    }();
    return is_bf16 ? __bfloat162float({bits}) : halves[bits];
}

// D [16, 8] = A [16, 16] B [16, 8] + C. With g = lane / 4 and t = lane % 4, registers of a lane hold
//     A: rows g, g + 8, g, g + 8, columns 2t and the next, 8 more in the last two registers
//     B: rows 2t and the next, 8 more in the second register, column g
//     C, D: row g, columns 2t and the next; then row g + 8
void multiply(const Parsed& parsed, int warp, bool is_bf16) {
    Thread* lanes = &threads[warp * kWarp];
    float a[16][16], b[16][8], c[16][8];
    for (int l = 0; l < kWarp; ++l) {
        const int g = l / 4, t = l % 4;
        for (int i = 0; i < 4; ++i) {
            const std::uint32_t pair = at<std::uint32_t>(parsed, lanes[l], 1, i, false);
            for (int half = 0; half < 2; ++half) {
                a[g + i % 2 * 8][2 * t + half + i / 2 * 8] = number(pair >> 16 * half, is_bf16);
            }
            c[g + i / 2 * 8][2 * t + i % 2] = at<float>(parsed, lanes[l], 3, i, false);
        }
        for (int i = 0; i < 2; ++i) {
            const std::uint32_t pair = at<std::uint32_t>(parsed, lanes[l], 2, i, false);
            for (int half = 0; half < 2; ++half) {
                b[2 * t + half + i * 8][g] = number(pair >> 16 * half, is_bf16);
            }
        }
    }
    for (int m = 0; m < 16; ++m) {
        for (int k = 0; k < 16; ++k) {
            for (int n = 0; n < 8; ++n) {
                c[m][n] += a[m][k] * b[k][n];
            }
        }
    }
    for (int l = 0; l < kWarp; ++l) {
        for (int i = 0; i < 4; ++i) {
            at<float>(parsed, lanes[l], 0, i, true) = c[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
        }
    }
}

}  // namespace

Instruction::Instruction(const char* text) : parsed(new Parsed(parse(text))) {}
Instruction::~Instruction() { delete parsed; }

void Instruction::execute(const Operand* operands) const {
    Request& request = current->request;
    request = {this, 0, operands, 0, 0, __builtin_return_address(0)};
    switch (parsed->kind) {
        case Kind::copy:
        case Kind::copy_16: {
            const Copy copy{shared_operand(*parsed, *current, 0), at<std::uintptr_t>(*parsed, *current, 1, 0, false),
                            integer(*parsed, *current, 2), integer(*parsed, *current, 3), request.site};
            const bool allowed =
                copy.bytes == 16 || (parsed->kind == Kind::copy && (copy.bytes == 4 || copy.bytes == 8));
            if (!allowed || copy.read < 0 || copy.read > copy.bytes) {
                fail(parsed->opcode + " of " + std::to_string(copy.bytes) + " bytes, " + std::to_string(copy.read) +
                         " read",
                     request.site);
            }
            begin_copy(copy);
            current->begun.push_back(copy);
            break;
        }
        case Kind::commit:
            ++current->commits;
            current->groups.push_back(std::move(current->begun));
            current->begun.clear();
            break;
        case Kind::wait:
            finish_groups(*current, integer(*parsed, *current, 0));
            break;
        case Kind::unknown:
            fail("PTX that the emulator does not know: " + parsed->opcode, request.site);
        default:
            wait_for_warp();
    }
}

void run_warp(int warp) {
    Thread* lanes = &threads[warp * kWarp];
    if (lanes[0].request.what == nullptr) {
        std::array<std::uint32_t, kWarp> bits;
        for (int l = 0; l < kWarp; ++l) {
            const int source = lanes[l].request.source;
            bits[l] = lanes[source >= 0 && source < kWarp ? source : l].request.bits;
        }
        for (int l = 0; l < kWarp; ++l) {
            lanes[l].request.bits = bits[l];
        }
        return;
    }
    const Parsed& parsed = static_cast<const Instruction*>(lanes[0].request.what)->form();
    if (parsed.kind == Kind::load || parsed.kind == Kind::load_transposed) {
        load_matrices(parsed, warp, parsed.kind == Kind::load_transposed);
    } else {
        multiply(parsed, warp, parsed.kind == Kind::multiply_bf16);
    }
    current = nullptr;
}

}  // namespace emulator
