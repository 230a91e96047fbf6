"""The bench of the ablations: noise in a known share, results computed once, filters at equal pairs, both policies."""
import json
from dataclasses import replace

import pytest

from rlhi import arms
from rlhi.arms import (FILTERS, Bench, Setting, bad_feedback, judge_arms, key_of, make_pairs, points, read_setting,
                       recorded, select_pairs, spoil_feedback, train_arm)
from rlhi.simulate import make_users, simulate_logs

SMALL = Setting(users=8, test_users=6, conversations=3, learning_rate=0.1, epochs=6, batch_size=16)


@pytest.fixture(scope="module")
def log():
    return simulate_logs(make_users(8, shares={"honest": 1.0}), 4)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("run"), SMALL)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_the_share_of_bad_feedback_is_exact(log, share):
    rows, truth = spoil_feedback(*log, share)
    counted = bad_feedback(truth)
    assert counted["bad"] == round(share * counted["complaints"]) and counted["complaints"] > 4


def test_spoiled_feedback_stands_in_the_log_and_nothing_else_changes(log):
    rows, truth = spoil_feedback(*log, 0.5)
    tastes = {row["user_id"]: row["tastes"] for row in truth if row["record"] == "user"}
    spoiled = {(row["conversation_id"], row["turn"]): row for row in truth if row.get("spoiled")}
    changed = set()
    for before, after in zip(log[0], rows, strict=True):
        assert {k: v for k, v in before.items() if k != "turns"} == {k: v for k, v in after.items() if k != "turns"}
        changed |= {(after["conversation_id"], i) for i, (a, b) in enumerate(zip(before["turns"], after["turns"], strict=True))
                    if a != b}
    assert changed == set(spoiled)
    for (name, turn), row in spoiled.items():
        assert row["feedback"] in next(r for r in rows if r["conversation_id"] == name)["turns"][turn]["content"]
        assert tastes[row["user_id"]].get(row["dimension"]) != row["value"]


def test_more_noise_only_adds(log):
    some, more = ({(r["conversation_id"], r["turn"]): r["feedback"] for r in spoil_feedback(*log, share)[1]
                   if r.get("spoiled")} for share in (0.25, 0.75))
    assert some.items() <= more.items() and len(some) < len(more)


def test_a_share_in_per_cent_is_refused(log):
    with pytest.raises(ValueError, match="from 0 to 1"):
        spoil_feedback(*log, 30)


def test_a_result_is_made_once_and_a_cut_file_counts_as_none(tmp_path):
    calls = []
    make = lambda: calls.append(1) or {"value": [1, 2]}
    path = tmp_path / "deep" / "x.json"
    assert recorded(path, make) == recorded(path, make) == {"value": [1, 2]} and len(calls) == 1
    path.write_text('{"value": [1,')
    assert recorded(path, make) == {"value": [1, 2]} and len(calls) == 2
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


def test_other_code_or_other_inputs_are_other_results(monkeypatch):
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1}) != key_of({"a": 1, "b": 3})
    before = key_of(1)
    monkeypatch.setattr(arms, "package_state", lambda: "other")
    assert key_of(1) != before


def test_settings_prefer_the_ablation_name():
    found = read_setting({"users": 3, "ablation_users": 9, "seeds": [5], "ablation_tastes": ["length: short"], "beta": None})
    assert (found.users, found.seed, found.beta, found.tastes) == (9, 0, 0.1, ("length: short",))


def test_no_filter_keeps_what_the_scorer_dislikes_and_drops_equal_sides(bench):
    made = make_pairs(bench, "UGR")
    assert {p["pair_id"] for p in select_pairs(made, FILTERS["no filter"])} == {
        p["pair_id"] for p in made if p["chosen"][0]["content"].split() != p["rejected"][0]["content"].split()}
    assert any(p["reward_chosen"] <= p["reward_rejected"] for p in made)
    assert all(p["reward_chosen"] - p["reward_rejected"] >= 0.05 for p in select_pairs(made, FILTERS["all filters"]))


def test_a_larger_limit_only_adds(bench):
    made = make_pairs(bench, "UBR")
    few, many = ([p["pair_id"] for p in select_pairs(made, limit=n)] for n in (3, 8))
    assert few == many[:3] and len(many) == 8
    one = made[0]["user_id"]
    assert {p["user_id"] for p in select_pairs(made, FILTERS["no filter"], users={one})} == {one}


def test_held_out_users_give_no_pairs(bench):
    test = {name for name, user in bench.world.users.items() if user.split == "test"}
    assert len(test) == 6 and not test & {p["user_id"] for method in ("UGR", "UBR") for p in make_pairs(bench, method)}
    assert {row["user_id"] for row in bench.world.examples} == test


def test_an_arm_learns_and_is_found_again(bench, monkeypatch):
    rows = select_pairs(make_pairs(bench, "UBR"))
    adapter, summary = train_arm(bench, "UBR", rows)
    assert summary["rows"] == len(rows) and summary["log"][-1]["accuracy"] > 0.8
    judged = judge_arms(bench, {"UBR": adapter, "nothing": None})
    assert {row["arm_a"] for row in judged} == {"UBR"}
    monkeypatch.setattr(arms, "train_policy", None)
    again = Bench(bench.folder.parent, SMALL)
    assert train_arm(again, "UBR", select_pairs(make_pairs(again, "UBR"))) == (adapter, summary)
    assert judge_arms(again, {"UBR": adapter}) == judged
    table = points(judged, aspect=None)
    assert len(table) == 6 and all(row["n"] == row["users"] == 6 for row in table)
    assert all(row["points"] == pytest.approx(100 * (row["wins"] - row["losses"]) / 6) for row in table)


def test_pairs_read_back_in_another_process_carry_their_styles(bench):
    made = make_pairs(bench, "UGR")
    again = Bench(bench.folder.parent, SMALL)
    assert not again.base.seen and make_pairs(again, "UGR") == made
    for pair in made:
        for side in ("chosen", "rejected"):
            text = pair[side][0]["content"]
            assert again.base.seen[text] == bench.base.seen[text]


def test_noise_and_seed_change_the_world_and_the_optimizer_does_not(bench):
    base = bench.world.rows
    assert Bench(bench.folder.parent, replace(SMALL, epochs=9, beta=0.3)).world.rows == base
    assert Bench(bench.folder.parent, replace(SMALL, noise=1.0)).world.rows != base
    other = Bench(bench.folder.parent, replace(SMALL, seed=1)).world
    assert not set(other.users) & set(bench.world.users)


def test_unknown_methods_are_named(bench):
    with pytest.raises(ValueError, match="UGR logged"):
        make_pairs(bench, "UGRR")


def test_a_real_model_goes_the_same_way(tmp_path):
    setting = Setting(policy="tiny", users=4, test_users=2, conversations=3, max_new_tokens=6, epochs=1, batch_size=2,
                      lora_rank=2, feedback_limit=3, shares=(("honest", 1.0),))
    bench = Bench(tmp_path, setting)
    rows = select_pairs(make_pairs(bench, "UGR"), FILTERS["no filter"], 2)
    adapter, summary = train_arm(bench, "UGR", rows)
    assert (adapter / "adapter_model.safetensors").exists() and summary["rows"] == len(rows) > 0
    judged = judge_arms(bench, {"UGR": adapter})
    assert len(judged) == 3 * len(bench.world.examples)
    assert json.loads((adapter / "summary.json").read_text()) == summary
