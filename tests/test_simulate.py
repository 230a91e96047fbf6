"""Simulated users: the same from one seed, honest about the truth, and never leaking it into the log."""
import collections
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhi.checkers import DIMENSIONS, read_data, relevance, satisfies
from rlhi.conversations import read_table, validate, write_table
from rlhi.simulate import (BEHAVIOURS, SHARES, SimulatedUser, User, aspects, make_users, read_truth, satisfaction,
                           scripted_assistant, simulate_logs, true_followups, true_users, write_truth)

KINDS = {"new_request", "continuation", "reattempt_with_feedback", "reattempt_without_feedback", "positive_feedback"}


@pytest.fixture(scope="module")
def world():
    users = make_users(150, seed=3)
    rows, truth = simulate_logs(users, 4, seed=3)
    return users, rows, truth


def answers_before(rows, truth):
    "Each later user message's truth with the answer that it reacts to."
    turns = {row["conversation_id"]: row["turns"] for row in rows}
    return [(record, turns[record["conversation_id"]][record["turn"] - 1]["content"])
            for record in true_followups(truth)]


def test_rows_are_a_conversations_table(world, tmp_path):
    _, rows, _ = world
    validate(rows, "conversations", "simulated")
    write_table(rows, "conversations", tmp_path / "log.parquet")
    again = read_table("conversations", tmp_path / "log.parquet")
    assert [{k: row[k] for k in rows[0]} for row in again] == rows
    for row in rows:
        assert [m["role"] for m in row["turns"]] == ["user", "assistant"] * (len(row["turns"]) // 2)
        assert all(m["content"].strip() for m in row["turns"])
    assert len({row["conversation_id"] for row in rows}) == len(rows) == 600


def test_the_log_does_not_tell_the_truth(world):
    users, rows, _ = world
    columns = {"conversation_id", "user_id", "timestamp", "language", "country", "model", "turns", "source"}
    assert all(set(row) == columns for row in rows)
    meta = json.dumps([{k: str(v) for k, v in row.items() if k != "turns"} for row in rows])
    assert not any(re.search(rf"\b{word}\b", meta) for word in (*BEHAVIOURS, "train", "test", *DIMENSIONS))


def test_truth_describes_every_user_message(world):
    users, rows, truth = world
    messages = {(r["conversation_id"], r["turn"]): r for r in truth if r["record"] == "message"}
    assert true_users(truth) == users
    assert len(messages) == sum(len(row["turns"]) // 2 for row in rows)
    for row in rows:
        for turn, message in enumerate(row["turns"]):
            if message["role"] == "user":
                record = messages[row["conversation_id"], turn]
                assert record["kind"] in (KINDS if turn else {"first_request"})
                assert not record["feedback"] or record["feedback"] in message["content"]
                assert bool(record["feedback"]) == (record["kind"] == "reattempt_with_feedback")
                assert (record["satisfaction_before"] is None) == (turn == 0)


def test_user_histories_are_in_time_order_by_conversation(world):
    _, rows, _ = world
    by_user = collections.defaultdict(list)
    for row in rows:
        by_user[row["user_id"]].append(row["timestamp"])
    assert all(times == sorted(times) and len(set(times)) == 4 for times in by_user.values())


def test_byte_identical_in_another_process_with_another_hash_seed():
    code = ("import json, rlhi.simulate as s; rows, truth = s.simulate_logs(s.make_users(12, 5), 3, 5);"
            "import hashlib; print(hashlib.sha256(json.dumps([rows, truth], default=str).encode()).hexdigest())")
    digests = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                              env={**os.environ, "PYTHONHASHSEED": seed}).stdout for seed in ("1", "2")}
    rows, truth = simulate_logs(make_users(12, 5), 3, 5)
    digests.add(hashlib.sha256(json.dumps([rows, truth], default=str).encode()).hexdigest() + "\n")
    assert len(digests) == 1
    assert simulate_logs(make_users(12, 6), 3, 6)[0] != rows


def test_conversations_do_not_depend_on_the_other_users():
    users = make_users(10, seed=1)
    all_rows, _ = simulate_logs(users, 3, seed=1)
    one, _ = simulate_logs(users[4:5], 3, seed=1)
    assert [row for row in all_rows if row["user_id"] == users[4].user_id] == one


def test_a_live_user_says_what_the_log_says(world):
    users, rows, _ = world
    for user in users[:20]:
        live = SimulatedUser(user, seed=3)
        for row in (row for row in rows if row["user_id"] == user.user_id):
            turns = [{"role": "user", "content": live.request()}]
            while True:
                turns.append({"role": "assistant", "content": scripted_assistant([turns])[0]})
                if (message := live.reply(turns[-1]["content"])) is None:
                    break
                turns.append({"role": "user", "content": message})
            assert turns == row["turns"]


def test_a_user_who_left_says_so():
    user = SimulatedUser(make_users(1)[0])
    with pytest.raises(RuntimeError, match=r"call request\(\) first"):
        user.reply("Hello.")
    user.request()
    while user.reply("I cannot help with that.") is not None:
        pass
    with pytest.raises(RuntimeError, match="has left"):
        user.reply("Hello.")
    assert user.request()


