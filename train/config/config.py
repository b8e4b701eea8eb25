"""What a person may ask of a run. One frozen object, made once, by `train.main`.

Nothing below `train/` ever receives it. A field that is None is chosen by the device and the
model (`train.run.resolve`), and the choice is said in the log.
"""

import dataclasses
import math
from typing import Annotated, Literal

from models.remat import REMAT
from train.config.sections import (
    DataConfig,
    DistConfig,
    GuardConfig,
    MeshConfig,
    OptimConfig,
    chosen,
    require,
)
from train.config.window import parse_window

MOST_STEPS = 2**31 - 1
"""The state counts them in int32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Trains InternLM2 on packed documents, and writes checkpoints, metrics and a sample."""

    recipe: Annotated[str | None, chosen("NAME|list")] = None
    """Values for the other flags, each of which overrides it; "list" shows the recipes."""

    model: Annotated[str | None, chosen("NAME|DIR")] = None
    """Preset (nano, internlm2-1.8b, internlm2-7b, internlm2-20b) or a directory of HF weights. By
    default nano, or internlm2-1.8b on a GPU that it fits."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)

    tokenizer: Annotated[str | None, chosen("byte|FILE|DIR")] = None
    """"byte", a SentencePiece tokenizer.model, or a directory that holds one. By default the HF
    directory's own, else byte."""

    attn: str = "auto"
    """Attention: auto, pallas (flash_attention_2), cudnn, xla (sdpa), eager. What is named runs,
    or the run stops and says why."""

    deterministic: bool = False
    """The same losses and weights, bit for bit, in every run on GPUs of one kind: attention's
    backward at 7 products for 5, and XLA without atomic sums and without timing its products."""

    seq_len: int = 512
    """Tokens in a packed row."""

    rope_factor: Annotated[float | None, chosen("FLOAT")] = None
    """Factor of the model's rotary scaling, instead of its own; --seq_len may be as many times its
    trained length. A model without scaling gets dynamic (NTK) scaling."""

    batch_size: Annotated[int | None, chosen("INT")] = None
    """Rows in a step. By default as many as make 2,048 tokens, or 32,768 per GPU."""

    grad_accum: int = 1
    """Parts that a step's rows are worked through in; more parts take less memory."""

    steps: int = 120
    """Optimizer steps of the whole run, those before a resume included."""

    epochs: Annotated[float | None, chosen("FLOAT")] = None
    """Instead of --steps: as many as it takes to see the data so often."""

    seed: int = 0
    """Of the initial weights and of the order of the documents."""

    out: Annotated[str | None, chosen("DIR")] = None
    """Where checkpoints and metrics.jsonl go. By default runs/<model>-<seq_len>."""

    resume: bool = True
    """Go on from the latest checkpoint in --out. Without it, --out must hold none."""

    save_every: int = 500
    """Steps between checkpoints; the last step always makes one."""

    save_minutes: float = 30.0
    """Minutes after which a checkpoint is made even if --save_every has not come round."""

    keep_last: int = 2
    """Checkpoints to keep, newest first."""

    keep_best: int = 1
    """Checkpoints to keep beside those: the ones with the lowest validation loss (the mean over the
    sets), among those made at a step of --eval_every."""

    log_every: int = 1
    """Steps between lines of metrics.jsonl."""

    eval_every: int = 100
    """Steps between evaluations on --data.val, every row of it; the last step always makes one."""

    log: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where the numbers of metrics.jsonl and eval.jsonl go too; needs tensorboardX, or wandb."""

    prompts: tuple[str, ...] = ()
    """Texts that the model goes on with as it is trained, in samples.jsonl; FILE.txt is a text a
    line."""

    sample_every: int = 0
    """Steps between samples from --prompts; 0: none. They need a copy of the weights in the compute
    type."""

    chat: bool = False
    """The prompts are a user's messages, to be answered."""

    profile: Annotated[str | None, chosen("START:STOP")] = None
    """Write a trace of the device's work in these steps to <out>/profile; a few are enough."""

    remat: Annotated[str | None, chosen("NAME")] = None
    """What the backward pass finds in memory: none of a block recomputed ("none"), what matrix
    products and attention gave kept ("dots"), q, k, v and the output of attention ("qkv"), only
    the output ("attention"), nothing kept ("full"); or as "attention", in the host's memory
    ("offload"). By default the first of dots, attention, full that fits the device."""

    scan_layers: Annotated[bool | None, chosen("BOOL")] = None
    """One compiled block for all layers, which compiles faster, instead of each layer of its own,
    which runs faster. By default not on a GPU, unless --remat=offload."""

    dtype: Annotated[Literal["bfloat16", "float32"] | None, chosen("bfloat16|float32")] = None
    """Compute type. By default bfloat16 on a GPU, float32 elsewhere."""

    param_dtype: Literal["fp32", "bf16"] = "fp32"
    """What weights are stored in between steps; bf16 ones are updated with stochastic rounding."""

    dry_run: bool = False
    """Show the configuration, the mesh and the memory plan, compile, compare the plan with the
    compiler's, and stop; nothing is read, trained or written."""

    dry_run_device: Annotated[str | None, chosen("NAME|GiB")] = None
    """With --dry_run: plan for this GPU, which need not be here: h200, h100, a100, or its GiB. As
    many of them as the --mesh has."""

    z_loss: float = 0.0
    """Factor of the squared log of the softmax's denominator, which is added to the loss to keep
    the logits small: 1e-4 in PaLM. The loss that is shown is without it."""

    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)

    guard: GuardConfig = dataclasses.field(default_factory=GuardConfig)

    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    dist: DistConfig = dataclasses.field(default_factory=DistConfig)

    traceback: bool = False
    """Show where in the code an error came from."""

    def __post_init__(self):
        """Checks ranges.

        Raises:
            ValueError: naming the flag, its value and the bound.
        """
        for name, least in (
            ("seq_len", 2),
            ("batch_size", 1),
            ("grad_accum", 1),
            ("steps", 1),
            ("seed", 0),
            ("save_every", 1),
            ("keep_last", 1),
            ("keep_best", 0),
            ("log_every", 1),
            ("eval_every", 1),
            ("sample_every", 0),
        ):
            value = getattr(self, name)
            require(value is None or value >= least, f"--{name}", value, f"at least {least}")
        bound = f"at most {MOST_STEPS:,}"
        require(self.steps <= MOST_STEPS, "--steps", self.steps, bound)
        require(0 <= self.z_loss < math.inf, "--z_loss", self.z_loss, "at least 0 and finite")
        require(
            self.rope_factor is None or 1 <= self.rope_factor < math.inf,
            "--rope_factor",
            self.rope_factor,
            "at least 1 and finite",
        )
        require(self.save_minutes > 0, "--save_minutes", self.save_minutes, "above 0")
        require(
            self.epochs is None or 0 < self.epochs < math.inf,
            "--epochs",
            self.epochs,
            "above 0 and finite",
        )
        if self.remat is not None and self.remat not in REMAT:
            raise ValueError(f"--remat={self.remat} must be one of {', '.join(REMAT)}")
        if self.sample_every and not self.prompts:
            raise ValueError(f"--sample_every={self.sample_every} needs --prompts")
        if self.epochs is None:
            self.check_profile()
        if self.dry_run_device is not None and not self.dry_run:
            raise ValueError(
                f"--dry_run_device={self.dry_run_device} describes a GPU for --dry_run: add it"
            )
        if self.batch_size is not None and self.batch_size % self.grad_accum:
            raise ValueError(
                f"--batch_size={self.batch_size} must be a multiple of "
                f"--grad_accum={self.grad_accum}"
            )

    def check_profile(self) -> None:
        """Checks that the run reaches the end of --profile, once its steps are known.

        Raises:
            ValueError: it is no window, or ends after the last step.
        """
        if self.profile is not None and parse_window(self.profile)[1] > self.steps:
            given = f" of --epochs={self.epochs:g}" if self.epochs is not None else ""
            raise ValueError(
                f"--profile={self.profile} ends after the last step, {self.steps}{given}"
            )
