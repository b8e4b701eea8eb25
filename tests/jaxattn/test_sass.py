"""The reader of machine code that the checks of the kernels rest on."""

from tests.jaxattn import sass


def test_reader_sees_spills_and_order():
    """Counts come from the loop, not from around it; a skipped branch is not on the path."""
    listing = """
.text.flash_example_mosaic_gpu_kernel:
        /*0000*/                   STL [R1], R3 ;
.L_x_1:
        /*0010*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT, gsb0 ;
        /*0020*/               @P2 BRA `(.L_x_2) ;
        /*0030*/                   LDL.LU R0, [R1+0x18] ;
.L_x_2:
        /*0040*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0050*/              @!P3 BRA `(.L_x_3) ;
.L_x_4:
        /*0060*/               @P1 BRA `(.L_x_1) ;
        /*0070*/                   LDL R0, [R1] ;
        /*0080*/                   EXIT ;
.L_x_3:
        /*0090*/              @!P3 BRA `(.L_x_3) ;
        /*00a0*/                   BRA `(.L_x_4) ;
//--------------------- SYMBOLS --------------------------
"""
    (loop,) = sass.kernels(listing)["flash_example"]
    assert (sass.spills(loop.body), sass.spills(loop.straight)) == (1, 0)
    assert sass.events(loop) == "Q0"
    assert sass.notes("ptxas info : (C7517) warpgroup.wait is injected\n(C7509) other") != []


def test_a_second_way_back_past_the_first_part():
    """The copies before the second label are a part of the round."""
    listing = """
.text.flash_example_mosaic_gpu_kernel:
.L_x_1:
        /*0000*/                   LDGSTS.E.BYPASS.128 [R1], [R2.64] ;
.L_x_2:
        /*0010*/                   HMMA.16816.F32.BF16 R0, R4, R8, R0 ;
        /*0020*/               @P1 BRA `(.L_x_2) ;
        /*0030*/               @P2 BRA `(.L_x_3) ;
        /*0040*/                   BRA `(.L_x_1) ;
.L_x_3:
        /*0050*/                   EXIT ;
//--------------------- SYMBOLS --------------------------
"""
    (loop,) = sass.kernels(listing)["flash_example"]
    assert sass.count(loop.body, "LDGSTS") == sass.count(loop.body, "HMMA") == 1
