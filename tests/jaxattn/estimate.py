"""Estimate the speed of the mma.sync kernels on GPUs that were not measured.

    python -m tests.jaxattn.estimate

Compiles the kernels for every chip (needs the `codegen` extra) and prints useful TFLOP/s for head
dim 128, a group of four and a causal mask without documents. The model has three units: tensor
cores, shared memory and the exponential unit. A tile takes

    tensor + share * (shared memory + exponentials)    cycles,

where `share` is the part that does not overlap with the tensor cores: its value on the H200, where
the share of the tensor peak was measured, and 1. Copies from global memory, the issue of other
instructions and the clock under load are not in the model.
"""

import dataclasses
import subprocess
import sys

from tests.jaxattn import sass


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU and the rates of its data sheet.

    Attributes:
      capability: compute capability.
      sms: multiprocessors.
      clock: boost clock, GHz.
      tflops: dense bf16 products with sums in fp32, 1e12 operations per second.
    """

    capability: str
    sms: int
    clock: float
    tflops: float


GPUS = {
    "A100": Gpu("8.0", 108, 1.41, 312),
    "RTX 3090": Gpu("8.6", 82, 1.695, 71),
    "RTX A6000": Gpu("8.6", 84, 1.80, 154.8),
    "RTX 4090": Gpu("8.9", 128, 2.52, 165.2),
    "L40S": Gpu("8.9", 142, 2.52, 362),
    "RTX 5090": Gpu("12.0", 170, 2.407, 209.5),
}
# mma.sync reaches fewer operations than wgmma: measured with the hardware counters.
H200 = Gpu("9.0", 132, 1.83, 630)
# Share of the tensor peak that was measured on the H200 (docs/attention_other_gpus.md).
MEASURED = {"flash_forward_mma": 0.61, "flash_backward_mma": 0.58}

# Cycles for one instruction of each of the four warps of a program. Shared memory moves 128 bytes
# per cycle and multiprocessor; the exponential unit of each warp computes 4 values per cycle.
_SHARED = {r"\bLDSM\b": 16, r"\bSTSM\b": 16, r"\bLDGSTS\b": 16, r"\b(LDS|STS)\b": 4}
_EXP = 8
_OPERATIONS = 4 * 2 * 16 * 8 * 16  # of one mma.sync of each of the four warps


def tensor_cycles(gpu: Gpu, products: int) -> float:
    """Return the cycles of the tensor cores for `products` mma.sync of each of four warps."""
    per_cycle = gpu.tflops * 1e12 / (gpu.sms * gpu.clock * 1e9)
    return products * _OPERATIONS / per_cycle


def other_cycles(body: list[str]) -> float:
    """Return the cycles of shared memory and exponentials in one round of a main loop."""
    shared = sum(cycles * sass.count(body, pattern) for pattern, cycles in _SHARED.items())
    return shared + _EXP * sass.count(body, r"\bMUFU\b")


def peak_share(gpu: Gpu, body: list[str], not_overlapped: float) -> float:
    """Return the estimated share of the tensor peak, between 0 and 1."""
    tensor = tensor_cycles(gpu, sass.count(body, r"\bHMMA\b"))
    return tensor / (tensor + not_overlapped * other_cycles(body))


def not_overlapped_on_h200(body: list[str], measured: float) -> float:
    """Return the share of the other cycles that explains the measured share of the peak."""
    tensor = tensor_cycles(H200, sass.count(body, r"\bHMMA\b"))
    return tensor * (1 / measured - 1) / other_cycles(body)


def main() -> None:
    """Print one line for each GPU."""
    bodies = {c: _loops(c) for c in sorted({g.capability for g in (H200, *GPUS.values())})}
    shares = {
        name: not_overlapped_on_h200(bodies["9.0"][name], share) for name, share in MEASURED.items()
    }
    print(", ".join(f"{name}: {share:.2f} of the other cycles" for name, share in shares.items()))
    for label, gpu in GPUS.items():
        cells = []
        for name, share in shares.items():
            low, high = sorted(
                gpu.tflops * peak_share(gpu, bodies[gpu.capability][name], s) for s in (1.0, share)
            )
            cells.append(f"{name} {low:.0f} to {high:.0f}")
        print(f"{label} ({gpu.tflops:g} TFLOP/s): {', '.join(cells)}")


def _loops(capability: str) -> dict[str, list[str]]:
    arguments = ["32", "8", "128", "causal", capability, "mma"]
    run = subprocess.run(
        [sys.executable, "-m", "tests.jaxattn.codegen", *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    kernels = sass.kernels(run.stdout)
    return {name: without_second_dq(kernels[name][0].body) for name in MEASURED}


def without_second_dq(body: list[str]) -> list[str]:
    """Return a main loop without one of two copies of the dQ part, of which a warp runs one.

    With two warpgroups they add dQ at different places of the backward kernel's loop.
    """
    # Five products of 64 x 64 x 128 by a warpgroup, 64 mma.sync per warp each, and one more.
    if sass.count(body, r"\bHMMA\b") != 6 * 64:
        return body
    left = {"HMMA": 64, "LDSM": 32}
    kept = []
    for instruction in body:
        name = next((n for n in left if sass.count([instruction], rf"\b{n}\b")), None)
        if name and left[name] > 0:
            left[name] -= 1
        else:
            kept.append(instruction)
    return kept


if __name__ == "__main__":
    main()