@pytest.mark.parametrize("n", [0, 1, 7, 48, 1268])
def test_shares_are_exact(n):
    counts = collections.Counter(u.behaviour for u in make_users(n))
    assert sum(counts.values()) == n
    assert all(abs(counts[b] - n * share) < 1 for b, share in SHARES.items())


def test_users_have_two_or_three_tastes_of_every_kind():
    users = make_users(1268)
    assert {len(u.tastes) for u in users} == {2, 3}
    seen = collections.Counter((d, v) for u in users for d, v in u.tastes.items())
    assert set(seen) == {(d, v) for d, values in DIMENSIONS.items() for v in values}
    assert len({u.user_id for u in users} | {u.user_id for u in make_users(200, split="test")}) == 1468
    assert make_users(1268) == users and make_users(1268, seed=1) != users


@pytest.mark.parametrize("arguments, words", [
    ({"split": "dev"}, "'dev'"), ({"shares": {"honest": 0.5}}, "add up to 1"), ({"shares": {"kind": 1.0}}, "kind"),
    ({"shares": {"honest": 1.5, "silent": -0.5}}, "add up to 1")])
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        make_users(3, **arguments)


def test_an_assistant_that_loses_answers_is_caught():
    with pytest.raises(ValueError, match="0 answers to 6 conversations"):
        simulate_logs(make_users(2), 3, assistant=lambda conversations: [])


def wordings(split):
    return {key: group[split] for key, group in read_data("wordings")["feedback"].items()}


def test_at_least_eight_wordings_for_every_taste_and_split():
    assert set(wordings("train")) == {f"{d}/{v}" for d, values in DIMENSIONS.items() for v in values}
    for split in ("train", "test"):
        assert all(len(set(group)) >= 8 for group in wordings(split).values())


def test_test_wordings_differ_from_training_in_words():
    def words(text):
        return frozenset(re.findall(r"\w+", text.lower()))
    lists = read_data("wordings")
    train = [w for group in wordings("train").values() for w in group]
    test = [w for group in wordings("test").values() for w in group]
    for name in ("missed", "again", "positive", "continuation", "hostile", "switch", "lead_in"):
        train += [w for w in lists[name]["train"] if w.strip()]
        test += [w for w in lists[name]["test"] if w.strip()]
    assert len(set(train)) == len(train) and len(set(test)) == len(test)
    closest = max((len(words(a) & words(b)) / len(words(a) | words(b)), a, b) for a in train for b in test)
    assert closest[0] <= 0.5, closest


def test_feedback_of_training_and_test_users_is_disjoint(world):
    _, _, truth = world
    _, held_out = simulate_logs(make_users(60, 3, "test"), 4, seed=3)
    said = [{r["feedback"].lower().rstrip(".!") for r in true_followups(t) if r["feedback"]} for t in (truth, held_out)]
    assert len(said[0]) > 80 and len(said[1]) > 50 and not said[0] & said[1]
    asked = [{r["request"].lower() for r in t if r["record"] == "message"} for t in (truth, held_out)]
    assert not asked[0] & asked[1]


def test_requests_do_not_repeat():
    size = yaml.safe_load((Path(__file__).parents[1] / "nbs" / "profiles" / "lab.yaml").read_text())
    users, held_out = make_users(size["train_users"]), make_users(size["test_users"], split="test")
    requests = []
    for user in users + held_out:
        live = SimulatedUser(user)
        requests += [live.request().lower().rstrip(".!") for _ in range(size["conversations_per_user"])]
    assert len(set(requests)) == len(requests) == (1268 + 200) * 6


def test_requests_of_training_and_test_are_about_other_subjects():
    domains = read_data("topics")["domains"].values()
    train, test = ({s.lower() for d in domains for s in d[split]} for split in ("train", "test"))
    assert len(train) >= 200 and len(test) >= 60 and not train & test


def test_requests_do_not_repeat_within_a_log(world):
    _, _, truth = world
    asked = [r["request"] for r in truth if r.get("kind") in ("first_request", "new_request")]
    assert len(set(asked)) == len(asked)


def test_honest_users_complain_only_about_what_is_wrong(world):
    users, rows, truth = world
    honest = {u.user_id: u for u in users if u.behaviour == "honest"}
    complaints = 0
    for record, answer in answers_before(rows, truth):
        if record["user_id"] in honest and record["kind"] == "reattempt_with_feedback":
            complaints += 1
            if record["dimension"] == "request":
                assert relevance(record["request"], answer) < 0.35
            else:
                assert honest[record["user_id"]].tastes[record["dimension"]] == record["value"]
                assert satisfies(record["dimension"], record["value"], answer) < 0.5
        if record["user_id"] in honest and record["kind"] == "positive_feedback":
            assert relevance(record["request"], answer) >= 0.35
    assert complaints > 100


