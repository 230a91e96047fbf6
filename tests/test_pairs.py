"""Pairs: what stands in a prompt, which side is which, what the arms share, hashes, reruns, TRL."""
import json
import math
import random

import pytest

from rlhi.checkpoints import resolve_model
from rlhi.conversations import read_table, write_table
from rlhi.generate import Sampling, load_backend, read_prompt
from rlhi.local import load_model
from rlhi.pairs import (add_rewards, best_against_worst, feedback_cases, filter_pairs, guided_rewrites, keep_best,
                        logged_sft_rows, make_pair, pick, requests, rewrites_from_scratch, sample_candidates, sft_rows,
                        user_agnostic_rewards, user_based_rewards)
from rlhi.personas import system_message
from rlhi.rewards import PreferenceChecker
from rlhi.simulate import DIMENSIONS, NO_PREFERENCE

SHORT = Sampling(max_new_tokens=12)


def conversation(name, user, *texts, system=None):
    turns = [{"role": "system", "content": system}] if system else []
    turns += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"conversation_id": name, "user_id": user, "timestamp": None, "language": "English", "country": None,
            "model": None, "turns": turns, "source": "test"}


def followup(name, turn, user, kind, feedback=None):
    return {"conversation_id": name, "turn": turn, "user_id": user, "kind": kind, "probabilities": {}, "feedback": feedback}


ROWS = [
    conversation("c1", "ann", "How do I boil eggs?", "Long story.", "Shorter please. Ta", "Nine minutes.", "And pasta?", "Ten."),
    conversation("c2", "bob", "Name a river.", "The Rhine.", "Another, with a fact", "The Po.", "No, longer!", "The Po is long.",
                 system="Be kind."),
    conversation("c3", "cy", "Hello?", "Hi."),
]
FOLLOWUPS = [
    followup("c1", 2, "ann", "reattempt_with_feedback", "Shorter please."),
    followup("c1", 4, "ann", "new_request"),
    followup("c2", 3, "bob", "continuation"),
    followup("c2", 5, "bob", "reattempt_with_feedback"),
]


def persona(user, text, **values):
    return {"user_id": user, "persona": text, "conversations": [],
            "preferences": [{"dimension": d, "value": values.get(d, NO_PREFERENCE),
                             "strength": float(d in values), "evidence": []} for d in DIMENSIONS]}


PERSONAS = [persona("ann", "Likes short answers.", length="short"), persona("bob", "Likes detail.", length="detailed")]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return load_backend("tiny", store=tmp_path_factory.mktemp("store") / "answers.db", progress=False)


class Scorer:
    """Scores by a fixed table of texts; NaN for what is not in it."""
    name = "table"

    def __init__(self, **table):
        self.table, self.asked = table, []

    def score(self, prompts, answers, personas=None):
        self.asked += list(zip(prompts, answers, personas))
        return [self.table.get(a, math.nan) for a in answers]


# -- requests and feedback

def test_first_messages_and_new_requests_are_requests():
    found, counts = requests(ROWS, FOLLOWUPS)
    assert [(r["conversation_id"], r["turn"], len(r["messages"])) for r in found] == [("c1", 1, 1), ("c1", 5, 5), ("c2", 2, 2), ("c3", 1, 1)]
    assert all(r["messages"][-1]["role"] == "user" for r in found)
    assert counts == {"user messages": 7, "not a new request": 3, "too long": 0, "over the cap": 0, "requests": 4}
    assert [(r["conversation_id"], r["turn"]) for r in requests(ROWS)[0]] == [("c1", 1), ("c2", 2), ("c3", 1)]


def test_what_is_left_out_is_counted():
    found, counts = requests(ROWS, FOLLOWUPS, max_characters=30, limit=2)
    assert len(found) == 2 and counts["too long"] == 1 and counts["over the cap"] == 1
    assert counts["user messages"] == sum(v for k, v in counts.items() if k != "user messages")


def test_caps_do_not_depend_on_the_order_of_rows_and_grow_by_adding():
    cases = [{"user_id": f"u{i % 7}", "conversation_id": f"c{i}", "turn": 1} for i in range(200)]
    shuffled = random.Random(0).sample(cases, 200)
    assert pick(cases, 3, 15) == pick(shuffled, 3, 15)
    small, large = pick(cases, None, 10), pick(cases, None, 50)
    assert len(small) == 10 and all(c in large for c in small)
    assert max(sum(c["user_id"] == f"u{u}" for c in pick(cases, 2, None)) for u in range(7)) == 2


