"""Grading against stored verdicts and reference solutions, and against answers that are nearly right."""
import json
import random
import re
import threading
import time

import pytest

from rlhi.answers import extract_gsm8k, extract_letter, extract_math, gold_answer, grade, grade_file
from rlhi.cli import main
from rlhi.equality import compact, equal_math, normalise


@pytest.fixture(scope="module")
def reasoning(shared_data):
    folder = shared_data / "reasoning"
    if not folder.is_dir():
        pytest.skip("no reasoning data")
    return folder


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("model", ["6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"])
def test_gsm8k_verdicts_are_openais(reasoning, model):
    done = grade_file(reasoning / "gsm8k_model_solutions_first600.jsonl", "gsm8k", f"{model}.solution", "ground_truth", f"{model}.is_correct")
    assert done["n"] == 600 and done["agrees_with_stored"] == 600
    assert done["correct"] == {"6b_finetuning": 129, "6b_verification": 239, "175b_finetuning": 205, "175b_verification": 333}[model]


def test_gsm8k_gold_solutions(reasoning):
    done = grade_file(reasoning / "gsm8k_test.jsonl", "gsm8k", "answer", "answer")
    assert (done["n"], done["correct"], done["unparsed"]) == (1319, 1319, 0)


def test_mmlu_pro_letters_are_the_stored_ones(reasoning):
    done = grade_file(reasoning / "mmlu_pro_llama31_8b_instruct_outputs.parquet", "mmlu_pro", "generated_text", "answer", "pred")
    rows = done["rows"]
    assert done["n"] == 12032 and done["unparsed"] == 694
    # Every letter that was parsed is the stored one; where there was none, the script stored a guess.
    assert all(row["agrees"] for row in rows if row["answer"] is not None) and done["agrees_with_stored"] == 11338
    assert round(done["accuracy"], 4) == 0.4358
    lucky = sum(row["stored"] == row["gold"] for row in rows if row["answer"] is None)
    assert lucky == 73 and round((done["correct"] + lucky) / 12032, 4) == round(done["accuracy_of_stored"], 4) == 0.4419
    assert abs(done["accuracy_with_guesses"] - 0.4419) < 0.003


def test_fast_cascade_is_the_published_one():
    def published(text):
        for pattern, flags in ((r"answer is \(?([A-J])\)?", 0), (r".*[aA]nswer:\s*([A-J])", 0), (r"\b[A-J]\b(?!.*\b[A-J]\b)", re.DOTALL)):
            if match := re.search(pattern, text, flags):
                return match[match.lastindex or 0]

    luck = random.Random(0)
    pieces = ["answer is (", "answer is ", "Answer:", "answer: ", "A", "B", "(C)", " D ", "\n", " ", "x", "J.", "K", "E)"]
    for _ in range(3000):
        text = "".join(luck.choices(pieces, k=luck.randint(1, 9)))
        assert extract_letter(text).answer == published(text), repr(text)
    start = time.process_time()
    assert extract_letter("answer " * 200_000).answer is None
    assert time.process_time() - start < 5