def test_behaviours_differ_as_named(world):
    users, rows, truth = world
    by_user = {u.user_id: u for u in users}
    said = collections.defaultdict(list)
    for record in true_followups(truth):
        said[by_user[record["user_id"]].behaviour].append(record)
    assert not {r["kind"] for r in said["silent"]} - {"new_request", "continuation"}
    own = [by_user[r["user_id"]].tastes.get(r["dimension"]) == r["value"] for r in said["noisy"] if r["feedback"]]
    assert 0 < sum(own) < len(own) / 2
    assert any(r["dimension"] == "hostile" for r in said["malicious"])
    assert not any(r["dimension"] == "hostile" for b in BEHAVIOURS if b != "malicious" for r in said[b])
    against = [r for r in said["contradictory"] if r["feedback"] and r["dimension"] in DIMENSIONS
               and by_user[r["user_id"]].tastes[r["dimension"]] != r["value"]]
    assert against and all(r["value"] in DIMENSIONS[r["dimension"]] for r in against)


def test_about_a_quarter_of_followups_are_feedback(world):
    "The paper reports 26.51 % (digest)."
    _, _, truth = world
    kinds = collections.Counter(r["kind"] for r in true_followups(truth))
    assert set(kinds) == KINDS
    assert 0.22 < kinds["reattempt_with_feedback"] / sum(kinds.values()) < 0.31


def test_feedback_improves_what_it_is_about(world):
    "The scripted assistant follows about two in three complaints: the next answer meets the taste far more often."
    users, rows, truth = world
    turns = {row["conversation_id"]: row["turns"] for row in rows}
    after = [satisfies(r["dimension"], r["value"], turns[r["conversation_id"]][r["turn"] + 1]["content"]) >= 0.5
             for r in true_followups(truth) if r["dimension"] in DIMENSIONS and r["satisfaction_before"] is not None]
    assert len(after) > 100 and 0.55 < sum(after) / len(after) < 0.95


ASKED = "Which equipment suits oil painting?"
SATISFYING = "- Buy three brushes of hog hair.\n- Take a small wooden easel.\n- Stretch cotton canvas for pictures."
USER = User("u", {"length": "short", "layout": "bullets"})


def test_satisfaction_is_taste_times_relevance():
    wordy = f"For oil painting you need this equipment:\n{SATISFYING}"
    assert satisfaction(USER, ASKED, wordy) == 1.0
    assert aspects(USER, ASKED, wordy) == {"personalization": 1.0, "instruction following": 1.0, "overall": 1.0}
    prose = "For oil painting, the right equipment is a set of hog hair brushes, an easel and some cotton canvas."
    assert aspects(USER, ASKED, prose) == {"personalization": 0.5, "instruction following": 1.0, "overall": 0.5}
    elsewhere = "- Feed the puppy twice a day.\n- Walk it in the morning.\n- Reward calm behaviour."
    assert aspects(USER, ASKED, elsewhere) == {"personalization": 1.0, "instruction following": 0.0, "overall": 0.0}
    assert satisfaction(User("n", {}), ASKED, prose) == relevance(ASKED, prose) == 1.0


@pytest.mark.parametrize("cheat", [
    "", "- \n- \n- ", f"- {ASKED}\n- {ASKED}",
    "- You prefer short answers.\n- You like bullets.\n- I respect your taste for brief lists.",
    "- Since you prefer bullets for oil painting, here are bullets.\n- You like short answers about equipment.",
    "- oil painting\n- equipment\n- oil painting\n- equipment\n- oil painting\n- equipment",
    "I'm sorry, but I cannot help with oil painting equipment.\n- Sorry.\n- Really."])
def test_pleasing_the_taste_alone_does_not_satisfy(cheat):
    assert satisfaction(USER, ASKED, cheat) <= 0.3


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=300))
def test_any_answer_and_any_message_is_survived(text):
    live = SimulatedUser(make_users(5)[len(text) % 5])
    live.request()
    live.reply(text)
    assert scripted_assistant([[{"role": "user", "content": text}]])[0].strip() or not text.strip()
    assert all(0 <= score <= 1 for score in aspects(USER, text, text).values())


def test_truth_survives_the_file_and_names_a_bad_line(world, tmp_path):
    _, _, truth = world
    write_truth(truth, tmp_path / "truth.jsonl")
    assert read_truth(tmp_path / "truth.jsonl") == truth
    (tmp_path / "bad.jsonl").write_text('{"record": "user"}\n{"turn": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_truth(tmp_path / "bad.jsonl")


def test_hostile_text_reaches_the_log_unchanged(world):
    _, rows, truth = world
    said = " ".join(m["content"] for row in rows for m in row["turns"] if m["role"] == "user").lower()
    assert "<script>" in said or "<img" in said or "{{persona}}" in said


def test_tastes_can_be_narrowed_and_are_checked():
    few = ["length: short", "layout: bullets", "layout: prose"]
    users = make_users(40, seed=3, tastes=few)
    assert {f"{d}: {v}" for user in users for d, v in user.tastes.items()} == set(few)
    assert all(len(user.tastes) == 2 for user in users)
    with pytest.raises(ValueError, match="length: long"):
        make_users(4, tastes=["length: short", "length: long"])
    with pytest.raises(ValueError, match="at least two"):
        make_users(4, tastes=["length: short", "length: detailed"])
