import doctest

from bpo_fast.kernels import sass

# An outer loop 0x20..0x80 around an inner one 0x30..0x60, then padding. What stands behind ";" is the encoding.
LISTING = """
    Function : some_kernel
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;   /* 0x00000a00ff017624 */
                                                                             /* 0x000fe400078e00ff */
        /*0010*/              @!P0 BRA 0x90 ;                                /* 0x0000155000008947 */
        /*0020*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;             /* 0x0000155000008947 */
        /*0030*/              @!P1 LDG.E.128.CONSTANT R4, [R2.64] ;          /* 0x0000155000008947 */
        /*0040*/                   MUFU.EX2 R4, R4 ;                         /* 0x0000155000008947 */
        /*0050*/                   MUFU.EX2 R5, R5 ;                         /* 0x0000155000008947 */
        /*0060*/               @P1 BRA 0x30 ;                                /* 0xfffff7e000008947 */
        /*0070*/                   STG.E.64 [R2.64], R4 ;                    /* 0x0000155000008947 */
        /*0080*/              @!P2 BRA 0x20 ;                                /* 0xfffff7e000008947 */
        /*0090*/                   EXIT ;                                    /* 0x0000155000008947 */
        /*00a0*/                   BRA 0xa0;                                 /* 0xfffffff000007947 */
        /*00b0*/                   NOP;                                      /* 0x0000000000007918 */
"""


def test_instructions():
    code = sass.instructions(LISTING)
    assert len(code) == 11
    assert code[3] == sass.Instruction(0x30, "@!P1", "LDG.E.128.CONSTANT", "R4, [R2.64]")


def test_the_longest_loop_holds_no_other():
    loop = sass.longest_loop(sass.instructions(LISTING))
    assert [instruction.address for instruction in loop] == [0x30, 0x40, 0x50, 0x60]
    assert sass.longest_loop(sass.instructions(LISTING)[:3]) == []


def test_loaded_bytes_of_the_longest_loop():
    assert sass.loaded_bytes(sass.longest_loop(sass.instructions(LISTING))) == 16


def test_the_report_counts_by_kind():
    lines = sass.report(sass.instructions(LISTING)).splitlines()
    assert lines[3] == "> 0030  @!P1 LDG.E.128.CONSTANT     R4, [R2.64]"
    counts = {words[0]: words[1:] for words in map(str.split, lines[lines.index("") + 2 :])}
    assert counts["MUFU.EX2"] == ["2", "2"]
    assert counts["LDG.E.128"] == ["1", "1"]
    assert counts["BRA"] == ["1", "4"]
    assert counts["STG.E.64"] == ["0", "1"]
    assert counts["sum"] == ["4", "11"]


def test_doctests():
    assert doctest.testmod(sass).failed == 0