def test_feedback_cases_end_at_the_request():
    first, second = feedback_cases(ROWS, FOLLOWUPS)[0]
    assert first["messages"] == ROWS[0]["turns"][:1] and first["answer"] == "Long story." and first["turn"] == 1
    assert (first["message"], first["feedback"]) == ("Shorter please. Ta", "Shorter please.")
    assert second["messages"] == ROWS[1]["turns"][:4] and second["feedback"] == "No, longer!"


def test_followups_of_other_conversations_are_an_error():
    with pytest.raises(ValueError, match="turn 1 of c1: expected user, assistant, user up to there, found"):
        feedback_cases(ROWS, [followup("c1", 1, "ann", "reattempt_with_feedback")])
    assert feedback_cases(ROWS, [followup("elsewhere", 2, "x", "reattempt_with_feedback")])[0] == []


# -- guided rewrites

@pytest.fixture
def heard(tiny, monkeypatch):
    """Every conversation that the backend is asked to answer."""
    asked, real = [], tiny.candidates
    monkeypatch.setattr(tiny, "candidates", lambda c, n, s: asked.append(c) or real(c, n, s))
    return asked


def test_guided_rewrites_word_for_word(tiny, heard):
    pairs = guided_rewrites(ROWS, FOLLOWUPS, PERSONAS, tiny, sampling=SHORT)
    ann, bob = pairs
    originals, rewrites = heard
    assert ann["prompt"] == [system_message("Likes short answers."), ROWS[0]["turns"][0]] == originals[0]
    assert rewrites[0] == [*ann["prompt"], ann["rejected"][0], {"role": "user", "content": "Shorter please. Ta"}]
    assert "Shorter" not in json.dumps(ann["prompt"])  # the feedback helps the rewrite and is not in the pair
    assert ann["rejected"][0]["content"] != "Long story."
    assert [m["role"] for m in bob["prompt"]] == ["system", "user", "assistant", "user"]
    assert bob["prompt"][0]["content"] == system_message("Likes detail.")["content"] + "\n\nBe kind."
    assert (bob["turn"], bob["persona"], bob["method"]) == (4, "Likes detail.", "UGR")


def test_logged_answers_may_be_kept_and_the_prompt_file_used(tiny, heard):
    pairs = guided_rewrites(ROWS, FOLLOWUPS, None, tiny, regenerate=False, style="prompt", sampling=SHORT)
    assert len(heard) == 1 and [p["rejected"][0]["content"] for p in pairs] == ["Long story.", "The Po."]
    assert heard[0][0][-1]["content"] == read_prompt("guided_rewrite").fill(feedback="Shorter please.", request="How do I boil eggs?")
    assert pairs[0]["persona"] is None and pairs[0]["prompt"] == ROWS[0]["turns"][:1]
    with pytest.raises(ValueError, match="expected 'turn' or 'prompt'"):
        guided_rewrites(ROWS, FOLLOWUPS, None, tiny, style="magic")


def test_from_scratch_differs_in_the_chosen_side_only(tiny, heard):
    guided = guided_rewrites(ROWS, FOLLOWUPS, PERSONAS, tiny, sampling=SHORT)
    scratch = rewrites_from_scratch(guided, tiny, sampling=SHORT)
    for one, other in zip(guided, scratch, strict=True):
        assert (one["prompt"], one["rejected"]) == (other["prompt"], other["rejected"])
        assert other["chosen"] not in (one["chosen"], one["rejected"]) and other["method"] == "scratch"
    assert heard[-1] == [p["prompt"] for p in guided]


def test_of_several_rewrites_the_scorer_keeps_the_best(tiny):
    scorer = PreferenceChecker()
    one = guided_rewrites(ROWS, FOLLOWUPS, PERSONAS, tiny, scorer, sampling=SHORT)
    best = guided_rewrites(ROWS, FOLLOWUPS, PERSONAS, tiny, scorer, sampling=SHORT, n=4)
    for a, b in zip(one, best, strict=True):
        assert (a["prompt"], a["rejected"]) == (b["prompt"], b["rejected"]) and b["reward_chosen"] >= a["reward_chosen"]
    assert len(rewrites_from_scratch(best, tiny, scorer, PERSONAS, SHORT, n=4)) == len(best)
    with pytest.raises(ValueError, match="n=2 rewrites of each answer: expected n=1, or more and a scorer"):
        guided_rewrites(ROWS, FOLLOWUPS, None, tiny, sampling=SHORT, n=2)


def test_a_kept_pair_goes_before_a_cut_one_of_higher_reward():
    low, high = ({**make_pair("UGR", candidate([]), None, ROWS[0]["turns"][:1], text, "No.", end)} for text, end in (("a", "stop"), ("b", "length")))
    assert keep_best([[high, low]], Scorer(**{"a": 1, "b": 2, "No.": 0}), None)[0]["chosen"][0]["content"] == "a"


