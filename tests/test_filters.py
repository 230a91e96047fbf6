"""Filters: each reason by a pair made for it, quantiles, nothing lost, precision and recall by hand, safe display."""
import random
import statistics

import pytest

from rlhi.filters import (REASONS, RIP, examples_by_reason, filter_pairs, filter_quality, funnel, is_refusal,
                          pair_accuracy, show_pair, similarity, simulated_truth, threshold, wilson)
from rlhi.simulate import User

GOOD = "Water the plant twice a week, and keep it away from direct sun."
BAD = "Plants are living things which people have kept for centuries in many places."


def pair(chosen=GOOD, rejected=BAD, high=0.8, low=0.3, method="UGR", request="How do I keep a fern?", number=[0], **more):
    number[0] += 1
    return {"pair_id": f"{number[0]:016x}", "user_id": "u", "conversation_id": f"c{number[0]}", "turn": 1,
            "method": method, "persona": None, "prompt": [{"role": "user", "content": f"{request} ({number[0]})"}],
            "chosen": [{"role": "assistant", "content": chosen}], "rejected": [{"role": "assistant", "content": rejected}],
            "reward_chosen": high, "reward_rejected": low, "ref_chosen_logp": None, "ref_rejected_logp": None,
            "ref_key": None, "kept": True, "reason": None, **more}


def reason(p, **options):
    return filter_pairs([p], **options)[0]["reason"]


GERMAN = "Gießen Sie den Farn zweimal in der Woche und halten Sie ihn von der direkten Sonne fern."
LONG_REQUEST = "Could you please tell me how I should look after the fern in my bathroom during the winter?"


@pytest.mark.parametrize("expected, made, options", [
    (None, pair(), {}),
    ("no reward", pair(kept=False, reason="no reward"), {}),
    ("cut", pair(kept=False, reason="cut"), {}),
    (None, pair(kept=False, reason="cut"), {"cut": False}),
    ("empty answer", pair(chosen=" \n"), {}),
    ("empty answer", pair(rejected="..."), {}),
    ("identical", pair(chosen=GOOD, rejected=GOOD.replace(" ", "  ")), {}),
    ("near-identical", pair(chosen=GOOD * 5, rejected=(GOOD * 5).upper() + "!"), {}),
    ("refusal", pair(chosen="I'm sorry, but I can't help with that."), {}),
    (None, pair(chosen="I'm sorry, but I can't help with that."), {"refusals": False}),
    ("language", pair(chosen=GERMAN, request=LONG_REQUEST), {"language": True}),
    (None, pair(chosen=GERMAN, request=LONG_REQUEST), {}),
    ("prompt length", pair(), {"prompt_characters": (1, 10)}),
    ("answer length", pair(chosen="Yes, twice."), {"answer_characters": (20, 100)}),
    ("answer length", pair(rejected="no " * 50), {"answer_characters": (2, 100)}),
    ("rejected length", pair(), {"min_rejected_characters": 200}),
    ("tie", pair(high=0.5, low=0.5), {}),
    ("chosen reward", pair(), {"min_chosen_reward": 0.9}),
    ("rejected reward", pair(), {"min_rejected_reward": 0.4}),
    ("gap too small", pair(high=0.3, low=0.8), {}),
    (None, pair(high=0.3, low=0.8), {"min_gap": None}),
    ("gap too small", pair(), {"min_gap": 0.6}),
    ("gap too large", pair(), {"max_gap": 0.4}),
    (None, pair(high=None, low=None), {"min_chosen_reward": 0.9, "max_gap": 0.1}),
])
def test_each_reason_by_a_pair_made_for_it(expected, made, options):
    assert reason(made, **options) == expected
    assert expected is None or expected in REASONS


def test_copies_of_another_user_are_no_duplicates():
    victim = pair(request="How do I keep a fern?", number=[6])
    copies = [{**victim, "user_id": f"malicious {i}"} for i in range(5)]
    marked = filter_pairs([*copies, victim, {**victim}])
    assert [p["reason"] for p in marked] == [None] * 6 + ["duplicate"]


