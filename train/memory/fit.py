"""When a run does not fit its device: the cheapest change that makes it fit.

Changes are tried in the order of their cost: first what only reorders the work, then what computes
something twice, then what rounds more, then what waits for the host. What one of them cannot do
alone, they do together.
"""

import dataclasses
from collections.abc import Callable, Iterator

from models.remat import REMAT
from train.flags.config import Config
from train.memory.plan import GiB, Plan

Planner = Callable[[Config], Plan]


def remedy(needed: Planner, config: Config, have: int, *, most_accum: int) -> str:
    """What to change.

    Args:
        needed: plans a run.
        config: a run that needs more than there is.
        have: bytes of the device.
        most_accum: parts that a step's rows can be worked through in.
    """
    single = list(_changes(config, most_accum))
    together = [single[: n + 1] for n in range(1, len(single))]
    for changes in [[change] for change in single] + together:
        changed = config
        for _, change in changes:
            changed = change(changed)
        total = needed(changed).total
        if total <= have:
            flags = {flag.split("=")[0]: flag for flag, _ in changes}  # a later one wins
            return f"take {' '.join(flags.values())}, which needs {total / GiB:.2f} GiB"
    least = needed(changed).total / GiB if single else needed(config).total / GiB
    return (
        f"no flag makes it fit ({least:.2f} GiB at the least): take more devices (--mesh.fsdp), "
        "a shorter --seq_len or a smaller --model"
    )


def _changes(config: Config, most_accum: int) -> Iterator[tuple[str, Callable[[Config], Config]]]:
    """(flags to add, what they change), the cheapest first."""

    def setting(flag: str, **fields) -> tuple[str, Callable[[Config], Config]]:
        return flag, lambda c: dataclasses.replace(c, **fields)

    if config.attn == "eager":
        yield setting("--attn=xla", attn="xla")
    accum = config.accum * 2
    while accum <= most_accum:
        if most_accum % accum == 0:
            yield setting(f"--accum={accum}", accum=accum)
        accum *= 2
    order = [remat for remat in REMAT if remat != "offload"]
    if config.remat is not None and config.remat in order:
        for remat in order[order.index(config.remat) + 1 :]:
            yield setting(f"--remat={remat}", remat=remat)
    if config.optim.name == "adamw" and config.optim.state != "int8":
        int8 = dataclasses.replace(config.optim, state="int8")
        yield setting("--optim.state=int8", optim=int8)
    if config.remat != "offload":
        yield setting("--remat=offload", remat="offload")
    if config.param_dtype != "bf16":
        yield setting("--param_dtype=bf16", param_dtype="bf16")
