"""Read a config of XTuner 0.1: the flags that its settings become, and what has no flag.

The file is not executed. Settings are the variables of the file; where a variable has a name of its
own, the place in the nested dicts that takes it decides. Values that are written into the dicts
themselves, such as those of LoRA, are read from there.

References:
    InternLM/xtuner v0.1.23, xtuner/configs/internlm/internlm2*; xtuner/dataset/huggingface.py and
    xtuner/engine/hooks for the meaning of the settings.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from train.config.config import Config
from train.config.plain_python import Constant, Leaf, Name, PlainPython, Unread, read_plain_python
from train.config.words import flag_kinds, flag_words, shell


class Outcome(NamedTuple):
    """Hold the flags that a setting became, or the reason why it has none."""

    flags: Mapping[str, Any] = {}
    reason: str = ""
    lost: bool = False
    source: str = ""  # instead of the name of the setting


Facts = Mapping[str, Any]
"""Values of all settings by the keys of `RULES`; None for one that is not a plain constant."""

Rule = Callable[[Any, Facts, str], Outcome | None]
"""(value, facts, type of the dict that has it) -> outcome; None: a default without meaning here."""


@dataclasses.dataclass
class XTunerConfig:
    """Hold the flags of an XTuner config, and each other setting with a reason."""

    flags: dict[str, Any] = dataclasses.field(default_factory=dict)  # values by flag
    became: dict[str, str] = dataclasses.field(default_factory=dict)  # settings by flag
    unneeded: list[tuple[str, str]] = dataclasses.field(default_factory=list)  # need no flag
    lost: list[tuple[str, str]] = dataclasses.field(default_factory=list)  # could not be mapped

    def set(self, flag: str, value: Any, source: str) -> None:
        """Set a flag; a later setting replaces an earlier one, except for files, which add up."""
        before = self.became.pop(flag, None)
        if before is not None and flag == "data.files":
            value, source = (*self.flags[flag], *value), f"{before}, {source}"
        elif before is not None:
            self.unneeded.append((before, f"{source} replaces it"))
        self.flags[flag], self.became[flag] = value, source

    def report(self, in_use: Mapping[str, Any]) -> list[str]:
        """Return one line for each setting; `in_use` has the values of the run by flag."""
        kinds, lines = flag_kinds(Config), []
        for flag, source in self.became.items():
            text = _shown(shell(flag_words(flag, kinds[flag], self.flags[flag])))
            replaced = ", replaced" if in_use[flag] != self.flags[flag] else ""
            lines.append(f"{text:<40} from {source}{replaced}")
        plain = [setting for setting, reason in self.unneeded if not reason]
        lines += [f"no flag needed: {s}: {reason}" for s, reason in self.unneeded if reason]
        if plain:
            lines.append(f"no flag needed: {', '.join(plain)}")
        return lines + [f"not mapped: {setting}: {reason}" for setting, reason in self.lost]


def read_xtuner(path: Path) -> XTunerConfig:
    """Read an XTuner config.

    Raises:
        ValueError: The file is not Python, or no config for supervised fine-tuning or pre-training.
        OSError: The file cannot be read.
    """
    try:
        file = read_plain_python(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error}") from error
    _check_kind(file)
    settings = [_of_constant(name, c) for name, c in file.constants.items()]
    settings += [_of_leaf(leaf) for leaves in file.parts.values() for leaf in leaves]
    facts = {s.key: s.value for s in settings if s.key and not _has_unread(s.value)}
    facts |= {s.key: None for s in settings if s.key and s.key not in facts}
    found = XTunerConfig()
    for setting in settings:
        outcome = _outcome(setting, facts)
        if outcome is None:
            continue
        if outcome.flags:
            source = outcome.source or ".".join(setting.name.split(".")[-2:])
            for flag, value in outcome.flags.items():
                found.set(flag, value, source)
        else:
            shown = f"{setting.name}={_shown(setting.value)}"
            (found.lost if outcome.lost else found.unneeded).append((shown, outcome.reason))
    if "optim_wrapper" in file.parts and "param_scheduler" not in file.parts:
        found.set("optim.schedule", "constant", "no param_scheduler")
        found.set("optim.warmup_ratio", 0.0, "no param_scheduler")
    found.lost += [(line, "a statement that is not a plain assignment") for line in file.unread]
    return found


@dataclasses.dataclass
class _Setting:
    name: str
    value: Any
    key: str  # of RULES; "" if there is none
    owner: str = ""
    used_in: str = ""


def _of_constant(name: str, constant: Constant) -> _Setting:
    keys = filter(None, (_key(place) for place in (name, *constant.used_at)))
    return _Setting(name, constant.value, next(keys, ""), used_in=", ".join(constant.used_in))


def _of_leaf(leaf: Leaf) -> _Setting:
    return _Setting(leaf.place, leaf.value, _key(leaf.place), owner=leaf.owner)


def _key(place: str) -> str:
    """Return the longest end of a dotted place that has a rule."""
    parts = place.split(".")
    ends = (".".join(parts[i:]) for i in range(len(parts)))
    return next((end for end in ends if end in RULES), "")


def _outcome(setting: _Setting, facts: Facts) -> Outcome | None:
    """Return what became of a setting; None for one of the nested dicts that means nothing here."""
    nested = "." in setting.name
    if nested and setting.name.partition(".")[0] in _DICTS_WITHOUT_MEANING:
        return None
    if not setting.key:
        reason = f"used in {setting.used_in}" if setting.used_in else "not a setting known here"
        return Outcome(reason=reason, lost=not setting.used_in)
    rule = RULES[setting.key]
    if _has_unread(setting.value) and rule is not _ignore:
        flag = f"--{rule.name}" if isinstance(rule, _Flag) else "the flag"
        return Outcome(reason=f"not a plain constant: give {flag} yourself", lost=True)
    try:
        outcome = rule(setting.value, facts, setting.owner)
    except (TypeError, ValueError, AttributeError):
        return Outcome(reason="not a value that is known here", lost=True)
    return Outcome() if outcome is None and not nested else outcome


def _has_unread(value: Any) -> bool:
    items = value if isinstance(value, list | tuple) else [value]
    return any(isinstance(item, Unread) for item in items)


def _shown(value: Any) -> str:
    text = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    text = " ".join(text.split())
    return text if len(text) <= 40 else f"{text[:37]}..."


def _check_kind(file: PlainPython) -> None:
    for leaf in file.parts.get("model", ()):
        if leaf.place == "model.type" and Name(leaf.value).last != "SupervisedFinetune":
            raise ValueError(
                f"model.type={leaf.value} is not supported: supervised fine-tuning and "
                "pre-training (SupervisedFinetune) are"
            )
    if not file.constants.keys() & RULES.keys() and "model" not in file.parts:
        raise ValueError("no setting of an XTuner config is in this file")


# Rules.


@dataclasses.dataclass(frozen=True)
class _Flag:
    """Rule for a setting that becomes one flag."""

    name: str
    convert: Callable[[Any], Any] = lambda value: value

    def __call__(self, value: Any, facts: Facts, owner: str) -> Outcome:
        return Outcome({self.name: self.convert(value)})


def _if_true(flag: str, chosen: Any) -> Rule:
    """Return a rule that sets a flag to `chosen` where the setting is true."""
    return lambda value, facts, owner: Outcome({flag: chosen}) if value else None


def _unneeded(reason: str = "") -> Rule:
    return lambda value, facts, owner: Outcome(reason=reason)


def _lost(reason: str) -> Rule:
    return lambda value, facts, owner: Outcome(reason=reason, lost=True)


def _only(*values: Any, otherwise: Rule) -> Rule:
    """Return a rule for settings that mean nothing here with their usual values."""
    return lambda value, facts, owner: (
        None if value in values or _last(value) in values else otherwise(value, facts, owner)
    )


def _ignore(value: Any, facts: Facts, owner: str) -> None:
    return None


def _last(value: Any) -> Any:
    return Name(value).last if isinstance(value, str) else value


def _rows(value: int, facts: Facts, owner: str) -> Outcome:
    """Rows of a step, here and there for each group of devices that share rows."""
    accum = facts.get("accumulative_counts", 1)
    if accum is None:
        reason = "accumulative_counts is not known: give --rows_per_device, their product"
        return Outcome(reason=reason, lost=True)
    rows = value * accum
    return Outcome({"rows_per_device": rows}, source=f"batch_size={value} x accumulative_counts")


def _optimizer(value: Any, facts: Facts, owner: str) -> Outcome:
    name = str(_last(value))
    if name in ("AdamW", "PagedAdamW", "PagedAdamW32bit"):
        return Outcome({"optim.name": "adamw"})
    if name in ("AdamW8bit", "PagedAdamW8bit"):
        return Outcome({"optim.name": "adamw", "optim.moment_dtype": "int8"})
    if name in ("Lion", "Adafactor"):
        return Outcome({"optim.name": name.lower()})
    return Outcome(reason="another optimizer: see --optim.name", lost=True)


def _dtype(value: Any, facts: Facts, owner: str) -> Outcome | None:
    name = str(_last(value))
    if owner.endswith("OptimWrapper") and _last(facts.get("torch_dtype")) == name:
        return None
    if name in ("bfloat16", "float32"):
        return Outcome({"dtype": name})
    return Outcome(reason="float16 is not supported; bfloat16 is used on a GPU", lost=True)


def _last_rate(value: int | float, facts: Facts, owner: str) -> Outcome:
    rate = facts.get("lr")
    if not rate:
        return Outcome(reason="lr is not known: give --optim.min_lr_ratio", lost=True)
    return Outcome({"optim.min_lr_ratio": float(f"{value / rate:.6g}")})


def _scheduler(value: Any, facts: Facts, owner: str) -> Outcome | None:
    name = str(_last(value))
    if name == "LinearLR":
        return None  # the warm-up
    if name == "CosineAnnealingLR":
        return Outcome({"optim.schedule": "cosine"})
    return Outcome(reason="another schedule: see --optim.schedule", lost=True)


def _end(value: int | float, facts: Facts, owner: str) -> Outcome | None:
    """End of a scheduler, in epochs."""
    epochs = facts.get("max_epochs")
    if owner != "LinearLR":
        return None if value == epochs else Outcome(reason="not the last epoch", lost=True)
    if not epochs:
        return Outcome(reason="max_epochs is not known: give --optim.warmup_ratio", lost=True)
    if value in [(facts.get(key) or 0) * epochs for key in ("warmup_ratio", "warm_up_ratio")]:
        return None
    return Outcome({"optim.warmup_ratio": float(f"{value / epochs:.6g}")})


def _begin(value: int | float, facts: Facts, owner: str) -> Outcome | None:
    if owner == "LinearLR" and value:
        return Outcome(reason="a warm-up begins at the first step", lost=True)
    return None


def _keep(value: int, facts: Facts, owner: str) -> Outcome:
    if value < 1:
        return Outcome(reason="all checkpoints: give a large --keep_last", lost=True)
    return Outcome({"keep_last": value})


def _prompts(value: Any, facts: Facts, owner: str) -> Outcome:
    chat = {"chat": True} if "prompt_template" in facts else {}
    return Outcome({"prompts": tuple(value), **chat})


def _system(value: Any, facts: Facts, owner: str) -> Outcome:
    if value in (None, ""):
        return Outcome()
    return Outcome(reason="samples have no system message; training rows keep theirs", lost=True)


def _template(value: Any, facts: Facts, owner: str) -> Outcome:
    if _last(value) == "internlm2_chat":
        return Outcome(reason="chats are written in this form")
    return Outcome(reason="chats are written in the form internlm2_chat", lost=True)


def _dataset(value: Any, facts: Facts, owner: str) -> Outcome | None:
    if value == "json":
        return None  # data_files has the files
    if Path(str(value)).is_file():
        return Outcome({"data.files": (str(value),)})
    get = f"hf download {value} --repo-type dataset --local-dir {value}"
    return Outcome(reason=f"a dataset of the hub: {get}, then give its file by --data", lost=True)


def _files(value: Any, facts: Facts, owner: str) -> Outcome:
    return Outcome({"data.files": (value,) if isinstance(value, str) else tuple(value)})


def _lora(value: Any, facts: Facts, owner: str) -> Outcome | None:
    if _last(value) != "LoraConfig":
        return Outcome(reason="not a kind of adapter that is known here", lost=True)
    if "target_modules" in facts:
        return None
    return Outcome(reason="XTuner adapts the output layer, too, which is frozen here", lost=True)


_UNKNOWN = _lost("another value than the usual one: not supported")
_DICTS_WITHOUT_MEANING = ("env_cfg", "log_processor")
_WITHOUT_MEANING = """
    trust_remote_code padding_side model.type llm.type tokenizer.type task_type
    bnb_4bit_compute_dtype dataset_cfg.type dataset_cfg.file_type datasets template_map_fn
    template_map_fn.type remove_unused_columns shuffle_before_pack map_num_proc sampler
    sampler.seed train_dataset.seed batch_sampler.type batch_sampler.drop_last
    batch_sampler.batch_size collate_fn.type train_dataloader.num_workers
    clip_grad.error_if_nonfinite loss_scale param_scheduler.start_factor
    param_scheduler.convert_to_iter_based train_cfg.type train_cfg.by_epoch
    custom_hooks.is_intern_repo_dataset logger.log_metric_by_epoch log_level
    default_hooks.checkpoint.type default_hooks.logger.type default_hooks.param_scheduler.type
    default_hooks.sampler_seed.type default_hooks.timer.type
