"""Step feedback and the harness: files as published, our YAML tasks and lm-eval's own, offline, and figures by hand."""
import csv
import json
import math

import pytest

from rlhi import reasoning, steps
from rlhi.answers import extract_gsm8k
from rlhi.conversations import validate


class Answering:
    """A backend whose answers come from a function: the harness is real, and so are the prompts that it sends."""
    model_id = "answering"

    def __init__(self, answer):
        self.answer, self.seen = answer, []

    def chat(self, conversations, sampling):
        self.seen += [(messages, sampling) for messages in conversations]
        return [self.answer(messages[-1]["content"]) for messages in conversations]

    def logprobs(self, conversations, answers):
        return [-float(len(answer)) for answer in answers]


def test_made_problems_are_right_where_they_say_so():
    for i in range(300):
        right = steps.read_steps(steps.make_problem(i, "train", False))
        wrong = steps.read_steps(steps.make_problem(i, "train", True))
        assert right["first_wrong"] is None and extract_gsm8k(right["whole"][-1]).answer == right["gold"]
        for j, text in enumerate(right["steps"][:-1]):
            sum_, result = text.rstrip(".").rsplit(": ", 1)[1].split(" = ")
            a, sign, b = sum_.split()
            assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign] == int(result) >= 0, (i, j, text)
        assert wrong["first_wrong"] == len(wrong["steps"]) - 1 < len(wrong["whole"]) - 1
        assert wrong["problem"] == right["problem"] and wrong["reference"] == steps.show_steps(right["whole"])
        assert wrong["steps"][:-1] == right["whole"][:len(wrong["steps"]) - 1] and wrong["steps"][-1] != right["whole"][len(wrong["steps"]) - 1]
    assert steps.make_problem(7, "train", True) == steps.make_problem(7, "train", True)


def test_prm800k_as_published(tmp_path):
    def row(made, finish="found_error", **more):
        return {"labeler": "x", "is_quality_control_question": False, "is_initial_screening_question": False,
                "question": {"problem": "P $\\frac{1}{2}$?", "ground_truth_answer": "2"}, "label": {"steps": made, "finish_reason": finish}, **more}

    def step(*ratings, chosen=None, human=None):
        return {"completions": [{"text": f"t{i} {{x}}", "rating": r, "flagged": False} for i, r in enumerate(ratings)], "human_completion": human, "chosen_completion": chosen}

    rows = [row([step(1, chosen=0), step(0, -1, chosen=0), step(-1)]), row([step(1, -1, chosen=0), step(-1, -1, human={"text": "by hand", "rating": None}), step(1, chosen=0)], "solution"),
            row([step(-1)], "bad_problem"), row([step(1)], "found_error"), row([step(1)], is_quality_control_question=True), {"question": {}}]
    steps.write_problems(rows, tmp_path / "phase1.jsonl")
    found, rejected = steps.read_prm800k(tmp_path / "phase1.jsonl")
    assert [(s["first_wrong"], s["steps"]) for s in found] == [(2, ["t0 {x}"] * 3), (None, ["t0 {x}", "by hand", "t0 {x}"])]
    assert len(rejected) == 4 and [r["row"] for r in rejected] == [3, 4, 5, 6]
    # Braces of LaTeX pass through the user's wordings.
    assert all("{step}" not in steps.point_at_step(found[0], seed=s) and "{number}" not in steps.point_at_step(found[0], seed=s) for s in range(40))
    assert any("t0 {x}" in steps.point_at_step(found[0], seed=s) for s in range(40)) and any("step 3" in steps.point_at_step(found[0], seed=s).lower() for s in range(40))


def test_conversations_go_through_the_pipeline():
    from rlhi.generate import Sampling, load_backend
    from rlhi.pairs import guided_rewrites

    solutions = steps.make_solutions(12)
    rows, golds = steps.step_conversations(solutions)
    validate(rows, "conversations", "made")
    kinds = steps.meant_followups(rows, solutions)
    validate(kinds, "followups", "made")
    wrong = [s for s in solutions if s["first_wrong"] is not None]
    pairs = guided_rewrites(rows, kinds, None, load_backend("tiny"), steps.AnswerScorer(golds), regenerate=False, sampling=Sampling(8))
    assert len(pairs) == len(wrong) > 5
    for pair in pairs:
        assert pair["reward_rejected"] == 0.0 and pair["rejected"][0]["content"].startswith("Step 1: ")
    scorer = steps.AnswerScorer(golds)
    for pair in steps.reference_pairs(rows, solutions):
        assert scorer.score([pair["prompt"]] * 2, [pair[side][0]["content"] for side in ("chosen", "rejected")]) == [1.0, 0.0]
    test_rows, _ = steps.step_conversations(steps.make_solutions(30, "test"), "test")
    train_rows, _ = steps.step_conversations(steps.make_solutions(30, "train"), "train")
    assert not {r["turns"][0]["content"] for r in test_rows} & {r["turns"][0]["content"] for r in train_rows}


