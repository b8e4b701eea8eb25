"""Orbax directories, as models.convert writes them: config.json and params/.

Each parameter is an orbax checkpoint of its own, params/<path>, because orbax writes a tree of
arrays only as a whole: so writing and reading need memory for one parameter.
"""

import dataclasses
from collections.abc import Callable, Generator, Iterable
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from tqdm import tqdm

from models.config import ModelConfig
from models.execution import INFERENCE, Execution
from models.files import read_json
from models.internlm2 import InternLM2, with_new_adapters
from models.quantize import quantize_stack
from models.weights.abstract import abstract, fill, named_params
from models.weights.orbax_errors import cause
from models.weights.safetensors_file import DTYPES

PARAMS = "params"
CONFIG = "config.json"


def is_orbax(directory: Path) -> bool:
    """Return True for a directory that models.convert wrote with orbax."""
    return (directory / PARAMS).is_dir()


def save_orbax(parameters: Iterable[tuple[str, jax.Array]], directory: Path) -> None:
    """Write parameters, by path, into an existing directory; config.json belongs beside them.

    Raises:
      OSError: orbax cannot write, for example because the disk is full.

    Memory: one parameter, and the copies that orbax makes of it.
    """
    with ocp.StandardCheckpointer() as checkpointer:
        for path, value in parameters:
            try:
                checkpointer.save((directory / PARAMS / path).resolve(), {path: value})
                checkpointer.wait_until_finished()
            except Exception as error:  # orbax and tensorstore raise many types
                raise OSError(f"cannot write {path} with orbax: {cause(error)}") from error
            del value  # before the next one is made


def load_orbax(
    directory: str | Path,
    *,
    execution: Execution = INFERENCE,
    mesh: Mesh | None = None,
    progress: bool = False,
    seed: int = 0,
) -> InternLM2:
    """Load an orbax directory that models.convert wrote; arguments as for `load_hf`.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: the weights do not fit config.json, or the mesh does not divide the model.
    """
    directory = Path(directory)
    config = ModelConfig.from_hf(read_json(directory / CONFIG))

    def read(stored: InternLM2) -> Generator[tuple[str, jax.Array]]:
        total = len(named_params(stored))
        yield from tqdm(
            _read(directory, stored), "loading", total, unit="parameter", disable=not progress
        )

    return fill_with(read, config, execution=execution, mesh=mesh, seed=seed)


def fill_with(
    read: Callable[[InternLM2], Generator[tuple[str, jax.Array]]],
    config: ModelConfig,
    *,
    execution: Execution,
    mesh: Mesh | None,
    seed: int,
) -> InternLM2:
    """Create a model from whole parameters, each quantized once it is read.

    `read` yields (path, parameter) from a model of ShapeDtypeStructs that is not quantized. Other
    arguments as for `models.weights.load.load_hf`.
    """
    model = abstract(config, execution, mesh=mesh)
    like = named_params(model)
    stored = abstract(config, dataclasses.replace(execution, quantize=None), mesh=mesh)
    values = {path: quantize_stack(like[path], value) for path, value in read(stored)}
    return with_new_adapters(fill(model, values), seed=seed, mesh=mesh)


def orbax_parameters(
    directory: str | Path,
) -> tuple[ModelConfig, str, Generator[tuple[str, jax.Array]]]:
    """Read the parameters one after the other; results as of `models.weights.load.hf_parameters`.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: the weights do not fit config.json.

    Memory: one parameter, and the copies that orbax makes of it.
    """
    directory = Path(directory)
    hf = read_json(directory / CONFIG)
    config = ModelConfig.from_hf(hf)
    dtype = hf.get("dtype", hf.get("torch_dtype", "float32"))
    if dtype not in DTYPES.values():
        raise ValueError(
            f"{directory / CONFIG}: torch_dtype={dtype!r:.40} must be one of "
            f"{', '.join(DTYPES.values())}"
        )
    return config, dtype, _read(directory, abstract(config, Execution(param_dtype=dtype)))


def _read(directory: Path, model: InternLM2) -> Generator[tuple[str, jax.Array]]:
    if (directory / PARAMS / "_METADATA").exists():
        raise ValueError(
            f"{directory / PARAMS} is one checkpoint of all parameters, as earlier versions wrote "
            "it: convert the HF weights again"
        )
    with ocp.StandardCheckpointer() as checkpointer:
        for path, like in named_params(model).items():
            where = (directory / PARAMS / path).resolve()
            if not where.is_dir():
                raise FileNotFoundError(f"{where} is missing")
            try:
                value = checkpointer.restore(where, {path: like}).pop(path)
            except Exception as error:  # orbax and tensorstore raise many types
                raise ValueError(
                    f"cannot read {where}, or it is not {like.dtype} {list(like.shape)} as in "
                    f"config.json: convert the HF weights again ({cause(error):.200})"
                ) from error
            yield path, value
