"""Win rates against closed forms, the AlpacaEval leaderboard, and the alpaca-eval package's own figures."""
import csv
import json
import math

import numpy as np
import pytest

from rlhi import arena, length_control, winrates

# length_controlled_winrate and lc_standard_error of alpaca-eval 0.6.6 (scikit-learn 1.9.1) on the annotation files and
# the reconstructed df_gamed.csv; python tests/benchmarks/bench_winrates.py computes them anew.
PACKAGE = {
    "FuseChat-Qwen-2.5-7B-Instruct": (63.631475839527226, 0.6183783551717668),
    "NullModel": (86.48501718773396, 0.1239650476122077),
    "OpenHermes-2.5-Mistral-7B": (16.46331696385726, 0.7251589622526478),
    "alpaca-7b": (6.034213708669459, 0.3678508032508568),
    "claude-2.1": (25.775357581174553, 0.7545313159009268),
    "claude-instant-1.2": (25.592127840529095, 0.8772030720355668),
    "falcon-7b-instruct": (4.053919415819485, 0.25954849932290014),
    "gemma-2b-it": (5.6385346533737755, 0.3171007365095792),
    "gpt35_turbo_instruct": (17.808449684160674, 0.3132069034939095),
    "gpt4_0613_concise": (21.56827929100841, 0.7496043206745727),
    "phi-2": (4.393577006086759, 0.10437580090062741),
    "vicuna-13b": (9.31438982698165, 0.5387184469125905),
}


def judgment(example, first, verdict, user="u", arm="x", aspect="overall"):
    return {"example": example, "user_id": user, "arm_a": arm, "arm_b": "base", "aspect": aspect, "mode": None,
            "shown_first": first, "judge": "j", "verdict": verdict}


@pytest.fixture(scope="module")
def published(shared_data):
    "Our rows for the twelve annotated models, and the leaderboard."
    folder = shared_data / "alpaca_eval"
    if not folder.is_dir():
        pytest.skip("no AlpacaEval annotations")
    rows = winrates.winrate_files(sorted((folder / "annotations").glob("*.parquet")), gamed=folder / "df_gamed_reconstructed.csv")
    with open(folder / "leaderboard.csv", newline="") as file:
        board = {row[""]: row for row in csv.DictReader(file)}
    return rows, board


def test_raw_win_rates_are_the_leaderboards(published):
    rows, board = published
    assert len(rows) == 12
    for row in rows:
        theirs = board[row["model"]]
        for name in ("win_rate", "standard_error", "discrete_win_rate"):
            assert row[name] == pytest.approx(float(theirs[name]), abs=1e-6), (row["model"], name)
        assert (row["n"], row["n_wins"], row["n_wins_base"]) == tuple(int(theirs[k]) for k in ("n_total", "n_wins", "n_wins_base"))
        assert abs(row["avg_length"] - float(theirs["avg_length"])) <= 2, row["model"]  # two models lack an answer or two


def test_length_controlled_win_rates_are_the_packages(published):
    rows, board = published
    for row in rows:
        rate, error = PACKAGE[row["model"]]
        # Tied strengths are settled in the middle: at most half of MIDDLE off, and a little for where the solver stops.
        assert row["length_controlled_winrate"] == pytest.approx(rate, abs=length_control.MIDDLE / 2 + 0.01), row["model"]
        assert row["lc_standard_error"] == pytest.approx(error, abs=0.002), row["model"]
        # The CSV is a reconstruction: its README promises a mean error of 0.23 and at most 0.40 on held-out models.
        assert abs(row["length_controlled_winrate"] - float(board[row["model"]]["length_controlled_winrate"])) < 0.6
        assert row["lc_low"] < row["length_controlled_winrate"] < row["lc_high"]


def test_published_coefficients_predict_the_leaderboard(shared_data, published):
    folder = shared_data / "alpaca_eval"
    weights = length_control.read_weights(folder / "glm_weights.csv")
    gamed = length_control.read_gamed(folder / "df_gamed_reconstructed.csv")
    difficulty = np.array([gamed.difficulty[i] for i in range(805)])
    errors = [length_control.predicted_win_rate(weights, model, "gpt4_1106_preview", difficulty) - float(row["length_controlled_winrate"])
              for model, row in published[1].items() if model in weights and row["length_controlled_winrate"]]
    assert len(errors) > 150
    assert np.abs(errors).mean() < 0.3


