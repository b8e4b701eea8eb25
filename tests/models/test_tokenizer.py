"""Tokenizers: the original's ids, nothing added, any text, and clear refusals."""

import json
import multiprocessing
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import sentencepiece

from models.tokenizer import CHAT_TOKENS, ByteTokenizer, load_tokenizer

DATA = Path(__file__).parents[1] / "data"
JSON, SPM = DATA / "tokenizer_tiny", DATA / "tokenizer_tiny_spm"
GOLDEN = json.loads((JSON / "golden_tokenizer.json").read_text(encoding="utf-8"))
# A directory with tokenizer.json, one as published with tokenizer.model, and the bare model file,
# whose six chat tokens are called [UNUSED_TOKEN_141..146].
SOURCES = [JSON, SPM, SPM / "tokenizer.model"]
HARD = ["a\ud800b", "\udc80", "\x00", "🐉" * 3, "\u200b ▁ \t", "<|im_end|>" * 2, "[UNUSED_TOKEN_3]"]


@pytest.fixture(scope="module", params=SOURCES, ids=lambda p: p.name)
def tokenizer(request):
    return load_tokenizer(request.param)


def test_ids_are_the_originals(tokenizer):
    assert tokenizer.encode_batch(GOLDEN["texts"]) == GOLDEN["ids_no_special"]
    assert [tokenizer.encode(text) for text in GOLDEN["texts"]] == GOLDEN["ids_no_special"]


def test_decoding_is_the_originals(tokenizer):
    plain = [tokenizer.decode(ids, skip_special=True) for ids in GOLDEN["ids"]]
    assert plain == GOLDEN["decode_skip_special"]
    assert [tokenizer.decode(tokenizer.encode(t)) for t in GOLDEN["texts"]] == GOLDEN["texts"]


def test_no_id_is_added_and_the_special_ones_are_known(tokenizer):
    assert tokenizer.vocab_size == 512
    ids = (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    assert ids == (0, 1, 2, 2)
    assert [tokenizer.encode(name) for name in CHAT_TOKENS] == [[i] for i in range(506, 512)]
    assert (tokenizer.im_end_id, tokenizer.im_start_id) == (510, 511)


@pytest.mark.parametrize("text", HARD)
def test_any_text_and_any_id(tokenizer, text):
    assert all(0 <= i < 512 for i in tokenizer.encode(text))
    tokenizer.decode(tokenizer.encode(text))
    for i in range(512):
        tokenizer.decode([i])


def test_bytes_that_are_not_utf8_become_replacement_characters(tokenizer):
    assert tokenizer.decode([3 + 0xFF]) == "�"
    assert tokenizer.decode([3 + 0xE4, *tokenizer.encode("Hello")]) == "�Hello"
    assert ByteTokenizer().decode([3 + 0xFF, 3 + ord("a")]) == "�a"


def test_byte_tokenizer():
    byte = load_tokenizer("byte")
    assert byte.vocab_size == 265
    assert byte.encode("aé") == [3 + 97, 3 + 0xC3, 3 + 0xA9]
    assert byte.encode("<|im_start|>a<|im_end|>") == [byte.im_start_id, 100, byte.im_end_id]
    assert [byte.encode(name) for name in CHAT_TOKENS] == [[i] for i in range(259, 265)]
    assert byte.decode([1, 100, 264, 2]) == "<s>a<|im_start|></s>"
    assert byte.decode([1, 100, 264, 2], skip_special=True) == "a"
    assert byte.decode([265, 319]) == "��"
    for text in GOLDEN["texts"] + HARD[2:]:
        assert byte.decode(byte.encode(text)) == text
    assert byte.encode_batch(["a", ""]) == [[100], []]


@pytest.mark.parametrize("source", ["byte", *SOURCES], ids=str)
def test_pickle_keeps_ids_and_fingerprint(source):
    tokenizer = load_tokenizer(source)
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("Hello world") == tokenizer.encode("Hello world")
    assert copy.fingerprint == tokenizer.fingerprint and copy.name == tokenizer.name


def test_processes_share_a_tokenizer():
    tokenizer = load_tokenizer(JSON)
    tokenizer.encode_batch(GOLDEN["texts"] * 8)  # its threads have run before the processes start
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(tokenizer.encode, GOLDEN["texts"]) == GOLDEN["ids_no_special"]


def test_fingerprints_tell_tokenizers_apart():
    assert load_tokenizer(JSON).fingerprint != ByteTokenizer().fingerprint
    assert load_tokenizer(JSON).fingerprint == load_tokenizer(JSON).fingerprint


def test_remote_code_beside_the_files_is_not_run(tmp_path):
    """A published directory carries code that nothing here may import."""
    shutil.copytree(SPM, tmp_path / "spm")
    for name in ("tokenization_internlm2.py", "tokenization_internlm2_fast.py"):
        (tmp_path / "spm" / name).write_text("raise SystemExit('remote code ran')")
    assert load_tokenizer(tmp_path / "spm").vocab_size == 512


def test_a_config_without_added_tokens_gets_the_published_names(tmp_path):
    """As in the first releases: the chat tokens keep their ids."""
    shutil.copyfile(SPM / "tokenizer.model", tmp_path / "tokenizer.model")
    config = {"tokenizer_class": "InternLM2Tokenizer", "auto_map": {}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path).im_start_id == 511


def test_refusals(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="neither tokenizer.json nor tokenizer.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": "x.Y"}}')
    with pytest.raises(ValueError, match="needs code of that directory"):
        load_tokenizer(tmp_path)
    (tmp_path / "broken.model").write_bytes(b"\xff\xff\xff")
    with pytest.raises(ValueError, match="is not a SentencePiece model"):
        load_tokenizer(tmp_path / "broken.model")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="give its directory"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_old_names_of_chat_tokens_are_the_tokens(tokenizer):
    """As SentencePiece itself gives: [UNUSED_TOKEN_141..146] in the published model."""
    published = sentencepiece.SentencePieceProcessor(model_file=str(SPM / "tokenizer.model"))
    old = [f"[UNUSED_TOKEN_{i}]" for i in range(141, 147)]
    assert [published.piece_to_id(name) for name in old] == [*range(506, 512)]
    assert [tokenizer.encode(name) for name in old] == [[i] for i in range(506, 512)]
    text = "[UNUSED_TOKEN_146]user\nhi[UNUSED_TOKEN_145]\n"
    new = "<|im_start|>user\nhi<|im_end|>\n"
    assert tokenizer.encode(text) == tokenizer.encode(new)
    assert tokenizer.encode_batch([text, "a"]) == tokenizer.encode_batch([new, "a"])
    for other in ("[UNUSED_TOKEN_147]", "[UNUSED_TOKEN_1460]", "[UNUSED_TOKEN_14]"):
        assert not set(tokenizer.encode(other)) & {*range(506, 512)}


