"""Size a run by its flags: its memory plan, the remat that fits, the flags to change."""

import dataclasses
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from models.config import ModelConfig
from models.lora import LoRA
from train.config.config import Config
from train.distributed.mesh import row_shards
from train.memory.advice import suggest_flags
from train.memory.plan import Plan, plan

PARAM_DTYPES = {"fp32": jnp.dtype("float32"), "bf16": jnp.dtype("bfloat16")}
REMAT_BY_SPEED = ("dots", "attention", "full")
"""Remat policies from most memory and least work to the reverse; those between gain little
(measured at 1.8B)."""


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

    lora: LoRA | None = None
    """Adapters, which are then the only trained weights."""

    def plan(self, config: Config, *, remat: str, attn: str | None = None) -> Plan:
        """Plan the memory of a run of `config`, with another attention if one is given."""
        on_gpu = not isinstance(self.mesh, Mesh) or self.mesh.devices.flat[0].platform == "gpu"
        return plan(
            self.model,
            self.mesh,
            rows=self.rows // config.grad_accum,
            seq_len=config.seq_len,
            grad_accum=config.grad_accum,
            remat=remat,
            itemsize=self.dtype.itemsize,
            attn=attn or self.attn,
            scan=in_scan(config.scan_layers, remat, on_gpu=on_gpu),
            optim=config.optim,
            param_itemsize=stored_dtype(config, self.dtype).itemsize,
            lora=self.lora,
            quantize=quantize_kind(config),
            matmul=config.matmul,
        )

    def fastest_remat(self, config: Config, memory: int) -> str:
        """Return the fastest remat policy that fits `memory` bytes a device."""
        need = {remat: self.plan(config, remat=remat).total for remat in REMAT_BY_SPEED}
        return choose_remat(need, memory)

    def memory_advice(self, config: Config, remat: str, memory: int) -> str | None:
        """Return the flags that make the run fit `memory` bytes a device; None where it fits."""

        def needed(changed: Config) -> Plan:
            attn = None if changed.attn == config.attn else changed.attn
            return self.plan(changed, remat=changed.remat or remat, attn=attn)

        if needed(config).total <= memory:
            return None
        given = dataclasses.replace(config, remat=remat)
        most = self.rows // row_shards(self.mesh)
        return suggest_flags(needed, given, memory, most_grad_accum=most)


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
    """Return the format of quantised frozen weights, or None."""
    return config.base_dtype if config.base_dtype in ("nf4", "int8") else None


def in_scan(scan_layers: bool | None, remat: str, *, on_gpu: bool) -> bool:
    """Return whether the layers of the training step are one scan.

    For remat "offload" they are, by default: XLA's schedule of unrolled layers begins the copies
    to the host when the backward pass wants them back, and holds everything on the device until
    then (64 GiB instead of 31 at 1.8B and 32k, by the compiler's count).

    Args:
        scan_layers: --scan_layers.
        remat: Key of `models.remat.REMAT`.
        on_gpu: Whether the devices are GPUs.

    Raises:
        ValueError: Unrolled layers for "offload" on a GPU.
    """
    if scan_layers is None:
        return not on_gpu or remat == "offload"
    if on_gpu and remat == "offload" and not scan_layers:
        raise ValueError(
            "--scan_layers=False with --remat=offload would hold on the device what is meant for "
            "the host: leave it out, or take --remat=attention"
        )
    return scan_layers


def choose_remat(need: dict[str, int], memory: int) -> str:
    """Return the first policy that needs at most 85% of the memory, else the last.

    The margin is for what no plan counts, and for XLA: above 80% of a GPU (87% of what jax takes)
    it recomputes values to save memory, in an order of its own. Compiled for an H200, 7B at 32k
    then grew from 124 to 177 GiB.

    Args:
        need: Bytes per device of each policy, fastest first.
        memory: Bytes of the device.
    """
    return next((remat for remat, total in need.items() if total <= 0.85 * memory), [*need][-1])
