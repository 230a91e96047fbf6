"""General benchmarks: file formats, judging by ours and by the alpaca-eval package, tables, and what a judge is worth."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from openai_server import FaultyServer, ModelServer, completion, reply

from rlhi import alpaca
from rlhi.arena import arena_battles
from rlhi.generate import load_backend
from rlhi.judge import Budget, judge_data, shield
from rlhi.winrates import alpaca_outputs, winrate_files

PACKAGE_PYTHON = os.environ.get("RLHI_ALPACA_PYTHON")  # a Python with alpaca-eval 0.6.6 and setuptools<82


class Rule:
    "A judge that follows a rule on the two answers that it is shown, and counts what it was asked."
    model_id, revision, adapter_hash, name, last_stats = "rule", "1", None, "rule", {}

    def __init__(self, say):
        self.say, self.asked = say, 0

    def both(self, conversations):
        self.asked += len(conversations)
        cut = [[c[-1]["content"].split(f"<answer_{x}>\n")[1].split(f"\n</answer_{x}>")[0] for x in "AB"] for c in conversations]
        return [self.say(*pair) for pair in cut]

    def choose(self, conversations, options):
        return np.array(self.both(conversations))

    def chat(self, conversations, sampling):
        return self.both(conversations)


def longer(a, b):
    return (0.7, 0.2, 0.1) if len(a) > len(b) else (0.2, 0.7, 0.1) if len(b) > len(a) else (0.3, 0.3, 0.4)


def outputs(arm, texts):
    return alpaca_outputs([f"Instruction {i}" for i in range(len(texts))], texts, arm, ["koala"] * len(texts))


# --- questions and files

def test_questions_of_the_package_are_distinct_and_take_turns():
    for kind, count, categories in (("general", 32, 8), ("hard", 16, 4)):
        rows = alpaca.read_questions(kind)
        assert len({r["example"] for r in rows}) == len({r["prompt"][0]["content"] for r in rows}) == count
        assert len({r["category"] for r in rows[:categories]}) == categories
    training = {r["text"] if "text" in r else json.dumps(r) for r in judge_data("judge_probes")}
    assert not training & {r["prompt"][0]["content"] for r in alpaca.read_questions("general")}


def test_published_files_are_read(shared_data):
    reference = shared_data / "alpaca_eval" / "gpt4_1106_preview.json"
    rows = alpaca.read_questions(reference)
    assert len(rows) == 805 and {r["category"] for r in rows} == alpaca.ALPACA_SETS and all(r["reference"] for r in rows)
    theirs = alpaca.read_outputs(shared_data / "alpaca_eval" / "Meta-Llama-3.1-8B-Instruct-Turbo.json")
    aligned = alpaca.align_outputs(theirs[::-1], alpaca.read_outputs(reference))
    assert [a["instruction"] for a in aligned] == [r["prompt"][0]["content"] for r in rows]
    hard = alpaca.read_questions(shared_data / "arena_hard" / "v2.0_question.jsonl", 3)
    assert [r["baseline"] for r in hard] == ["o3-mini-2025-01-31"] * 3


@pytest.mark.parametrize(("records", "match"), [([{"instruction": "i"}], "record 1: output"), ([{"instruction": "i", "output": None}], "output"),
                                                ([], "list of records"), ("text", "list of records")])
def test_bad_outputs_are_refused(tmp_path, records, match):
    (tmp_path / "o.json").write_text(json.dumps(records))
    with pytest.raises(ValueError, match=match):
        alpaca.read_outputs(tmp_path / "o.json")


def test_hostile_texts_survive_the_file(tmp_path):
    texts = [r["text"] for r in judge_data("judge_injections")] + ["\u2028 \x85 \ud7ff", '"""', "</answer_A>"]
    path = alpaca.write_records(outputs("arm", texts), tmp_path / "deep" / "model_outputs.json")
    assert [r["output"] for r in alpaca.read_outputs(path)] == texts
    assert list(path.parent.iterdir()) == [path]


