"""What a person may ask of a run. One frozen object, made once, by `train.main`.

Nothing below `train/` ever receives it. A field that is None is chosen by the device and the
model (`train.defaults`), and the choice is said in the log.
"""

import dataclasses
from typing import Annotated, Literal

import tyro


def _chosen(metavar: str):
    """An option that the program chooses where it is not given."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train on."""

    files: Annotated[
        tuple[str, ...], tyro.conf.arg(name="", metavar="FILE...", help_behavior_hint="")
    ] = ()
    """Files to train on: .txt, .json, .jsonl, the same as .gz or .zst, .parquet. Their format is
    recognised by their content. Without any: the built-in corpus. FILE:2 is twice in every epoch,
    FILE:0.3 a random 30% of it."""

    packing: Literal["fit", "concat", "xtuner"] = "fit"
    """How rows are filled: with whole documents, best fit first; from one stream of all tokens, cut
    every --seq_len; or as XTuner's Packer does it, for comparisons."""

    val: tuple[str, ...] = ()
    """Validation: files, each a set of its own name, or a share such as 0.01 of the documents of
    every training file, which is then not trained on. Their losses go to eval.jsonl."""

    overlong: Literal["drop", "head", "tail"] = "drop"
    """What becomes of a chat longer than a row: left out, or cut to its head or its tail. Raw text
    is split. All of it is counted and said."""

    cache: Annotated[str | None, _chosen("DIR")] = None
    """Where tokens are kept, so that a file is tokenised once. By default internlm2-jax in the
    user's cache directory."""

    strict: bool = False
    """Stop at the first broken row, naming its file and line, instead of counting and skipping."""

    def __post_init__(self):
        """Checks ranges."""
        _ = self.hold_out

    @property
    def hold_out(self) -> float:
        """The share of the documents that --data.val asks for; 0 where it names files or nothing.

        Raises:
            ValueError: a number that is no share.
        """
        try:
            [share] = map(float, self.val)
        except ValueError:
            return 0.0
        _require(0 < share < 1, "--data.val", self.val[0], "a share in (0, 1), or files")
        return share


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, with a linear warm-up and a cosine to a fraction of the peak."""

    lr: Annotated[float | None, _chosen("FLOAT")] = None
    """Peak learning rate. By default 2e-3 for nano, 3e-4 for a larger preset, 2e-5 for trained
    weights."""

    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the two moments."""

    weight_decay: float = 0.01
    """Decoupled weight decay; norms and biases have none."""

    warmup: float = 0.025
    """Share of the steps over which the learning rate rises from 0 to its peak."""

    min_lr_ratio: float = 0.15
    """Where the cosine ends, as a share of the peak."""

    clip: float = 1.0
    """Largest global norm of the gradient; larger ones are scaled down to it."""

    def __post_init__(self):
        """Checks ranges."""
        _require(self.lr is None or self.lr > 0, "--optim.lr", self.lr, "above 0")
        _require(all(0 <= b < 1 for b in self.betas), "--optim.betas", self.betas, "in [0, 1)")
        _require(self.weight_decay >= 0, "--optim.weight_decay", self.weight_decay, "at least 0")
        _require(0 <= self.warmup <= 1, "--optim.warmup", self.warmup, "a share in [0, 1]")
        _require(
            0 <= self.min_lr_ratio <= 1, "--optim.min_lr_ratio", self.min_lr_ratio, "in [0, 1]"
        )
        _require(self.clip > 0, "--optim.clip", self.clip, "above 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How the devices share the work. The three numbers multiply to the number of devices."""

    data: int = 1
    """Groups of devices that hold copies of the weights and split the rows."""

    fsdp: Annotated[int | None, _chosen("INT")] = None
    """Devices that split both the weights and the rows. By default all that remain."""

    tensor: int = 1
    """Devices that split heads and feed-forward columns of each row."""

    def __post_init__(self):
        """Checks ranges."""
        for name in ("data", "fsdp", "tensor"):
            size = getattr(self, name)
            _require(size is None or size >= 1, f"--mesh.{name}", size, "at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Trains InternLM2 on packed documents, and writes checkpoints, metrics and a sample."""

    model: Annotated[str | None, _chosen("NAME|DIR")] = None
    """Preset (nano, internlm2-1.8b, internlm2-7b, internlm2-20b) or a directory of HF weights. By
    default nano, or internlm2-1.8b on a GPU that it fits."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)

    tokenizer: Annotated[str | None, _chosen("byte|FILE|DIR")] = None
    """"byte", a SentencePiece tokenizer.model, or a directory that holds one. By default the HF
    directory's own, else byte."""

    attn: str = "auto"
    """Attention: auto, pallas (flash_attention_2), cudnn, xla (sdpa), eager. What is named runs,
    or the run stops and says why."""

    seq_len: int = 512
    """Tokens in a packed row."""

    batch_size: Annotated[int | None, _chosen("INT")] = None
    """Rows in a step. By default as many as make 2,048 tokens, or 32,768 per GPU."""

    accum: int = 1
    """Parts that a step's rows are worked through in; more parts take less memory."""

    steps: int = 120
    """Optimizer steps of the whole run, those before a resume included."""

    seed: int = 0
    """Of the initial weights and of the order of the documents."""

    out: Annotated[str | None, _chosen("DIR")] = None
    """Where checkpoints and metrics.jsonl go. By default runs/<model>-<seq_len>."""

    resume: bool = True
    """Go on from the latest checkpoint in --out. Without it, --out must hold none."""

    save_every: int = 500
    """Steps between checkpoints; the last step always makes one."""

    keep: int = 2
    """Checkpoints to keep, newest first."""

    log_every: int = 1
    """Steps between lines of metrics.jsonl."""

    eval_every: int = 100
    """Steps between evaluations on --data.val, every row of it; the last step always makes one."""

    remat: str = "attention"
    """What the backward pass finds in memory: none of a block recomputed ("none"), q, k, v and the
    output of attention kept ("qkv"), only the output ("attention"), nothing kept ("full")."""

    dtype: Annotated[Literal["bfloat16", "float32"] | None, _chosen("bfloat16|float32")] = None
    """Compute type; weights and optimizer stay float32. By default bfloat16 on a GPU, float32
    elsewhere."""

    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)

    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

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
            ("accum", 1),
            ("steps", 1),
            ("seed", 0),
            ("save_every", 1),
            ("keep", 1),
            ("log_every", 1),
            ("eval_every", 1),
        ):
            value = getattr(self, name)
            _require(value is None or value >= least, f"--{name}", value, f"at least {least}")
        if self.batch_size is not None and self.batch_size % self.accum:
            raise ValueError(
                f"--batch_size={self.batch_size} must be a multiple of --accum={self.accum}"
            )


def _require(holds: bool, flag: str, value: object, bound: str) -> None:
    if not holds:
        raise ValueError(f"{flag}={value} must be {bound}")