def test_shuffled_columns_nan_and_duplicates(shared_data, tmp_path):
    import pyarrow.parquet as pq

    folder = shared_data / "alpaca_eval"
    rows = pq.read_table(folder / "annotations" / "vicuna-13b.parquet").to_pylist()
    gamed = folder / "df_gamed_reconstructed.csv"
    path = tmp_path / "results" / "vicuna-13b" / "judge" / "annotations.json"
    path.parent.mkdir(parents=True)

    def run(records):
        path.write_text(json.dumps(records))
        return winrates.winrate_files([path], gamed=gamed)[0]

    plain = run(rows)
    nameless = run([{k: v for k, v in row.items() if not k.startswith("generator")} for row in rows])
    assert nameless["model"] == "vicuna-13b"
    assert nameless["length_controlled_winrate"] == plain["length_controlled_winrate"]
    doubled = run(rows[:100] + rows[50:])
    assert doubled["n"] == 805 and doubled["length_controlled_winrate"] == plain["length_controlled_winrate"]
    assert "50 repeated" in doubled["note"]
    # Not judged: the package leaves the rows out of the fit, and predicts them all the same.
    unjudged = run([row | {"preference": None if i % 50 == 0 else row["preference"]} for i, row in enumerate(rows)])
    assert unjudged["n"] == 788 and "17 without a preference" in unjudged["note"]
    shuffled = [row | {"index": i} for i, row in enumerate(rows)]
    np.random.default_rng(0).shuffle(shuffled)
    assert run(shuffled)["length_controlled_winrate"] == pytest.approx(plain["length_controlled_winrate"], abs=0.05)


def test_no_hub_leaves_the_raw_figures(tmp_path, monkeypatch):
    def offline(name):
        raise OSError("df_gamed.csv could not be fetched")

    monkeypatch.setattr(length_control, "hub_file", offline)
    path = tmp_path / "m.jsonl"
    path.write_text("\n".join(json.dumps({"instruction": str(i), "output_1": "a", "output_2": "bb", "preference": 1 + i % 2})
                              for i in range(10)))
    (row,) = winrates.winrate_files([path])
    assert (row["model"], row["win_rate"], row["length_controlled_winrate"]) == ("m", 50.0, None)
    assert "could not be fetched" in row["note"]


def test_a_file_with_the_wrong_bytes_is_refused(tmp_path, monkeypatch):
    import huggingface_hub

    path = tmp_path / "df_gamed.csv"
    path.write_text("model,index\n")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args, **options: str(path))
    with pytest.raises(ValueError, match="sha256"):
        length_control.hub_file("df_gamed.csv")


@pytest.mark.parametrize("penalty", [1e-3, 0.5, 5.0, 40.0])
def test_minimum_satisfies_the_optimality_conditions(penalty):
    rng = np.random.default_rng(0)
    features, targets = rng.normal(size=(300, 3)), rng.random(300)
    weights = rng.random((4, 300))
    rows = length_control.WeightedRows(features, targets, weights)
    for start in (np.zeros((4, 3)), np.full((4, 3), 2.0)):
        b, _ = length_control.minimise(rows, start, penalty, 1e-9)
        gradient, _ = rows.derivatives(b)
        assert np.allclose(gradient[b != 0], -penalty * np.sign(b[b != 0]), atol=1e-5)
        assert (np.abs(gradient[b == 0]) <= penalty + 1e-6).all()


def test_solver_path_stops_where_liblinear_stops():
    from sklearn.svm._base import _fit_liblinear

    rng = np.random.default_rng(1)
    features, targets, weights = rng.normal(size=(400, 3)), rng.random(400), rng.random(400)
    folds = length_control.Folds(features, targets, weights)
    for place in (2, 4, 5):
        ours = length_control.solver_path(folds, np.array([place]))[0]
        for fold in range(length_control.FOLDS):
            keep, state = folds.fold != fold, np.random.RandomState(123)
            for _ in range(len(length_control.STRENGTHS) - 1 - place):
                state.randint(np.iinfo("i").max)
            theirs, _, _ = _fit_liblinear(
                np.vstack([features[keep]] * 2), np.repeat([1.0, 0.0], keep.sum()), length_control.STRENGTHS[place], False, 1.0,
                None, "l1", False, 0, 100, 1e-4, state,
                sample_weight=np.concatenate([(weights * targets)[keep], (weights * (1 - targets))[keep]]))
            assert np.allclose(ours[fold], theirs[0], atol=1e-5)


