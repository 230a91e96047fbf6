"""Length-controlled win rates: ours beside the alpaca-eval package, on the same annotation files.

    python tests/benchmarks/bench_winrates.py --gamed df_gamed.csv --package-python VENV/bin/python FILE...

The package (0.6.6) wants setuptools<82 and lives in an environment of its own: python -m venv VENV, then
VENV/bin/pip install 'setuptools<82' alpaca-eval==0.6.6. Without --package-python only our times are printed.
Times are processor seconds of the fit alone (five folds, ten strengths, refit), best of three.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PACKAGE = """
import json, sys, time, warnings
warnings.filterwarnings("ignore")
import pandas as pd
import alpaca_eval.metrics.glm_winrate as package
gamed, out, *files = sys.argv[1:]
package.hf_hub_download = lambda **options: gamed
fit, seconds = package.fit_LogisticRegressionCV, []
def timed(*args, **options):
    start = time.process_time()
    model = fit(*args, **options)
    seconds.append(time.process_time() - start)
    return model
package.fit_LogisticRegressionCV = timed
rows = []
for file in files:
    frame = pd.read_parquet(file) if file.endswith(".parquet") else pd.read_json(file)
    seconds.clear()
    for _ in range(3):
        metrics = package.get_length_controlled_winrate(frame, save_weights_dir=None)
    rows.append({k: float(v) for k, v in metrics.items()} | {"seconds": min(seconds)})
json.dump(rows, open(out, "w"))
"""


def ours(files: list[str], gamed: str) -> list[dict]:
    "Our figures and the time of our fit."
    import numpy as np

    from rlhi import length_control, winrates

    baselines = length_control.read_gamed(gamed)
    rows = []
    for file in files:
        ((model, records),) = winrates.read_annotations(file)[0].items()
        lengths = [np.array([len(r[c]) for r in records]) for c in ("output_1", "output_2")]
        preferences = np.array([r["preference"] for r in records]) - 1
        difficulty = np.array([baselines.difficulty[r["index"]] for r in records])
        features = length_control.length_features(*lengths, difficulty)
        judged = np.isfinite(preferences)
        seconds = []
        for _ in range(3):
            start = time.process_time()
            length_control.fit_length_control(features[judged], preferences[judged], baselines)
            seconds.append(time.process_time() - start)
        result = length_control.length_controlled(*lengths, preferences, difficulty, baselines, samples=0)
        rows.append({"model": model, **winrates.raw_win_rate(preferences + 1), **result, "seconds": min(seconds)})
    return rows


def package(files: list[str], gamed: str, python: str) -> list[dict]:
    "The package's figures and the time of its fit, in its own environment."
    with tempfile.TemporaryDirectory() as folder:
        script, out = Path(folder) / "package.py", Path(folder) / "out.json"
        script.write_text(PACKAGE)
        subprocess.run([python, str(script), gamed, str(out), *files], check=True, stderr=subprocess.DEVNULL)
        return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--gamed", required=True)
    parser.add_argument("--package-python")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    mine = ours(options.files, options.gamed)
    theirs = package(options.files, options.gamed, options.package_python) if options.package_python else [None] * len(mine)
    names = ("win_rate", "standard_error", "discrete_win_rate", "length_controlled_winrate", "lc_standard_error")
    print(f"{'model':32} {'ours LC':>8} {'package':>8} {'largest difference':>18} {'ours ms':>8} {'package ms':>10} {'times':>6}")
    worst = 0.0
    for a, b in zip(mine, theirs):
        line = f"{a['model']:32} {a['length_controlled_winrate']:8.3f}"
        if b:
            difference = max(abs(a[n] - b[n]) for n in names)
            worst = max(worst, difference)
            line += (f" {b['length_controlled_winrate']:8.3f} {difference:18.4f} {1000 * a['seconds']:8.1f} {1000 * b['seconds']:10.1f}"
                     f" {b['seconds'] / a['seconds']:6.1f}")
        else:
            line += f" {'':8} {'':18} {1000 * a['seconds']:8.1f}"
        print(line)
    if options.package_python:
        total = [sum(r["seconds"] for r in rows) for rows in (mine, theirs)]
        print(f"all {len(mine)}: ours {total[0]:.3f} s, package {total[1]:.3f} s, {total[1] / total[0]:.1f} times; largest difference {worst:.4f}")
        if worst > 0.05:
            sys.exit("the figures differ by more than 0.05 points")


if __name__ == "__main__":
    main()
