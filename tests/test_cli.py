"""The command line, on real files, as a person would type it."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

from rlhi.cli import COMMANDS, main, make_parser

BIN = Path(sys.executable).parent


def write_log(path, talks, **more):
    with open(path, "w", encoding="utf-8") as file:
        for i, talk in enumerate(talks):
            messages = [{"role": "user" if t % 2 == 0 else "assistant", "content": text} for t, text in enumerate(talk)]
            file.write(json.dumps({"id": f"talk-{i}", "messages": messages, **more}) + "\n")
    return path


@pytest.fixture
def log(tmp_path):
    talks = [["How do I boil an egg?", "Eggs are fascinating. " * 40, "Way too long, give me just the steps in two lines.", "Boil water. Nine minutes.", "Thanks, perfect!"],
             ["Name a tree.", "Oak.", "Write a haiku about the sea.", "Waves fold into light.", "Again."],
             ["Only one message here."]]
    return write_log(tmp_path / "log.jsonl", talks, user="ada")


def test_followups_one_line_for_each_later_user_message(log, tmp_path, capsys):
    out = tmp_path / "sub" / "kinds.jsonl"
    assert main(["followups", str(log), "--out", str(out)]) == 0
    rows = [json.loads(line) for line in open(out)]
    assert [(row["conversation_id"], row["turn"]) for row in rows] == [("talk-0", 2), ("talk-0", 4), ("talk-1", 2), ("talk-1", 4)]
    for row in rows:
        assert abs(sum(row["probabilities"].values()) - 1) < 1e-5
        assert row["kind"] == max(row["probabilities"], key=row["probabilities"].get)
    assert rows[0]["kind"] == "reattempt_with_feedback" and rows[1]["kind"] == "positive_feedback"


def test_the_same_command_writes_the_same_bytes(log, tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        main(["followups", str(log), "--out", str(tmp_path / name)])
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_personas_one_line_for_each_user(log, tmp_path):
    assert main(["personas", str(log), "--out", str(tmp_path / "personas.jsonl")]) == 0
    rows = [json.loads(line) for line in open(tmp_path / "personas.jsonl")]
    assert len(rows) == 1
    values = {p["dimension"]: p["value"] for p in rows[0]["preferences"]}
    assert values["length"] == "short"


def test_bad_rows_are_kept_beside_the_output(tmp_path):
    path = write_log(tmp_path / "log.jsonl", [["Hello there", "Hi.", "What is a fjord?"]])
    with open(path, "a") as file:
        file.write('{"id": "broken", "messages": [{"role"\n')
    assert main(["followups", str(path), "--out", str(tmp_path / "out.jsonl")]) == 0
    rejected = [json.loads(line) for line in open(tmp_path / "out.rejected.jsonl")]
    assert len(rejected) == 1 and rejected[0]["row"] == 2


@pytest.mark.parametrize("arguments, words", [
    (["followups", "no-such-file.jsonl", "--out", "x.jsonl"], "no-such-file"),
    (["train", "no-such-pairs.parquet", "--out", "x"], "no-such-pairs"),
    (["reproduce", "no-such-profile"], "no-such-profile"),
    (["reproduce", "tiny", "--set", "epochs"], "NAME=VALUE"),
])
def test_errors_name_what_was_found(arguments, words, capsys, tmp_path, monkeypatch):
    assert main(arguments) == 1
    assert words in capsys.readouterr().err


def test_unknown_ending_is_refused(log, tmp_path, capsys):
    assert main(["followups", str(log), "--out", str(tmp_path / "kinds.pickle")]) == 1
    assert ".jsonl or .parquet" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        make_parser().parse_args([command, "--help"])
    assert stop.value.code == 0
    assert f"example: rlhi {command}" in " ".join(capsys.readouterr().out.split())


def test_help_loads_nothing_heavy():
    code = "import sys, rlhi.cli; rlhi.cli.make_parser(); print([n for n in ('torch', 'transformers', 'trl', 'vllm', 'pandas', 'pyarrow', 'sklearn', 'duckdb') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_the_package_imports_neither_nbdev_nor_fastcore_nor_vllm():
    code = """
import importlib, importlib.abc, pathlib, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("nbdev", "fastcore", "vllm", "execnb", "ghapi"): raise ImportError("refused: " + name)
sys.meta_path.insert(0, Refuse())
import rlhi
for path in sorted(pathlib.Path(rlhi.__file__).parent.glob("*.py")):
    if not path.stem.startswith("_"): importlib.import_module("rlhi." + path.stem)
print("fine")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "fine", done.stderr[-2000:]


@pytest.mark.slow
def test_run_makes_pairs_and_an_adapter(tmp_path):
    from rlhi.conversations import read_table
    from rlhi.simulate import make_users, simulate_logs

    rows, _ = simulate_logs(make_users(5, seed=1), conversations_per_user=3, seed=1)
    log = tmp_path / "log.jsonl"
    with open(log, "w") as file:
        for row in rows:
            file.write(json.dumps({"id": row["conversation_id"], "user": row["user_id"], "messages": row["turns"]}) + "\n")
    out = tmp_path / "mine"
    command = [BIN / "rlhi", "run", log, "--out", out, "--model", "tiny", "--scorer", "judge:tiny", "--pairs", "4", "--max-new-tokens", "12", "--min-gap", "-1", "--epochs", "1", "--store", tmp_path / "s.sqlite"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["conversations"] == len(rows) and summary["users"] == 5
    pairs = read_table("pairs", out / "pairs.parquet")
    assert summary["pairs made"] == {m: sum(p["method"] == m for p in pairs) for m in summary["pairs made"]}
    assert {p["method"] for p in pairs} == {"UGR", "UBR"}
    assert (out / "adapter" / "adapter_model.safetensors").exists()
    talk = subprocess.run([BIN / "rlhi", "chat", "--model", "tiny", "--adapter", out / "adapter", "--message", "Hello", "--max-new-tokens", "5", "--store", tmp_path / "s.sqlite"], capture_output=True, text=True, check=False)
    assert talk.returncode == 0, talk.stderr[-2000:]
