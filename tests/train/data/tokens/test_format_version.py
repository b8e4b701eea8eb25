"""The version of the token cache is raised whenever the content of a cache changes."""

import hashlib
import json
from pathlib import Path

import pytest

from models.tokenizer import load_tokenizer
from train.data.tokens import cache as cache_module
from train.data.tokens.cache import FORMAT_VERSION, ReadOptions, stale_caches
from train.data.tokens.dataset import tokenize

DATA = Path(__file__).parents[3] / "data"
ROWS = json.loads((Path(__file__).parents[1] / "files" / "golden_template.json").read_text("utf-8"))
DECISIONS = [  # each depends on a rule of its own in formats.py
    {
        "conversations": [
            {"from": "human", "value": "Q"},
            {"from": "gpt", "value": "A", "weight": 0},
        ]
    },
    {
        "conversations": [
            {"from": "system", "value": "S", "name": "<|plugin|>"},
            {"from": "human", "value": "Q"},
            {"from": "gpt", "value": "A"},
        ]
    },
    {"conversation": [{"input": "", "output": "Raw."}]},
    {"conversation": [{"input": "Q", "output": "A"}, {"input": "", "output": "B"}]},
    {"question": "Q", "context": "C", "system": "S", "answer": "A", "tools": " ", "id": 7},
    {"instruction": "I", "input": "None", "output": "A", "reasoning_content": "Hm."},
    {
        "tools": [{"type": "function", "function": {"name": "f", "parameters": None}}],
        "messages": [
            {"role": "system", "content": "S", "name": "<|plugin|>"},
            {"role": "developer", "content": "D"},
            {"role": "user", "content": [{"type": "text", "text": "Q"}]},
            {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f"}}]},
            {"role": "tool", "content": "R", "tool_call_id": "1"},
            {"role": "assistant", "content": "<think>Hm.</think>A"},
            {"role": "user", "content": "unanswered"},
        ],
    },
]
BROKEN = [{"question": "Q", "answer": " "}, {"prompt": "Q"}, {"text": "caf\udce9"}, [1]]

# FORMAT_VERSION, and the SHA-256 of the cache files that it stands for. If the hash changes, users'
# caches no longer hold what this program makes: raise FORMAT_VERSION, and then write both here.
GOLDEN = (3, "dace25c97c34eb9b4c31982495eb0369c074e72a77cdbb2ee87bc1601cd9b76e")


def test_content_of_the_cache_changes_only_with_its_version(tmp_path):
    """Three tokenizers, every format, every kind of text file, broken rows: to the last byte."""
    rows = [case["row"] for case in ROWS if "tokens" not in case["row"]] + DECISIONS
    lines = [json.dumps(row, ensure_ascii=False) for row in (*rows, *BROKEN)]
    lines.insert(2, '{"text": ')
    files = {
        "a.jsonl": "\n".join(lines),
        "b.json": json.dumps(rows, indent=1, ensure_ascii=False),
        "c.txt": "A line.\n\nAnother one: 你好。\n" * 3,
        "d.txt": "\n".join(f"Article {i}: " + "word " * 200 for i in range(3)),
        "e.jsonl": '{"tokens": [1, -5, 6]}\n{"tokens": [1, 5, 6]}\n',
    }
    paths = []
    for name, text in files.items():
        paths.append(tmp_path / name)
        paths[-1].write_bytes(text.encode("utf-8", "surrogateescape"))
    digest = hashlib.sha256()
    for number, spec in enumerate(("byte", DATA / "tokenizer_tiny", DATA / "tokenizer_tiny_spm")):
        for path in paths:
            cache = tmp_path / f"cache-{number}-{path.name}"
            tokenize([path], load_tokenizer(spec), ReadOptions(cache=cache, workers=1))
            for chunk in sorted(cache.rglob("*.tokens")):
                digest.update(chunk.read_bytes())
    assert (FORMAT_VERSION, digest.hexdigest()) == GOLDEN


def test_another_version_has_a_cache_of_its_own(write, tokenizer, tmp_path, monkeypatch, caplog):
    """Caches of other versions are never read; they are named once as safe to delete."""
    caplog.set_level("INFO")
    path, cache = write("a.jsonl", [{"text": "one"}]), tmp_path / "cache"
    monkeypatch.setattr(cache_module, "FORMAT_VERSION", 998)
    tokenize([path], tokenizer, ReadOptions(cache=cache, workers=1))
    assert not caplog.messages
    monkeypatch.setattr(cache_module, "FORMAT_VERSION", 999)
    (cache / ("0" * 32)).mkdir()  # of the time before there were versions
    (cache / "notes").mkdir()  # somebody else's
    cache_module.log_stale_caches.cache_clear()
    for _ in range(2):
        tokenize([path], tokenizer, ReadOptions(cache=cache, workers=1))
    assert [d.name for d in stale_caches(cache)] == ["0" * 32, "v998"]
    assert len(list((cache / "v999").rglob("*.tokens"))) == 1
    assert caplog.messages == [
        f"token caches of other versions in {cache}, safe to delete: {'0' * 32}, v998"
    ]


@pytest.mark.parametrize("missing", ["nowhere", "a file"])
def test_no_cache_has_no_stale_ones(tmp_path, missing):
    (tmp_path / "a file").write_text("")
    assert stale_caches(tmp_path / missing) == []
