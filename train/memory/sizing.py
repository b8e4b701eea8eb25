"""Size a run by its flags: its memory plan, the remat that fits, the flags to change."""

import collections
import dataclasses
import itertools
import math
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from models.config import ModelConfig
from models.lora import LoRA
from models.remat import IN_TILES, parse_remat
from models.tiles import divides, tile_count
from train.config.config import Config
from train.distributed.mesh import row_shards
from train.memory.advice import suggest_flags
from train.memory.plan import Plan, plan

PARAM_DTYPES = {"fp32": jnp.dtype("float32"), "bf16": jnp.dtype("bfloat16")}
REMAT_BY_SPEED = (
    *("dots", "dots,dots,dots,attention", "dots,attention", "dots,attention,attention,attention"),
    *("attention", "full"),
)
"""Remat policies from most memory and least work to the reverse. The mixes fill the memory between
"dots" and "attention" (7B, 4,096 x 8, one H200: 11,659 tokens/s with half of the layers "dots",
10,428 without)."""
MARGIN = 0.85
"""Share of the memory that a plan may take if there is a choice. The margin is for what no plan
counts, and for XLA: above 80% of a GPU (87% of what jax takes) it recomputes values to save memory,
in an order of its own. Compiled for an H200, 7B at 32k then grew from 124 to 177 GiB."""
LONG_ROW = 65_536
"""Tokens of a row from which attention takes so long that other costs of a layer matter little."""
TILE_SIZE = 16_384
"""Default tokens of a tile: matrix products of this height run at full speed."""
ATTENTION_RATE = 6e14
"""FLOP/s of the forward kernel (H200), to compare policies."""
HOST_RATE = 5e10
"""Bytes/s between device and host (PCIe 5), to compare policies."""

