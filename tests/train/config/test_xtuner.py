"""Every setting of an XTuner config becomes a flag, or is named with the reason why not."""

import pytest

from train.config.command_line import parse_flags
from train.config.config import Config
from train.config.words import flatten_config
from train.config.xtuner import read_xtuner
from train.main import main

SETTINGS = """
pretrained_model_name_or_path = 'internlm/internlm2-chat-7b'
use_varlen_attn = False
alpaca_en_path = 'tatsu-lab/alpaca'
prompt_template = PROMPT_TEMPLATE.internlm2_chat
max_length = 2048
pack_to_max_length = True
sequence_parallel_size = 1
batch_size = 2
accumulative_counts = 16
accumulative_counts *= sequence_parallel_size
dataloader_num_workers = 0
max_epochs = 3
optim_type = AdamW
lr = 2e-4
betas = (0.9, 0.999)
weight_decay = 0
max_norm = 1
warmup_ratio = 0.03
save_steps = 500
save_total_limit = 2
evaluation_freq = 100
SYSTEM = SYSTEM_TEMPLATE.coder
evaluation_inputs = ['one', 'two\\nlines']
"""

PARTS = """
tokenizer = dict(type=AutoTokenizer.from_pretrained,
    pretrained_model_name_or_path=pretrained_model_name_or_path, padding_side='right')
model = dict(type=SupervisedFinetune, use_varlen_attn=use_varlen_attn, llm=dict(
    type=AutoModelForCausalLM.from_pretrained, torch_dtype=torch.float16,
    pretrained_model_name_or_path=pretrained_model_name_or_path, attn_implementation='sdpa',
    quantization_config=dict(type=BitsAndBytesConfig, load_in_4bit=True, load_in_8bit=False,
        bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True)),
    lora=dict(type=LoraConfig, r=64, lora_alpha=16, lora_dropout=0.1, bias='none'))
alpaca_en = dict(type=process_hf_dataset, dataset=dict(type=load_dataset, path=alpaca_en_path),
    max_length=max_length, dataset_map_fn=alpaca_map_fn,
    template_map_fn=dict(type=template_map_fn_factory, template=prompt_template))
sampler = A if sequence_parallel_size > 1 else B
train_dataloader = dict(batch_size=batch_size, num_workers=dataloader_num_workers,
    dataset=alpaca_en, sampler=dict(type=sampler, shuffle=True))
optim_wrapper = dict(type=AmpOptimWrapper, dtype='float16', accumulative_counts=accumulative_counts,
    optimizer=dict(type=optim_type, lr=lr, betas=betas, weight_decay=weight_decay),
    clip_grad=dict(max_norm=max_norm, error_if_nonfinite=False), loss_scale='dynamic')
param_scheduler = [
    dict(type=LinearLR, start_factor=1e-5, by_epoch=True, begin=0, end=warmup_ratio * max_epochs),
    dict(type=CosineAnnealingLR, eta_min=lr * 0.15, by_epoch=True,
        begin=warmup_ratio * max_epochs, end=max_epochs)]
train_cfg = dict(type=TrainLoop, max_epochs=max_epochs)
custom_hooks = [dict(type=DatasetInfoHook), dict(type=EvaluateChatHook,
    every_n_iters=evaluation_freq, evaluation_inputs=evaluation_inputs, system=SYSTEM)]
if use_varlen_attn:
    custom_hooks += [dict(type=VarlenAttnArgsToMessageHubHook)]
default_hooks = dict(logger=dict(type=LoggerHook, interval=10),
    checkpoint=dict(type=CheckpointHook, interval=save_steps, max_keep_ckpts=save_total_limit))
env_cfg = dict(cudnn_benchmark=False)
visualizer = None
log_level = 'INFO'
load_from = None
resume = False
randomness = dict(seed=None, deterministic=False)
"""

FLAGS = {
    "model": "internlm/internlm2-chat-7b",
    "seq_len": 2048,
    "rows_per_device": 32,
    "grad_accum": 16,
    "epochs": 3,
    "attn": "sdpa",
    "base_dtype": "nf4",
    "lora.rank": 64,
    "lora.alpha": 16,
    "lora.dropout": 0.1,
    "optim.name": "adamw",
    "optim.lr": 2e-4,
    "optim.betas": (0.9, 0.999),
    "optim.weight_decay": 0,
    "optim.clip": 1,
    "optim.warmup_ratio": 0.03,
    "optim.schedule": "cosine",
    "optim.min_lr_ratio": 0.15,
    "save_every": 500,
    "keep_last": 2,
    "sample_every": 100,
    "prompts": ("one", "two\nlines"),
    "chat": True,
    "log_every": 10,
}

