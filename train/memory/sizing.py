"""A run's memory by its flags: what it needs, the remat that fits, what to change if none does."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from models.config import ModelConfig
from train.config.config import Config
from train.distributed.mesh import row_shards
from train.memory import advice
from train.memory.plan import Plan, plan

PARAM_DTYPES = {"fp32": jnp.dtype("float32"), "bf16": jnp.dtype("bfloat16")}
REMAT_BY_SPEED = ("dots", "attention", "full")
"""More memory and less work first; what lies between gains little (measured at 1.8B)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizing:
    """What the memory of a run depends on besides the flags that can be changed to make it fit."""

    model: ModelConfig
    """The architecture."""

    mesh: Mesh | AbstractMesh
    """The devices."""

    rows: int
    """In a step."""

    dtype: np.dtype
    """Compute type."""

    attn: str
    """Implementation that runs for the configuration's own --attn."""

    def plan(self, config: Config, *, attn: str | None = None) -> Plan:
        """The memory that a run of `config` needs, with another implementation if one is named."""
        return plan(
            self.model,
            self.mesh,
            rows=self.rows // config.grad_accum,
            seq_len=config.seq_len,
            grad_accum=config.grad_accum,
            remat=config.remat or REMAT_BY_SPEED[-1],
            itemsize=self.dtype.itemsize,
            attn=attn or self.attn,
            scan=in_scan(config, self.mesh),
            optim=config.optim,
            param_itemsize=PARAM_DTYPES[config.param_dtype].itemsize,
        )

    def with_remat(self, config: Config, have: int) -> Config:
        """The configuration with the remat asked for, or the fastest that fits `have` bytes."""
        if config.remat is not None:
            return config
        all_of = {r: dataclasses.replace(config, remat=r) for r in REMAT_BY_SPEED}
        return all_of[choose_remat({r: self.plan(c).total for r, c in all_of.items()}, have)]

    def advice(self, config: Config, have: int) -> str | None:
        """What to change so that the run fits `have` bytes a device; None where it does."""

        def needed(changed: Config) -> Plan:
            return self.plan(changed, attn=None if changed.attn == config.attn else changed.attn)

        if needed(config).total <= have:
            return None
        return advice.suggest_flags(
            needed, config, have, most_grad_accum=self.rows // row_shards(self.mesh)
        )


def in_scan(config: Config, mesh: Mesh | AbstractMesh) -> bool:
    """Whether training's layers are one loop; a mesh without devices stands for GPUs.

    For remat "offload" by default always: XLA's schedule of unrolled layers begins the copies to
    the host when the backward pass wants them back, and holds everything on the device until then
    (64 GiB instead of 31 at 1.8B and 32k, by the compiler's count).

    Raises:
        ValueError: unrolled layers for "offload" on a GPU.
    """
    on_gpu = not isinstance(mesh, Mesh) or mesh.devices.flat[0].platform == "gpu"
    if config.scan_layers is None:
        return not on_gpu or config.remat == "offload"
    if on_gpu and config.remat == "offload" and not config.scan_layers:
        raise ValueError(
            "--scan_layers=False with --remat=offload would hold on the device what is meant for "
            "the host: leave it out, or take --remat=attention"
        )
    return config.scan_layers


def choose_remat(need: dict[str, int], have: int) -> str:
    """The first, in order of speed, that leaves a margin for what no plan knows; else the last.

    And for XLA: above 80% of a GPU (87% of what jax takes) it computes values again to save memory,
    in an order of its own. Compiled for an H200, 7B at 32k then grew from 124 to 177 GiB.

    Args:
        need: bytes per device of each, fastest first.
        have: bytes of the device.
    """
    return next((remat for remat, total in need.items() if total <= 0.85 * have), [*need][-1])