def test_a_scorer_sees_the_prompt_without_the_persona_text_and_the_persona_row(tiny):
    table = Scorer(better=0.9, worse=0.1)
    bare = make_pair("UGR", feedback_cases(ROWS, FOLLOWUPS)[0][1], "Likes detail.",
                     [system_message("Likes detail."), *ROWS[0]["turns"][:1]], "better", "worse")
    scored, = add_rewards([bare], table, PERSONAS)
    assert (scored["reward_chosen"], scored["reward_rejected"]) == (0.9, 0.1) and scored["kept"]
    assert [(p, a, row["user_id"]) for p, a, row in table.asked] == [(ROWS[0]["turns"][:1], "better", "bob"), (ROWS[0]["turns"][:1], "worse", "bob")]
    assert add_rewards([bare], None, PERSONAS) == [bare]
    missing, = add_rewards([bare], Scorer(better=0.9), PERSONAS)
    assert (missing["kept"], missing["reason"], missing["reward_chosen"]) == (False, "no reward", None)


# -- candidates

def candidate(texts, finish=None, user="ann"):
    return {"conversation_id": "c1", "user_id": user, "turn": 1, "messages": ROWS[0]["turns"][:1],
            "persona": "Likes short answers.", "candidates": texts, "finish": finish or ["stop"] * len(texts)}


def test_best_and_worst():
    pair, = best_against_worst([candidate(["b", "a", "d", "c"])], Scorer(a=1, b=2, c=3, d=4), PERSONAS)
    assert (pair["chosen"][0]["content"], pair["rejected"][0]["content"]) == ("d", "a")
    assert (pair["reward_chosen"], pair["reward_rejected"]) == (4.0, 1.0)
    pair, = best_against_worst([candidate(["x", "a", "b"])], Scorer(a=1, b=2), PERSONAS)  # x has no score
    assert (pair["chosen"][0]["content"], pair["rejected"][0]["content"]) == ("b", "a")
    pair, = best_against_worst([candidate(["x", "y"])], Scorer(), PERSONAS)
    assert (pair["kept"], pair["reason"]) == (False, "no reward")
    pair, = best_against_worst([candidate(["a", "b"])], Scorer(a=1, b=1), PERSONAS)
    assert filter_pairs([pair], answer_characters=(1, 9))[0]["reason"] == "tie"


@pytest.mark.parametrize("worst, best, finish, dropped", [
    ("Yes.", "And so", ["stop", "length"], True),  # only the chosen side is cut
    ("Yes.", "So.", ["length", "stop"], False),
    ("And then", "And so", ["length", "length"], False),  # both are cut: the ending tells nothing
    ("```\ncode.", "And so", ["length", "length"], False),
])
def test_a_cut_chosen_answer_against_a_finished_one_is_dropped(worst, best, finish, dropped):
    pair, = best_against_worst([candidate([worst, best], finish)], Scorer(**{worst: 1, best: 2}), PERSONAS)
    assert (not pair["kept"], pair["reason"] == "cut") == (dropped, dropped)


def test_the_cut_filter_may_be_left_off():
    cut, = best_against_worst([candidate(["a.", "b"], ["stop", "length"])], Scorer(**{"a.": 1, "b": 2}), PERSONAS)
    assert filter_pairs([cut])[0]["reason"] == "cut" and filter_pairs([cut], cut=False, answer_characters=(1, 9))[0]["kept"]


def test_arms_share_candidates_and_nothing_is_computed_twice(tiny):
    sampling = Sampling(max_new_tokens=20, seed=5)
    wanted, _ = requests(ROWS, FOLLOWUPS)
    candidates = sample_candidates(wanted, PERSONAS, tiny, 4, sampling)
    assert tiny.last_stats["computed"] == 16
    assert [len(set(c["candidates"])) for c in candidates] == [4] * 4
    checker = PreferenceChecker(prior=0.1)
    ubr = best_against_worst(candidates, checker, PERSONAS)
    agnostic = user_agnostic_rewards(candidates, checker)
    assert user_based_rewards(ROWS, PERSONAS, tiny, checker, 4, sampling, FOLLOWUPS) == ubr
    assert tiny.last_stats["computed"] == 0
    assert [p["prompt"] for p in ubr] == [p["prompt"] for p in agnostic]
    assert {p["method"] for p in agnostic} == {"agnostic"}
    without = user_agnostic_rewards(candidates, checker, persona_in_prompt=False)
    assert all(p["persona"] is None and p["prompt"] == c["messages"] for p, c in zip(without, candidates))


def test_user_agnostic_scoring_is_not_told_who_asks():
    table = Scorer(a=1, b=2)
    user_agnostic_rewards([candidate(["a", "b"])], table)
    assert [row for _, _, row in table.asked] == [None, None]
    assert all("Likes short" not in json.dumps(prompt) for prompt, _, _ in table.asked)


