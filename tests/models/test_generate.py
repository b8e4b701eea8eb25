"""Generation against the original's, and the command."""

import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from models import cache
from models import generate as command
from models.execution import Execution
from models.generate import generate, stop_ids_of
from models.sampling import Sampling
from models.tokenizer import ByteTokenizer, load_tokenizer
from models.weights.load import load_hf

SPM = Path(__file__).parents[1] / "data" / "tokenizer_tiny_spm"


@pytest.fixture(scope="module")
def model(tiny_dir):
    return load_hf(tiny_dir, execution=Execution(dtype="float32", attn="xla"))


@pytest.fixture(scope="module")
def prompts(golden):
    return [golden[f"generate{i}/prompt_ids"].tolist() for i in (0, 1)]


@pytest.fixture(scope="module")
def expected(golden):
    return [golden[f"generate{i}/new_ids"].tolist() for i in (0, 1)]


def test_greedy_ids_are_the_originals(model, prompts, expected, exact):
    """Both prompts, of 12 and 21 tokens, in one batch."""
    assert generate(model, prompts, max_new_tokens=16) == expected


def test_a_single_prompt_is_read_and_continued_alike(model, prompts, expected, exact):
    """One row takes another path through the projections (`models.block`)."""
    assert generate(model, prompts[1:], max_new_tokens=16) == expected[1:]


def test_a_long_cache_is_summed_in_blocks(model, prompts, expected, exact):
    """Room for 2,000 tokens, of which a stop id needs few: the same ids."""
    assert cache.capacity_for(2064) == 2560 and cache.capacity_for(1000) == 1024
    stop = expected[0][5]
    ids = generate(model, prompts[:1], max_new_tokens=2000, stop_ids=[stop])
    assert ids == [expected[0][:5]]


def test_consuming_the_model_changes_no_id(tiny_dir, prompts, expected, exact):
    """And leaves nothing of it to use."""
    model = load_hf(tiny_dir, execution=Execution(dtype="float32", attn="xla"))
    steps = command.stream(model, prompts, max_new_tokens=16, sampling=Sampling(), consume=True)
    assert [list(ids) for ids in zip(*steps, strict=True)] == expected
    with pytest.raises(RuntimeError, match="deleted"):
        model(np.ones((1, 4), np.int32))


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 2, 2, 2)])
def test_greedy_ids_over_a_mesh(tiny_dir, prompts, expected, exact, make_mesh, sizes):
    """Two rows over four batch shards: filler rows make up the batch. seq splits the prompts."""
    model = load_hf(
        tiny_dir, mesh=make_mesh(*sizes), execution=Execution(dtype="float32", attn="xla")
    )
    assert generate(model, prompts, max_new_tokens=16) == expected


def test_stop_ids_end_one_row_and_not_the_other(model, prompts, expected, exact):
    stop = expected[0][5]
    assert stop not in expected[0][:5]
    want = [ids[: ids.index(stop)] if stop in ids else ids for ids in expected]
    assert generate(model, prompts, max_new_tokens=16, stop_ids=[stop]) == want


def test_compiled_once_for_similar_requests(model, prompts, exact):
    generate(model, prompts, max_new_tokens=16)
    before = command._first._cache_size(), command._next._cache_size()
    generate(model, [p[:-3] for p in prompts], max_new_tokens=11)
    assert (command._first._cache_size(), command._next._cache_size()) == before


def test_sampling_follows_the_seed(model, prompts, exact):
    def run(seed):
        return generate(model, prompts, max_new_tokens=8, temperature=1.0, top_k=50, seed=seed)

    assert run(1) == run(1) != run(2)


def test_prompts_are_ids(model):
    """Those of a batch, an array, too; without the checks of types that pytest adds."""
    check = inspect.unwrap(command._check)
    check(np.ones((2, 3), np.int32), model.config.vocab_size, 4)
    with pytest.raises(ValueError, match="prompt 0 is text, must be ids"):
        check(["hi"], model.config.vocab_size, 4)


@pytest.mark.parametrize(
    ("prompts", "new", "message"),
    [
        ([], 4, "at least one id"),
        ([[]], 4, "at least one id"),
        ([[1, 512]], 4, "prompt 0 has ids outside 0 .. 511"),
        ([[1]], 0, "max_new_tokens=0"),
    ],
)
def test_generate_refuses(model, prompts, new, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, max_new_tokens=new)


def test_stop_ids_come_from_both_configs(model, tmp_path):
    assert stop_ids_of(tmp_path, model, ByteTokenizer()) == (2, 263)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 77]}))
    assert stop_ids_of(tmp_path, model, ByteTokenizer()) == (2, 77, 263)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": None}))
    assert stop_ids_of(tmp_path, model, ByteTokenizer()) == (2, 5, 263)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [[2]]}))
    with pytest.raises(ValueError, match=r"eos_token_id=\[\[2\]\] must be an id, a list of ids"):
        stop_ids_of(tmp_path, model, ByteTokenizer())