""".split()

RULES: dict[str, Rule] = {
    **dict.fromkeys(_WITHOUT_MEANING, _ignore),
    # Model
    "pretrained_model_name_or_path": _Flag("model"),
    "tokenizer.pretrained_model_name_or_path": lambda value, facts, owner: (
        None
        if value == facts.get("pretrained_model_name_or_path")
        else Outcome({"tokenizer": value})
    ),
    "attn_implementation": _Flag("attn"),
    "use_varlen_attn": _unneeded("documents of one row never attend to each other"),
    "max_position_embeddings": _lost("the scaling of the weights is used; see --rope_factor"),
    "torch_dtype": _dtype,
    # LoRA
    "lora.type": _lora,
    "r": _Flag("lora.rank"),
    "lora_alpha": _Flag("lora.alpha", float),
    "lora_dropout": _Flag("lora.dropout", float),
    "target_modules": _Flag("lora.targets", tuple),
    "use_rslora": _Flag("lora.rslora"),
    "bias": _only("none", otherwise=_UNKNOWN),
    # Quantization
    "load_in_4bit": _if_true("base_dtype", "nf4"),
    "load_in_8bit": _if_true("base_dtype", "int8"),
    "bnb_4bit_quant_type": _only("nf4", otherwise=_lost("4-bit weights are nf4")),
    "bnb_4bit_use_double_quant": _only(True, otherwise=_lost("the scales are quantized, too")),
    "llm_int8_threshold": _only(6.0, otherwise=_lost("int8 products are computed in --dtype")),
    "llm_int8_has_fp16_weight": _only(False, otherwise=_UNKNOWN),
    "quantization_config.type": _only("BitsAndBytesConfig", otherwise=_UNKNOWN),
    # Data
    "data_files": _files,
    "data_files.train": _files,
    "dataset.path": _dataset,
    "dataset.dataset_name": _dataset,
    "type": _only(
        *("process_hf_dataset", "process_ms_dataset", "ConcatDataset", "build_packed_dataset"),
        otherwise=_UNKNOWN,
    ),
    "dataset_cfg.folder": _lost(
        "a folder of InternEvo: rename its .bin files, which are JSON lines, to .jsonl and give "
        "them by --data"
    ),
    "dataset_cfg.min_length": _only(0, otherwise=_UNKNOWN),
    "dataset_cfg.data_order_path": _only(None, otherwise=_UNKNOWN),
    "dataset.type": _only("load_dataset", "load", otherwise=_UNKNOWN),
    "prompt_template": _template,
    "template_map_fn.template": _template,
    "dataset_map_fn": _only(  # rows are recognized by their keys
        *(None, "alpaca_map_fn", "openai_map_fn", "pretrain_map_fn"),
        otherwise=_lost(
            "rows must be conversation, messages or instruction and output: write them so"
        ),
    ),
    "max_length": _Flag("seq_len"),
    "packed_length": _Flag("seq_len"),
    "pack_to_max_length": lambda value, facts, owner: Outcome(
        reason="rows are always packed" + ("" if value else ", with several documents each"),
        lost=not value,
    ),
    "max_dataset_length": _lost("give a part of a file by --data FILE:0.3"),
    "sampler.type": _only(
        *("DefaultSampler", "InternRepoSampler", "SequenceParallelSampler"), otherwise=_UNKNOWN
    ),
    "sampler.shuffle": _only(True, otherwise=_lost("rows are always shuffled, by --seed")),
    "dataloader_num_workers": _unneeded(),
    "sequence_parallel_size": _only(1, otherwise=_Flag("mesh.seq")),
    # Steps and optimizer
    "batch_size": _rows,
    "accumulative_counts": _Flag("grad_accum"),
    "max_epochs": _Flag("epochs", float),
    "max_iters": _Flag("steps"),
    "optim_type": _optimizer,
    "optimizer.type": _optimizer,
    "lr": _Flag("optim.lr", float),
    "betas": _Flag("optim.betas", tuple),
    "weight_decay": _Flag("optim.weight_decay", float),
    "max_norm": _Flag("optim.clip", float),
    "optim_wrapper.type": _only("AmpOptimWrapper", "OptimWrapper", otherwise=_UNKNOWN),
    "optim_wrapper.dtype": _dtype,
    "warmup_ratio": _Flag("optim.warmup_ratio", float),
    "warm_up_ratio": _Flag("optim.warmup_ratio", float),
    "param_scheduler.type": _scheduler,
    "param_scheduler.eta_min": _last_rate,
    "param_scheduler.begin": _begin,
    "param_scheduler.end": _end,
    "param_scheduler.by_epoch": _only(True, otherwise=_lost("the schedule counts epochs")),
    # Checkpoints, samples, log
    "save_steps": _Flag("save_every"),
    "checkpoint.interval": _Flag("save_every"),
    "checkpoint.by_epoch": _only(False, otherwise=_lost("checkpoints are counted in steps")),
    "save_total_limit": _keep,
    "checkpoint.max_keep_ckpts": _keep,
    "evaluation_freq": _Flag("sample_every"),
    "custom_hooks.every_n_iters": _Flag("sample_every"),
    "evaluation_inputs": _prompts,
    "SYSTEM": _system,
    "custom_hooks.system": _system,
    "custom_hooks.type": _only(
        *("DatasetInfoHook", "EvaluateChatHook", "ThroughputHook"),
        "VarlenAttnArgsToMessageHubHook",
        otherwise=_lost("hooks of one's own are not run"),
    ),
    "logger.interval": _Flag("log_every"),
    "visualizer": _only(None, otherwise=_lost("see --log")),
    "load_from": _only(None, otherwise=_lost("a run resumes by --out, or begins by --model RUN")),
    "resume": _only(False, otherwise=_lost("a run resumes by the same --out")),
    # Randomness
    "randomness.seed": _only(None, otherwise=_Flag("seed")),
    "randomness.deterministic": _if_true("deterministic", True),
}
"""Rules by the end of the dotted place of a setting."""