def test_the_same_answers_change_places_with_the_user():
    short = "Boil eggs nine minutes, then cool them quickly under cold running water."
    long = " ".join(f"{short} In kitchen {i} the cook tried {i * 3} eggs and wrote down what happened to every yolk." for i in range(6))
    ann, bob = best_against_worst([candidate([short, long]), candidate([short, long], user="bob")], PreferenceChecker(), PERSONAS)
    assert (ann["chosen"][0]["content"], bob["chosen"][0]["content"]) == (short, long)


# -- other arms, ids, tables

def test_sft_rows():
    kept, dropped = (make_pair("UGR", candidate([]), None, ROWS[0]["turns"][:1], "yes", "no.", end) for end in ("stop", "length"))
    row, = sft_rows([kept, dropped])
    assert (row["prompt"], row["completion"]) == (ROWS[0]["turns"][:1], [{"role": "assistant", "content": "yes"}])
    logged = logged_sft_rows(ROWS, PERSONAS)
    assert [(r["conversation_id"], r["turn"]) for r in logged] == [("c1", 1), ("c1", 3), ("c1", 5), ("c2", 2), ("c2", 4), ("c2", 6), ("c3", 1)]
    assert logged[0]["prompt"] == [system_message("Likes short answers."), ROWS[0]["turns"][0]]
    assert len(logged_sft_rows(ROWS, None, max_characters=30)) < len(logged)


def test_ids_are_the_same_in_every_process_and_change_with_the_text():
    made = make_pair("UGR", candidate([]), None, ROWS[0]["turns"][:1], "yes \ud800", "no")  # a lone surrogate too
    assert made["pair_id"] == make_pair("UGR", candidate([]), None, ROWS[0]["turns"][:1], "yes \ud800", "no")["pair_id"]
    assert made["pair_id"] == "7cdb62c85bb70311"
    assert made["pair_id"] != make_pair("UBR", candidate([]), None, ROWS[0]["turns"][:1], "yes \ud800", "no")["pair_id"]


def test_a_second_run_gives_the_same_bytes(tmp_path, capsys):
    files = []
    for name in ("one", "two"):  # two runs that share nothing
        backend = load_backend("tiny", store=tmp_path / f"{name}.db", progress=False)
        pairs = guided_rewrites(ROWS, FOLLOWUPS, PERSONAS, backend, PreferenceChecker(), sampling=SHORT)
        pairs += user_based_rewards(ROWS, PERSONAS, backend, PreferenceChecker(), 3, SHORT, FOLLOWUPS)
        write_table(filter_pairs(pairs, cut=False, min_gap=None), "pairs", tmp_path / f"{name}.parquet")
        files.append((tmp_path / f"{name}.parquet").read_bytes())
    assert files[0] == files[1]
    assert read_table("pairs", tmp_path / "one.parquet") == filter_pairs(pairs, cut=False, min_gap=None)
    assert "4 answers of at most 12 tokens" in capsys.readouterr().out


def test_pairs_load_in_trl_as_they_are(tiny, tmp_path):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    pairs = user_based_rewards(ROWS, PERSONAS, tiny, PreferenceChecker(), 3, SHORT, FOLLOWUPS)
    config = DPOConfig(output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True,
                       save_strategy="no", disable_tqdm=True, bf16=False)
    model, _ = load_model(resolve_model("tiny"), dtype="float32")  # a backend's own model may be packed for inference
    trainer = DPOTrainer(model, args=config, train_dataset=Dataset.from_list(pairs), processing_class=tiny.tokenizer)
    sample = trainer.train_dataset[0]
    assert "Likes short answers." in tiny.tokenizer.decode(sample["prompt_ids"])
    assert tiny.tokenizer.decode(sample["chosen_ids"]).startswith(pairs[0]["chosen"][0]["content"][:20])
    assert math.isfinite(trainer.train().training_loss)


def test_real_messages_are_counted_and_none_is_lost(shared_data):
    from rlhi.conversations import read_conversations
    rows, _ = read_conversations(shared_data / "wildchat", limit=300)
    found, counts = requests(rows, max_characters=2000)
    assert counts["user messages"] == sum(t["role"] == "user" for row in rows for t in row["turns"])
    assert counts["user messages"] == sum(v for k, v in counts.items() if k != "user messages")
    assert 0 < counts["requests"] <= len(rows) == len({r["conversation_id"] for r in rows})
    pairs = [make_pair("UBR", r, None, r["messages"], r["messages"][-1]["content"], "Another answer.") for r in found]
    assert len(filter_pairs(pairs, language=True)) == len(found) == len({p["pair_id"] for p in pairs})