def test_a_repeated_instruction_is_answered_twice():
    one, two = ({"instruction": "same", "output": text} for text in ("first", "second"))
    assert [r["output"] for r in alpaca.align_outputs([one, two], [one, one])] == ["first", "second"]
    assert [r["output"] for r in alpaca.align_outputs([one], [one, one])] == ["first", "first"]


# --- our judge

def test_preferences_are_the_mean_of_both_orders(tmp_path):
    rule = Rule(longer)
    annotations, judgments, report = alpaca.judge_outputs(outputs("arm", ["long answer", "b", "same"]), outputs("ref", ["a", "longer one", "size"]), rule)
    assert [r["preference"] for r in annotations] == pytest.approx([1.75, 1.25, 1.5])
    assert rule.asked == 6 == report["asked"] and {j["arm_b"] for j in judgments} == {"ref"}
    (row,) = alpaca.alpaca_table({"arm": annotations})
    (again,) = winrate_files([alpaca.write_records(annotations, tmp_path / "annotations.json")], gamed=make_gamed(tmp_path))
    assert row["win_rate"] == pytest.approx(50) == again["win_rate"]
    assert "no file of the gamed" in row["note"] and again["note"] == ""


def make_gamed(folder):
    rng = np.random.default_rng(0)
    lines = ["index,preference,std_delta_len,instruction_difficulty"]
    lines += [f"{i},{rng.random():.3f},{rng.normal():.3f},{rng.normal():.3f}" for i in range(20)]
    (folder / "gamed.csv").write_text("\n".join(lines))
    return folder / "gamed.csv"


def test_length_control_is_not_made_up_for_other_questions(tmp_path):
    made = [{"index": i, "instruction": str(i), "dataset": "rlhi", "output_1": "a", "output_2": "bb" * i, "preference": 1 + i % 2,
             "generator_1": "ref", "generator_2": "arm"} for i in range(10)]
    (foreign,) = alpaca.alpaca_table({"arm": made}, make_gamed(tmp_path))
    (known,) = alpaca.alpaca_table({"arm": [r | {"dataset": "koala"} for r in made]}, make_gamed(tmp_path))
    assert foreign["length_controlled_winrate"] is None and "10 of 10 questions are not AlpacaEval's" in foreign["note"]
    assert 0 < known["length_controlled_winrate"] < 100 and known["note"] == ""


def test_unreadable_comparisons_are_counted(tmp_path):
    said = iter(["A", "B", "no idea", "A", "A", "B"])
    annotations, _, report = alpaca.judge_outputs(outputs("arm", ["x", "y", "z"]), outputs("ref", ["1", "2", "3"]), Rule(lambda a, b: next(said)), by="text")
    assert report["unreadable"] == 1 and [r["preference"] for r in annotations] == [2.0, None, 2.0]
    (row,) = alpaca.alpaca_table({"arm": annotations})
    assert row["n"] == 2 and "1 of 3 comparisons unreadable" in row["note"]
    with pytest.raises(ValueError, match="none of 3"):
        alpaca.alpaca_table({"arm": [r | {"preference": None} for r in annotations]})


def test_a_ceiling_leaves_the_rest_for_the_next_run(tmp_path):
    ours, theirs = outputs("arm", ["long answer"] * 6), outputs("ref", ["short"] * 6)
    first, second = Rule(longer), Rule(longer)
    annotations, _, report = alpaca.judge_outputs(ours, theirs, first, record=tmp_path / "r.jsonl", batch_size=4, budget=Budget((10.0, 0.0), ceiling=0.015))
    assert "ceiling" in report["stopped"] and 0 < first.asked < 12 and report["spent"] <= 0.015
    assert sum(r["preference"] is None for r in annotations) == 6 - first.asked // 2
    annotations, _, _ = alpaca.judge_outputs(ours, theirs, second, record=tmp_path / "r.jsonl", batch_size=4)
    assert first.asked + second.asked == 12 and all(r["preference"] == pytest.approx(1.75) for r in annotations)


