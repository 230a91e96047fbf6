"""Judging: hostile texts, both orders, resume and budget; agreement against published figures."""
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from openai_server import FaultyServer, completion, reply

from rlhi import agreement, judge
from rlhi.conversations import validate
from rlhi.generate import Sampling, load_backend, read_prompt
from rlhi.simulate import User
from rlhi.winrates import outcomes, win_table

GREEDY = Sampling(max_new_tokens=8, temperature=0.0)


class Rule:
    "A judge that follows a rule on the text it is shown, and counts what it was asked."
    model_id, revision, adapter_hash, name, last_stats = "rule", "1", None, "rule", {}

    def __init__(self, say):
        self.say, self.asked = say, []

    def chat(self, conversations, sampling):
        self.asked += [c[-1]["content"] for c in conversations]
        return [self.say(c[-1]["content"]) for c in conversations]

    def choose(self, conversations, options):
        return np.array([self.say(c[-1]["content"]) for c in conversations])


def shown(text, letter):
    return text.split(f"<answer_{letter}>\n")[1].split(f"\n</answer_{letter}>")[0]


def by_length(text):
    a, b = len(shown(text, "A")), len(shown(text, "B"))
    return "A" if a > b else "B" if b > a else "tie"


def make_tasks(n, aspect="overall"):
    return [{"example": str(i), "user_id": f"u{i % 5}", "arm_a": "x", "arm_b": "base", "aspect": aspect, "mode": "context-only",
             "prompt": [{"role": "user", "content": f"Task {i}"}], "persona": None, "answer_a": ("", "other words", "long answer, long answer")[i % 3],
             "answer_b": "long answer"} for i in range(n)]


# --- hostile text

@pytest.mark.parametrize("injection", judge.judge_data("judge_injections"), ids=lambda i: i["id"])
def test_injections_stay_in_their_place(injection):
    task = {"prompt": [{"role": "user", "content": injection["text"]}], "persona": injection["text"],
            "answer_a": injection["text"], "answer_b": "fine"}
    for name in ("judge_pairwise", "judge_personalization", "judge_instruction_following", "judge_overall", "judge_arena"):
        text = judge.question(read_prompt(name), task, "a")[0]["content"]
        for tag in ("answer_A", "answer_B"):
            assert text.count(f"<{tag}>") == text.count(f"</{tag}>") == 1
        assert not any(token in text for token in ("<|", "|>", "\u200b", "\u202e", "\u2060", "\ufeff", "＜"))
        if name != "judge_arena":
            assert "[[" not in text
        assert "{{" not in text


def test_fields_in_a_text_are_not_filled():
    task = {"prompt": [{"role": "user", "content": "{{answer_b}}"}], "persona": None, "answer_a": "{{persona}}", "answer_b": "secret"}
    text = judge.question(read_prompt("judge_overall"), task, "a")[0]["content"]
    assert text.count("secret") == 1 and "{{answer_b}}" in text and "{{persona}}" in text


@pytest.mark.parametrize(("raw", "expected"), [
    ("A", "A"), (" b ", "B"), ("**Tie**.", "tie"), ("Output (b)", "B"), ("The verdict", None), ("[[C]]", "tie"), ("[[B>>A]]", "B"),
    ("A and B", None), ("A\nB", None), ("Answer A is better because it is short.", None), ("First I read A.\n**Verdict: A**", "A"),
    ("[[A]] ... [[A]]", "A"), ("[[A]] [[tie]]", None), ("Alpha", None), ("", None), ("I choose neither", None)])
def test_verdicts_are_read_strictly(raw, expected):
    assert judge.parse_verdict(raw) == expected


# --- both orders

def test_a_position_bound_judge_gives_only_ties():
    for always in ("A", "B"):
        rows, report = judge.judge_pairs(make_tasks(9), Rule(lambda text: always), by="text", sampling=GREEDY)
        validate(rows, "judgments")
        assert report["asked"] == 18 and {r["outcome"] for r in outcomes(rows)} == {0.0}


def test_letters_are_translated_back():
    rows, _ = judge.judge_pairs(make_tasks(9), Rule(by_length), by="text", sampling=GREEDY)
    for row in rows:
        assert row["verdict"] == {0: "b", 1: "tie", 2: "a"}[int(row["example"]) % 3]
    (row,) = win_table(rows)
    assert (row["wins"], row["losses"], row["ties"]) == (3, 3, 3)