def test_the_second_of_two_equal_pairs_is_a_duplicate_within_its_arm_only():
    first, other_arm = pair(), pair(method="UBR")
    again = {**first, "pair_id": "x", "chosen": [{"role": "assistant", "content": GOOD.upper() + " "}]}
    other_arm["prompt"] = first["prompt"]
    assert [p["reason"] for p in filter_pairs([first, again, other_arm])] == [None, "duplicate", None]


def test_no_pair_is_lost_and_none_is_changed():
    rng = random.Random(0)
    pairs = [pair(high=rng.random(), low=rng.random(), chosen=rng.choice([GOOD, "", BAD, "Sorry, no."]),
                  method=rng.choice(["UGR", "UBR"])) for _ in range(200)]
    before = repr(pairs)
    marked = filter_pairs(pairs, min_chosen_reward="q0.3", max_gap="q0.8")
    assert repr(pairs) == before
    assert [p["pair_id"] for p in marked] == [p["pair_id"] for p in pairs]
    assert all(p["kept"] == (p["reason"] is None) for p in marked)
    assert {k: v for k, v in marked[0].items() if k not in ("kept", "reason")} == \
        {k: v for k, v in pairs[0].items() if k not in ("kept", "reason")}
    for method in ("UGR", "UBR"):
        rows = [r for r in funnel(marked) if r["method"] == method]
        dropped = sum(r["pairs"] for r in rows if r["step"] not in ("made", "kept"))
        assert rows[0]["pairs"] == dropped + rows[-1]["pairs"] == sum(p["method"] == method for p in pairs)
        assert rows[-1]["left"] == rows[-1]["pairs"] == sum(p["kept"] for p in marked if p["method"] == method)


def test_filters_do_the_same_twice_and_for_each_arm_alone():
    rng = random.Random(1)
    pairs = [pair(high=rng.random(), low=rng.random(), method=m) for m in ("UGR", "UBR") for _ in range(50)]
    together = filter_pairs(pairs, **RIP)
    assert together == filter_pairs(pairs, **RIP)
    assert together == filter_pairs(pairs[:50], **RIP) + filter_pairs(pairs[50:], **RIP)


def test_quantiles_are_those_of_the_standard_library():
    sample = [random.Random(2).random() for _ in range(101)]
    cuts = statistics.quantiles(sample, n=20, method="inclusive")
    for i, cut in enumerate(cuts, 1):
        assert threshold(f"q{i / 20}", sample) == pytest.approx(cut, abs=1e-12)
    assert (threshold("q0", sample), threshold("q1", sample)) == (min(sample), max(sample))
    assert threshold(0.3, sample) == 0.3 and threshold(None, sample) is None and threshold("q0.5", []) is None
    for wrong in ("0.5", "q1.5", "median", "q-0.1"):
        with pytest.raises(ValueError, match="expected a number, None or a quantile"):
            threshold(wrong, sample)


def test_rip_keeps_what_lies_on_the_right_side_of_each_median():
    """An independent computation: numpy's median on each of the three quantities."""
    import numpy as np
    rng = random.Random(3)
    pairs = [pair(high=0.5 + rng.random(), low=0.5 * rng.random(), rejected=" ".join(rng.choices(BAD.split(), k=rng.randint(5, 60))))
             for _ in range(301)]
    lengths = np.array([len(p["rejected"][0]["content"]) for p in pairs])
    low = np.array([p["reward_rejected"] for p in pairs])
    gap = np.array([p["reward_chosen"] - p["reward_rejected"] for p in pairs])
    expected = (lengths >= np.median(lengths)) & (low >= np.median(low)) & (gap <= np.median(gap))
    assert [p["kept"] for p in filter_pairs(pairs, **RIP)] == expected.tolist()


def test_similarity_is_the_jaccard_index_of_word_triples():
    assert similarity("a b c d", "A, b; c d!") == 1.0
    assert similarity("a b c d", "a b c x") == pytest.approx(1 / 3)
    assert similarity("a b", "a b") == 1.0 and similarity("a b", "a") == 0.0
    assert similarity("a b c", "d e f") == 0.0


