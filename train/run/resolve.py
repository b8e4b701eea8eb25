"""Resolve a run: every choice that the flags leave open, made once, before any work is done."""

import dataclasses
import hashlib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

import jaxattn
from jaxattn import Implementation
from jaxattn.device import DeviceSpec, GiB, device_memory, host_memory
from jaxattn.sharded import kv_copies
from models.config import PRESETS, ModelConfig
from models.execution import Execution
from models.lora import LoRA
from models.remat import parse_remat
from models.tokenizer import Tokenizer
from models.weights.abstract import abstract
from models.weights.llama import layout_of
from models.weights.run_layout import find_checkpoint
from train.config.config import MOST_STEPS, Config
from train.distributed.device import HOST_SHARE
from train.distributed.mesh import (
    abstract_mesh,
    check_rows,
    check_seq,
    head_shards,
    make_mesh,
    row_shards,
)
from train.memory.plan import Plan
from train.memory.sizing import Sizing, in_scan, quantize_kind, stored_dtype
from train.run.inputs import (
    check_files,
    check_vocabulary,
    default_tokenizer,
    extend_rope,
    read_lora,
    read_model,
    read_tokenizer,
    with_vocabulary,
)

GPU_MODEL, CPU_MODEL = "internlm2-1.8b", "nano"
GPU_TOKENS = 32_768
"""Default tokens of a step for each GPU that holds its own rows: one row of the longest case."""
CPU_TOKENS = 2_048
_LR_OF = {"lion": 0.1}
"""Factor of the default learning rate by optimizer."""
FP8_CAPABILITY = (8, 9)
"""Lowest compute capability with 8-bit floating-point matrix products."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A run without open choices: the flags, and what was chosen where a flag was not given."""

    config: Config
    """The flags, as given."""

    name: str
    """Preset, config.json, or directory of the weights."""

    model: ModelConfig
    """Architecture."""

    weights: Path | None
    """Directory of HF or orbax weights to load, or a run's checkpoint; None: random weights."""

    layout: str | None
    """Layout of exports, "internlm2" or "llama"; None for random weights, which have none yet."""

    tokenizer: Tokenizer
    """Tokenizer, whose vocabulary fits the model's."""

    mesh: Mesh | AbstractMesh
    """All devices; an AbstractMesh where they are not in this machine."""

    device: jax.Device | DeviceSpec
    """One of the devices; all are alike."""

    execution: Execution
    """Attention implementation, dtypes, remat and scan of the training step."""

    attn_reason: str
    """Reason for `execution.attn`."""

    packed: bool
    """True if a row may hold several documents, so that attention gets segment ids."""

    rows: int
    """Rows of a step; a multiple of grad_accum times the devices that split rows."""

    steps: int
    """Optimizer steps of the whole run; 0 for --epochs until `with_epochs`."""

    lr: float
    """Peak learning rate."""

    out: Path
    """Directory of checkpoints and records."""

    plan: Plan
    """Estimated memory of the step, per device."""

    memory: int
    """Bytes of a device that jax may allocate."""

    host: int
    """Bytes of main memory that the activations of one device may take."""

    memory_advice: str | None
    """Flags that make the run fit; None where it fits."""

    notes: tuple[str, ...]
    """Choices with their reasons, for the log."""

    @property
    def real_mesh(self) -> Mesh:
        """The mesh of devices that are in this machine."""
        assert isinstance(self.mesh, Mesh)
        return self.mesh

    def check_memory(self) -> None:
        """Check that the plan fits the device.

        Raises:
            ValueError: It does not; names the flags that make it fit.
        """
        if self.memory_advice is not None:
            host = f" and {self.host / GiB:.2f} GiB of the host" if self.plan.host else ""
            raise ValueError(
                f"the run needs about {self.plan}; the device has {self.memory / GiB:.2f} GiB"
                f"{host}: {self.memory_advice}"
            )

    def with_epochs(self, rows: int) -> "Run":
        """Return the run with the steps of --epochs, where that is given.

        Args:
            rows: Rows of the training data.

        Raises:
            ValueError: There are too many steps, or fewer than --profile needs.
        """
        epochs = self.config.epochs
        if epochs is None:
            return self
        steps = epochs * rows / self.rows
        if steps > MOST_STEPS:
            raise ValueError(
                f"--epochs={epochs:g} of {rows:,} rows are {steps:.3g} steps, must be at most "
                f"{MOST_STEPS:,}"
            )
        run = dataclasses.replace(self, steps=max(1, math.ceil(steps)))
        self.config.check_profile(run.steps)
        return run

    def chosen(self) -> dict[str, Any]:
        """Return the values in use of all flags whose default depends on device or model."""
        config, optim = self.config, self.config.optim
        return {
            "model": self.name,
            "tokenizer": config.tokenizer or default_tokenizer(self.name, self.weights),
            "attn": self.execution.attn,
            "batch_size": self.rows,
            "rows_per_device": None,
            "steps": self.steps or None,
            "out": str(self.out),
            "remat": self.execution.remat,
            "tile_size": self.execution.tile_size,
            "scan_layers": self.execution.scan,
            "dtype": self.execution.dtype.name,
            "optim.lr": self.lr,
            "optim.betas": None if optim.name == "adafactor" else optim.rates,
            "optim.min_lr_ratio": None if optim.schedule == "constant" else optim.last_ratio,
            "optim.decay_ratio": optim.last_decay if optim.schedule == "wsd" else None,
            **{f"mesh.{axis}": size for axis, size in self.mesh.shape.items()},
        }


