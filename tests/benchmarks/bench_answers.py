"""Grading against stored verdicts, reference solutions, right answers respelt and wrong ones nearly right.

python tests/benchmarks/bench_answers.py [../shared/data]
"""
import logging
import random
import sys
import time
from pathlib import Path

import sympy

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from test_answers import lines, perturb  # noqa: E402

from rlhi.answers import gold_answer, grade, grade_file  # noqa: E402
from rlhi.filters import wilson  # noqa: E402
from rlhi.equality import bracket_parts, compact, list_parts, normalise, read_latex, same_shape, same_words, split_unit  # noqa: E402

logging.disable(logging.CRITICAL)
folder = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parents[3] / "shared" / "data") / "reasoning"
if not folder.is_dir():
    sys.exit(f"{folder} is not here: nothing to measure")
rows, failed = [], []


def report(name, right, n, start):
    low, high = wilson(right, n)
    rows.append((name, right, n, low, high, time.perf_counter() - start))


for model in ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"):
    start = time.perf_counter()
    done = grade_file(folder / "gsm8k_model_solutions_first600.jsonl", "gsm8k", f"{model}.solution", "ground_truth", f"{model}.is_correct")
    report(f"GSM8K, stored verdicts of {model}", done["agrees_with_stored"], done["n"], start)
start = time.perf_counter()
done = grade_file(folder / "gsm8k_test.jsonl", "gsm8k", "answer", "answer")
report("GSM8K, gold solutions", done["correct"], done["n"], start)
start = time.perf_counter()
done = grade_file(folder / "mmlu_pro_llama31_8b_instruct_outputs.parquet", "mmlu_pro", "generated_text", "answer", "pred")
report("MMLU-Pro, stored letters where one was parsed", done["agrees_with_stored"], done["n"] - done["unparsed"], start)
print(f"MMLU-Pro accuracy: {done['accuracy']:.4f} ({done['unparsed']} unparsed count as wrong); stored, guesses among them: {done['accuracy_of_stored']:.4f}")

minerva = [(row["solution"], row["solution"]) for row in lines(folder / "minerva_math.jsonl")]
math500 = [(row["solution"], row["answer"]) for row in lines(folder / "math500.jsonl")]
olympiad = [(f"{row['solution'][0]}\n\\boxed{{{row['final_answer'][0]}}}", row["final_answer"]) for row in lines(folder / "olympiadbench.jsonl")]
golds = []
for name, pairs in (("Minerva-Math", minerva), ("MATH-500", math500), ("OlympiadBench", olympiad)):
    start = time.perf_counter()
    graded = [grade("math", text, gold) for text, gold in pairs]
    report(f"{name}, reference solutions", sum(row["correct"] for row in graded), len(graded), start)
    start, right = time.perf_counter(), 0
    for row in graded:
        gold = normalise(row["gold"])
        verdict = same_words(gold, gold) if gold.startswith("\\text") else same_shape(gold, gold, 0.0, 5.0)
        right += verdict.equal
        failed += [] if verdict else [f"{name}: {row['gold']} is not found equal to itself without comparing text ({verdict.reason})"]
    report(f"{name}, gold against itself, not as text", right, len(graded), start)
    golds += [row["gold"] for row in graded]

start, right, n = time.perf_counter(), 0, 0
for gold in golds:
    text = split_unit(normalise(gold))[0]
    if len(list_parts(text)) > 1 or bracket_parts(text) or any(mark in text for mark in ("=", "\\in", "\\cup", "text", "matrix", "<", ">", "_", "\\le", "\\ge")):
        continue
    try:
        value = read_latex(text)
        forms = {sympy.latex(value), sympy.latex(sympy.expand(value)), sympy.latex(sympy.together(value.doit()))} if value is not None else ()
    except (AttributeError, TypeError, ValueError):
        continue
    for form in forms:
        if compact(normalise(form)) != compact(normalise(gold)):
            n, verdict = n + 1, grade("math", f"\\boxed{{{form}}}", gold)
            right += verdict["correct"]
            failed += [] if verdict["correct"] else [f"respelt: {form} for {gold} ({verdict['reason']})"]
report("right answers as SymPy spells them", right, n, start)

for tolerance in (0.0, 1e-4):
    start, luck = time.perf_counter(), random.Random(0)
    luck.shuffle(shuffled := list(golds))
    wrong = [(gold, new) for gold in shuffled if (new := perturb(gold, luck)) is not None][:1000]
    accepted = [pair for pair in wrong if grade("math", f"So it is \\boxed{{{pair[1]}}}.", pair[0], tolerance)["correct"]]
    failed += [f"accepted: {new} for {gold}" for gold, new in accepted]
    report(f"wrong answers refused, tolerance {tolerance:g}", len(wrong) - len(accepted), len(wrong), start)

print(f"{'what':<52}{'right':>7}{'n':>7}  95 % interval     seconds")
for name, right, n, low, high, seconds in rows:
    print(f"{name:<52}{right:>7}{n:>7}  {low:.4f} to {high:.4f}{seconds:>9.1f}")
print(*failed, sep="\n")
