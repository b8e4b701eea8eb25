"""Write metrics to TensorBoard and Weights & Biases, if their packages are installed."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.metrics.metrics import Sink

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}
"""Package of each sink; tensorboardX writes event files without TensorFlow or PyTorch."""


def open_sinks(
    names: Sequence[str], out: Path, *, start: int, settings: dict[str, Any]
) -> list[Sink]:
    """Open the sinks of --log, keys of `PACKAGES`.

    Points after `start`, the step that the run resumes from, are superseded. The settings are the
    values of all flags. TensorBoard's files are in out/tensorboard.
    """
    makers = {"tensorboard": TensorBoard, "wandb": WandB}
    return [makers[name](out, start=start, settings=settings) for name in names]


def check_sinks(names: Sequence[str]) -> None:
    """Raise ValueError if a package of --log is not installed; names the package."""
    for name in names:
        try:
            importlib.import_module(PACKAGES[name])
        except ImportError as error:
            package = PACKAGES[name]
            raise ValueError(
                f"--log {name} needs the package {package}: pip install {package}"
            ) from error


class TensorBoard:
    """Write event files for `tensorboard --logdir`."""

    def __init__(self, out: Path, *, start: int, settings: dict[str, Any]):
        """Open the sink; arguments as in `open_sinks`."""
        from tensorboardX import SummaryWriter  # optional, and slow to import

        self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=start + 1)
        text = "\n".join(f"    {name}={value}" for name, value in settings.items())
        self._writer.add_text("config", text, start)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add a point to each curve."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush the files."""
        self._writer.close()


class WandB:
    """Log to a run of Weights & Biases, which a resumed run continues. WANDB_* variables apply."""

    def __init__(self, out: Path, *, start: int, settings: dict[str, Any]):
        """Open the sink; arguments as in `open_sinks`."""
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
        """Log the values of a step."""
        self._run.log(values, step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()