def resolve(config: Config, devices: Sequence[jax.Device] | DeviceSpec | None = None) -> Run:
    """Make every choice that the flags leave open, and refuse what cannot run.

    Args:
        config: The flags.
        devices: Devices to train on, or the kind of GPUs that --mesh counts, which need not be in
            this machine; None: all devices of jax. Memory is planned but not checked, see
            `Run.check_memory`.

    Raises:
        ValueError: Unknown model, tokenizer too large, a mesh that does not divide the model.
        NotImplementedError: An attention implementation or --matmul=fp8 that cannot run on the
            devices.
        OSError: A model, tokenizer or data file that cannot be read.
    """
    if isinstance(devices, DeviceSpec):
        mesh, device = abstract_mesh(config.mesh), devices
    else:
        mesh = make_mesh(config.mesh, devices)
        device = mesh.devices.flat[0]
    on_gpu, memory, notes = device.platform == "gpu", device_memory(device), []
    _check_offload(config, device)
    _check_fp8(config, device)
    rows = _rows(config, mesh, on_gpu=on_gpu)
    check_rows(mesh, rows=rows, grad_accum=config.grad_accum)
    if rows * config.seq_len > MOST_STEPS:
        raise ValueError(
            f"--batch_size={rows} x --seq_len={config.seq_len} tokens a step must be at most "
            f"{MOST_STEPS:,}"
        )
    dtype = jnp.dtype(config.dtype or ("bfloat16" if on_gpu else "float32"))
    host = _host_memory(device)
    sized: dict[str, Any] = {"mesh": mesh, "rows": rows, "dtype": dtype, "host": host}

    name = config.model
    if name is None and config.lora.adapter is not None:
        raise ValueError(
            f"--lora.adapter={config.lora.adapter} needs --model, the base model that it belongs to"
        )
    if name is None:
        sizing = Sizing(model=PRESETS[GPU_MODEL], attn="xla", **sized)
        need = sizing.plan(config, config.remat or "full").total
        name, why = choose_model(need, memory if on_gpu else None, device.device_kind)
        notes.append(f"model {name}: {why}")
    model, weights = read_model(name)
    name = str(weights) if weights else name  # of a run the checkpoint, which adapters belong to
    tokenizer = read_tokenizer(config.tokenizer, weights, name)
    model = with_vocabulary(model, tokenizer) if name == CPU_MODEL else model
    check_vocabulary(tokenizer, model, name)
    model = extend_rope(model, config.rope_factor, config.seq_len)
    check_seq(mesh, heads=model.num_heads, seq_len=config.seq_len)
    notes += _seq_notes(mesh, model, config.seq_len)
    if config.prompts and not config.sample_every:
        notes.append("no samples of --prompts during training: --sample_every is 0")
    if config.chat and not config.prompts:
        notes.append("no samples during training: --chat is for --prompts, and there are none")
    attn, reason = _attention(config, model, mesh, device, rows, dtype)

    lora = read_lora(config.lora, model)
    sizing = Sizing(model=model, attn=attn, lora=lora, **sized)
    remat, tile_size = way = sizing.fastest(config, memory)
    plan = sizing.plan(config, *way)
    if config.remat is None:
        tiles = "" if tile_size is None else f" with tiles of {tile_size:,} tokens"
        size = f"{plan.total / GiB:.1f} GiB"
        why = "the fastest that fits" if sizing.fits(plan, memory) else "which needs the least"
        notes.append(f"remat {remat}{tiles}: {why}, with {size}")
    scan = in_scan(config.scan_layers, remat, on_gpu=on_gpu, seq_len=config.seq_len)
    if scan and model.num_layers % (policies := len(parse_remat(remat))):
        raise ValueError(
            f"--remat={remat} has {policies} policies, whose number must divide the "
            f"{model.num_layers} layers where they are one loop: take another number, or "
            "--scan_layers=False"
        )
    execution = Execution(
        attn=attn,
        deterministic=config.deterministic,
        dtype=dtype,
        param_dtype=stored_dtype(config, dtype),
        remat=remat,
        tile_size=tile_size,
        lora=lora,
        quantize=quantize_kind(config),
        scan=scan,
        matmul=config.matmul,
    )
    abstract(model, execution, mesh=mesh)  # raises where the mesh does not divide the model
    check_files(config.data)
    return Run(
        config=config,
        name=name,
        model=model,
        weights=weights,
        layout=config.export_layout or (layout_of(weights) if weights else None),
        tokenizer=tokenizer,
        mesh=mesh,
        device=device,
        execution=execution,
        attn_reason=reason,
        packed=attn != "cudnn",
        rows=rows,
        steps=config.steps if config.epochs is None else 0,
        lr=config.optim.lr or _lr(name, weights, lora) * _LR_OF.get(config.optim.name, 1.0),
        out=Path(config.out or default_out(config, name, weights)),
        plan=plan,
        memory=memory,
        host=host,
        memory_advice=sizing.memory_advice(config, way, memory),
        notes=tuple(notes),
    )


