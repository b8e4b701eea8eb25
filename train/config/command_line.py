"""Parse the command line of train.main: flags, over the file of --config, over --recipe."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from models.cli import parse
from models.config import PRESETS
from models.files import check_file
from train.config.bounds import check_bounds
from train.config.config import Config
from train.config.file import SUFFIXES, Values, read_values
from train.config.recipes import RECIPES
from train.config.synonyms import SYNONYMS
from train.config.words import flag_kinds, flag_words, flatten_config
from train.config.xtuner import read_xtuner

RIVALS = {"steps": "epochs", "batch_size": "rows_per_device"}
"""Flags of which one is left out: what is nearer to the command line counts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Given:
    """The flags that decide on the values of the others."""

    recipe: str | None = None
    config: str | None = None
    steps: int | None = None
    epochs: float | None = None
    batch_size: int | None = None
    rows_per_device: int | None = None

    def __post_init__(self):
        check_bounds(self)


def parse_flags(argv: Sequence[str]) -> Config:
    """Parse the words of the command line of train.main.

    Raises:
        ValueError: A flag or a value of --config is wrong, there is no such recipe, or two flags
            contradict.
        OSError: The file of --config cannot be read.
    """
    typed = vars(parse(_Given, argv, "train.main", ignore_unknown=True))
    given = {name: value for name, value in typed.items() if value is not None}
    _check_rivals(given)
    path = config_path(given["config"]) if "config" in given else None
    in_file = _read(path) if path else {}
    for pair in RIVALS.items():
        if given.keys() & {*pair}:
            in_file = {name: value for name, value in in_file.items() if name not in pair}
    kinds = flag_kinds(Config)
    try:
        default = _recipe(given.get("recipe", in_file.get("recipe")), given | in_file)
        words = [w for name, value in in_file.items() for w in flag_words(name, kinds[name], value)]
        return parse(Config, [*words, *argv], "train.main", default=default, synonyms=SYNONYMS)
    except ValueError as error:
        found = re.match(r"--([\w.]+)", str(error))
        name = found[1] if found else ""
        in_argv = any(re.match(rf"--{re.escape(name)}(=|$)", word) for word in argv)
        if not found or in_argv or not {name, f"{name}.files"} & in_file.keys():
            raise
        raise ValueError(f"{path}: {error}") from error


def config_path(given: str) -> Path:
    """Return the file of --config, also in the directory of a run; raise ValueError without one."""
    path = Path(given)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise ValueError(f"--config={given}: there is no file {path}")
    if path.suffix not in (*SUFFIXES, ".py"):
        raise ValueError(f"--config={given} must end with {', '.join(SUFFIXES)} or .py (XTuner)")
    return path


def config_notes(config: Config) -> list[str]:
    """Return lines that describe what was read from an XTuner config; [] for other files."""
    if config.config is None or not config.config.endswith(".py"):
        return []
    lines = read_xtuner(Path(config.config)).report(flatten_config(config))
    return [f"XTuner config {config.config}:", *lines]


def check_complete(config: Config) -> None:
    """Check that a recipe or an XTuner config has data to train on, and weights or a tokenizer.

    A run is refused with a ValueError without them. --dry_run and --print_config print the reason
    instead.
    """
    path = Path(config.config) if config.config and config.config.endswith(".py") else None
    if config.recipe is None and path is None:
        return
    flag = f"--config={path}" if path else f"--recipe={config.recipe}"
    if not config.data.files:
        lost = read_xtuner(path).lost if path else []
        why = [f"{setting} is {why}" for setting, why in lost if "--data" in why]
        raise ValueError(f"{flag} needs --data: {(*why, 'files to train on')[0]}")
    if (config.model is None or config.model in PRESETS) and config.tokenizer is None:
        given = "without --model" if config.model is None else f"with --model={config.model}"
        raise ValueError(
            f"{flag} needs --model DIR (trained weights): {given} the run begins with random "
            "weights and needs --tokenizer"
        )


def _read(path: Path) -> Values:
    check_file(path)
    try:
        values = read_xtuner(path).flags if path.suffix == ".py" else read_values(path)
        _check_rivals({name: value for name, value in values.items() if value is not None})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return values


def _check_rivals(values: Values) -> None:
    for one, other in RIVALS.items():
        if {one, other} <= values.keys():
            pair = (f"--{name}={_number(values[name])}" for name in (one, other))
            raise ValueError(f"{' and '.join(pair)} contradict: leave one out")


def _number(value: object) -> object:
    return f"{value:g}" if isinstance(value, float) else value


def _recipe(name: str | None, given: Values) -> Config | None:
    if name is None or name == "list":
        return None
    if name not in RECIPES:
        raise ValueError(f"--recipe={name} must be one of {', '.join(RECIPES)}, or list")
    recipe = RECIPES[name]
    return dataclasses.replace(recipe, epochs=None) if given.get("steps") is not None else recipe