@pytest.fixture
def first_release(tmp_path):
    """Make a tokenizer.model whose config names no added tokens."""
    shutil.copyfile(SPM / "tokenizer.model", tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "InternLM2Tokenizer"}')
    return tmp_path


def test_added_tokens_json_is_read(first_release):
    """New ids at the end, and names for unused tokens of the vocabulary."""
    path = first_release / "added_tokens.json"
    path.write_text('{"<|think|>": 512, "<|endthink|>": 513, "<|im_end|>": 510}')
    tokenizer = load_tokenizer(first_release)
    assert tokenizer.vocab_size == 514
    assert tokenizer.encode("<|think|>a<|endthink|>")[::2] == [512, 513]
    assert (tokenizer.im_end_id, tokenizer.encode("<|im_start|>")) == (510, [511])
    assert tokenizer.decode([512]) == "<|think|>"


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ('{"<|think|>": 600}', "gives '<|think|>' the id 600, but the tokenizer gives it 512"),
        ('{"<|im_end|>": 512}', "gives '<|im_end|>' the id 512, but the tokenizer gives it 510"),
        ('{"<|think|>": "x"}', "must contain an id for every name"),
        ("[]", "must contain a JSON object"),
    ],
)
def test_added_tokens_that_cannot_be_read_are_refused(first_release, added, message):
    (first_release / "added_tokens.json").write_text(added)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_tokenizer(first_release)
    assert "added_tokens.json" in str(error.value)


def test_added_tokens_beside_a_tokenizer_json_are_checked(tmp_path):
    shutil.copytree(JSON, tmp_path / "json")
    (tmp_path / "json" / "added_tokens.json").write_text('{"<|im_end|>": 510}')
    assert load_tokenizer(tmp_path / "json").im_end_id == 510
    (tmp_path / "json" / "added_tokens.json").write_text('{"<|think|>": 512}')
    with pytest.raises(ValueError, match="the id 512, but the tokenizer gives it none"):
        load_tokenizer(tmp_path / "json")


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", "tokenizer_config.json"])
def test_pointers_and_fifos_are_refused(tmp_path, name):
    """Instead of advice to install packages, or a wait without end."""
    shutil.copytree(JSON if name == "tokenizer.json" else SPM, tmp_path / "t")
    (tmp_path / "t" / name).write_text("version https://git-lfs.github.com/spec/v1\noid a\n")
    with pytest.raises(ValueError, match=f"{name} is a Git LFS pointer"):
        load_tokenizer(tmp_path / "t")
    (tmp_path / "t" / name).unlink()
    os.mkfifo(tmp_path / "t" / name)
    with pytest.raises(ValueError, match=f"{name} is not a regular file"):
        load_tokenizer(tmp_path / "t")