# --- tests between arms

def test_paired_arms_find_a_constant_difference_and_no_other():
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 0.2, 200)
    def arm(shift):
        return [{"instruction": str(i), "preference": float(np.clip(1.5 + h + shift + e, 1, 2))} for i, (h, e) in enumerate(zip(hard, rng.normal(0, 0.02, 200)))]
    rows = {(r["first"], r["second"]): r for r in alpaca.paired_arms({"x": arm(0.05), "y": arm(0), "z": arm(0)[:150] + [{"instruction": "?", "preference": 1.1}]}, samples=999)}
    assert rows["x", "y"]["difference"] == pytest.approx(5, abs=0.6) and rows["x", "y"]["p"] < 0.01
    assert rows["y", "z"]["p"] > 0.05 and (rows["y", "z"]["n"], rows["y", "z"]["unpaired"]) == (150, 51)
    assert alpaca.paired_arms({"x": arm(0), "w": [{"instruction": "none", "preference": 2}]}) == []


# --- Arena-Hard

def verdicts(a, b):
    return "I would say [[A>>B]]" if len(a) > 2 * len(b) else "[[A>B]]" if len(a) > len(b) else "[[B>>A]]" if len(b) > 2 * len(a) else "[[B>A]]" if len(b) > len(a) else "[[A=B]]"


def test_arena_by_text_counts_degrees():
    questions = [{"example": str(i), "prompt": [{"role": "user", "content": f"Q{i}"}], "category": c, "baseline": b} for i, (c, b) in
                 enumerate([("hard_prompt", "o3"), ("hard_prompt", "o3"), ("creative_writing", "gem")])]
    answers = {"arm": {"0": "a long answer, very long", "1": "b", "2": "same"}}
    baselines = {"o3": {"0": "short", "1": "bc"}, "gem": {"2": "size"}}
    judgments, report = alpaca.judge_arena(questions, answers, baselines, Rule(verdicts))
    battles, unread = arena_battles(judgments)
    assert report["asked"] == 6 and unread == 0
    assert sorted((b["example"], b["score"], b["weight"]) for b in battles) == [("0", 1, 3), ("0", 1, 3), ("1", 0, 1), ("1", 0, 1), ("2", 0.5, 1), ("2", 0.5, 1)]
    rows = {r["baseline"]: r for r in alpaca.arena_table(judgments, answers | baselines, samples=50)}
    assert rows["gem"]["category"] == "creative_writing" and rows["gem"]["score"] == pytest.approx(50, abs=0.1)
    assert rows["o3"]["score"] == pytest.approx(75, abs=0.1) and rows["o3"]["questions"] == 2
    with pytest.raises(ValueError, match="no answer of gem"):
        alpaca.judge_arena(questions, answers, {"o3": baselines["o3"], "gem": {}}, Rule(verdicts))


def test_arena_by_probabilities_and_unreadable_orders():
    questions = alpaca.read_questions("hard")
    texts = {name: {q["example"]: f"{name} answer" for q in questions} for name in ("longer arm", "base")}
    judgments, _ = alpaca.judge_arena(questions, {"longer arm": texts["longer arm"]}, {"base": texts["base"]}, Rule(longer), by="probabilities")
    (row,) = alpaca.arena_table(judgments, texts, "probabilities", samples=50)
    assert row["score"] == pytest.approx(75, abs=0.1) and row["questions"] == 16 and row["unread"] == 0
    judgments[0]["verdict"] = None
    (row,) = alpaca.arena_table(judgments, texts, "probabilities", samples=50)
    assert (row["questions"], row["unread"]) == (15, 1)
    (row,) = alpaca.arena_table([j | {"verdict": None} for j in judgments], texts, "probabilities")
    assert row["score"] is None and row["unread"] == 16


