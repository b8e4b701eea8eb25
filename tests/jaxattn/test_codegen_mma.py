"""The machine code of the mma.sync kernels for every chip: no spills in the main loops.

Compiled without a GPU (`make codegen`): forward, backward and the deterministic backward of 32k
tokens, with the tiles of the chip.
"""

import functools
import subprocess
import sys

import pytest

from jaxattn.pallas.mma.tiles import rule_tiles
from jaxattn.pallas.tiles import CHIPS
from tests.jaxattn import sass

pytestmark = pytest.mark.codegen

HEADS = {1: (8, 8), 2: (16, 8), 4: (32, 8), 6: (48, 8)}  # by group: InternLM2 has 2, 4 and 6
CASES = [
    (capability, head_dim, group, kind)
    for capability in CHIPS
    for head_dim in (128, 64)
    for group in HEADS
    for kind in ("causal", "documents")
]
# mma.sync per warp in a product of 64 x 64 x 128 by a warpgroup: 16 x 8 x 16 each, by four warps.
PRODUCT = 64
# Products in a round of the main loop of each kernel. With two warpgroups the code of dQ is there
# twice, because the warpgroups add it at different places.
KERNELS = {
    "flash_forward_mma": 2,
    "flash_backward_mma": 5,
    "flash_backward_dkv_mma": 4,
    "flash_backward_dq_mma": 3,
}
# Local loads and stores that are tolerated in a round of the main loop, in all of it and where
# nothing is masked: measured with jax 0.12.0.1 and ptxas 13.5. None elsewhere.
SPILLS = {("12.0", 128, "flash_backward_mma"): (6, 3)}


@functools.cache
def _dump(capability: str, head_dim: int, group: int, kind: str) -> str:
    arguments = [*HEADS[group], head_dim, kind, capability, "mma"]
    run = subprocess.run(
        [sys.executable, "-m", "tests.jaxattn.codegen", *map(str, arguments)],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout


@pytest.mark.parametrize("case", CASES, ids=str)
def test_main_loops(case):
    """One loop a kernel with the instructions that it should have, and no spills where none mask.

    HMMA are the products, LDSM the loads of fragments, LDGSTS the copies.
    """
    capability, head_dim, group, _ = case
    text = _dump(*case)
    kernels, registers = sass.kernels(text), sass.registers(text)
    tiles = rule_tiles(*HEADS[group], head_dim, capability)
    assert set(kernels) == set(registers) == set(KERNELS)
    for name, products in KERNELS.items():
        (loop,) = kernels[name]
        spills = sass.spills(loop.body), sass.spills(loop.straight)
        print(f"{name}: {registers[name]} registers, {spills} local loads and stores")
        limits = SPILLS.get((capability, head_dim, name), (0, 0))
        assert spills[0] <= limits[0] and spills[1] <= limits[1], f"{name} {case}: {spills}"
        rows = tiles.forward.rows // 64 if name == "flash_forward_mma" else 1
        if name == "flash_backward_mma" and tiles.backward.warpgroups > 1:
            products += 1
        hmma = sass.count(loop.body, r"\bHMMA.16816.F32.BF16")
        assert hmma == products * rows * PRODUCT * head_dim // 128, (name, hmma)
        assert hmma / 4 < sass.count(loop.body, r"\bLDSM\b") < 0.7 * hmma, name
        assert sass.count(loop.body, r"\bLDGSTS\b") >= 8, name