def test_folds_are_scikit_learns():
    from sklearn.model_selection import GroupKFold

    folds = length_control.Folds(np.zeros((23, 1)), np.zeros(23), np.zeros(23))
    for fold, (_, held_out) in enumerate(GroupKFold(5).split(np.zeros(46), groups=np.tile(np.arange(23), 2))):
        assert set(held_out % 23) == set(np.flatnonzero(folds.fold == fold))


def test_length_control_recovers_what_was_put_in():
    rng = np.random.default_rng(0)
    n, difficulty = 4000, rng.normal(0, 1, 4000)
    reference = rng.integers(500, 2500, n)
    model = reference + rng.normal(400, 600, n).round()
    features = length_control.length_features(reference, model, difficulty)
    targets = length_control.sigmoid(features @ np.array([-1.8, 0.8, -0.5]))
    gamed = length_control.Gamed(features * [1, 1, 0], length_control.sigmoid(features @ np.array([-1.8, 0.8, 0])),
                                 dict(enumerate(difficulty)), "made here")
    b, _ = length_control.fit_length_control(features, targets, gamed)
    assert np.allclose(b, [-1.8, 0.8, -0.5], atol=0.01)


def test_extremes_do_not_break_the_fit():
    rng = np.random.default_rng(0)
    difficulty = rng.normal(0, 1, 60)
    gamed = length_control.Gamed(np.stack([np.tanh(rng.normal(0, 1, 60)), difficulty, np.zeros(60)], 1), rng.random(60),
                                 dict(enumerate(difficulty)), "made here")
    lengths = rng.integers(10, 3000, 60), rng.integers(10, 3000, 60)
    for preferences, expected in ((np.zeros(60), 0), (np.ones(60), 100)):
        row = length_control.length_controlled(*lengths, preferences, difficulty, gamed, samples=20)
        assert row["length_controlled_winrate"] == pytest.approx(expected, abs=0.5)
    same = length_control.length_controlled(lengths[0], lengths[0], np.full(60, 0.5), difficulty, gamed, samples=20)
    assert math.isfinite(same["length_controlled_winrate"])


def test_win_table_counts():
    rows = [judgment("1", "a", "a"), judgment("1", "b", "a"), judgment("2", "a", "b"), judgment("2", "b", "b"),
            judgment("3", "a", "a"), judgment("3", "b", "b"), judgment("4", "a", None), judgment("4", "b", "a"),
            judgment("5", None, "a", user="v")]
    (row,) = winrates.win_table(rows)
    assert [row[k] for k in ("wins", "losses", "ties", "n", "users", "unparsed")] == [2, 1, 1, 4, 2, 1]
    assert row["points"] == pytest.approx(25) and row["win_rate"] == pytest.approx(62.5)


def test_win_table_is_deterministic_and_splits_turns():
    rng = np.random.default_rng(0)
    rows = [judgment(str(i), o, "ab"[rng.integers(2)], user=f"u{i // 3}") for i in range(60) for o in "ab"]
    examples = [{"example": str(i), "turn_kind": "first" if i % 3 == 0 else "follow-up"} for i in range(60)]
    first, again = winrates.win_table(rows, examples), winrates.win_table(rows, examples)
    assert first == again
    assert {r["turn_kind"]: r["n"] for r in first} == {"all": 60, "first": 20, "follow-up": 40}


def test_intervals_cover_and_widen_with_clusters():
    covered, rng = 0, np.random.default_rng(0)
    for seed in range(200):
        means = rng.normal(0, 1, 30)
        values = np.repeat(means, 4) + rng.normal(0, 0.3, 120)
        low, high = winrates.cluster_interval(values, np.repeat(np.arange(30), 4), samples=400, seed=seed)
        covered += low <= 0 <= high
    assert 0.87 <= covered / 200 <= 0.99


def test_sign_flips_agree_with_the_exact_test():
    first, second = [1, 1, 0, 1, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0, 0, 0]
    assert winrates.paired_test(first, second, samples=20000)["p"] == pytest.approx(2 / 2**6, abs=0.006)
    assert winrates.paired_test(first, first)["p"] == 1
    # Six examples of one user are one unit, and one unit proves nothing.
    assert winrates.paired_test(first, second, units=["u"] * 8)["p"] == 1