@pytest.mark.parametrize(("text", "expected"), [
    ("#### 1,234", "1234"), ("so\nA: $3.50\nthanks", "3.50"), (r"thus \boxed{\$1{,}000}", "1000"), ("The answer is **42**, from 6 and 7.", "42"),
    ("He has 3 left. Then 5", "5"), ("none", None), ("#### -7", "-7"), ("It costs $5.", "5"), (r"\boxed{12 \text{ apples}}", "12"), (r"\boxed{x = 18}", "18"), (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}")])
def test_gsm8k_extraction(text, expected):
    assert extract_gsm8k(text).answer == expected


@pytest.mark.parametrize(("text", "expected"), [
    (r"a \boxed{1} then \boxed{\frac{1}{\sqrt{2}}}.", r"\frac{1}{\sqrt{2}}"), (r"$\boxed{3}$ and $\boxed{5}$", "3, 5"), (r"\boxed{\{1,2\}}", r"\{1,2\}"),
    (r"$\boxed{15\frac{39}{40}}$ or $\boxed{\frac{639}{40}}$", r"\frac{639}{40}"), (r"cut off \boxed{\frac{1}{", None), (r"\boxed 7", "7"),
    ("Final Answer: The final answer is $x+1$. I hope it is correct.", "x+1"), ("The answer is 3.5.", "3.5"), (r"\fbox{2}", "2"), ("#### 9", "9"),
    ("Some words first.\nThen $a$ and last $b^2$ it was, all in all.", "b^2"), ("", None)])
def test_math_extraction(text, expected):
    assert extract_math(text).answer == expected or (expected is None and "box" in extract_math(text).how)


SAME = [(r"\frac{1}{2}", "0.5"), (r"\frac{1}{2}", r"50\%"), (r"\dfrac43", "4/3"), (r"11\sqrt2", r"\sqrt{242}"), ("10,\\!080", "10080"), ("p - q", "-q+p"),
        (r"(-\infty, 2) \cup (3, \infty)", r"(3,\infty)\cup(-\infty,2)"), ("3, 5, 7", r"7, 5 \text{ and } 3"), (r"\text{Evelyn}", "evelyn"),
        (r"\text{(C)}", "C"), ("C", r"\text{(C)}"), ("x=5", "5"), ("y = 2x + 3", "y=3+2x"), ("5x - 7y + 11z + 4 = 0", "7y = 5x + 11z + 4"), ("90^\\circ", "90"),
        (r"864 \mbox{ inches}^2", "864 square inches"), (r"\$32,\!348", "32348"), ("4.5e33", r"4.5 \times 10^{33}"), (r"1\frac{4}{5}", "1.8"),
        (r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}", r"\begin{bmatrix} 0.2 \\ -3.6 \end{bmatrix}"), (r"1 \pm \sqrt{19}", r"1-\sqrt{19}, 1+\sqrt{19}"),
        ("6 - 5i", "-5i+6"), ("6+9i", "9 i + 6"), ("1 - 12i", r"1 - 3 \cdot 4i"), (r"x \in [-2,7]", r"-2 \le x \le 7"), (r"\frac{1}{3}", "0.333333"), (r"\frac{a b}{2}", r"\frac{1}{2}ab"), ("2^{1009}", r"2 \cdot 2^{1008}"),
        (r"\frac{1}{3} E_{1}+\frac{2}{3} E_{2}", r"\frac{E_1 + 2E_2}{3}"), ("50", r"50\%"), (r"3\pi", "9.424778"), ("x > 5", r"(5, \infty)")]
OTHER = [(r"\frac{1}{2}", "2"), (r"\frac{1}{3}", "0.33"), ("(1,2)", "[1,2]"), ("(1,2)", "(2,1)"), ("(3,4]", "[3,4)"), ("3, 5, 7", "3, 5"), ("3, 5, 7", "3, 5, 7, 9"),
         (r"\text{even}", "odd"), ("52_8", "52_9"), ("x=5", "x=-5"), ("2271380", "2271381"), ("p - q", "q - p"), (r"5.4 \text{ cents}", r"5.4 \text{ dollars}"),
         ("2", "2n"), ("0.5", "50"), (r"1 \pm \sqrt{19}", r"1 + \sqrt{19}"), (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}"),
         (r"(-\infty, 2)", r"(-\infty, 2]"), (r"\sqrt{2}", "1.41"), ("6 - 5i", "6 + 5i"), ("x^3+3x-6", "x^3+3x+6"), ("5x - 7y + 4 = 0", "5x - 7y - 4 = 0"),
         ("1e-8", "2e-8"), ("5.89e-7", "5.88e-7"), (r"\pi", r"3.14"), ("", "1"), ("1", ""), ("11", "1,1"), (r"(0,9) \cup (9,36)", "(0,36)"), (r"\cot x", r"\tan x"), ("C", "(D)"), (r"50\%", r"0.5\%"), ("50", "0.5")]


@pytest.mark.parametrize(("gold", "answer"), SAME)
def test_same_answers(gold, answer):
    assert equal_math(gold, answer), equal_math(gold, answer).reason


@pytest.mark.parametrize(("gold", "answer"), OTHER)
def test_other_answers(gold, answer):
    assert not equal_math(gold, answer), equal_math(gold, answer).reason


def test_reference_solutions_are_accepted(reasoning):
    minerva = [(row["solution"], row["solution"]) for row in lines(reasoning / "minerva_math.jsonl")]
    math500 = [(row["solution"], row["answer"]) for row in lines(reasoning / "math500.jsonl")]
    # OlympiadBench's solutions hold no box: the final answer is put below the text, as a model would.
    olympiad = [(f"{row['solution'][0]}\n\\boxed{{{row['final_answer'][0]}}}", row["final_answer"]) for row in lines(reasoning / "olympiadbench.jsonl")]
    for pairs, n in ((minerva, 272), (math500, 500), (olympiad, 675)):
        wrong = [(gold, row["reason"]) for text, gold in pairs if not (row := grade("math", text, gold))["correct"]]
        assert len(pairs) == n and wrong == []


def perturb(gold, luck):
    "One change that makes another answer: a digit, a sign, plus or minus one, the negative; None where none applies."
    plain = compact(normalise(gold))
    digits = list(re.finditer(r"(?<![\\a-zA-Z])\d", gold))
    signs = list(re.finditer(r"(?<=[a-zA-Z\d})])\s*[+-]\s*(?=[\\a-zA-Z\d(])", gold)) if r"\pm" not in gold else []
    kinds = ["digit"] * 3 * bool(digits) + ["sign"] * bool(signs) + ["one"] * bool(re.fullmatch(r"-?\d+", gold.strip()))
    kinds += ["negative"] if gold.strip() != "0" and not re.search(r"text|[,=<>]|\\(?:in|cup|pm|ge|le)|\(", gold) else []
    for kind in luck.choices(kinds, k=20) if kinds else []:
        place = luck.choice({"digit": digits, "sign": signs}.get(kind, [None]))
        if kind == "digit":
            new = gold[:place.start()] + str((int(place[0]) + luck.randint(1, 9)) % 10) + gold[place.end():]
        elif kind == "sign":
            new = gold[:place.start()] + place[0].translate(str.maketrans("+-", "-+")) + gold[place.end():]
        else:
            new = str(int(gold) + luck.choice([-1, 1])) if kind == "one" else gold.lstrip()[1:] if gold.lstrip().startswith("-") else f"-({gold})"
        if compact(normalise(new)) != plain:
            return new
    return None


@pytest.mark.parametrize(("n", "seed"), [(100, 1), pytest.param(1000, 0, marks=pytest.mark.slow)])
def test_wrong_answers_are_refused(reasoning, n, seed):
    golds = [gold_answer("math", row["solution"]) for row in lines(reasoning / "minerva_math.jsonl")]
    golds += [row["answer"] for row in lines(reasoning / "math500.jsonl")]
    golds += [gold_answer("math", row["final_answer"]) for row in lines(reasoning / "olympiadbench.jsonl")]
    luck = random.Random(seed)
    luck.shuffle(golds)
    pairs = [(gold, new) for gold in golds if (new := perturb(gold, luck)) is not None][:n]
    accepted = [pair for pair in pairs if grade("math", f"So it is \\boxed{{{pair[1]}}}.", pair[0])["correct"]]
    assert len(pairs) == n and accepted == []


def test_time_is_limited_in_any_thread():
    found, start = {}, time.process_time()

    def ask(name, gold, answer):
        found[name] = equal_math(gold, answer, seconds=0.5)

    threads = [threading.Thread(target=ask, args=(name, *pair)) for name, pair in
               (("slow", ("x", "9^{9^{9^{9^9}}}")), ("fast", (r"\frac{\sqrt{3}}{3}", r"1/\sqrt{3}")))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not found["slow"] and found["fast"]
    assert time.process_time() - start < 1, "the work is done elsewhere"


def test_hostile_text_costs_nothing():
    start = time.process_time()
    for text in ("\\boxed{" * 20_000, "{" * 100_000, "$" * 50_001, "answer is " * 20_000, "\\text{a} " * 20_000, "1," * 50_000, "(" * 50_000):
        grade("math", text, "1")
        grade("gsm8k", text, "1")
        equal_math("2", text)
    assert time.process_time() - start < 5


def test_grade_command(tmp_path, capsys):
    path = tmp_path / "stored.jsonl"
    rows = [{"q": {"gold": r"\frac{1}{2}"}, "out": r"\boxed{0.5}", "ok": True}, {"q": {"gold": "3"}, "out": "no idea at all about this one", "ok": "false"},
            {"q": {"gold": "x+1"}, "out": r"\boxed{x-1}", "ok": True}]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert main(["grade", str(path), "--task", "math", "--answer", "out", "--gold", "q.gold", "--verdict", "ok", "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert (done["n"], done["correct"], done["agrees_with_stored"]) == (3, 1, 2)
    assert [row["correct"] for row in done["rows"]] == [True, False, False] and done["rows"][2]["reason"] == "different by algebra"
    assert main(["grade", str(path), "--task", "math", "--answer", "out"]) == 1
    assert "which field holds the gold answers" in capsys.readouterr().err
    assert main(["grade", str(path), "--task", "math", "--answer", "missing", "--gold", "out"]) == 1
    assert "no field 'missing'" in capsys.readouterr().err
    path.write_text('{"out": "1", "gold": "1"}\nnot json')
    assert main(["grade", str(path), "--task", "gsm8k", "--answer", "out"]) == 1
    assert "line 2" in capsys.readouterr().err
