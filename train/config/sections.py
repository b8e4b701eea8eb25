"""The sections of a run's configuration, each for one part of the program.

A field that is None is chosen by the device and the model (`train.run.resolve`).
"""

import dataclasses
import math
from typing import Annotated, Literal

import tyro


def chosen(metavar: str):
    """An option that the program chooses where it is not given."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


def require(holds: bool, flag: str, value: object, bound: str) -> None:
    """Checks a flag's value.

    Raises:
        ValueError: naming the flag, its value and the bound.
    """
    if not holds:
        raise ValueError(f"{flag}={value} must be {bound}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train on."""

    files: Annotated[
        tuple[str, ...] | None, tyro.conf.arg(name="", metavar="FILE...", help_behavior_hint="")
    ] = None
    """Files to train on: .txt, .json, .jsonl, the same as .gz or .zst, .parquet, .arrow, and
    directories that the datasets library saved. Their format is recognised by their content.
    Without any: the built-in corpus. FILE:2 is twice in every epoch, FILE:0.3 a random 30% of
    it."""

    packing: Literal["fit", "concat", "xtuner"] = "fit"
    """How rows are filled: with whole documents, best fit first; from one stream of all tokens, cut
    every --seq_len; or as XTuner's Packer does it, for comparisons."""

    val: Annotated[tuple[str, ...] | None, chosen("FILE...|SHARE")] = None
    """Validation: files, each a set of its own name, or a share such as 0.01 of the documents of
    every training file, which is then not trained on. Always packed by fit. Their losses go to
    eval.jsonl."""

    too_long: Literal["drop", "head", "tail"] = "drop"
    """What becomes of a chat longer than a row: left out, or cut to its head or its tail. Raw text
    is split. All of it is counted and said."""

    cache: Annotated[str | None, chosen("DIR")] = None
    """Where tokens are kept, so that a file is tokenised once. By default internlm2-jax in the
    user's cache directory."""

    stall_minutes: float = 10.0
    """How long to wait for a batch before the run saves and stops. A first look at files, which
    tokenises them, has no limit."""

    strict: bool = False
    """Stop at the first broken row, naming its file and line, instead of counting and skipping."""

    def __post_init__(self):
        """Checks ranges."""
        if self.files == ():
            raise ValueError("--data names no file: name some, or leave it out for built-in text")
        if self.val == ():
            raise ValueError(
                "--data.val names neither files nor a share: name some, or leave it out"
            )
        _ = self.hold_out
        require(self.stall_minutes > 0, "--data.stall_minutes", self.stall_minutes, "above 0")

    @property
    def hold_out(self) -> float:
        """The share of the documents that --data.val asks for; 0 where it names files or nothing.

        Raises:
            ValueError: a number that is no share.
        """
        try:
            [share] = map(float, self.val or ())
        except ValueError:
            return 0.0
        require(0 < share < 1, "--data.val", f"{share:g}", "a share in (0, 1), or files")
        return share


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The update rule, and its learning rate: a linear warm-up, then a schedule."""

    name: Literal["adamw", "adafactor", "lion", "muon"] = "adamw"
    """adafactor stores almost no second moment, lion only one moment; muon makes the momentum of
    every weight matrix orthogonal, and leaves the rest to adamw."""

    moment_dtype: Literal["fp32", "bf16", "int8"] = "fp32"
    """What adamw stores its two moments in: 8, 4 or 2 bytes a parameter."""

    lr: Annotated[float | None, chosen("FLOAT")] = None
    """Peak learning rate. By default 2e-3 for nano, 3e-4 for a larger preset, 2e-5 for trained
    weights; a tenth of it for lion."""

    betas: Annotated[tuple[float, float] | None, chosen("FLOAT FLOAT")] = None
    """Decay rates of the two moments; of lion's step and its moment. By default 0.9 0.95; for lion
    0.9 0.99. Adafactor has none of its own choosing."""

    weight_decay: float = 0.01
    """Decoupled weight decay; norms and biases have none."""

    warmup_ratio: float = 0.025
    """Share of the steps over which the learning rate rises from 0 to its peak."""

    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """What follows the warm-up: a fall along half a cosine or a line, none, or the peak kept and a
    short fall at the end (warm-up, stable, decay)."""

    min_lr_ratio: Annotated[float | None, chosen("FLOAT")] = None
    """Where the schedule ends, as a share of the peak. By default 0.15."""

    decay_ratio: Annotated[float | None, chosen("FLOAT")] = None
    """Share of the steps after the warm-up over which wsd falls. By default 0.2."""

    clip: float = 1.0
    """Largest global norm of the gradient; larger ones are scaled down to it."""

    def __post_init__(self):
        """Checks ranges."""
        require(
            self.lr is None or 0 < self.lr < math.inf, "--optim.lr", self.lr, "above 0 and finite"
        )
        require(all(0 <= b < 1 for b in self.rates), "--optim.betas", self.betas, "in [0, 1)")
        require(
            0 <= self.weight_decay < math.inf,
            "--optim.weight_decay",
            self.weight_decay,
            "at least 0 and finite",
        )
        require(
            0 <= self.warmup_ratio <= 1,
            "--optim.warmup_ratio",
            self.warmup_ratio,
            "a share in [0, 1]",
        )
        require(0 <= self.last_ratio <= 1, "--optim.min_lr_ratio", self.min_lr_ratio, "in [0, 1]")
        require(
            0 < self.last_decay <= 1, "--optim.decay_ratio", self.decay_ratio, "a share in (0, 1]"
        )
        require(self.clip > 0, "--optim.clip", self.clip, "above 0")
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
        """The betas in use."""
        return self.betas or ((0.9, 0.99) if self.name == "lion" else (0.9, 0.95))

    @property
    def last_ratio(self) -> float:
        """The min_lr_ratio in use."""
        return 0.15 if self.min_lr_ratio is None else self.min_lr_ratio

    @property
    def last_decay(self) -> float:
        """The decay in use."""
        return 0.2 if self.decay_ratio is None else self.decay_ratio


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What a step may not do. Gradients that are not finite never change anything."""

    spike: float = 10.0
    """Skip the update where the gradient norm is above this many times its running mean, once 20
    updates are done; inf never skips for that."""

    patience: int = 5
    """Steps skipped in a row after which the run saves and stops, naming their documents."""

    def __post_init__(self):
        """Checks ranges."""
        require(self.spike > 1, "--guard.spike", self.spike, "above 1")
        require(self.patience >= 1, "--guard.patience", self.patience, "at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How the devices share the work. The three numbers multiply to the number of devices."""

    data: int = 1
    """Groups of devices that hold copies of the weights and split the rows."""

    fsdp: Annotated[int | None, chosen("INT")] = None
    """Devices that split both the weights and the rows. By default all that remain."""

    tensor: int = 1
    """Devices that split heads and feed-forward columns of each row."""

    def __post_init__(self):
        """Checks ranges."""
        for name in ("data", "fsdp", "tensor"):
            size = getattr(self, name)
            require(size is None or size >= 1, f"--mesh.{name}", size, "at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistConfig:
    """Several processes. Under srun, mpirun or in an indexed Kubernetes job nothing is needed."""

    coordinator: Annotated[str | None, chosen("HOST:PORT")] = None
    """Where the processes meet: the host of process 0, and a free port."""

    processes: Annotated[int | None, chosen("INT")] = None
    """How many there are. 1 trains alone, whatever started it."""

    id: Annotated[int | None, chosen("INT")] = None
    """Which of them this is, from 0."""

    timeout_minutes: float = 2.0
    """How long to wait for one that does not come or no longer answers."""

    def __post_init__(self):
        """Checks that the flags go together."""
        alone = self.processes == 1 and self.coordinator is None and self.id is None
        given = [x is not None for x in (self.coordinator, self.processes, self.id)]
        if any(given) and not all(given) and not alone:
            raise ValueError("--dist.coordinator, --dist.processes and --dist.id go together")
        if self.coordinator is not None:
            host, _, port = self.coordinator.rpartition(":")
            right = host and port.isdecimal() and 1 <= int(port) <= 65535
            bound = "HOST:PORT, a port from 1 to 65535"
            require(bool(right), "--dist.coordinator", self.coordinator, bound)
        if self.processes is not None:
            require(self.processes >= 1, "--dist.processes", self.processes, "at least 1")
        if self.id is not None and self.processes is not None:
            bound = f"from 0 to {self.processes - 1}: there are --dist.processes={self.processes}"
            require(0 <= self.id < self.processes, "--dist.id", self.id, bound)
        require(self.timeout_minutes > 0, "--dist.timeout_minutes", self.timeout_minutes, "above 0")