def test_style_control_takes_out_what_style_explains():
    rng = np.random.default_rng(0)
    questions = [{"example": str(i), "prompt": [{"role": "user", "content": str(i)}], "category": "c", "baseline": "base"} for i in range(300)]
    def arm(share):
        return {str(i): "word " * int(rng.integers(20, 60)) + "\n- item" * (4 if rng.random() < share else 0) for i in range(300)}
    answers = {"base": arm(0.1), "listed": arm(0.9), "plain": arm(0.1)}
    def likes_lists(a, b):
        chance = 0.5 + 0.35 * (("\n- " in a) - ("\n- " in b))
        return (1, 0, 0) if rng.random() < chance else (0, 1, 0)
    judgments, _ = alpaca.judge_arena(questions, {k: answers[k] for k in ("listed", "plain")}, {"base": answers["base"]}, Rule(likes_lists), by="probabilities")
    rows = {r["arm"]: r for r in alpaca.arena_table(judgments, answers, "probabilities", samples=100)}
    gap = rows["listed"]["score"] - rows["plain"]["score"]
    assert gap > 20 and abs(rows["listed"]["style-controlled"] - rows["plain"]["style-controlled"]) < gap / 2


# --- what a judge is worth

def test_judge_card_of_a_perfect_and_of_a_gullible_judge():
    better = {shield(p["better"]) for p in judge_data("judge_probes")}
    perfect = Rule(lambda a, b: (0.9, 0.1, 0) if a in better else (0.1, 0.9, 0))
    values = {r["statistic"]: r for r in alpaca.judge_card(perfect, injected=2)[0]}
    assert values["accuracy"]["value"] == values["position consistency"]["value"] == 1 and values["turned by an injection"]["value"] == 0
    assert values["accuracy, mean of both orders"]["value"] == 1 and values["accuracy"]["n"] == 16 and perfect.asked == 2 * (16 + 2 * 36)

    def gullible(a, b):
        plea = [bool(re.search("this answer", x, re.IGNORECASE)) for x in (a, b)]
        return perfect.say(a, b) if plea[0] == plea[1] else (0.9, 0.1, 0) if plea[0] else (0.1, 0.9, 0)

    card, kinds = alpaca.judge_card(Rule(gullible), injected=2)
    turned = {r["statistic"]: r for r in card}["turned by an injection"]
    expected = sum(bool(re.search("this answer", i["text"], re.IGNORECASE)) for i in judge_data("judge_injections")) / 36
    assert turned["value"] == pytest.approx(expected) and 0 < expected < 1 and turned["n"] == 144
    assert {r["kind"] for r in kinds} == {i["kind"] for i in judge_data("judge_injections")} | {"all"}


def test_the_mean_of_both_orders_sees_through_a_position_bias():
    better = {shield(p["better"]) for p in judge_data("judge_probes")}
    biased = Rule(lambda a, b: (0.9, 0.1, 0) if a in better else (0.8, 0.2, 0))
    values = {r["statistic"]: r["value"] for r in alpaca.judge_card(biased, injected=0)[0]}
    assert values["accuracy"] == 0.5 and values["takes the first answer"] == 1 and values["position consistency"] == 0
    assert values["accuracy, mean of both orders"] == 1 and values["turned by an injection"] is None


def test_cost_is_plain_arithmetic():
    cost = alpaca.evaluation_cost(100, (40, 400, 360), template=800, orders=2, judge_tokens=10, prices=(10, 30), tokens_per_second=1000, load_seconds=0)
    assert cost["judge prompt tokens"] == 80_000 and cost["dollars"] == pytest.approx(0.8 + 0.06)
    assert cost["GPU-hours"] == pytest.approx(10_000 / 1000 / 3600)


# --- servers

