"""The lint, on listings written by hand: each rule must be able to fail."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gptoss_compile.kernels.spec import Launch, Pdl, Source
from gptoss_compile.lint import check_amdgcn, check_sass

GOOD = """
 PREEXIT ;
 LDG.E.128 R4, desc[UR4][R2.64] ;
 ACQBULK ;
 LDG.E R8, desc[UR4][R6.64] ;
 HGMMA.64x16x16.F32.BF16 R24, R24, gdesc[UR8], R24 ;
 EXIT ;
"""
LAUNCH = Launch(Source(None, (), ()), (1, 1, 1), ("weight", "x", "out0"), pdl=Pdl(("weight",)), promises=("HGMMA",))


def test_good_code_passes() -> None:
    assert check_sass(LAUNCH, GOOD, pdl=True) == []


@pytest.mark.parametrize(("broken", "message"), [
    (GOOD.replace(" ACQBULK ;", ""), "no ACQBULK"),
    (GOOD.replace(" PREEXIT ;", ""), "no PREEXIT"),
    (GOOD.replace(" LDG.E.128 R4, desc[UR4][R2.64] ;\n ACQBULK ;", " ACQBULK ;\n LDG.E.128 R4 ;"),
     "0 global loads before ACQBULK, but the contract preloads weight"),
    (GOOD.replace(" EXIT ;", " STL [R1], R4 ;\n LDL R4, [R1] ;\n" * 5), "10 local memory instructions"),
    (GOOD.replace("HGMMA", "HMMA"), "no HGMMA"),
    (GOOD.replace(" PREEXIT ;", "").replace("ACQBULK ;", "ACQBULK ;\n PREEXIT ;"), "PREEXIT behind ACQBULK"),
])
def test_each_fault_is_named(broken: str, message: str) -> None:
    (found,) = check_sass(LAUNCH, broken, pdl=True)
    assert message in found


def test_late_trigger_must_be_late() -> None:
    (found,) = check_sass(replace(LAUNCH, pdl=Pdl(("weight",), "after_wait")), GOOD, pdl=True)
    assert "PREEXIT before ACQBULK" in found


def test_absent_operands_need_no_load() -> None:
    launch = replace(LAUNCH, pdl=Pdl(("weight", "scales")))
    assert check_sass(launch, GOOD, pdl=True) == []


def test_a_parked_pointer_is_tolerated() -> None:
    assert check_sass(LAUNCH, GOOD + " STL.64 [R1], R2 ;\n LDL.64 R2, [R1] ;\n", pdl=True) == []


def test_without_pdl_no_wait_is_asked_for() -> None:
    assert check_sass(LAUNCH, "HGMMA.64x16x16 ;", pdl=False) == []


def test_amdgcn() -> None:
    launch = replace(LAUNCH, promises=("v_mfma_scale",))
    good = " v_mfma_scale_f32_32x32x64_f8f6f4 a[0:15]\n .private_segment_fixed_size: 0\n .vgpr_spill_count: 0\n"
    assert check_amdgcn(launch, good) == []
    assert "spill" in check_amdgcn(launch, good.replace("count: 0", "count: 3"))[0]
    assert "no v_mfma_scale" in check_amdgcn(launch, good.replace("v_mfma_scale", "v_mfma"))[0]
