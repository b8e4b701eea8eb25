"""The sections of a run's configuration, each for one part of the program.

A field that is None is chosen by the device and the model (`train.defaults`).
"""

import dataclasses
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
        tuple[str, ...], tyro.conf.arg(name="", metavar="FILE...", help_behavior_hint="")
    ] = ()
    """Files to train on: .txt, .json, .jsonl, the same as .gz or .zst, .parquet, .arrow, and
    directories that the datasets library saved. Their format is recognised by their content.
    Without any: the built-in corpus. FILE:2 is twice in every epoch, FILE:0.3 a random 30% of
    it."""

    packing: Literal["fit", "concat", "xtuner"] = "fit"
    """How rows are filled: with whole documents, best fit first; from one stream of all tokens, cut
    every --seq_len; or as XTuner's Packer does it, for comparisons."""

    val: tuple[str, ...] = ()
    """Validation: files, each a set of its own name, or a share such as 0.01 of the documents of
    every training file, which is then not trained on. Their losses go to eval.jsonl."""

    overlong: Literal["drop", "head", "tail"] = "drop"
    """What becomes of a chat longer than a row: left out, or cut to its head or its tail. Raw text
    is split. All of it is counted and said."""

    cache: Annotated[str | None, chosen("DIR")] = None
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
        require(0 < share < 1, "--data.val", self.val[0], "a share in (0, 1), or files")
        return share


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, with a linear warm-up and a cosine to a fraction of the peak."""

    lr: Annotated[float | None, chosen("FLOAT")] = None
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
        require(self.lr is None or self.lr > 0, "--optim.lr", self.lr, "above 0")
        require(all(0 <= b < 1 for b in self.betas), "--optim.betas", self.betas, "in [0, 1)")
        require(self.weight_decay >= 0, "--optim.weight_decay", self.weight_decay, "at least 0")
        require(0 <= self.warmup <= 1, "--optim.warmup", self.warmup, "a share in [0, 1]")
        require(0 <= self.min_lr_ratio <= 1, "--optim.min_lr_ratio", self.min_lr_ratio, "in [0, 1]")
        require(self.clip > 0, "--optim.clip", self.clip, "above 0")


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
