"""Where numbers go besides metrics.jsonl: TensorBoard and Weights & Biases, if installed."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.metrics.metrics import Sink

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}
"""What each needs; tensorboardX writes event files without TensorFlow or PyTorch."""


def open_sinks(
    names: Sequence[str], out: Path, *, start: int, settings: dict[str, Any]
) -> list[Sink]:
    """Opens what was asked for.

    Args:
        names: keys of `PACKAGES`.
        out: the run's directory; TensorBoard's files go to out/tensorboard.
        start: step the run goes on from; what was written after it is superseded.
        settings: the run's configuration, flat.
    """
    makers = {"tensorboard": TensorBoard, "wandb": WandB}
    return [makers[name](out, start=start, settings=settings) for name in names]


def check_sinks(names: Sequence[str]) -> None:
    """Finds a missing package before any work is done.

    Raises:
        ValueError: with what to install.
    """
    for name in names:
        try:
            importlib.import_module(PACKAGES[name])
        except ImportError as error:
            package = PACKAGES[name]
            raise ValueError(
                f"--log {name} needs the package {package}: pip install {package}"
            ) from error


class TensorBoard:
    """Event files for `tensorboard --logdir`."""

    def __init__(self, out: Path, *, start: int, settings: dict[str, Any]):
        """Arguments as `open_sinks`."""
        from tensorboardX import SummaryWriter  # optional, and slow to import

        self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=start + 1)
        text = "\n".join(f"    {name}={value}" for name, value in settings.items())
        self._writer.add_text("config", text, start)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Adds a point to each curve."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes the files."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases, that a resumed run goes on with; WANDB_* variables apply."""

    def __init__(self, out: Path, *, start: int, settings: dict[str, Any]):
        """Arguments as `open_sinks`."""
        wandb: Any = importlib.import_module("wandb")  # optional
        file = out / "wandb_id"
        if not file.exists():
            file.write_text(wandb.util.generate_id())
        self._run = wandb.init(
            project="internlm2-jax",
            name=out.name,
            id=file.read_text(),
            resume="allow",
            config=settings,
            dir=str(out),
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        """Logs the values."""
        self._run.log(values, step=step)

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()