def test_harness_grades_ours_from_a_file(tmp_path):
    path = tmp_path / "olympiad.jsonl"
    problems = [{"id": i, "context": None, "question": f"Half of {i}?", "final_answer": [f"$\\frac{{{i}}}{{2}}$"]} for i in range(40)]
    path.write_text("\n".join(map(json.dumps, problems)))

    def answer(text):
        i = int(text.split("Half of ")[1].split("?")[0])
        return f"It is \\boxed{{{i / 2}}}" if i % 4 else "I do not know"

    backend = Answering(answer)
    samples = reasoning.run_tasks(backend, ["rlhi_olympiadbench"], limit=20, files={"rlhi_olympiadbench": str(path)}, max_new_tokens=50)
    assert len(samples) == 20 and {row["correct"] for row in samples} == {True, False}
    assert all(row["correct"] == (int(row["id"]) % 4 != 0) and "sha256" in row["origin"] for row in samples)
    messages, sampling = backend.seen[0]
    assert [m["role"] for m in messages] == ["user"] and messages[0]["content"].endswith("put your final answer within \\boxed{}.")
    assert (sampling.max_new_tokens, sampling.temperature) == (50, 0.0)
    fewer = reasoning.run_tasks(backend, ["rlhi_olympiadbench"], limit=5, files={"rlhi_olympiadbench": str(path)})
    assert {row["id"] for row in fewer} < {row["id"] for row in samples}


def test_harness_runs_its_own_tasks_from_files(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    def question(i, category):
        return {"question_id": i, "question": f"Letter {i}?", "options": ["w", "x", "y", "z"], "answer": "ABCD"[i % 4], "answer_index": i % 4, "category": category,
                "cot_content": f"A: Let's think step by step. The answer is ({'ABCD'[i % 4]}).", "src": "made"}

    rows = [question(i, c) for c in ("math", "law") for i in range(8)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "test.parquet")
    with open(tmp_path / "gpqa.csv", "w", newline="") as file:
        table = csv.DictWriter(file, ["Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3", "Record ID"])
        table.writeheader()
        table.writerows({"Question": f"q{i}", "Correct Answer": "right", **{f"Incorrect Answer {k}": f"wrong{k}" for k in (1, 2, 3)}, "Record ID": f"rec{i}"} for i in range(6))

    def answer(text):
        if "(A)" in text:
            return f"Let me think. The answer is {text.split(' right')[0][-3:]}."
        return "The answer is (B)."

    backend = Answering(answer)
    files = {"mmlu_pro_math": str(tmp_path / "test.parquet"), "gpqa_main_cot_zeroshot": str(tmp_path / "gpqa.csv")}
    samples = reasoning.run_tasks(backend, list(files), files=files)
    table = {row["task"]: row for row in reasoning.task_table(samples)}
    assert table["mmlu_pro"]["n"] == 8 and table["mmlu_pro"]["accuracy"] == 25.0
    assert table["gpqa_main_cot_zeroshot"]["n"] == 6 and table["gpqa_main_cot_zeroshot"]["accuracy"] == 100.0
    shots = next(m for m, _ in backend.seen if "Letter" in m[-1]["content"])
    assert len(shots) > 5, "five examples, as turns"


def test_figures_by_hand():
    base = [{"task": t, "id": str(i), "correct": i < right, "answer": "1" if i else None} for t, right in (("a", 4), ("mmlu_pro_law", 1), ("mmlu_pro_math", 3)) for i in range(8)]
    arm = [{**row, "correct": row["correct"] or (row["task"] == "a" and row["id"] == "7")} for row in base]
    a, mmlu, average = reasoning.task_table(base)
    assert (a["accuracy"], mmlu["accuracy"], mmlu["n"], average["accuracy"], average["task"]) == (50.0, 25.0, 16, 37.5, "average of 2")
    assert a["se"] == pytest.approx(100 * math.sqrt(0.25 / 7)) and average["se"] == pytest.approx(math.hypot(a["se"], mmlu["se"]) / 2)
    rows = reasoning.paired_table(base, arm)
    assert [(r["difference"], r["gained"], r["lost"], r["n"]) for r in rows] == [(12.5, 1, 0, 8), (0.0, 0, 0, 16), (6.25, 1, 0, 24)]
    assert rows[0]["se"] == pytest.approx(12.5) and rows[2]["se"] == pytest.approx(6.25)
    with pytest.raises(ValueError, match="different questions"):
        reasoning.paired_table(base, arm[1:])


def test_files_and_names_that_do_not_fit(tmp_path, shared_data):
    for name, file, n in (("minerva_math272", "minerva_math", 272), ("olympiadbench", "olympiadbench", 675), ("math500", "math500", 500)):
        problems, origin = reasoning.problems_of(name, shared_data / "reasoning" / f"{file}.jsonl")
        assert len(problems) == len({row["id"] for row in problems}) == n and "sha256" in origin
    with pytest.raises(ValueError, match="no task 'hellaswag'"):
        reasoning.run_tasks(Answering(str), ["hellaswag"])
    (tmp_path / "x.jsonl").write_text('{"text": "?"}')
    with pytest.raises(ValueError, match="row 1: expected `problem`"):
        reasoning.problems_of("math500", tmp_path / "x.jsonl")


def test_vllm_command_and_its_samples(tmp_path):
    line = reasoning.vllm_command("m", "o", adapter="a dir", files={"rlhi_math500": "f.jsonl"}, tasks=("rlhi_math500",))
    assert "--batch_size auto" in line and "'" in line and "lora_local_path=a dir" in line and '"math500": "f.jsonl"' in line and "--log_samples" in line
    sample = {"doc_id": 0, "doc": {"id": "7", "tolerance": 0.0, "origin": "f"}, "target": "2", "resps": [["\\boxed{2.0}"]], "filtered_resps": ["\\boxed{2.0}"], "filter": "none",
              "metrics": ["accuracy"], "accuracy": 1.0, "prompt_hash": "0" * 64}
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "samples_rlhi_math500_2026-01-01T00-00-00.jsonl").write_text(json.dumps(sample))
    (row,) = reasoning.read_samples(tmp_path)
    assert (row["task"], row["id"], row["correct"], row["answer"], row["reason"]) == ("rlhi_math500", "7", True, "2.0", "the same number")
