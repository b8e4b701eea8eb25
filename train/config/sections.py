"""Sections of the configuration of a run, each for one part of the program.

A field that is None is chosen by device and model, in `train.run.resolve`.
"""

import dataclasses
from typing import Annotated, Literal

import tyro

from models.lora import LoRA
from train.config.bounds import (
    NOT_NEGATIVE,
    POSITIVE,
    Bound,
    above,
    at_least,
    check_bounds,
    check_not_empty,
    require,
)


def chosen(metavar: str):
    """Annotate a flag that the program chooses where it is not given."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training and validation data."""

    files: Annotated[
        tuple[str, ...] | None, tyro.conf.arg(name="", metavar="FILE...", help_behavior_hint="")
    ] = None
    """Training files: .txt, .json, .jsonl, each also as .gz or .zst, .parquet, .arrow, and
    directories of the datasets library. The format of the rows is recognized by their content.
    FILE:2 repeats a file twice in each epoch, FILE:0.3 takes a random 30% of it. By default the
    built-in text."""

    packing: Literal["fit", "concat", "xtuner"] = "fit"
    """Packing of documents into rows. fit: whole documents, best fit first; concat: one stream of
    all tokens, split every --seq_len; xtuner: as XTuner's Packer does, for comparisons."""

    val: Annotated[tuple[str, ...] | None, chosen("FILE...|SHARE")] = None
    """Validation data: files, each a set with the file's name, or a share such as 0.01 of the
    documents of each training file, which are then left out of training. Packing is always fit.
    Losses are written to eval.jsonl."""

    too_long: Literal["drop", "head", "tail"] = "drop"
    """Treatment of chats longer than a row: drop the chat, or keep its head or its tail. Raw text
    is split. The log has the counts."""

    reasoning: Literal["keep", "drop"] = "keep"
    """Reasoning of an answer (reasoning_content, <think> ... </think>): kept before the answer in
    <think> ... </think> and trained on, or dropped."""

    cache: Annotated[str | None, chosen("DIR")] = None
    """Directory of the token cache, by which a file is tokenized once. By default internlm2-jax in
    the user's cache directory."""

    stall_minutes: Annotated[float, above(0)] = 10.0
    """Minutes to wait for a batch before the run saves and stops. Opening and tokenizing the files
    has no limit."""

    strict: bool = False
    """Stop at the first broken row, with its file and line, instead of skipping it."""

    def __post_init__(self):
        """Check the ranges."""
        check_bounds(self, "--data.")
        check_not_empty("--data", *(self.files or ()))
        check_not_empty("--data.val", *(self.val or ()))
        if self.files == ():
            raise ValueError("--data names no file: name some, or leave it out for built-in text")
        if self.val == ():
            raise ValueError(
                "--data.val names neither files nor a share: name some, or leave it out"
            )
        _ = self.hold_out

    @property
    def hold_out(self) -> float:
        """Share of the documents that --data.val holds out; 0 where it names files or nothing.

        Raises:
            ValueError: The number is not between 0 and 1.
        """
        try:
            [share] = map(float, self.val or ())
        except ValueError:
            return 0.0
        require(0 < share < 1, "--data.val", f"{share:g}", "a share in (0, 1), or files")
        return share