def test_a_cache_that_does_not_fit_is_one_line(directory, capsys):
    argv = [str(directory), "--prompt=a", "--dtype=float32", f"--max_new_tokens={10**12}"]
    assert command.main(argv) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: out of memory") and err.count("\n") == 1


@pytest.fixture
def directory(tiny_dir, tmp_path):
    shutil.copytree(tiny_dir, tmp_path / "model")
    for file in SPM.iterdir():
        shutil.copyfile(file, tmp_path / "model" / file.name)
    return tmp_path / "model"


def test_command_prints_what_generate_returns(directory, capsys):
    argv = [str(directory), "--prompt", "Hello", "--max_new_tokens=8", "--dtype=float32"]
    assert command.main(argv) == 0
    out = capsys.readouterr().out
    tokenizer = load_tokenizer(directory)
    model = load_hf(directory, execution=Execution(dtype="float32"))
    (new,) = generate(
        model,
        [[1, *tokenizer.encode("Hello")]],
        max_new_tokens=8,
        stop_ids=stop_ids_of(directory, model, tokenizer),
    )
    assert out == tokenizer.decode(new, skip_special=True) + "\n"
    assert command.main([*argv, "--chat"]) == 0
    assert capsys.readouterr().out != out


def test_command_errors_are_one_line(directory, capsys):
    wide = ["--tokenizer", str(directory)]
    for argv, status, message in [
        ([str(directory / "nowhere"), "--prompt=a"], 1, "nowhere does not exist: give a HF direct"),
        ([str(directory), "--prompt=a", "--attn=fast"], 2, "--attn=fast must be one of auto, cud"),
        ([str(directory), "--prompt=a", *wide], 1, "cannot be read"),
    ]:
        if message == "cannot be read":
            (directory / "tokenizer.json").write_text("{}")
        assert command.main(argv) == status
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and message in err


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_an_error(tiny_dir, prompts, bad):
    """Not an empty line: in one row's weights alone, and later in a run too."""
    model = load_hf(tiny_dir, execution=Execution(dtype="float32", attn="xla"))
    model.norm_D[...] = model.norm_D[...].at[3].set(bad)
    with pytest.raises(FloatingPointError, match="the logits of token 1 are NaN or infinite"):
        generate(model, prompts, max_new_tokens=4)


def test_no_tokenizer_is_one_line_with_a_remedy(tiny_dir, tmp_path, capsys):
    shutil.copytree(tiny_dir, tmp_path / "model")
    assert command.main([str(tmp_path / "model"), "--prompt=a"]) == 1
    assert "name one with --tokenizer ('byte' for" in capsys.readouterr().err


def test_a_directory_without_a_model_is_one_line(tmp_path, capsys):
    """The model is missing, not only its tokenizer."""
    assert command.main([str(tmp_path), "--prompt=a"]) == 1
    assert f"{tmp_path} is no model: it has no config.json" in capsys.readouterr().err


def test_a_damaged_run_is_one_line(tmp_path, capsys):
    (tmp_path / "run" / "checkpoints" / "8").mkdir(parents=True)
    assert command.main([str(tmp_path / "run"), "--prompt=a"]) == 1
    assert "checkpoints/8/run/metadata is missing" in capsys.readouterr().err


def test_a_lora_adapter_is_named(tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert command.main([str(tmp_path), "--prompt=a"]) == 1
    assert "contains a LoRA adapter" in capsys.readouterr().err


def test_ctrl_c_is_one_line(directory, monkeypatch, capsys):
    """Text that was generated before stays."""

    def stream(*args, **kwargs):
        yield [3 + ord("c")]
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "stream", stream)
    assert command.main([str(directory), "--prompt=a", "--tokenizer=byte"]) == 130
    said = capsys.readouterr()
    assert (said.out, said.err) == ("c", "error: stopped by Ctrl-C\n")


def test_a_reader_that_has_seen_enough_is_no_error(directory):
    """The output goes to `head`, which ends after the first bytes."""
    flags = [str(directory), "--prompt=a", "--tokenizer=byte", "--max_new_tokens=50"]
    command = [sys.executable, "-m", "models.generate", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as shown:
        shown.stdout.close()
        assert shown.stderr.read() == b""
    assert shown.returncode == 0


def test_escape_sequences_are_not_sent_to_a_terminal(directory, monkeypatch, capsys):
    """To a file the text goes as it is."""
    monkeypatch.setattr(command, "stream", lambda *args, **kwargs: iter([[3 + 27], [3 + ord("c")]]))
    argv = [str(directory), "--prompt=a", "--dtype=float32", "--tokenizer=byte"]
    assert command.main(argv) == 0
    assert capsys.readouterr().out == "\x1bc\n"
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda _: True)
    assert command.main(argv) == 0
    assert capsys.readouterr().out == "\\x1bc\n"
