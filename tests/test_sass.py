"""The machine code of the built library, and the parser that reads it."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import check_sass

SASS = """
Fatbin elf code:
================
arch = sm_90a
code version = [1,8]

	code for sm_90a
		Function : _Z15WarpgroupKernelv
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                     /* 0x00000a00ff017b82 */
                                                                              /* 0x000fe20000000800 */
        /*0010*/                   UBLKCP.S.G [UR6], [UR4], UR10 ;            /* 0x000 */
        /*0020*/              @!P2 UTMALDG.2D [UR8], [UR4], desc[UR6] ;       /* 0x000 */
        /*0030*/                   LDS.128 R4, [R8] ;                         /* 0x000 */
        /*0040*/                   IGMMA.64x128x32.S8.U8 R24, R56, gdesc[UR4], R24, gsb0 ; /* 0x000 */
        /*0050*/                   STS [R3], R4 ;                             /* 0x000 */
        /*0060*/               @P0 BRA 0x30 ;                                 /* 0x000 */
        /*0070*/                   EXIT ;                                     /* 0x000 */
        /*0080*/                   BRA 0x80;                                  /* 0x000 */
"""
RESOURCES = """
Fatbin elf code:
================
arch = sm_90a

Resource usage:
 Common:
  GLOBAL:0
 Function _Z15WarpgroupKernelv:
  REG:168 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:544 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
PTXAS = """
ptxas info    : Compiling entry function '_Z1kv' for 'sm_80'
ptxas info    : Function properties for _Z1kv
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
"""


def warpgroup(sass=SASS, resources=RESOURCES):
    """The kernel of the listing, with its resources, and the faults that concern it."""
    (kernel,) = check_sass.parse_sass(sass)
    kernel.resources = check_sass.parse_resources(resources).get((kernel.arch, kernel.name), {})
    return kernel, [line for line in check_sass.faults([kernel]) if kernel.name in line]


def test_listing_is_read():
    kernel, faults = warpgroup()
    assert (kernel.name, kernel.arch, len(kernel.code)) == ("_Z15WarpgroupKernelv", "sm_90a", 9)
    assert kernel.resources["REG"] == 168
    assert [[text.split()[0] for text in loop] for loop in kernel.loops()] == [
        ["LDS.128", "IGMMA.64x128x32.S8.U8", "STS", "BRA"]
    ]
    assert kernel.has("^UTMALDG")
    assert not kernel.has("^UTMALDG", in_loop=True)
    assert faults == []


@pytest.mark.parametrize(
    ("find", "put", "complaint"),
    [
        ("STS [R3], R4", "STL [R1], R4", "local memory in the main loop"),
        ("IGMMA.64x128x32.S8.U8", "IGMMA.64x128x32.S8.S8", "no ^IGMMA"),
        ("UBLKCP.S.G [UR6], [UR4], UR10", "LDG.E R4, desc[UR4][R2.64]", "no ^UBLKCP"),
        ("LDS.128 R4", "LDS.64 R4", r"no ^LDS\.128"),
        ("@P0 BRA 0x30", "@P0 BRA 0x70", "in the main loop"),
    ],
)
def test_unintended_code_is_a_fault(find, put, complaint):
    assert find in SASS
    _, faults = warpgroup(SASS.replace(find, put))
    assert any(complaint in line for line in faults), faults


def test_stack_and_missing_report_are_faults():
    assert "stack memory of 64 bytes" in warpgroup(resources=RESOURCES.replace("STACK:0", "STACK:64"))[1][0]
    assert "no resource report" in warpgroup(resources="")[1][0]


def test_absent_kernels_are_faults():
    names = {wanted.kernel for wanted in check_sass.EXPECTATIONS}
    assert {line.removeprefix("no kernel is named ") for line in check_sass.faults([])} == names


def test_ptxas_report_is_read():
    report = check_sass.parse_ptxas(PTXAS)
    assert report == {("sm_80", "_Z1kv"): {"stack": 16, "spill_stores": 8, "spill_loads": 4, "registers": 255}}
    spills = [line for line in check_sass.faults([], report) if "ptxas reports" in line]
    assert spills == [
        "sm_80 _Z1kv: ptxas reports 16 bytes stack",
        "sm_80 _Z1kv: ptxas reports 8 bytes spill stores",
        "sm_80 _Z1kv: ptxas reports 4 bytes spill loads",
    ]


def test_built_library_has_the_intended_code():
    from fptq_onnx.ops.library import get_library_path, library_info

    assert check_sass.disassembler() is not None, (
        "no disassembler: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
    )
    if library_info().cuda is None:  # then the library says so, and holds none
        with pytest.raises(RuntimeError, match=r"holds no CUDA machine code|does not contain device code"):
            check_sass.read(get_library_path())
    else:
        assert check_sass.faults(check_sass.read(get_library_path())) == []
