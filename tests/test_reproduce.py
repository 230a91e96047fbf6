"""The runner of the experiments: what it skips, what it refuses, and what a kill leaves behind."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from openai_server import ModelServer

from rlhi.generate import load_backend
from rlhi.reproduce import (Experiment, ReproduceError, check_parameters, imported_modules, ingredients, make_plan, orphans,
                            project_root, read_experiments, read_profile, read_stamp, why_run)

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent


def experiment(name="20_x", needs=(), parameters=("profile", "model"), code="from rlhi.report import make_result"):
    return Experiment(name, ROOT / "nbs" / "experiments" / f"{name}.ipynb", needs, parameters, code)


def test_every_profile_is_taken_whole_by_the_experiments():
    found = read_experiments(ROOT)
    for path in (ROOT / "nbs" / "profiles").glob("*.yaml"):
        check_parameters(read_profile(path.stem, ROOT), found)


def test_profiles_name_the_same_parameters():
    keys = {path.stem: set(read_profile(path.stem, ROOT)) for path in (ROOT / "nbs" / "profiles").glob("*.yaml")}
    assert len(keys) == 4
    assert len({frozenset(value) for value in keys.values()}) == 1, "a parameter that one profile lacks runs there with a default"


def test_misspelt_parameter_is_an_error_that_names_the_right_one():
    with pytest.raises(ReproduceError, match="'learning_rte'.*'learning_rate'"):
        check_parameters({"learning_rte": 1}, read_experiments(ROOT))


def test_outside_a_checkout_the_error_says_where_the_notebooks_are(tmp_path):
    with pytest.raises(ReproduceError, match="git clone"):
        project_root(tmp_path)


def test_imports_are_followed_through_the_package(tmp_path):
    (tmp_path / "one.py").write_text("from .two import x\n")
    (tmp_path / "two.py").write_text("def f():\n    from .three import y\n")
    (tmp_path / "three.py").write_text("")
    (tmp_path / "four.py").write_text("")
    assert imported_modules("from rlhi.one import z", tmp_path) == {"one", "two", "three"}
    assert imported_modules("import rlhi.four", tmp_path) == {"four"}


@pytest.mark.parametrize("change, piece", [
    (lambda e, p: (experiment(code=e.code + "\nx = 1"), p), "code"),
    (lambda e, p: (e, {**p, "model": "other"}), "parameter model"),
])
def test_a_change_is_named_in_the_plan(change, piece):
    before = ingredients(experiment(), {"profile": "x", "model": "tiny"}, ROOT, {})
    after = ingredients(*change(experiment(), {"profile": "x", "model": "tiny"}), ROOT, {})
    assert why_run({"pieces": before}, before) is None
    assert why_run({"pieces": before}, after) == f"changed: {piece}"


def test_parameters_that_a_notebook_does_not_take_do_not_concern_it():
    one = ingredients(experiment(), {"profile": "x", "model": "tiny", "epochs": 1}, ROOT, {})
    assert one == ingredients(experiment(), {"profile": "x", "model": "tiny", "epochs": 2}, ROOT, {})


def test_a_new_result_of_a_needed_experiment_runs_the_next_one_again():
    e = experiment(needs=("10_y",))
    one, two = (ingredients(e, {"profile": "x"}, ROOT, {"10_y": key}) for key in ("a", "b"))
    assert why_run({"pieces": one}, two) == "changed: result of 10_y"


def test_changed_log_is_noticed(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text("{}\n")
    e = experiment(parameters=("profile", "source"))
    one = ingredients(e, {"profile": "x", "source": str(log)}, ROOT, {})
    log.write_text("{}\n{}\n")
    assert why_run({"pieces": one}, ingredients(e, {"profile": "x", "source": str(log)}, ROOT, {})) == "changed: data of source"


def test_a_stamp_cut_short_counts_as_none(tmp_path):
    (tmp_path / "stamps").mkdir()
    (tmp_path / "stamps" / "20_x.json").write_text('{"pieces": {"co')
    assert read_stamp(tmp_path, "20_x") == {}


def test_only_and_from_choose(tmp_path):
    values = read_profile("tiny", ROOT)
    chosen = [step.experiment.name for step in make_plan(ROOT, values, tmp_path, only=["21", "report"]) if step.run]
    assert chosen == ["21_training", "90_report"]
    later = [step.experiment.name for step in make_plan(ROOT, values, tmp_path, start="user_eval") if step.run]
    assert later[0] == "30_user_eval" and "21_training" not in later


def carry_out(plan, folder):
    """Stamp what a plan would have run, and name it."""
    (folder / "stamps").mkdir(exist_ok=True)
    for step in (step for step in plan if step.run):
        (folder / "stamps" / f"{step.experiment.name}.json").write_text(json.dumps({"pieces": step.pieces}))
    return [step.experiment.name for step in plan if step.run]


def test_the_report_of_a_part_is_written_again_when_the_rest_has_run(tmp_path):
    values = read_profile("tiny", ROOT)
    part = ["20", "21", "30", "90"]
    assert len(carry_out(make_plan(ROOT, values, tmp_path, only=part), tmp_path)) == 4
    assert carry_out(make_plan(ROOT, values, tmp_path, only=part), tmp_path) == [], "the same part is up to date"
    whole = make_plan(ROOT, values, tmp_path)
    assert "changed: result of 31_alpaca_eval" in whole[-1].reason
    assert {"31_alpaca_eval", "70_costs", "90_report"} <= set(carry_out(whole, tmp_path))
    assert carry_out(make_plan(ROOT, values, tmp_path), tmp_path) == []
    assert carry_out(make_plan(ROOT, values, tmp_path, only=part), tmp_path) == []


def test_what_was_left_out_does_not_make_others_stale_before_it_runs(tmp_path):
    values = read_profile("tiny", ROOT)
    carry_out(make_plan(ROOT, values, tmp_path), tmp_path)
    other = {**values, "eval_top_p": 0.5}  # of 30_user_eval, which the report needs
    assert carry_out(make_plan(ROOT, other, tmp_path, only=["90"]), tmp_path) == []
    assert carry_out(make_plan(ROOT, other, tmp_path), tmp_path) == ["30_user_eval", "90_report"]


def run_tiny(folder, *more, wait=True, **variables):
    command = [BIN / "rlhi", "reproduce", "tiny", "--out", str(folder), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    with open(folder / "log.txt", "a") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment)
    if wait:
        assert process.wait(timeout=1200) == 0, (folder / "log.txt").read_text()[-3000:]
    return process


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """One whole run of the smallest profile."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_tiny(folder)
    return folder