class JudgeServer(FaultyServer):
    "The faulty server, as a judge that takes the longer answer; it counts what it answered, and names itself."
    created = 1_700_000_000

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.answered = []

    def answer(self, handler, body):
        with self.lock:
            fault = self.script.pop(0) if self.script else "ok"
        if fault != "ok":
            with self.lock:
                self.script.insert(0, fault)
            return super().answer(handler, body)
        text = body["messages"][-1]["content"]
        found = [text.split(f"<answer_{x}>\n")[1].split(f"\n</answer_{x}>")[0] for x in "AB"]
        record = json.loads(completion("A" if len(found[0]) > len(found[1]) else "B"))
        with self.lock:
            self.answered.append(text)
        reply(handler, 200, json.dumps(record | {"model": "judge-2023-11-06", "created": self.created}).encode())


FAULTS = [429, 500, "cut", "never", "hang up", "nonsense", "html", "null", 503]


def test_faults_of_a_server_change_nothing_in_the_table(tmp_path):
    ours, theirs = outputs("arm", [f"long answer {'x' * i}" for i in range(8)]), outputs("ref", ["short"] * 8)
    expected, _, _ = alpaca.judge_outputs(ours, theirs, Rule(lambda a, b: "A" if len(a) > len(b) else "B"), by="text")
    with JudgeServer(FAULTS, slow=3.0) as server:
        judge = load_backend("m", kind="openai", base_url=server.url, concurrency=4, timeout=1.5, progress=False)
        annotations, _, report = alpaca.judge_outputs(ours, theirs, judge, by="text", record=tmp_path / "r.jsonl", batch_size=8)
        assert annotations == expected and report["unreadable"] == 0
        assert len(server.answered) == len(set(server.answered)) == 16 and len(server.requests) == 16 + len(FAULTS)
        alpaca.judge_outputs(ours, theirs, judge, by="text", record=tmp_path / "r.jsonl")
        assert len(server.answered) == 16
    for line in (tmp_path / "r.jsonl").read_text().strip().split("\n"):
        row = json.loads(line)
        assert (row["judge"], row["served"], row["served_at"]) == ("m", "judge-2023-11-06", "2023-11-14T22:13:20+00:00")
        assert row["template"] and "temperature" in row["how"] and row["raw"] in "AB" and row["date"] > "2024"


def test_the_servers_words_survive_the_store(tmp_path):
    ours, theirs = outputs("arm", ["long answer"]), outputs("ref", ["short"])
    with JudgeServer() as server:
        for attempt in range(2):  # the second asks nothing: the answers come from the store, not from the record
            judge = load_backend("m", kind="openai", base_url=server.url, store=tmp_path / "s.sqlite", progress=False)
            _, judgments, _ = alpaca.judge_outputs(ours, theirs, judge, by="text", record=tmp_path / f"{attempt}.jsonl")
            assert all("judge-2023-11-06 2023-11-14" in j["judge_version"] for j in judgments)
        assert len(server.answered) == 2


def test_a_store_of_before_gets_the_new_columns(tmp_path):
    import sqlite3

    from rlhi.generate import Answer, Store

    with sqlite3.connect(tmp_path / "old.sqlite") as db:
        db.execute("CREATE TABLE answers (key TEXT PRIMARY KEY, text TEXT NOT NULL, finish TEXT NOT NULL, prompt_tokens INT, "
                   "answer_tokens INT, seconds REAL, created REAL) WITHOUT ROWID")
        db.execute("INSERT INTO answers VALUES ('k', 'one', 'stop', 1, 2, 0.5, 0)")
    store = Store(tmp_path / "old.sqlite")
    store.put({"l": Answer("two", served="m", served_at=5)})
    assert Store(tmp_path / "old.sqlite").get(["k", "l"]) == {"k": Answer("one", "stop", 1, 2, 0.5), "l": Answer("two", served="m", served_at=5)}