def choose_model(need: int, have: int | None, device: str) -> tuple[str, str]:
    """Choose the default preset.

    Args:
        need: Bytes per device of a run of the GPU's model.
        have: Bytes of a GPU; None without a GPU.
        device: Name of the device.

    Returns:
        (preset, reason).
    """
    if have is None:
        return CPU_MODEL, f"there is no GPU, only {device}"
    fits = need <= have
    why = (
        f"the {need / GiB:.1f} GiB that {GPU_MODEL} needs "
        f"{'fit' if fits else 'do not fit'} the {have / GiB:.1f} GiB of {device}"
    )
    return (GPU_MODEL if fits else CPU_MODEL), why


def default_out(config: Config, name: str, weights: Path | None) -> str:
    """Return the default of --out, which belongs to one model, data, tokenizer and row length.

    Data and tokenizers of the same name in other directories get another hash.
    """
    short = _short_name(name, weights)
    files = [str(Path(file).resolve()) for file in config.data.files or ()]
    key = [str(weights.resolve()) if weights else None, files, config.tokenizer]
    if key == [None, [], None]:
        return f"runs/{short}-{config.seq_len}"
    data = f"-{Path(files[0]).name.split('.')[0]}" if files else ""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=3).hexdigest()
    return f"runs/{short}{data}-{config.seq_len}-{digest}"


def _short_name(name: str, weights: Path | None) -> str:
    """Return a name for directories: a preset, a run, or a directory or file of a model."""
    if name in PRESETS:
        return name
    if weights is not None and find_checkpoint(weights) is not None:
        return weights.resolve().parents[1].name  # <run>/checkpoints/<step>
    path = (weights or Path(name)).resolve()
    if path.name == "config.json":
        return path.parent.name
    return path.stem if path.suffix == ".json" else path.name


