"""What a run logs at its end: its files, its time, and the commands that come next."""


def test_last_lines_name_files_time_and_next_commands(finished):
    log = finished.with_suffix(".log").read_text().splitlines()
    done, generate, report, convert = log[-7:-3]  # before the table
    assert done.startswith("done in 0:0") and f"{finished} has checkpoints, metrics.jsonl" in done
    assert generate == f'try it:  python -m models.generate {finished} --prompt "..."'
    assert report == f"curves:  python -m train.report {finished}"
    assert convert == f"weights: python -m models.convert {finished} {finished}/hf"
    for name in ("checkpoints", "metrics.jsonl", "config.json", "sample.txt"):
        assert (finished / name).exists()
