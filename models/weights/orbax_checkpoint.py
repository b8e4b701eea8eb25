"""The directory that models.convert writes: config.json, and params/ with orbax checkpoints.

Each parameter is a checkpoint of its own, params/<path>: so neither writing nor reading them ever
needs more than one in memory. (Orbax writes a tree of arrays only as a whole.)
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from models.config import ModelConfig
from models.internlm2 import InternLM2
from models.weights.abstract import abstract, fill, named_params
from models.weights.hf_files import read_json

PARAMS = "params"
CONFIG = "config.json"


def is_converted(directory: Path) -> bool:
    """Whether it is such a directory."""
    return (directory / PARAMS).is_dir()


def save_orbax(parameters: Iterable[tuple[str, jax.Array]], directory: Path) -> None:
    """Writes parameters, by path, into an existing directory; config.json belongs beside them.

    Memory: one parameter, and what orbax copies of it.
    """
    with ocp.StandardCheckpointer() as checkpointer:
        for path, value in parameters:
            checkpointer.save((directory / PARAMS / path).resolve(), {path: value})
            checkpointer.wait_until_finished()
            del value  # before the next one is made


def load_orbax(
    directory: str | Path,
    *,
    dtype: Any = "bfloat16",
    param_dtype: Any = None,
    attn: str = "auto",
    mesh: Mesh | None = None,
    remat: str = "full",
) -> InternLM2:
    """Reads what `python -m models.convert` wrote; arguments as `load_hf`.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: the checkpoint does not fit its config, or the mesh not the model.
    """
    directory = Path(directory)
    config = ModelConfig.from_hf(read_json(directory / CONFIG))
    model = abstract(
        config, mesh=mesh, dtype=dtype, param_dtype=param_dtype, attn=attn, remat=remat
    )
    return fill(model, dict(_read(directory, model)))


def converted_parameters(
    directory: str | Path,
) -> tuple[ModelConfig, str, Iterator[tuple[str, jax.Array]]]:
    """The parameters one after the other, as `models.weights.load.hf_parameters`.

    Memory: one parameter, and what orbax copies of it.
    """
    directory = Path(directory)
    hf = read_json(directory / CONFIG)
    config = ModelConfig.from_hf(hf)
    dtype = str(hf.get("dtype", hf.get("torch_dtype", "float32")))
    return config, dtype, _read(directory, abstract(config, mesh=None, dtype=dtype))


def _read(directory: Path, model: InternLM2) -> Iterator[tuple[str, jax.Array]]:
    if (directory / PARAMS / "_METADATA").exists():
        raise ValueError(
            f"{directory / PARAMS} holds all parameters as one checkpoint, as earlier versions "
            "wrote it: convert the HF weights again"
        )
    with ocp.StandardCheckpointer() as checkpointer:
        for path, like in named_params(model).items():
            where = (directory / PARAMS / path).resolve()
            if not where.is_dir():
                raise FileNotFoundError(f"{where} is missing")
            try:
                value = checkpointer.restore(where, {path: like}).pop(path)
            except Exception as error:  # orbax and tensorstore raise many kinds
                first = (str(error).splitlines() or [type(error).__name__])[0]
                raise ValueError(
                    f"cannot read {where}, or it is not {like.dtype} {list(like.shape)} as "
                    f"config.json has it: convert the HF weights again ({first:.200})"
                ) from error
            yield path, value