Way = tuple[str, int | None]
"""A remat, and a tile size, as in `models.execution.Execution`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizing:
    """The parts of a run that its memory depends on and that no flag changes to make it fit."""

    model: ModelConfig
    """Architecture."""

    mesh: Mesh | AbstractMesh
    """Devices."""

    rows: int
    """Rows of a step, over all devices."""

    dtype: np.dtype
    """Compute dtype."""

    attn: str
    """Attention implementation, a key of `jaxattn.IMPLEMENTATIONS`."""

    host: int
    """Bytes of main memory that the activations of one device may take."""

    lora: LoRA | None = None
    """Adapters, which are then the only trained weights."""

    def plan(
        self, config: Config, remat: str, tile_size: int | None = None, *, attn: str | None = None
    ) -> Plan:
        """Plan the memory of a run of `config`, with another attention if one is given."""
        return plan(
            self.model,
            self.mesh,
            rows=self.rows // config.grad_accum,
            seq_len=config.seq_len,
            grad_accum=config.grad_accum,
            remat=remat,
            itemsize=self.dtype.itemsize,
            attn=attn or self.attn,
            scan=self._in_scan(config, remat),
            tile_size=tile_size,
            optim=config.optim,
            param_itemsize=stored_dtype(config, self.dtype).itemsize,
            lora=self.lora,
            quantize=quantize_kind(config),
            matmul=config.matmul,
        )

    def fastest(self, config: Config, memory: int) -> Way:
        """Return the fastest remat and tile size that fit, else those that need the least memory.

        Args:
            config: The flags; a remat or a tile size that they give is kept.
            memory: Bytes of the device.
        """
        whole, tiled = self._ways(config)
        # Shorter rows are only tiled where they would not fit at all.
        lists = [whole + tiled] if config.seq_len >= LONG_ROW else [whole, tiled]
        plans = {way: self.plan(config, *way) for way in whole + tiled}
        on_host = {way for way in plans if plans[way].host <= self.host}
        for ways in lists:
            fits = [way for way in ways if way in on_host and plans[way].total <= memory]
            roomy = [way for way in fits if plans[way].total <= MARGIN * memory]
            if fits:
                return roomy[0] if roomy else min(fits, key=lambda way: plans[way].total)
        return min(plans, key=lambda way: (way not in on_host, plans[way].total))

    def fits(self, plan: Plan, memory: int) -> bool:
        """Return whether a plan fits a device of `memory` bytes, and its host."""
        return plan.total <= memory and plan.host <= self.host

    def memory_advice(self, config: Config, way: Way, memory: int) -> str | None:
        """Return the flags that make a run fit `memory` bytes a device; None where it fits."""
        if self.fits(self.plan(config, *way), memory):
            return None

        def needed(changed: Config) -> Plan:
            attn = None if changed.attn == config.attn else changed.attn
            return self.plan(changed, *self.fastest(changed, memory), attn=attn)

        given = dataclasses.replace(config, remat=way[0])
        fastest, _ = self.fastest(dataclasses.replace(config, remat=None), memory)
        return suggest_flags(
            needed,
            given,
            fits=lambda plan: self.fits(plan, memory),
            most_grad_accum=self.rows // row_shards(self.mesh),
            remat=fastest,
        )

    def _ways(self, config: Config) -> tuple[list[Way], list[Way]]:
        """Return remat policies without tiles, and with tiles, each list the fastest first."""
        tokens = config.seq_len // self.mesh.shape["seq"]  # of a row, on one device
        if config.remat is not None:
            on_device = tiled = [config.remat]
        else:
            on_device, tiled = [*REMAT_BY_SPEED], self._mixes(config.seq_len, tokens)
            if self._in_scan(config, "dots"):  # a mix would need stacks of each policy
                on_device = [remat for remat in on_device if "," not in remat]
            if config.scan_layers is False:  # which contradicts copies to the host
                tiled = [remat for remat in tiled if "offload" not in remat]
        if config.tile_size is not None:
            tile_count(tokens, config.tile_size)
            return [], [(remat, config.tile_size) for remat in tiled]
        whole: list[Way] = [(remat, None) for remat in on_device]
        long_row = config.seq_len >= LONG_ROW
        if tokens <= TILE_SIZE or not divides(tokens, TILE_SIZE):
            further: list[Way] = [(remat, None) for remat in tiled if (remat, None) not in whole]
            return whole, further if long_row else []
        if long_row and config.remat is None:
            whole.remove(("full", None))  # slower than mixes with tiles
        return whole, [(r, TILE_SIZE) for r in tiled if {*parse_remat(r)} <= {*IN_TILES}]

    def _in_scan(self, config: Config, remat: str) -> bool:
        on_gpu = not isinstance(self.mesh, Mesh) or self.mesh.devices.flat[0].platform == "gpu"
        return in_scan(config.scan_layers, remat, on_gpu=on_gpu, seq_len=config.seq_len)

    def _mixes(self, seq_len: int, tokens: int) -> list[str]:
        """Return remat policies and mixes of them over four layers, the fastest first.

        A layer that recomputes attention takes longer by its forward pass over a row of one
        document; one that keeps values in host memory by the time of their copies, there and back.
        """
        model = self.model
        width = model.num_heads * model.head_dim
        recomputed = 2 * seq_len * tokens * width / ATTENTION_RATE
        copied = 2 * tokens * model.hidden_size * self.dtype.itemsize / HOST_RATE
        seconds = {
            "offload": 2 * copied,
            "offload_input": copied + recomputed,
            "attention": 0.0,
            "full": recomputed,
        }
        groups = itertools.combinations_with_replacement(seconds, 4)
        by_speed = sorted(groups, key=lambda group: sum(map(seconds.__getitem__, group)))
        return [
            ",".join(policies)
            for policies in map(_shortest, by_speed)
            if model.num_layers % len(policies) == 0
        ]


def _shortest(group: tuple[str, ...]) -> tuple[str, ...]:
    """Return the shortest group with the same shares."""
    counts = collections.Counter(group)
    divisor = math.gcd(*counts.values())
    return tuple(name for name in counts for _ in range(counts[name] // divisor))


def stored_dtype(config: Config, dtype: np.dtype) -> np.dtype:
    """Return the dtype of stored weights; with adapters, of the frozen ones.

    Args:
        config: The flags.
        dtype: Compute dtype.
    """
    if not config.lora.used:
        return PARAM_DTYPES[config.param_dtype]
    if config.base_dtype is None:
        return dtype
    return PARAM_DTYPES.get(config.base_dtype, PARAM_DTYPES["bf16"])


def quantize_kind(config: Config) -> Literal["nf4", "int8"] | None:
    """Return the format of quantized frozen weights, or None."""
    return config.base_dtype if config.base_dtype in ("nf4", "int8") else None


def in_scan(scan_layers: bool | None, remat: str, *, on_gpu: bool, seq_len: int) -> bool:
    """Return whether the layers of the training step are one scan.

    With values in host memory they are, by default: XLA's schedule of unrolled layers begins the
    copies to the host when the backward pass wants them back, and holds everything on the device
    until then (64 GiB instead of 31 at 1.8B and 32k, by the compiler's count). With long rows they
    are, because a scan compiles one layer; but not where outputs of matrix products are saved. A
    scan copies all that is saved into stacks and out of them: with "dots", 1.8B and rows of 65,536
    tokens on an H200, a step takes 1,415 ms instead of 1,257, and 7 GiB more.

    Args:
        scan_layers: --scan_layers.
        remat: As in `models.execution.Execution`.
        on_gpu: Whether the devices are GPUs.
        seq_len: Tokens of a row.

    Raises:
        ValueError: Unrolled layers with values in host memory, on a GPU.
    """
    if scan_layers is None:
        saves_products = not {"none", "dots", "qkv"}.isdisjoint(parse_remat(remat))
        long_row = seq_len >= LONG_ROW and not saves_products
        return not on_gpu or "offload" in remat or long_row
    if on_gpu and "offload" in remat and not scan_layers:
        raise ValueError(
            f"--scan_layers=False with --remat={remat} would hold on the device what is meant for "
            "the host: leave it out, or take --remat=attention"
        )
    return scan_layers