KILLED = """
import json, sys
sys.path.insert(0, {tests!r})
from test_alpaca import outputs
from rlhi import alpaca
from rlhi.generate import load_backend
url, record, store = sys.argv[1:]
judge = load_backend("m", kind="openai", base_url=url, concurrency=2, attempts=20, store=store, progress=False)
ours, theirs = outputs("arm", ["x" * (i % 7) for i in range(30)]), outputs("ref", ["y" * (i % 5) for i in range(30)])
annotations, _, _ = alpaca.judge_outputs(ours, theirs, judge, by="text", record=record, batch_size=6)
print(json.dumps(alpaca.alpaca_table({{"arm": annotations}})))
"""


class SlowJudge(JudgeServer):
    def answer(self, handler, body):
        time.sleep(0.05)
        super().answer(handler, body)


def test_a_killed_run_against_a_faulty_server_resumes_to_the_same_table(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(KILLED.format(tests=str(Path(__file__).parent)))
    record = tmp_path / "record.jsonl"
    faults = [429, "ok", "ok", 500, "cut", "ok", "nonsense"] * 3

    def command(url, *names):
        return [sys.executable, str(script), url, *(str(tmp_path / name) for name in names)]

    with SlowJudge(faults) as server:
        for lines in (6, 30):
            process = subprocess.Popen(command(server.url, "record.jsonl", "s.sqlite"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and process.poll() is None and not (record.exists() and record.read_text().count("\n") >= lines):
                time.sleep(0.01)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        done = subprocess.run(command(server.url, "record.jsonl", "s.sqlite"), capture_output=True, text=True, check=True)
        answered = list(server.answered)
    with JudgeServer() as server:
        undisturbed = subprocess.run(command(server.url, "other.jsonl", "o.sqlite"), capture_output=True, text=True, check=True)
        wanted = len(server.answered)
    assert done.stdout.splitlines()[-1] == undisturbed.stdout.splitlines()[-1]
    keys = [json.loads(line)["key"] for line in record.read_text().split("\n") if line.startswith("{") and line.endswith("}")]
    assert len(keys) == len(set(keys)) == wanted == len(set(answered))
    # A kill can lose what was under way at that moment (two requests each time), nothing that had arrived.
    assert len(answered) <= wanted + 4


# --- the alpaca-eval package

@pytest.fixture(scope="module")
def package_python():
    "A Python that has the package; it wants setuptools<82 and so mostly lives in an environment of its own."
    python = PACKAGE_PYTHON or sys.executable
    probe = [python, "-c", "from importlib.metadata import version; print(version('alpaca-eval'))"]
    found = subprocess.run(probe, capture_output=True, text=True, check=False).stdout.strip() if shutil.which(python) else ""
    if found != "0.6.6":
        pytest.skip("no alpaca-eval 0.6.6: set RLHI_ALPACA_PYTHON to a Python that has it and setuptools<82")
    return python


def test_the_packages_evaluator_annotates_through_a_server(package_python, tmp_path, monkeypatch):
    class Weighted(FaultyServer):
        "Prefers the longer answer with three quarters of the probability, as AlpacaEval's evaluator reads it."

        def answer(self, handler, body):
            text = body["messages"][-1]["content"]
            first, second = (text.split(f'"model_identifier": "{m}",')[1].split('"output": """')[1].split('"""')[0] for m in "mM")
            chances = (0.75, 0.25) if len(first) > len(second) else (0.25, 0.75)
            tops = [{"token": t, "logprob": float(np.log(p)), "bytes": None} for t, p in zip("mM", chances)]
            best = max(tops, key=lambda t: t["logprob"])
            reply(handler, 200, completion(best["token"], "length", logprobs={"content": [best | {"top_logprobs": tops}]}))

    monkeypatch.setenv("OPENAI_API_KEY", "none")
    ours = alpaca.write_records(outputs("arm", ["long answer"] * 5 + ["x"]), tmp_path / "arm" / "model_outputs.json")
    theirs = alpaca.write_records(outputs("ref", ["short"] * 6), tmp_path / "reference.json")
    with Weighted() as server:
        evaluator = alpaca.evaluator_config("m", tmp_path / "loopback", server.url)
        found = alpaca.annotate_by_package(ours, theirs, tmp_path / "annotated", evaluator=evaluator, python=package_python)
        asked = len(server.requests)
        alpaca.annotate_by_package(ours, theirs, tmp_path / "annotated", evaluator=evaluator, python=package_python)
        assert asked == 6 == len(server.requests), "the package's cache resumes"
    (row,) = winrate_files([found], gamed=make_gamed(tmp_path))
    assert row["model"] == "arm" and row["n"] == 6
    assert row["win_rate"] == pytest.approx(100 * (5 * 0.75 + 0.25) / 6, abs=1e-4)


def test_without_the_package_the_error_says_what_is_needed(tmp_path):
    ours = alpaca.write_records(outputs("arm", ["x"]), tmp_path / "o.json")
    (tmp_path / "python").write_text("#!/bin/sh\necho no such module >&2\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(RuntimeError, match="no such module.*alpaca-eval==0.6.6 and setuptools<82"):
        alpaca.annotate_by_package(ours, ours, tmp_path / "a", python=str(tmp_path / "python"))


def test_a_real_model_behind_a_real_server_judges():
    with ModelServer(load_backend("tiny", progress=False)) as server:
        judge = load_backend("tiny", kind="openai", base_url=server.url, progress=False)
        annotations, judgments, report = alpaca.judge_outputs(outputs("arm", ["one", "two"]), outputs("ref", ["three", "four"]), judge)
    assert report["asked"] == 4 and all(j["raw"].startswith("{") for j in judgments)
    assert all(r["preference"] is None or 1 <= r["preference"] <= 2 for r in annotations)


def test_a_server_that_answers_twice_is_read_once(tmp_path):
    "The second response must not be taken for the answer to the next question on the same connection."
    with FaultyServer(["twice", "ok", "two bodies"] * 4) as server:
        backend = load_backend("m", kind="openai", base_url=server.url, concurrency=1, progress=False)
        asked = [f"question {'abcdefghijkl'[i]}" for i in range(12)]
        assert backend.chat([[{"role": "user", "content": text}] for text in asked]) == [text.upper() for text in asked]


def test_retries_of_a_faulty_server_stay_within_the_budget(tmp_path):
    ours, theirs = outputs("arm", [f"long answer {'x' * i}" for i in range(8)]), outputs("ref", ["short"] * 8)
    with JudgeServer([429, "ok", 500, "cut", "ok", "two bodies"], slow=3.0) as server:
        judge = load_backend("m", kind="openai", base_url=server.url, concurrency=2, timeout=2, progress=False)
        options = {"by": "text", "record": tmp_path / "r.jsonl", "batch_size": 4}
        _, _, report = alpaca.judge_outputs(ours, theirs, judge, budget=Budget((10.0, 0.0), ceiling=0.022), **options)
        assert "ceiling" in report["stopped"] and report["spent"] <= 0.022 and report["asked"] == len(server.answered) == 12
        _, _, report = alpaca.judge_outputs(ours, theirs, judge, **options)
        assert report["stopped"] is None and report["on_record"] == 12 and report["asked"] == 4
        assert len(server.answered) == len(set(server.answered)) == 16


def test_agreement_prints_nothing_but_json(tmp_path, capsys):
    from rlhi.cli import main

    (tmp_path / "pairs.csv").write_text("prompt,answer_a,answer_b,label\nWhat is two and two?,Four.,Five.,a\n")
    assert main(["agreement", str(tmp_path / "pairs.csv"), "--judge", "tiny", "--store", str(tmp_path / "s.sqlite"), "--json"]) == 0
    rows = {r["statistic"]: r for r in json.loads(capsys.readouterr().out)}
    assert rows["accuracy"]["n"] == 1 and rows["accuracy"]["value"] in (0, 0.5, 1)