def _rows(config: Config, mesh: Mesh | AbstractMesh, *, on_gpu: bool) -> int:
    """Return the rows of a step: as given, or as many as divide over the devices."""
    if config.batch_size is not None:
        return config.batch_size
    if config.rows_per_device is not None:
        return config.rows_per_device * row_shards(mesh)
    at_least = row_shards(mesh) * config.grad_accum
    tokens = GPU_TOKENS * row_shards(mesh) if on_gpu else CPU_TOKENS
    return max(1, tokens // config.seq_len // at_least) * at_least


def _attention(
    config: Config,
    model: ModelConfig,
    mesh: Mesh | AbstractMesh,
    device: jax.Device | DeviceSpec,
    rows: int,
    dtype: np.dtype,
) -> tuple[Implementation, str]:
    """Return the attention implementation and the reason for it."""
    batch = rows // config.grad_accum // row_shards(mesh)
    kv_heads = model.num_kv_heads * kv_copies(
        model.num_heads, model.num_kv_heads, head_shards(mesh)
    )
    q_BTNH, k_BTKH = (
        jax.ShapeDtypeStruct(
            (batch, config.seq_len, max(1, heads // head_shards(mesh)), model.head_dim), dtype
        )
        for heads in (model.num_heads, kv_heads)
    )
    # cuDNN has no document mask: the loop checks that each row has one document.
    packed = config.attn != "cudnn"
    mask = jaxattn.Mask(segment_ids=jnp.ones((1, 1), jnp.int32) if packed else None)
    try:
        return jaxattn.resolve(
            config.attn, q_BTNH, k_BTKH, mask, deterministic=config.deterministic, device=device
        )
    except NotImplementedError as error:  # in the words of the command line
        text = re.sub(r"impl='(\w+)'", r"--attn=\1", str(error))
        raise NotImplementedError(text.replace("deterministic=True", "--deterministic")) from error


def _seq_notes(mesh: Mesh | AbstractMesh, model: ModelConfig, seq_len: int) -> list[str]:
    """Return a log line on sequence parallelism, if there is any."""
    seq, heads, shards = mesh.shape["seq"], model.num_heads, head_shards(mesh)
    if seq == 1:
        return []
    copies = kv_copies(heads, model.num_kv_heads, shards)
    repeated = f", each kv head repeated {copies} times" if copies > 1 else ""
    return [
        f"mesh.seq {seq}: a device has {seq_len // seq:,} of the {seq_len:,} tokens of a row; "
        f"all-to-alls exchange them for {heads // shards} of the {heads} heads around attention"
        f"{repeated}"
    ]


def _check_offload(config: Config, device: jax.Device | DeviceSpec) -> None:
    if "offload" not in (config.remat or "") or isinstance(device, DeviceSpec):
        return
    if "pinned_host" not in _memories(device):
        raise NotImplementedError(
            f"--remat={config.remat} needs pinned host memory, which {device.device_kind} does not "
            "have: take --remat=full"
        )


def _check_fp8(config: Config, device: jax.Device | DeviceSpec) -> None:
    """Check that a GPU multiplies 8-bit numbers. A CPU computes the same in software."""
    if config.matmul != "fp8" or device.platform != "gpu":
        return
    capability = str(device.compute_capability)
    if tuple(map(int, capability.split("."))) < FP8_CAPABILITY:
        raise NotImplementedError(
            f"--matmul=fp8 needs a GPU of compute capability 8.9 or higher, {device.device_kind} "
            f"has {capability}: take --matmul=bf16"
        )


def _host_memory(device: jax.Device | DeviceSpec) -> int:
    """Return the bytes of main memory that the activations of one device may take.

    A machine's memory is shared by the devices of this process.
    """
    if isinstance(device, DeviceSpec):
        return int(HOST_SHARE * device.host_memory * GiB)
    if "pinned_host" not in _memories(device):
        return 0
    return int(HOST_SHARE * host_memory()) // jax.local_device_count()


def _memories(device: jax.Device) -> set[str]:
    return {memory.kind for memory in device.addressable_memories()}


def _lr(name: str, weights: Path | None, lora: LoRA | None) -> float:
    if weights is not None:
        return 2e-5 if lora is None else 2e-4
    return 2e-3 if name == "nano" else 3e-4
