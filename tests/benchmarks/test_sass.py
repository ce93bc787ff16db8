"""The prediction from SASS, on a short listing and on single instructions."""

import pytest

from benchmarks.sass import cost, instructions, loops, main_loop, opcode, prediction

# Written by hand in cuobjdump's format, with instructions of real kernels: a loop over tiles (0x10) that holds a loop
# with products (0x20), one with fewer of them (0x120), and one without any (0x160); then the padding.
SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;                              /* 0x00000a0000017a02 */
                                                                                       /* 0x000fc40000000f00 */
        /*0010*/                   LDG.E R4, [R2.64] ;                                 /* 0x0000000402047981 */
        /*0020*/                   DEPBAR.LE SB0, 0x2 ;                                /* 0x000080800000791a */
        /*0030*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;                       /* 0x0000000000007b1d */
        /*0040*/                   LDSM.16.M88.4 R80, [R190] ;                         /* 0x00000000be50783b */
        /*0050*/                   LDSM.16.MT88.4 R68, [R5+0x8000] ;                   /* 0x008000000544783b */
        /*0060*/                   HMMA.16816.F32.BF16 R104, R80.reuse, R68, RZ ;      /* 0x000000445068723c */
        /*0070*/                   HMMA.16816.F32.BF16 R76, R80.reuse, R70, RZ ;       /* 0x00000060504c723c */
        /*0080*/                   HMMA.16816.F32.BF16 R72, R80.reuse, R48, RZ ;       /* 0x000000305048723c */
        /*0090*/                   HMMA.16816.F32.BF16 R60, R80, R50, RZ ;             /* 0x000000305048723c */
        /*00a0*/                   SHFL.BFLY PT, R7, R6, 0x2, 0x1f ;                   /* 0x0c401f0006077f89 */
        /*00b0*/                   MUFU.EX2 R9, R8 ;                                   /* 0x0000000800097308 */
        /*00c0*/              @!P2 LDG.E R11, [R12.64] ;                               /* 0x0000001a0c0b7981 */
        /*00d0*/               @P0 LDGSTS.E.BYPASS.LTC128B.128 [R3], [R14.64] ;        /* 0x000000000e037fae */
        /*00e0*/                   LDGSTS.E.LTC128B [R3+0x400], [R14.64] ;             /* 0x000000000e037fae */
        /*00f0*/                   LDS.64 R20, [R21] ;                                 /* 0x0000000015147984 */
        /*0100*/                   LDGDEPBAR ;                                         /* 0x00000000000079af */
        /*0110*/               @P1 BRA 0x20 ;                                          /* 0xffffff0000007947 */
        /*0120*/                   HMMA.16816.F32.BF16 R60, R80, R50, RZ ;             /* 0x000000305048723c */
        /*0130*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;                       /* 0x0000000000007b1d */
        /*0140*/              @!P1 BRA 0x120 ;                                         /* 0xffffff0000007947 */
        /*0150*/               @P3 BRA 0x170 ;                                         /* 0x0000001000007947 */
        /*0160*/               @P3 BRA 0x150 ;                                         /* 0x0000001000007947 */
        /*0170*/               @P4 BRA 0x10 ;                                          /* 0x0000001000007947 */
        /*0180*/                   EXIT ;                                              /* 0x000000000000794d */
        /*0190*/                   BRA 0x190;                                          /* 0xfffffff000007947 */
"""


def test_loops_are_what_backward_branches_enclose():
    assert [(loop[0][0], loop[-1][0]) for loop in loops(instructions(SASS))] == [
        (0x20, 0x110),
        (0x120, 0x140),
        (0x150, 0x160),
        (0x10, 0x170),
    ]


def test_the_main_loop_is_the_innermost_with_the_most_products():
    loop = main_loop(SASS)
    assert loop is not None
    assert (loop[0], loop[-1], len(loop)) == ("DEPBAR.LE SB0, 0x2", "@P1 BRA 0x20", 16)
    # Of loops with equal products, the shortest.
    fewer = SASS.replace("/*0070*/                   HMMA", "/*0070*/                   FFMA")
    fewer = fewer.replace("/*0080*/                   HMMA", "/*0080*/                   FFMA")
    fewer = fewer.replace("/*0090*/                   HMMA", "/*0090*/                   FFMA")
    loop = main_loop(fewer)
    assert loop is not None and len(loop) == 3
    assert main_loop(SASS.replace("HMMA", "FFMA")) is None
    assert main_loop("") is None


def test_an_iteration_is_as_long_as_its_busiest_pipe():
    found = prediction(SASS, "sm_80", 4)
    # 4 warps: 4 products of 2 cycles; 2 loads of 4, a shuffle of 1, copies of 4 and 1, a load of 2; 16 instructions.
    assert found == {
        "cycles": {"mma": 32.0, "shared": 64.0, "exp": 8.0, "issue": 16.0},
        "bound": "shared",
        "mma_share": 0.5,
        "ldsm_per_mma": 0.5,
        "barriers": 1,
        "copies": 2,
        "loads": 1,
    }
    assert prediction(SASS.replace("HMMA", "FFMA"), "sm_80", 4) is None


def test_the_products_of_a_known_tile_take_the_known_cycles():
    """128 × 64 scores of heads of 128, and as many products with the values: 512 HMMA of 16 × 8 × 16, 2,048 cycles."""
    text = "HMMA.16816.F32.BF16 R104, R80, R68, RZ"
    count = 2 * (128 // 16) * (64 // 8) * (128 // 16)
    assert count * cost(text, "sm_80")["mma"] == 2 * 128 * 64 * 128 / 1024 == 2048


@pytest.mark.parametrize(
    ("text", "architecture", "pipe", "cycles"),
    [
        ("HMMA.1688.F32.TF32 R4, R8, R12, R4", "sm_80", "mma", 2.0),
        ("HMMA.16816.F32 R4, R8, R12, R4", "sm_90", "mma", 1 / 0.63),
        # A warp's quarter of 64 × 64 × 16; B, and A if it is not in registers, is read from shared memory.
        ("HGMMA.64x64x16.F32.BF16 R24, gdesc[UR12], R24, gsb0", "sm_90", "mma", 8.0),
        ("HGMMA.64x64x16.F32.BF16 R24, gdesc[UR12], R24, gsb0", "sm_90", "shared", 8.0),
        ("HGMMA.64x64x16.F32.BF16 R56, R88, gdesc[UR12].tnspB, R56", "sm_90", "shared", 4.0),
        ("LDSM.16.M88.4 R80, [R190]", "sm_80", "shared", 4.0),
        ("LDSM.16.M88 R80, [R190]", "sm_80", "shared", 1.0),
        ("@!UP0 STS.128 [R3], R4", "sm_80", "shared", 4.0),
        ("STS.U16 [R3], R4", "sm_80", "shared", 1.0),
        ("MUFU.EX2 R9, R8", "sm_90", "exp", 2.0),
    ],
)
def test_cost(text: str, architecture: str, pipe: str, cycles: float):
    assert cost(text, architecture)[pipe] == pytest.approx(cycles)
    assert cost(text, architecture)["issue"] == 0.25


def test_opcodes_have_neither_predicate_nor_operands():
    assert opcode("@!P2 LDG.E R11, [R12.64]") == "LDG.E"
    assert opcode("@UP0 UIADD3 UR4, UR4, UR5, URZ") == "UIADD3"
    assert opcode("EXIT") == "EXIT"
