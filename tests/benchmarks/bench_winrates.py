"""Length-controlled win rates: ours beside the alpaca-eval package, on the same annotation files.

    python tests/benchmarks/bench_winrates.py --gamed df_gamed.csv --package-python VENV/bin/python FILE...

The package (0.6.6) wants setuptools<82 and lives in an environment of its own: python -m venv VENV, then
VENV/bin/pip install 'setuptools<82' alpaca-eval==0.6.6. Without --package-python only our times are printed.
Times are processor seconds of the fit alone (five folds, ten strengths, refit), best of three.

Harder are mixtures of two models, where strengths nearly tie more often. Both fits run in turns in one process, so it
has to be the package's Python (it needs nothing else of rlhi's):

    PYTHONPATH=. VENV/bin/python tests/benchmarks/bench_winrates.py --mixtures 40 --gamed df_gamed.csv FILE...
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


def mixtures(files: list[str], gamed: str, count: int) -> None:
    "Prints the differences and ratios of some mixtures of two models' answers, the slowest first."
    import warnings

    import alpaca_eval.metrics.glm_winrate as package
    import numpy as np
    import pandas as pd

    from rlhi import length_control

    warnings.filterwarnings("ignore")
    package.hf_hub_download = lambda **options: gamed
    fit, theirs = package.fit_LogisticRegressionCV, []

    def timed(function, seconds):
        def run(*args, **options):
            start = time.process_time()
            result = function(*args, **options)
            seconds.append(time.process_time() - start)
            return result
        return run

    package.fit_LogisticRegressionCV = timed(fit, theirs)
    baselines, rng, rows = length_control.read_gamed(gamed), np.random.default_rng(0), []
    frames = [pd.read_parquet(f) if f.endswith(".parquet") else pd.read_json(f) for f in files]
    for _ in range(count):
        one, other = (frames[i] for i in rng.choice(len(frames), 2, replace=False))
        n = min(len(one), len(other))
        one, other = one[:n].reset_index(drop=True), other[:n].reset_index(drop=True)
        first, mixed = rng.random(n) < rng.choice([0.3, 0.5, 0.7]), one.copy()
        for column in ("output_2", "preference"):
            mixed[column] = np.where(first, one[column], other[column])
        names = [frame["generator_2"].iloc[0] for frame in (one, other)]
        preferences = mixed.preference.to_numpy(float) - 1
        lengths = [mixed[c].str.len().to_numpy(float) for c in ("output_1", "output_2")]
        difficulty = np.array([baselines.difficulty[i] for i in range(n)])
        features, judged = length_control.length_features(*lengths, difficulty), np.isfinite(preferences)
        theirs.clear()
        mine = []
        for _ in range(2):
            figures = package.get_length_controlled_winrate(mixed.assign(generator_2="mixture"), save_weights_dir=None)
            for _ in range(2):
                timed(length_control.fit_length_control, mine)(features[judged], preferences[judged], baselines)
        result = length_control.length_controlled(*lengths, preferences, difficulty, baselines, samples=0)
        difference = result["length_controlled_winrate"] - figures["length_controlled_winrate"]
        rows.append((min(theirs) / min(mine), min(mine), min(theirs), difference, " + ".join(names)))
    for ratio, ours_s, theirs_s, difference, name in sorted(rows)[:10]:
        print(f"{name:66} {difference:+8.4f} {1000 * ours_s:6.1f} ms {1000 * theirs_s:7.1f} ms {ratio:6.1f} times")
    ratios, worst = [r[0] for r in rows], max(abs(r[3]) for r in rows)
    total = sum(r[2] for r in rows) / sum(r[1] for r in rows)
    print(f"{count} mixtures: {total:.1f} times in all, median {np.median(ratios):.1f}, least {min(ratios):.1f}, "
          f"{sum(r < 20 for r in ratios)} below 20; largest difference {worst:.4f}")
    if worst > 0.05:
        sys.exit("the figures differ by more than 0.05 points")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--gamed", required=True)
    parser.add_argument("--package-python")
    parser.add_argument("--mixtures", type=int, help="so many mixtures of two of the files, in this process")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if options.mixtures:
        mixtures(options.files, options.gamed, options.mixtures)
        return
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
