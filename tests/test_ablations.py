"""The rule for verdicts at its edges, the claims against the paper's values, paired differences, personas of all kinds."""
from pathlib import Path

import pytest

from rlhi.ablations import CLAIMS, VERDICTS, claim_row, difference, persona_variants, true_persona, verdict, verdict_table
from rlhi.arms import Bench, Setting
from rlhi.report import paper_values
from rlhi.simulate import User

YES, NO, UNKNOWN = VERDICTS
VALUES = paper_values(Path(__file__).resolve().parents[1])


@pytest.mark.parametrize("low, high, claimed, threshold, expected", [
    (0.1, 50, 22.4, 0, YES), (0.0, 50, 22.4, 0, UNKNOWN), (-5, 22.4, 22.4, 0, UNKNOWN), (-5, 22.3, 22.4, 0, NO),
    (-9, -1, 22.4, 0, NO), (-9, 4.9, None, 0, NO), (-9, 5.0, None, 0, UNKNOWN), (-4.9, 3, -1.0, -5, YES),
    (-6, 3, -1.0, -5, UNKNOWN), (-9, -2, -1.0, -5, NO), (-12, -6, -1.0, -5, NO), (None, None, 22.4, 0, UNKNOWN)])
def test_the_rule_at_its_edges(low, high, claimed, threshold, expected):
    assert verdict(low, high, claimed, threshold) == expected


def test_an_interval_upside_down_is_refused():
    with pytest.raises(ValueError, match="lower end first"):
        verdict(3, -3)


def test_every_value_of_the_paper_has_a_claim_and_every_claim_a_source_or_a_reason():
    ids = [claim["id"] for claim in CLAIMS]
    assert len(ids) == len(set(ids))
    context = {"usereval.multiturn.winrate", "alpacaeval.ubr.raw", "reasoning.base.average"}  # said in another row
    assert set(VALUES) - context <= set(ids)
    assert all(("from" in claim) != ("why" in claim) for claim in CLAIMS)
    assert all(claim["id"] in VALUES or "paper" in claim for claim in CLAIMS)


def test_without_results_every_claim_is_in_the_table_and_none_is_reproduced():
    table = verdict_table({}, VALUES)
    assert len(table) == len(CLAIMS) and {row["verdict"] for row in table} == {UNKNOWN}
    assert sum("not run" in row["why"] for row in table) == sum("from" in claim for claim in CLAIMS)


def test_measured_claims_get_their_verdict_and_their_reason():
    comparison = {"low": 2.0, "high": 9.0, "difference": 5.0, "n": 100, "users": 50}
    rows = [claim_row("filtering.difference", comparison, "scripted", [0, 1]),
            claim_row("filtering.difference", {**comparison, "low": -2.0}, "smollm2", [0], "at 30 %")]
    usereval = {"rows": [{"arm": "UGR", "mode": mode, "aspect": "overall", "points": p, "low": p - 5, "high": p + 5, "n": 40, "users": 20}
                         for mode, p in (("context-only", 20.0), ("persona-guided", -10.0))],
                "provenance": {"seeds": [0], "model": "smollm2"}}
    table = verdict_table({"claims_filtering": {"rows": rows}, "user_eval": usereval}, VALUES)
    filtering = [row for row in table if row["claim"] == "filters improve UGR"]
    assert [(row["policy"], row["verdict"], row["seeds"]) for row in filtering] == [("scripted", YES, 2), ("smollm2", NO, 1)]
    assert filtering[1]["why"].endswith("at 30 %") and "paper's size is outside" in filtering[1]["why"]
    preferred = next(row for row in table if row["claim"] == "users prefer UGR to the base")
    assert (preferred["ours"], preferred["verdict"], preferred["paper"]) == (-10.0, NO, "22.4 points (S)")


def test_a_win_rate_of_the_paper_is_compared_in_points():
    turns = {"rows": [{"arm": "UGR", "mode": "persona-guided", "turn_kind": "first", "points": 8.0, "low": -1.0, "high": high, "n": 9, "users": 9}
                      for high in (20.0, 21.0)], "provenance": {"seeds": [0]}}
    first = [row["verdict"] for row in verdict_table({"user_eval_turns": turns}, VALUES) if row["ours"] == 8.0]
    assert first == [NO, UNKNOWN]  # 60.3 % is 20.6 points


def test_with_several_seeds_each_is_a_row():
    rows = [{"arm": f"UGR, seed {seed}", "mode": "persona-guided", "aspect": "overall", "points": 9.0, "low": 1.0, "high": 17.0,
             "n": 9, "users": 9} for seed in (0, 1)]
    usereval = {"rows": rows, "provenance": {"seeds": [0, 1], "model": "smollm2"}}
    found = [row for row in verdict_table({"user_eval": usereval}, VALUES) if row["claim"] == "users prefer UGR to the base"]
    assert [(row["seeds"], row["verdict"]) for row in found] == [(1, YES)] * 2


def test_unknown_claims_are_refused():
    with pytest.raises(ValueError, match="no claim 'magic'"):
        claim_row("magic", {}, "scripted", [0])


def test_differences_are_paired():
    def judged(arm, verdicts):
        return [{"example": str(i), "user_id": str(i), "arm_a": arm, "arm_b": "base", "aspect": "overall",
                 "mode": "persona-guided", "judge": "j", "verdict": v} for i, v in enumerate(verdicts)]
    rows = judged("one", ["a"] * 6 + ["b"] * 4) + judged("two", ["a"] * 3 + ["b"] * 7)
    found = difference(rows, "one", "two")
    assert found["difference"] == pytest.approx(60.0) and found["low"] >= 0 and found["n"] == found["users"] == 10
    missing = difference(rows, "one", "three")
    assert missing["difference"] is missing["low"] is None
    table = verdict_table({"claims_diversity": {"rows": [claim_row("diversity", missing, "scripted", [0])]}}, VALUES)
    assert next(row for row in table if row["policy"] == "scripted")["why"] == "not run: nothing was trained"


def test_personas_true_shuffled_absent_and_of_few_conversations(tmp_path):
    bench = Bench(tmp_path, Setting(users=2, test_users=5, conversations=4, shares=(("honest", 1.0),)))
    variants = persona_variants(bench, [1, 4])
    assert list(variants) == ["inferred", "true", "shuffled", "absent", "1 conversations", "4 conversations"]
    assert all(len(rows) == 5 for rows in variants.values())
    for name, row in variants["true"].items():
        clear = {p["dimension"]: p["value"] for p in row["preferences"] if p["strength"]}
        assert clear == bench.world.users[name].tastes and row["persona"]
    assert all(row["user_id"] != name for name, row in variants["shuffled"].items())
    assert sorted(row["user_id"] for row in variants["shuffled"].values()) == sorted(variants["inferred"])
    assert {name: row["persona"] for name, row in variants["4 conversations"].items()} == {
        name: row["persona"] for name, row in variants["inferred"].items()}
    assert all(len(row["conversations"]) == 1 for row in variants["1 conversations"].values())
    assert set(variants["absent"].values()) == {None}


def test_a_user_without_tastes_has_an_empty_true_persona():
    assert true_persona(User("u", {}))["persona"] == ""
