"""The bench of the data measures what it says."""

import json

from train.data.bench import main


def test_the_raw_tokenizer_has_the_texts_of_the_build(tmp_path, capsys):
    """The tokens in the cache are those of the texts, and one <s> for each document."""
    path = tmp_path / "a.jsonl"
    rows = [{"question": f"Q{i}", "answer": "A"} for i in range(50)] + [{"question": 1}]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert main(["--data", f"{path}:1", "--workers=1", "--repeat=1", "--seq_len=256"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "150 texts, 1 processes"
    raw, build, load = (line.split() for line in lines[2:])
    assert (raw[0], build[0], load[0]) == ("raw", "build", "load")
    assert int(load[1].replace(",", "")) - int(raw[1].replace(",", "")) == 50


def test_bad_flags_and_data_are_one_line(capsys, tmp_path):
    assert main(["--dta=x"]) == 2
    for flags in (["--data"], ["--data=a", "--workers=0"], ["--data=a", "--repeat=0"]):
        assert main(flags) == 2
    assert main(["--data", str(tmp_path / "nowhere.txt")]) == 1
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 5)