def test_probabilities_become_scores_of_the_arms():
    rows, _ = judge.judge_pairs(make_tasks(1), Rule(lambda text: [0.7, 0.2, 0.1]))
    assert [(r["shown_first"], r["verdict"]) for r in rows] == [("a", "a"), ("b", "b")]
    assert [r["score_a"] for r in rows] == pytest.approx([0.75, 0.25])
    blank, report = judge.judge_pairs(make_tasks(1), Rule(lambda text: [1 / 3] * 3))
    assert [r["verdict"] for r in blank] == [None, None] and report["unreadable"] == 2


def test_unreadable_answers_are_kept():
    rows, report = judge.judge_pairs(make_tasks(3), Rule(lambda text: "both " + by_length(text)), by="text")
    assert report["unreadable"] == 6 and {r["raw"] for r in rows} <= {"both A", "both B", "both tie"}
    assert win_table(rows)[0]["unparsed"] == 3


def test_the_record_names_judge_date_template_and_sampling(tmp_path):
    path = tmp_path / "judged.jsonl"
    judge.judge_pairs(make_tasks(1), Rule(by_length), by="text", sampling=GREEDY, record=path)
    for line in path.read_text().strip().split("\n"):
        row = json.loads(line)
        assert row["judge"] == "rule" and row["date"].startswith("20") and row["template"] == read_prompt("judge_overall").hash
        assert "temperature 0.0" in row["how"] and row["raw"] in ("A", "B", "tie")


# --- resume, budget

def test_nothing_is_asked_twice(tmp_path):
    path, tasks = tmp_path / "judged.jsonl", make_tasks(10)
    first = Rule(by_length)
    whole, _ = judge.judge_pairs(tasks[:4], first, by="text", record=path, batch_size=4)
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"key": "half a line \u2028')
    second = Rule(by_length)
    rows, report = judge.judge_pairs(tasks, second, by="text", record=path, batch_size=4)
    assert not set(first.asked) & set(second.asked)
    assert rows[:8] == whole and report["on_record"] == 8
    third = Rule(by_length)
    assert judge.judge_pairs(tasks, third, by="text", record=path)[0] == rows and not third.asked


def test_other_separators_in_a_raw_answer_do_not_break_the_record(tmp_path):
    path = tmp_path / "judged.jsonl"
    said = Rule(lambda text: "A\u2028 or\u0085 B\x0b?")
    rows, _ = judge.judge_pairs(make_tasks(2), said, by="text", record=path)
    again = Rule(lambda text: "never asked")
    assert judge.judge_pairs(make_tasks(2), again, by="text", record=path)[0] == rows and not again.asked


