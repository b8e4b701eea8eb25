"""Configuration of a run: one frozen dataclass, made once by `train.main`.

Nothing outside `train` receives it. A field that is None is chosen by device and model, in
`train.run.resolve`, and the log has the choice.
"""

import contextlib
import dataclasses
from typing import Annotated, Literal

import tyro

from jaxattn.api import Impl
from models.remat import IN_TILES, parse_remat
from train.config.bounds import (
    NOT_NEGATIVE,
    POSITIVE,
    Bound,
    above,
    at_least,
    check_bounds,
    require,
)
from train.config.sections import (
    DataConfig,
    DistConfig,
    GuardConfig,
    LoRAConfig,
    MeshConfig,
    OptimConfig,
    chosen,
)

MOST_STEPS = 2**31 - 1
"""Largest number of steps, and of tokens in a step: they are counted in int32."""

STEPS = Bound(lambda steps: steps <= MOST_STEPS, f"at most {MOST_STEPS:,}")
ROPE_FACTOR = Bound(lambda factor: 1 <= factor <= 1e6, "at least 1 and at most 1,000,000")
# jax keeps 32 bits: a larger seed would draw the weights of a smaller one.
SEED = Bound(lambda seed: 0 <= seed < 2**32, "at least 0 and below 4,294,967,296")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Train InternLM2 on packed documents; write checkpoints and metrics."""

    recipe: Annotated[str | None, chosen("NAME|list")] = None
    """Recipe whose values the other flags override; "list" shows all recipes."""

    config: Annotated[str | None, chosen("FILE|DIR")] = None
    """File with flags, which the flags of the command line override: .yaml or .json, with the
    flags as keys, such as `optim: {lr: 2e-5}`; the directory of a run, for the flags of that run;
    or a config of XTuner, .py, which is read but not executed."""

    print_config: bool = False
    """Print the flags that repeat this run as YAML, for --config, and exit."""

    model: Annotated[str | None, chosen("NAME|DIR|FILE")] = None
    """Preset with random weights (nano, internlm2-1.8b, internlm2-7b, internlm2-20b), a config.json
    of Hugging Face for random weights of another size, a directory of Hugging Face weights, or the
    directory of a run or of one of its checkpoints. By default nano, or internlm2-1.8b on a GPU
    with enough memory. The vocabulary of nano is that of the tokenizer."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)

    tokenizer: Annotated[str | None, chosen("byte|FILE|DIR")] = None
    """Tokenizer: "byte", a SentencePiece tokenizer.model, or a directory with a tokenizer. By
    default the one in the directory of --model, or of the run, else byte."""

    attn: Impl = "auto"
    """Attention implementation. pallas (or flash_attention_2) takes the kernels for the GPU: wgmma
    on Hopper, mma.sync (pallas_mma) on Ampere, Ada and Blackwell workstation GPUs. auto takes
    pallas on these GPUs, else xla. sdpa is xla. cudnn has no document mask: each row must hold one
    document. An implementation that cannot run is an error, never replaced."""

    deterministic: bool = False
    """Make losses and weights bitwise reproducible on GPUs of one kind. The backward pass of
    attention then computes 7 matrix products instead of 5, and XLA uses no atomic additions and no
    autotuning of matrix products."""

    seq_len: Annotated[int, at_least(2)] = 512
    """Tokens of a packed row."""

    rope_factor: Annotated[float | None, chosen("FLOAT"), ROPE_FACTOR] = None
    """Factor of rotary scaling, instead of the model's own: --seq_len may be the trained length
    times this factor. A model without scaling gets dynamic (NTK) scaling."""

    batch_size: Annotated[int | None, chosen("INT"), at_least(1)] = None
    """Rows of an optimizer step, over all devices and microbatches. By default as many as hold
    2,048 tokens, or 32,768 tokens for each GPU."""

    rows_per_device: Annotated[int | None, chosen("INT"), at_least(1)] = None
    """Rows of an optimizer step for each device (with --mesh.seq or --mesh.tensor for each group
    of devices that share rows), over all microbatches, instead of --batch_size."""

    grad_accum: Annotated[int, at_least(1)] = 1
    """Gradient-accumulation microbatches of an optimizer step. More microbatches need less
    memory."""

    steps: Annotated[int, at_least(1), STEPS] = 120
    """Optimizer steps of the whole run, including those before a resume."""

    epochs: Annotated[float | None, chosen("FLOAT"), POSITIVE] = None
    """Passes over the data, instead of --steps."""

    seed: Annotated[int, SEED] = 0
    """Seed of the initial weights and of the order of the data."""

    out: Annotated[str | None, chosen("DIR")] = None
    """Directory of checkpoints and records. By default runs/<model>-<seq_len>; with --data or
    --tokenizer, or trained weights, their name and hash are added."""

    resume: bool = True
    """Resume from the latest checkpoint in --out. With --no_resume, --out must hold no readable
    checkpoint."""

    save_every: Annotated[int, at_least(1)] = 500
    """Steps between checkpoints. The last step is always saved."""

    save_minutes: Annotated[float, above(0)] = 30.0
    """Longest time between checkpoints, in minutes."""

    keep_last: Annotated[int, at_least(1)] = 2
    """Number of latest checkpoints to keep."""

    keep_best: Annotated[int, at_least(0)] = 1
    """Number of further checkpoints to keep: those with the lowest validation loss (mean over the
    sets) among the checkpoints of evaluated steps."""

    export_every: Annotated[int, at_least(0)] = 0
    """Steps between exports: weights for other programs, <out>/export/step-<step>, written while
    training goes on; 0: no exports. The last step is exported, too. With LoRA the adapter alone is
    exported, as a PEFT directory."""

    export_dtype: Annotated[Literal["bf16", "fp16", "fp32"] | None, chosen("bf16|fp16|fp32")] = None
    """Dtype of exports. By default bf16, for adapters fp32."""

    export_layout: Annotated[Literal["internlm2", "llama"] | None, chosen("internlm2|llama")] = None
    """Names and shapes of exported tensors: InternLM2's, or those of LlamaForCausalLM. By default
    those of --model's weights, or of the exports of the run that it names, else internlm2."""

    export_keep: Annotated[int, at_least(1)] = 2
    """Number of latest exports to keep."""

    log_every: Annotated[int, at_least(1)] = 1
    """Steps between lines of metrics.jsonl."""

    eval_every: Annotated[int, at_least(1)] = 100
    """Steps between evaluations on all rows of --data.val. The last step is always evaluated."""

    log: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Further destinations of the metrics. Needs the package tensorboardX or wandb."""

    prompts: tuple[str, ...] = ()
    """Prompts of samples during training, which are written to samples.jsonl. FILE.txt stands for
    the lines of the file."""

    sample_every: Annotated[int, at_least(0)] = 0
    """Steps between samples of --prompts; 0: no samples. Samples need a copy of the weights in the
    compute dtype."""

    chat: bool = False
    """Treat each prompt as a chat message of a user and generate the reply."""

    profile: Annotated[str | None, chosen("START:STOP")] = None
    """Write a profiler trace of these steps to <out>/profile. A few steps are enough."""

    remat: Annotated[
        str | None, chosen("{none,dots,qkv,attention,full,offload,offload_input}[,...]")
    ] = None
    """Rematerialization: the activations of a layer that are saved for the backward pass. none:
    all; dots: outputs of matrix products and attention; qkv: q, k, v and attention output;
    attention: attention output; full: none, all are recomputed; offload: attention output, in host
    memory; offload_input: none, and the inputs of the layers are in host memory. Several with
    commas between them are taken in turn by consecutive layers. By default the fastest that fits
    device and host."""

    tile_size: Annotated[int | None, chosen("INT"), at_least(1)] = None
    """Most tokens of a row for which a layer's matrix products are computed at once; attention
    always takes the whole row. At least the tokens of a row on one device: no tiles. By default
    16,384 where the whole row does not fit the device, else no tiles."""

    scan_layers: Annotated[bool | None, chosen("{True,False}")] = None
    """Compile one layer for all layers (a scan): compiles faster, and runs slower by the copies of
    what is saved. By default False on a GPU, except with --remat=offload or offload_input, and with
    rows of 65,536 tokens or more if remat saves no matrix products (attention, full)."""

    dtype: Annotated[Literal["bfloat16", "float32"] | None, chosen("{bfloat16,float32}")] = None
    """Compute dtype. By default bfloat16 on a GPU, else float32."""

    param_dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype of the stored weights. bf16 weights are updated with stochastic rounding."""

    base_dtype: Annotated[
        Literal["fp32", "bf16", "nf4", "int8"] | None, chosen("fp32|bf16|nf4|int8")
    ] = None
    """Storage of the frozen weights beside LoRA adapters. nf4 (QLoRA) and int8 quantize the linear
    layers of the blocks; the other weights are stored in bfloat16. By default the compute dtype."""

    matmul: Literal["bf16", "fp8"] = "bf16"
    """Matrix products of the blocks. bf16: in the compute dtype; fp8: in 8-bit floating point,
    forward and backward. Stored weights, checkpoints and exports do not change. fp8 needs a GPU of
    compute capability 8.9 or higher (H100, H200, RTX 4090)."""

    dry_run: bool = False
    """Print the command with all choices, and the memory plan; compile the step and compare. No
    data are read, nothing is trained or written. The exit status is 1 if the run does not fit, or
    would be refused because data, weights or a tokenizer are missing."""

    dry_run_device: Annotated[str | None, chosen("NAME|GiB")] = None
    """GPU to plan for with --dry_run, which need not be installed: h200, h100, a100-80, a100-40,
    l40s, rtx4090, rtx3090, rtx5090, or the memory of a Hopper GPU in GiB. The sizes of --mesh
    count the GPUs."""

    z_loss: Annotated[float, NOT_NEGATIVE] = 0.0
    """Factor of the z-loss, log(Z)^2 of the softmax's denominator Z, which is added to the loss;
    PaLM has 1e-4. The reported loss is without it."""

    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)

    lora: LoRAConfig = dataclasses.field(default_factory=LoRAConfig)

    guard: GuardConfig = dataclasses.field(default_factory=GuardConfig)

    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    dist: DistConfig = dataclasses.field(default_factory=DistConfig)

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least level of the lines that are logged to standard output."""

    verbose: Annotated[bool, tyro.conf.arg(aliases=["-v"])] = False
    """Short for --log_level=debug."""

    traceback: bool = False
    """Print the Python traceback of an error."""

    def __post_init__(self):
        """Raise ValueError if a flag is out of its bound, or two flags contradict."""
        check_bounds(self)
        if self.sample_every and not self.prompts:
            raise ValueError(f"--sample_every={self.sample_every} needs --prompts")
        if self.epochs is None:
            self.check_profile(self.steps)
        if self.dry_run_device is not None and not self.dry_run:
            raise ValueError(
                f"--dry_run_device={self.dry_run_device} describes a GPU for --dry_run: add it"
            )
        if self.base_dtype is not None and not self.lora.used:
            raise ValueError(
                f"--base_dtype={self.base_dtype} is the storage of frozen weights: it needs "
                "--lora.rank, such as --lora.rank=64"
            )
        if self.lora.used and self.param_dtype != "fp32":
            raise ValueError(
                f"--param_dtype={self.param_dtype} is for trained weights, and adapters are "
                "float32: take --base_dtype for the frozen ones"
            )
        names = parse_remat(self.remat or "full", flag="--remat")
        if self.tile_size is not None and (outside := set(names) - set(IN_TILES)):
            raise ValueError(
                f"--remat={outside.pop()} would save what --tile_size={self.tile_size} recomputes: "
                f"leave out --tile_size, or take one of {', '.join(IN_TILES)}"
            )
        if self.base_dtype in ("nf4", "int8") and "none" in names:
            raise ValueError(
                f"--remat=none would keep a dequantized copy of all --base_dtype={self.base_dtype} "
                "weights: take --remat=dots"
            )
        if self.batch_size is not None and self.rows_per_device is not None:
            raise ValueError(
                f"--batch_size={self.batch_size} and --rows_per_device={self.rows_per_device} "
                "contradict: leave one out"
            )
        for name in ("batch_size", "rows_per_device"):
            rows = getattr(self, name)
            right = rows is None or rows % self.grad_accum == 0
            require(right, f"--{name}", rows, f"a multiple of --grad_accum={self.grad_accum}")

    @property
    def profile_window(self) -> tuple[int, int] | None:
        """First and last step of --profile, both included; None without it.

        Raises:
            ValueError: --profile is not two positive numbers in order.
        """
        if self.profile is None:
            return None
        first, _, last = self.profile.partition(":")
        with contextlib.suppress(ValueError):
            if 1 <= int(first) <= int(last):
                return int(first), int(last)
        raise ValueError(
            f"--profile={self.profile} must be START:STOP, steps from 1, such as 10:12"
        )

    def check_profile(self, steps: int) -> None:
        """Raise ValueError if --profile is no window, or ends after the last of `steps` steps."""
        window = self.profile_window
        if window is not None and window[1] > steps:
            given = f" of --epochs={self.epochs:g}" if self.epochs is not None else ""
            raise ValueError(f"--profile={self.profile} ends after the last step, {steps}{given}")