# A larger rate is 1 in float32, and Adam's bias correction would divide by zero.
_BETAS = Bound(
    lambda betas: all(0 <= b <= 1 - 2**-24 for b in betas), "in [0, 1), and at most 0.99999994"
)
_RATIO = Bound(lambda ratio: 0 <= ratio <= 1, "a share in [0, 1]")
_DECAY = Bound(lambda ratio: 0 < ratio <= 1, "a share in (0, 1]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer and learning rate: a linear warm-up, then a schedule."""

    name: Literal["adamw", "adafactor", "lion", "muon"] = "adamw"
    """Optimizer. adafactor stores a factored second moment, lion one moment; muon orthogonalizes
    the momentum of weight matrices and uses adamw for all other parameters."""

    moment_dtype: Literal["fp32", "bf16", "int8"] = "fp32"
    """Dtype of adamw's two moments: 8, 4 or 2 bytes a parameter for both."""

    lr: Annotated[float | None, chosen("FLOAT"), POSITIVE] = None
    """Peak learning rate. By default 2e-3 for nano, 3e-4 for larger presets, 2e-5 for trained
    weights, 2e-4 for adapters beside them; a tenth of that for lion."""

    betas: Annotated[tuple[float, float] | None, chosen("FLOAT FLOAT"), _BETAS] = None
    """Decay rates of the two moments; for lion, of its update and its moment. By default 0.9 0.95,
    for lion 0.9 0.99. Not for adafactor."""

    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.01
    """Decoupled weight decay of all parameters except norms and biases."""

    warmup_ratio: Annotated[float, _RATIO] = 0.025
    """Share of the steps in which the learning rate rises from 0 to its peak."""

    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Learning rate after the warm-up: half a cosine, linear, constant, or wsd (warm-up, stable,
    decay), which keeps the peak and falls at the end."""

    min_lr_ratio: Annotated[float | None, chosen("FLOAT"), _RATIO] = None
    """Learning rate at the last step, as a share of the peak. By default 0.15."""

    decay_ratio: Annotated[float | None, chosen("FLOAT"), _DECAY] = None
    """Share of the steps after the warm-up in which wsd falls. By default 0.2."""

    clip: Annotated[float, above(0)] = 1.0
    """Largest global norm of the gradient; a larger gradient is scaled down to it."""

    def __post_init__(self):
        """Check the ranges."""
        check_bounds(self, "--optim.")
        if self.name == "adafactor" and self.betas is not None:
            raise ValueError("--optim.betas is not for --optim.name=adafactor: leave one out")
        if self.name != "adamw" and self.moment_dtype != "fp32":
            raise ValueError(
                f"--optim.moment_dtype={self.moment_dtype} is for adamw only, "
                f"not --optim.name={self.name}"
            )
        if self.schedule == "constant" and self.min_lr_ratio is not None:
            raise ValueError(
                "--optim.min_lr_ratio is where a schedule ends, and --optim.schedule=constant ends "
                "at its peak: leave one out"
            )
        if self.schedule != "wsd" and self.decay_ratio is not None:
            raise ValueError(
                f"--optim.decay_ratio is for wsd, not --optim.schedule={self.schedule}"
            )

    @property
    def rates(self) -> tuple[float, float]:
        """Betas in use."""
        return self.betas or ((0.9, 0.99) if self.name == "lion" else (0.9, 0.95))

    @property
    def last_ratio(self) -> float:
        """Value of min_lr_ratio in use."""
        return 0.15 if self.min_lr_ratio is None else self.min_lr_ratio

    @property
    def last_decay(self) -> float:
        """Value of decay_ratio in use."""
        return 0.2 if self.decay_ratio is None else self.decay_ratio


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """LoRA: train adapters, in float32, and freeze all other weights."""

    rank: Annotated[int | None, chosen("INT")] = None
    """Rank of the adapters. By default there are no adapters and all weights are trained."""

    alpha: float = 16.0
    """Factor of the adapters' output, divided by the rank."""

    dropout: float = 0.0
    """Share of an adapter's inputs that are set to zero in training."""

    targets: tuple[Literal["wqkv", "wo", "w1", "w3", "w2"], ...] = ("wqkv", "wo", "w1", "w3", "w2")
    """Linear layers of the blocks that get an adapter."""

    rslora: bool = False
    """Divide alpha by the square root of the rank instead of the rank."""

    adapter: Annotated[str | None, chosen("DIR")] = None
    """Adapter to continue to train: a PEFT directory, or a run with adapters. Its rank, alpha,
    targets and rslora are used, and those flags are left out."""

    @property
    def used(self) -> bool:
        """True if adapters are trained."""
        return self.rank is not None or self.adapter is not None

    @property
    def lora(self) -> LoRA | None:
        """New adapters of the model; None without --lora.rank.

        Raises:
            ValueError: a value is out of range, or a flag is given without --lora.rank.
        """
        new = ("rank", "alpha", "dropout", "targets", "rslora")
        values = {name: getattr(self, name) for name in new}
        if self.rank is not None and self.adapter is None:
            return LoRA(**values)
        allowed = () if self.adapter is None else ("adapter", "dropout")
        for field in dataclasses.fields(self):
            if field.name not in allowed and getattr(self, field.name) != field.default:
                if self.adapter is None:
                    message = f"--lora.{field.name} needs --lora.rank, such as --lora.rank=64"
                else:
                    message = f"--lora.{field.name} is that of --lora.adapter: leave it out"
                raise ValueError(message)
        return None

    def __post_init__(self):
        """Check the ranges."""
        check_bounds(self, "--lora.")
        try:
            _ = self.lora
        except ValueError as error:
            raise ValueError(str(error).replace("lora ", "--lora.", 1)) from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Skip steps whose loss or gradient is not finite, or whose gradient is far above normal."""

    spike: Annotated[float, above(1)] = 10.0
    """Skip a step whose gradient norm exceeds this multiple of its running mean, from the 20th
    update on; inf: never."""

    patience: Annotated[int, at_least(1)] = 5
    """Steps skipped in a row after which the run saves and stops. The error names their
    documents."""

    def __post_init__(self):
        """Check the ranges."""
        check_bounds(self, "--guard.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Device mesh. The product of its sizes is the number of devices."""

    data: Annotated[int, at_least(1)] = 1
    """Data parallelism: groups of devices that replicate the weights and split the rows."""

    fsdp: Annotated[int | None, chosen("INT"), at_least(1)] = None
    """Fully sharded data parallelism: devices that split both weights and rows. By default all
    remaining devices."""

    seq: Annotated[int, at_least(1)] = 1
    """Sequence parallelism: devices that split the tokens of each row, and the weights together
    with fsdp. Attention exchanges tokens for heads, so that seq x tensor must divide the query
    heads."""

    tensor: Annotated[int, at_least(1)] = 1
    """Tensor parallelism: devices that split attention heads and feed-forward columns."""

    def __post_init__(self):
        """Check the ranges."""
        check_bounds(self, "--mesh.")


_UP_TO_A_DAY = Bound(lambda minutes: 0 < minutes <= 1440, "above 0 and at most 1,440, a day")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistConfig:
    """Several processes. Under srun, mpirun, torchrun or Kubernetes no flag is needed."""

    coordinator: Annotated[str | None, chosen("HOST:PORT")] = None
    """Address at which the processes connect: the host of process 0, and a free port."""

    processes: Annotated[int | None, chosen("INT"), at_least(1)] = None
    """Number of processes. 1 trains with this process alone, whatever launched it."""

    id: Annotated[int | None, chosen("INT")] = None
    """Number of this process, from 0."""

    timeout_minutes: Annotated[float, _UP_TO_A_DAY] = 2.0
    """Minutes to wait for a process that does not start or no longer answers."""

    def __post_init__(self):
        """Check the ranges, and that the flags go together."""
        check_bounds(self, "--dist.")
        alone = self.processes == 1 and self.coordinator is None and self.id is None
        given = [x is not None for x in (self.coordinator, self.processes, self.id)]
        if any(given) and not all(given) and not alone:
            raise ValueError("--dist.coordinator, --dist.processes and --dist.id go together")
        if self.coordinator is not None:
            host, _, port = self.coordinator.rpartition(":")
            right = host and port.isdecimal() and 1 <= int(port) <= 65535
            bound = "HOST:PORT, a port from 1 to 65535"
            require(bool(right), "--dist.coordinator", self.coordinator, bound)
        if self.id is not None and self.processes is not None:
            bound = f"from 0 to {self.processes - 1}: there are --dist.processes={self.processes}"
            require(0 <= self.id < self.processes, "--dist.id", self.id, bound)