def test_p_values_are_uniform_under_no_difference():
    rng = np.random.default_rng(0)
    p = [winrates.paired_test(rng.normal(size=40), rng.normal(size=40), samples=300, seed=i)["p"] for i in range(200)]
    assert 0.02 <= np.mean(np.array(p) < 0.05) <= 0.09


def test_compare_arms_pairs_the_examples():
    rows = [judgment(str(i), o, "a", user=str(i), arm="x") for i in range(8) for o in "ab"]
    rows += [judgment(str(i), o, "b", user=str(i), arm="y") for i in range(7) for o in "ab"]
    (row,) = winrates.compare_arms(rows, "x", "y")
    assert (row["difference"], row["n"], row["unpaired"]) == (200, 7, 1)


def test_annotations_go_there_and_back(tmp_path):
    outputs = winrates.alpaca_outputs(["i", "j"], ["one", "two"], "arm")
    reference = winrates.alpaca_outputs(["i", "j"], ["eins", "zwei"], "reference")
    judgments = [{"example": str(e), "verdict": v, "score_a": s, "score_b": 1 - s} for e, v, s in
                 ((0, "a", 0.9), (0, "a", 0.7), (1, "b", 0.2), (1, "b", 0.4))]
    (tmp_path / "a.json").write_text(json.dumps(winrates.alpaca_annotations(outputs, reference, judgments)))
    models, _ = winrates.read_annotations(tmp_path / "a.json")
    assert [row["preference"] for row in models["arm"]] == pytest.approx([1.8, 1.3])


@pytest.mark.parametrize(("value", "expected"), [(0, 1.5), (1.5, 1.5), ("1.25", 1.25), (None, None), (2.01, None), ("x", None),
                                                 (float("nan"), None), (-1, None), (0.5, None)])
def test_preferences(value, expected):
    found = winrates.number(value)
    assert found == expected if expected is not None else math.isnan(found)


def test_style_ignores_code():
    text = "```\n# no\n- no\n```\n## yes\n* yes\n2. yes\n__b__ **b**"
    assert winrates.style(text) == {"length": len(text), "headings": 1, "lists": 2, "bold": 2}


def test_arena_without_style_is_the_weighted_mean():
    rng = np.random.default_rng(0)
    battles = [{"model": m, "baseline": "base", "example": str(i), "score": float(rng.choice([0, 0.5, 1])), "weight": int(rng.choice([1, 3]))}
               for m in "xyz" for i in range(80)]
    for row in arena.arena_scores(battles)[0]:
        own = [(b["score"], b["weight"]) for b in battles if b["model"] == row["model"]]
        assert row["score"] == pytest.approx(100 * sum(s * w for s, w in own) / sum(w for _, w in own), abs=0.01)
        assert row["low"] < row["score"] < row["high"]


def test_arena_files(shared_data):
    folder = shared_data / "arena_hard"
    old, new = (arena.read_arena_questions(folder / f"{v}_question.jsonl") for v in ("v0.1", "v2.0"))
    assert (len(old), len(new)) == (500, 750)
    assert {q["baseline"] for q in old} == {"gpt-4-0314"}
    assert {q["category"] for q in new} == {"hard_prompt", "creative_writing"}
    answers = arena.read_arena_answers(folder / "v0.1_gpt-4-0314.jsonl")
    assert set(answers) == {q["example"] for q in old}
    # An arm that answers with the baseline's own words and ties always has the score of the baseline.
    battles = [{"model": "copy", "baseline": "gpt-4-0314", "example": q["example"], "score": 0.5, "weight": 1} for q in old]
    table, _ = arena.arena_scores(battles, {"copy": answers, "gpt-4-0314": answers}, samples=50)
    assert table[0]["score"] == pytest.approx(50, abs=0.01)


@pytest.mark.parametrize(("raw", "expected"), [("[[A>>B]]", (1.0, 3)), ("[[B<<A]]", (1.0, 3)), ("[[ A=B ]]", (0.5, 1)),
                                               ("[[B>A]] [[B>A]]", (0.0, 1)), ("[[A>B]] [[A>>B]]", None), ("A>B", None), ("[[A>A]]", None)])
def test_arena_verdicts(raw, expected):
    assert arena.parse_degree(raw) == expected