@pytest.mark.parametrize("text, refusal", [
    ("I'm sorry, but I can't do that.", True), ("I’m sorry, as an AI I have no hands.", True), ("Sorry, no.", True),
    ("As an AI language model, I", True), ("Unfortunately, I cannot browse.", True), ("抱歉，我无法", True),
    ("Извините, я не могу", True), ("I cannot stress enough how good soup is.", True),  # the price of a simple rule
    ("Sorrel soup needs an hour.", False), ("To say sorry, write a card.", False), ("", False)])
def test_refusals(text, refusal):
    assert is_refusal(text) is refusal


# -- measured against a truth

def test_precision_and_recall_by_hand():
    truth = {}

    def made(gap, **more):
        p = pair(**more)
        truth[p["pair_id"]] = gap
        return p
    pairs = [made(1), made(1), made(-1), made(0),  # kept: two right, one wrong, one level
             made(-1, high=0.5, low=0.5), made(1, high=0.5, low=0.5),  # ties: one bad of two
             made(-1, chosen="I'm sorry, no."), made(-1, chosen="I cannot.")]  # refusals: both bad
    marked = filter_pairs([{**p, "prompt": [{"role": "user", "content": p["pair_id"]}]} for p in pairs])
    made_row, kept = pair_accuracy(marked, lambda p: truth[p["pair_id"]])
    assert (made_row["n"], made_row["right"], made_row["wrong"], made_row["level"]) == (8, 3, 4, 1)
    assert (kept["n"], kept["right"], kept["wrong"], kept["level"], kept["share"]) == (4, 2, 1, 1, pytest.approx(2 / 3))
    rows = {r["reason"]: r for r in filter_quality(marked, lambda p: truth[p["pair_id"]])}
    assert (rows["tie"]["precision"], rows["tie"]["recall"]) == (0.5, 0.2)
    assert (rows["refusal"]["precision"], rows["refusal"]["recall"]) == (1.0, 0.4)
    assert (rows["all filters"]["precision"], rows["all filters"]["recall"]) == (0.75, pytest.approx(0.6))


def test_wilson_interval_equals_published_values():
    # Newcombe 1998, table I, method 3 (score without continuity correction): 81/263, 15/148, 0/20, 1/29
    for hits, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)):
        assert wilson(hits, n, 1.959964) == (pytest.approx(low, abs=6e-5), pytest.approx(high, abs=6e-5))
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)


def test_simulated_truth_prefers_what_the_taste_and_the_request_want():
    users = [User("u", {"length": "short"})]
    request = "How do I keep tomatoes healthy in a small garden?"
    short = "Water tomatoes at the root each morning, feed the garden soil weekly, and keep leaves dry and healthy."
    long = " ".join(f"{short} Point {i} concerns plot {i * 7}, where gardener {i} saw effect {i * 3}." for i in range(8))
    beside = "Sand the wood, then paint it twice."
    truth = simulated_truth(users)
    assert truth(pair(short, long, request=request)) > 0.4
    assert truth(pair(beside, long, request=request)) <= 0 < truth(pair(short, beside, request=request))


# -- display

EVIL = "<script>alert(1)</script> **bold** [x](javascript:0) \u202egnp.exe\u200b"


def test_what_users_wrote_cannot_become_html():
    shown = pair(EVIL, EVIL, request=EVIL, persona=EVIL, user_id=EVIL, method="UGR")
    shown["prompt"].insert(0, {"role": "system", "content": EVIL})
    markup = show_pair(shown)._repr_html_()
    assert "<script" not in markup and markup.count("&lt;script&gt;") == 5
    assert "\u202e" not in markup and "\\u202e" in markup
    assert not hasattr(show_pair(shown), "_repr_markdown_")
    text = str(show_pair(shown))
    assert "<script>" in text and "\u202e" not in text and "\\u200b" in text
    assert "reward 0.800" in text and "reward 0.300" in text


def test_examples_are_given_for_every_reason_that_occurred():
    marked = filter_pairs([pair(high=0.5, low=0.5), pair(high=0.4, low=0.4), pair(chosen=""), pair()])
    found = examples_by_reason(marked, n=1)
    assert list(found) == ["empty answer", "tie"] and len(found["tie"]) == 1
    assert len(examples_by_reason(marked, n=5)["tie"]) == 2
