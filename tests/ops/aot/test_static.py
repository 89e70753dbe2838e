"""The static table: cycles of a listing counted by hand, and what a change for the worse says."""

from __future__ import annotations

import pytest

from dualdiff_engine.bench.gpu import static

# four warps: 64 rows times 32 columns at depth 16, twice; the first factor in shared memory once
LOOP = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDGSTS.E.BYPASS.128 [R15], desc[UR20][R24.64], P4 ;
.L_x_1:
        /*0020*/                   HGMMA.64x32x16.F32.BF16 R24, gdesc[UR16], R24 ;
        /*0030*/                   HGMMA.64x32x16.F32.BF16 R24, R80, gdesc[UR16].tnspB, R24, gsb0 ;
        /*0040*/              @!PT LDS RZ, [RZ] ;
        /*0050*/                   LDS.128 R4, [R2] ;
        /*0060*/                   MUFU.EX2 R5, R6 ;
        /*0070*/              @!P6 BRA `(.L_x_1) ;
        /*0080*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0090*/                   EXIT ;
.L_x_2:
        /*00a0*/                   BRA `(.L_x_2);
"""
COPY = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.64 R2, desc[UR4][R2.64] ;
        /*0020*/                   FADD R2, R2, 1 ;
        /*0030*/                   STG.E.64 desc[UR4][R4.64], R2 ;
        /*0040*/                   EXIT ;
"""


def test_cycles_of_a_loop_by_hand() -> None:
    found = static.bound(static.parse(LOOP), {})
    # a product of N columns takes N / 2 cycles; 3 KiB and 1 KiB of factors and 2 KiB for the load
    assert found.cycles == {"issue": 6, "mufu": 8, "tensor": 32, "shared": 48}
    assert found.mix == {"hgmma": 2, "mufu": 1, "other": 1, "shared": 2}
    assert (found.by, found.unit) == ("shared", "TFLOP/s")
    flops = 2 * 2 * 64 * 32 * 16
    assert found.rate == pytest.approx(flops / 48 * 132 * 1.755e9 / 1e12, abs=0.05)


def test_padding_of_a_head_is_not_useful() -> None:
    code = static.parse(LOOP)
    padded = static.bound(code, {"FIRST": 32, "SECOND": 16, "DIM": 40})
    assert padded.rate == pytest.approx(static.bound(code, {}).rate * 40 / 48, abs=0.1)


def test_around_an_inner_loop_instructions_count_less() -> None:
    """Ten trips of the inner loop to one of what is around it."""
    outer = LOOP.replace(".L_x_1:", ".L_x_0:\n /*0018*/ FADD R2, R2, 1 ;\n.L_x_1:").replace(
        " /*0080*/ ", " /*0078*/ @P1 BRA `(.L_x_0) ;\n /*0080*/ "
    )
    found = static.working(static.parse(outer), 10)
    assert sum(times for times, _ in found) == pytest.approx(6 + 2 / 10)
    assert len(static.working(static.parse(outer), None)) == 6


def test_without_products_bytes_are_bound() -> None:
    found = static.bound(static.parse(COPY), {"BLOCK_C": 256, "BLOCK_G": 16, "WIDTH": 10})
    assert found.cycles["issue"] == 3
    # 8 bytes of 32 lanes of 4 warps, read and written, of which 160 lanes in 256 hold a channel
    moved = 2 * 8 * 32 * 4 * 160 / 256
    assert (found.by, found.unit) == ("issue", "TB/s")
    assert found.rate == pytest.approx(moved / 3 * 132 * 1.755e9 / 1e12, abs=0.005)


def test_a_change_for_the_worse_names_kernel_shape_and_bounds() -> None:
    row = {"rate": 508.0, "unit": "TFLOP/s", "by": "issue", "cycles": {"issue": 299}}
    slower = {"rate": 480.0, "unit": "TFLOP/s", "by": "mufu", "cycles": {"mufu": 316}}
    name = "attention bf16 D=40 self"
    assert static.worse({name: row}, {name: row}) == []
    assert static.worse({name: row}, {name: slower}) == []
    assert static.worse({name: slower}, {name: row}) == [
        "attention bf16 D=40 self: at best 480.0 TFLOP/s (bound by mufu, 316 cycles), "
        "was 508.0 (bound by issue, 299 cycles)"
    ]
    assert static.worse({}, {name: row}) == [f"{name}: in the table, gone"]
    assert static.worse({name: row}, {}) == [f"{name}: not in the table"]


def test_the_table_says_that_it_is_a_prediction() -> None:
    assert "nothing is measured" in static.LEGEND
    assert "Calibration" in static.LEGEND