# Variables of the 44 configs of InternLM2 for text in XTuner 0.1.23.
NAMES = """pretrained_model_name_or_path use_varlen_attn alpaca_en_path prompt_template max_length
pack_to_max_length sequence_parallel_size batch_size accumulative_counts dataloader_num_workers
max_epochs optim_type lr betas weight_decay max_norm warmup_ratio save_steps save_total_limit
evaluation_freq SYSTEM evaluation_inputs data_files warm_up_ratio data_path crime_kg_assitant_path
law_reference_data_path dataset_folder sampler visualizer log_level load_from resume""".split()


@pytest.fixture
def read(tmp_path):
    """Read a config with this text."""

    def of(text):
        (tmp_path / "config.py").write_text(text)
        return read_xtuner(tmp_path / "config.py")

    return of


def test_flags_of_a_qlora_config(read, tmp_path):
    found = read(SETTINGS + PARTS)
    assert found.flags == FLAGS
    lost = {setting.partition("=")[0] for setting, _ in found.lost}
    assert lost == {"alpaca_en_path", "SYSTEM", "model.llm.torch_dtype", "model.lora.type"}
    used = flatten_config(parse_flags([f"--config={tmp_path / 'config.py'}"]))
    assert {flag: used[flag] for flag in FLAGS} == FLAGS
    lines = found.report(used | {"seq_len": 4096})
    assert "--seq_len=2048                           from max_length, replaced" in lines
    assert any(x.startswith("--rows_per_device=32 ") and "batch_size=2 x acc" in x for x in lines)
    assert any(
        x.startswith("not mapped: alpaca_en_path=tatsu-lab/alpaca: a dataset") for x in lines
    )


@pytest.mark.parametrize("value", ["1", "'text'", "[1, 2]", "f(x)", "some.name", "None"])
def test_no_setting_is_silent(value, read):
    """Whatever its value is, and wherever it is used."""
    found = read("\n".join(f"{name} = {value}" for name in NAMES))
    named = [*found.became.values()] + [s for s, _ in found.unneeded + found.lost]
    missing = [n for n in NAMES if not any(s.partition("=")[0] == n for s in named)]
    assert missing == [] and all(reason for _, reason in found.lost)


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("weight = 0.1\noptim_wrapper['a'] = 1", {}),
        ("my_rate = 1e-5\noptim_wrapper = dict(optimizer=dict(lr=my_rate))", {"optim.lr": 1e-5}),
        ("optim_wrapper = {'clip_grad': {'max_norm': 2}}", {"optim.clip": 2}),
        ("x = dict(data_files=dict(train='a'))\ny = dict(data_files=['b'])", ("a", "b")),
        ("randomness = dict(seed=7, deterministic=True)", {"seed": 7, "deterministic": True}),
        ("optim_type = PagedAdamW8bit", {"optim.moment_dtype": "int8"}),
        ("optim_wrapper = dict(type=OptimWrapper)", {"optim.schedule": "constant"}),
        ("warm = 0.1\nparam_scheduler = [dict(type='LinearLR', end=warm * max_epochs)]", 0.1),
        ("model = dict(llm=dict(quantization_config=dict(load_in_8bit=True)))", "int8"),
        ("data_files = ['a.json']", {"data.files": ("a.json",)}),
    ],
)
def test_settings_that_people_change(text, flags, read):
    found = read(SETTINGS + text)
    short = {tuple: "data.files", float: "optim.warmup_ratio", str: "base_dtype"}
    flags = flags if isinstance(flags, dict) else {short[type(flags)]: flags}
    assert {flag: found.flags[flag] for flag in flags} == flags
    assert (found.flags["rows_per_device"], found.flags["grad_accum"]) == (32, 16)


def test_sequence_parallelism_keeps_the_rows_of_a_step(read):
    """accumulative_counts is multiplied by the devices that share rows, here --mesh.seq."""
    text = "sequence_parallel_size = 4\naccumulative_counts *= sequence_parallel_size"
    flags = read(SETTINGS + text).flags
    assert (flags["mesh.seq"], flags["rows_per_device"], flags["grad_accum"]) == (4, 128, 64)