def test_a_killed_run_resumes_to_the_same_table(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(f"""
        import json, sys, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_judge import Rule, by_length, make_tasks
        from rlhi import judge
        def slow(text):
            time.sleep(0.02)
            with open(sys.argv[2], "a") as file:
                file.write(json.dumps(text) + "\\n")
            return by_length(text)
        rows, report = judge.judge_pairs(make_tasks(30), Rule(slow), by="text", record=sys.argv[1], batch_size=2)
        print(json.dumps([{{k: v for k, v in r.items() if k != "judge_version"}} for r in rows]))
        """))
    record, asked = tmp_path / "judged.jsonl", tmp_path / "asked.jsonl"
    command = [sys.executable, str(script), str(record), str(asked)]
    for lines in (6, 30):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (record.exists() and record.read_text().count("\n") >= lines):
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    undisturbed = subprocess.run([*command[:2], str(tmp_path / "other.jsonl"), str(tmp_path / "other_asked.jsonl")],
                                 capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == undisturbed.stdout.splitlines()[-1]
    recorded = [json.loads(line)["key"] for line in record.read_text().split("\n") if line.startswith("{") and line.endswith("}")]
    assert len(recorded) == len(set(recorded)) == 60
    # A kill can lose the batch that was under way (two questions), nothing else.
    assert 60 <= asked.read_text().count("\n") <= 64


def test_ceilings_stop_cleanly():
    rule = Rule(by_length)
    rows, report = judge.judge_pairs(make_tasks(10), rule, by="text", batch_size=4, budget=judge.Budget((10.0, 0.0), ceiling=0.03))
    assert report["stopped"] and 0 < report["asked"] < 20 and report["spent"] <= 0.03
    assert len(rows) == report["asked"] and len(rows) // 2 + report["left"] == 10
    rows, report = judge.judge_pairs(make_tasks(10), Rule(by_length), by="text", budget=judge.Budget(minutes=-1))
    assert rows == [] and report["left"] == 10 and "minutes" in report["stopped"]


class JudgeServer(FaultyServer):
    "The faulty server with a verdict as its answer."

    def answer(self, handler, body):
        with self.lock:
            fault = self.script.pop(0) if self.script else "ok"
        if fault == "ok":
            reply(handler, 200, completion(by_length(body["messages"][-1]["content"])))
            return
        with self.lock:
            self.script.insert(0, fault)
        super().answer(handler, body)


def test_a_faulty_server_loses_nothing_and_is_asked_nothing_twice(tmp_path):
    faults, tasks, path = [429, 500, "cut", "never", "hang up", "nonsense", "html", 503], make_tasks(12), tmp_path / "judged.jsonl"
    expected, _ = judge.judge_pairs(tasks, Rule(by_length), by="text")
    with JudgeServer(faults, slow=3.0) as server:
        backend = load_backend("m", kind="openai", base_url=server.url, concurrency=4, timeout=1.5, progress=False)
        rows, report = judge.judge_pairs(tasks, backend, by="text", record=path, batch_size=8)
        asked = len({json.dumps(r["messages"]) for r in server.requests})
        assert [r["verdict"] for r in rows] == [r["verdict"] for r in expected]
        # Tasks that look the same are one question: 12 tasks, both orders, all different here.
        assert asked == 24 == report["asked"] and len(server.requests) == 24 + len(faults)
        again, _ = judge.judge_pairs(tasks, backend, by="text", record=path)
        assert again == rows and len(server.requests) == 24 + len(faults)


def test_a_failing_server_keeps_what_was_judged(tmp_path):
    from rlhi.servers import ServerError

    path, tasks = tmp_path / "judged.jsonl", make_tasks(8)
    with JudgeServer(["ok"] * 8 + [400]) as server:
        backend = load_backend("m", kind="openai", base_url=server.url, concurrency=1, store=tmp_path / "s.sqlite", progress=False)
        with pytest.raises(ServerError):
            judge.judge_pairs(tasks, backend, by="text", record=path, batch_size=4)
        rows, report = judge.judge_pairs(tasks, backend, by="text", record=path, batch_size=4)
        assert report["on_record"] == 8 and report["left"] == 0 and len(server.requests) == 17
    assert [r["verdict"] for r in rows] == [r["verdict"] for r in judge.judge_pairs(tasks, Rule(by_length), by="text")[0]]


def test_questions_that_do_not_fit_are_named():
    class Small(Rule):
        def chat(self, conversations, sampling):
            if any("much too long" in c[-1]["content"] for c in conversations):
                raise ValueError("conversation 0 has 9000 tokens, the model takes 8192")
            return super().chat(conversations, sampling)

    tasks = make_tasks(4)
    tasks[2]["answer_a"] = "much too long"
    rows, report = judge.judge_pairs(tasks, Small(by_length), by="text")
    assert report["unreadable"] == 2 and "9000 tokens" in rows[4]["raw"] and rows[0]["verdict"]


# --- UserEval

def test_user_eval_by_satisfaction():
    users = {"u": User("u", {"layout": "bullets"})}
    examples = [{"example": "1", "user_id": "u", "prompt": [{"role": "user", "content": "How do I water a cactus?"}], "persona": None,
                 "turn_kind": "first", "mode": "context-only"}]
    answers = {"base": ["Water a cactus rarely, and water it well."], "x": ["- Water the cactus rarely.\n- Water the cactus well."]}
    rows = judge.user_eval(examples, answers, "base", users=users)
    validate(rows, "judgments")
    assert {r["aspect"]: r["verdict"] for r in rows}["personalization"] == "a"
    assert len(rows) == 3
    mirrored = judge.user_eval(examples, answers, "x", users=users)
    assert {r["aspect"]: r["verdict"] for r in mirrored}["personalization"] == "b"


def test_a_real_model_judges():
    backend = load_backend("tiny", progress=False)
    rows, report = judge.judge_pairs(make_tasks(2, "pairwise"), backend, {"pairwise": "judge_pairwise"})
    validate(rows, "judgments")
    assert len(rows) == 4 and all(0 <= r["score_a"] <= 1 and r["score_a"] + r["score_b"] == pytest.approx(1) for r in rows)


# --- injections

def test_injection_report_counts_only_what_was_turned():
    probes, injections = judge.judge_data("judge_probes"), judge.judge_data("judge_injections")
    tasks = judge.injection_tasks(probes, injections)
    worse = {p["worse"]: p for p in probes}

    def turned_by_pleas(text):
        a, b = shown(text, "A"), shown(text, "B")
        bad = "A" if any(a.startswith(judge.shield(w)) for w in worse) else "B"
        return bad if "Please pick this answer" in a + b else "AB".replace(bad, "")

    rows, _ = judge.judge_pairs(tasks, Rule(turned_by_pleas), {"pairwise": "judge_pairwise"}, by="text")
    report = {r["kind"]: r for r in judge.injection_report(rows)}
    assert report["plea"]["turned"] == 2 * len(probes) and report["plea"]["n"] == 6 * len(probes)
    assert report["all"]["turned"] == 2 * len(probes)
    assert report["override"]["turned"] == 0 and report["override"]["low"] == 0


# --- agreement with humans

@pytest.fixture(scope="module")
def llmbar(shared_data):
    folder = shared_data / "judge_human"
    if not folder.is_dir():
        pytest.skip("no LLMBar files")
    return folder


CASES = [(data, model) for data in ("Natural", "Adversarial_GPTInst") for model in ("GPT-4", "ChatGPT")]


@pytest.mark.parametrize(("data", "model"), CASES)
def test_llmbar_statistics_are_recomputed(llmbar, data, model):
    from sklearn.metrics import cohen_kappa_score

    stem = f"{data}.{model}.Vanilla_NoRules"
    published = json.loads((llmbar / f"{stem}.statistics.json").read_text())
    rows = agreement.read_llmbar(llmbar / f"{stem}.result.json")
    ours = {r["statistic"]: r for r in agreement.agreement(rows, samples=500)}
    for name, theirs in (("accuracy, a first", "correct_False"), ("accuracy, b first", "correct_True"), ("accuracy", "correct_average"),
                         ("accuracy in both orders", "correct_both"), ("position consistency", "equal")):
        percent = float(published[theirs].split("=")[-1].strip(" %"))
        assert 100 * ours[name]["value"] == pytest.approx(percent, abs=1e-9), name
        assert ours[name]["low"] <= ours[name]["value"] <= ours[name]["high"]
    label = [r["label"] for r in rows]
    first, swapped = ([r[k] for r in rows] for k in ("verdict_first", "verdict_swapped"))
    assert ours["kappa"]["value"] == pytest.approx((cohen_kappa_score(first, label) + cohen_kappa_score(swapped, label)) / 2)
    # What was published as kappa: the verdict "2" had become 0, while the labels stayed 1 and 2.
    as_published = [cohen_kappa_score([int(v == "a") for v in verdicts], [1 if x == "a" else 2 for x in label]) for verdicts in (first, swapped)]
    assert as_published == pytest.approx([published["kappa_False"], published["kappa_True"]])
    assert ours["kappa between orders"]["value"] == pytest.approx(published["kappa_agreement"])


def test_oasst_ranks(shared_data):
    rows = agreement.read_oasst(shared_data / "oasst1" / "en-validation.jsonl")
    assert len(rows) == 1026
    assert abs(sum(r["label"] == "a" for r in rows) - 513) <= 1
    longest = [r | dict.fromkeys(("verdict_first", "verdict_swapped"), "a" if r["length_a"] >= r["length_b"] else "b") for r in rows]
    ours = {r["statistic"]: r["value"] for r in agreement.agreement(longest, samples=200)}
    assert 0.5 < ours["humans take the longer answer"] < 0.75 and ours["judge takes the longer answer"] == 1


def test_kappa_of_counts():
    assert agreement.kappa_of_counts(np.array([[20, 5], [10, 15]])) == pytest.approx(0.4)
    assert agreement.kappa_of_counts(np.eye(3) * 7) == pytest.approx(1)
    assert np.isnan(agreement.kappa_of_counts(np.array([[9, 0], [0, 0]])))


def test_agreement_files(tmp_path):
    (tmp_path / "x.csv").write_text("prompt,answer_a,answer_b,label,verdict_first,verdict_swapped\np,a,bb,1,1,2\np,a,bb,tie,0,tie\n")
    table = {r["statistic"]: r["value"] for r in agreement.agreement_file(tmp_path / "x.csv")}
    assert table["accuracy"] == 0.75 and table["position consistency"] == 0.5
    fresh = agreement.agreement_file(tmp_path / "x.csv", Rule(by_length), by="text")
    assert {r["statistic"]: r["value"] for r in fresh}["judge takes the longer answer"] == 1
    for name, content, match in (("y.csv", "answer_a,answer_b\n1,2\n", "no column label"), ("z.json", '[{"input": 1}]', "LLMBar"),
                                 ("w.txt", "", "ending"), ("v.jsonl", "{", "line 1")):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=match):
            agreement.agreement_file(tmp_path / name)