@pytest.mark.slow
@pytest.mark.xdist_group("tiny")
def test_tiny_runs_to_the_report(undisturbed):
    results = undisturbed / "results"
    page = (results / "report.html").read_text()
    assert "Its numbers mean nothing" in page or "its numbers mean nothing" in page
    table = json.loads((results / "user_eval.json").read_text())
    assert {row["arm"] for row in table["rows"]} == {"UGR", "UBR", "scratch", "agnostic", "SFT", "logged SFT"}
    for row in table["rows"]:
        assert row["wins"] + row["losses"] + row["ties"] == row["n"]
        assert row["low"] <= row["points"] <= row["high"]
    for stem in ("user_eval", "learning_curves"):
        assert (results / f"{stem}.png").stat().st_size > 5000 and (results / f"{stem}.pdf").exists()


@pytest.mark.slow
@pytest.mark.xdist_group("tiny")
def test_second_run_computes_nothing(undisturbed):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*.ipynb")}
    run_tiny(undisturbed)
    assert before and {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*.ipynb")} == before


@pytest.mark.slow
@pytest.mark.xdist_group("tiny")
def test_killed_three_times_the_pairs_are_the_same(undisturbed, tmp_path):
    """SIGKILL to the runner and whatever it started, in three stages; then the run is started once more."""
    main_way = ("--only", "20_pipeline", "21_training", "30_user_eval")
    waits = [tmp_path / "tables" / "followups.parquet", tmp_path / "tables" / "pairs.parquet", tmp_path / "adapters" / "UBR-seed0" / "run.json"]
    for awaited in waits:
        process = run_tiny(tmp_path, *main_way, wait=False)
        until = time.time() + 600
        while not awaited.exists() and process.poll() is None and time.time() < until:
            time.sleep(0.05)
        assert process.poll() is None, f"the run ended before {awaited.name} was seen: " + (tmp_path / "log.txt").read_text()[-3000:]
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    run_tiny(tmp_path, *main_way)
    assert orphans(tmp_path) == []
    for name in ("conversations", "followups", "personas", "pairs"):
        assert (tmp_path / "tables" / f"{name}.parquet").read_bytes() == (undisturbed / "tables" / f"{name}.parquet").read_bytes(), name
    first, second = (json.loads((folder / "results" / "user_eval.json").read_text())["rows"] for folder in (undisturbed, tmp_path))
    assert first == second


@pytest.mark.slow
@pytest.mark.xdist_group("tiny")
def test_a_server_gives_the_same_tables(undisturbed, tmp_path):
    """The pipeline against an OpenAI-compatible server: it answers, and loads the trained adapters for the evaluation."""
    with ModelServer(load_backend("tiny", progress=False)) as server:
        run_tiny(tmp_path, "--only", "20_pipeline", "21_training", "30_user_eval", "--set", "backend=openai",
                 "--set", "arms=[UGR, UBR]", OPENAI_BASE_URL=server.url)
        assert len(server.requests) > 20 and {name.split("-")[0] for name in server.models} == {"UGR", "UBR"}
    near, far = (json.loads((folder / "results" / "user_eval.json").read_text())["rows"] for folder in (undisturbed, tmp_path))
    shape = ("arm", "mode", "aspect", "n", "users")
    assert [[row[name] for name in shape] for row in far] == [[row[name] for name in shape] for row in near if row["arm"] in ("UGR", "UBR")]


def test_two_runners_do_not_share_a_folder(tmp_path):
    import fcntl

    with open(tmp_path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run([BIN / "rlhi", "reproduce", "tiny", "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Another process is running" in done.stderr