def test_what_is_not_read_is_named(read):
    found = read(SETTINGS + "lr = float('1e-4')\nfor i in x: max_norm = 2\nmodel['a'] = 3\nzz = 4")
    lost = dict(found.lost)
    assert lost["lr=float('1e-4')"] == "not a plain constant: give --optim.lr yourself"
    assert lost["zz=4"] == "not a setting known here"
    assert {"for i in x:", "model['a'] = 3"} <= lost.keys() and "optim.lr" not in found.flags


def test_all_that_could_not_be_mapped_is_named_where_the_config_is_refused(tmp_path, capsys):
    """Also what depends on it, such as the rows of a step on accumulative_counts."""
    text = "lr = float('1e-4')\nbetas = f()\naccumulative_counts = int(x)\n"
    (tmp_path / "config.py").write_text(SETTINGS + text + PARTS)
    assert main([f"--config={tmp_path / 'config.py'}"]) == 2
    out, err = capsys.readouterr()
    assert "needs --data: alpaca_en_path=tatsu-lab/alpaca is a dataset of the hub" in err
    assert "--optim.lr" not in out.partition("not mapped: ")[0] and "--rows_per_device" in out
    for line in (
        "lr=float('1e-4'): not a plain constant: give --optim.lr yourself",
        "betas=f(): not a plain constant: give --optim.betas yourself",
        "accumulative_counts=int(x): not a plain constant: give --grad_accum yourself",
        "batch_size=2: accumulative_counts is not known: give --rows_per_device, their product",
        "param_scheduler.eta_min=lr * 0.15: not a plain constant: give the flag yourself",
    ):
        assert f"not mapped: {line}\n" in out


@pytest.mark.parametrize("form", ["recipe", "xtuner"])
def test_dry_run_names_what_the_run_refuses(form, tiny, tmp_path, capsys):
    """By the same check: a preset begins with random weights, and has no tokenizer."""
    (tmp_path / "config.py").write_text(SETTINGS + "data_files = ['rows.jsonl']\n")
    (tmp_path / "rows.jsonl").write_text('{"text": "word"}')
    flags = {
        "recipe": ["--recipe=internlm2-1.8b-full-alpaca-2k", "--data", f"{tmp_path}/rows.jsonl"],
        "xtuner": [f"--config={tmp_path / 'config.py'}", f"--data={tmp_path / 'rows.jsonl'}"],
    }[form]
    flags += ["--model=tiny", "--seq_len=64", "--rows_per_device=1", "--grad_accum=1"]
    assert main(flags) == 2
    refused = capsys.readouterr().err.removeprefix("error: ")
    assert "needs --model DIR (trained weights): with --model=tiny the run begins" in refused
    assert main([*flags, "--dry_run", "--dry_run_device=h200", "--attn=xla"]) == 0
    assert f"\nthe run would be refused: {refused}" in capsys.readouterr().out
    assert main([*flags, "--print_config"]) == 0
    assert f"# a run would be refused: {refused}" in capsys.readouterr().out
    assert main([*flags, "--dry_run", "--tokenizer=byte"]) == 0
    assert "refused" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model = dict(type=DPO)", "model.type=DPO is not supported: supervised fine-tuning"),
        ("x = 1", "no setting of an XTuner config is in this file"),
        ("x = (", "not Python, line 1: "),
        (SETTINGS, "needs --data: alpaca_en_path=tatsu-lab/alpaca is "),
        (SETTINGS + "max_length = 'long'", "--seq_len=long must be INT"),
    ],
)
def test_refused(text, message, tmp_path, capsys):
    """Without an own file a config of a hub's dataset would train on the built-in text."""
    text = text.replace(
        "'tatsu-lab/alpaca'", "'tatsu-lab/alpaca'\nx = dict(dataset=dict(path=alpaca_en_path))", 1
    )
    (tmp_path / "config.py").write_text(text)
    assert main([f"--config={tmp_path / 'config.py'}"]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_the_report_is_printed_before_the_run(tmp_path, capsys):
    (tmp_path / "config.py").write_text(SETTINGS)
    argv = [f"--config={tmp_path / 'config.py'}", "--model=nano", "--print_config", "--attn=xla"]
    assert main([*argv, "--grad_accum=1"]) == 0
    said = capsys.readouterr().out
    assert (
        "# --model=internlm/internlm2-chat-7b       from pretrained_model_name_or_path, replaced"
        in said
    )
    (tmp_path / "again.yaml").write_text(said)
    assert parse_flags([f"--config={tmp_path / 'again.yaml'}"]).optim.lr == 2e-4
    assert Config().optim.lr is None
