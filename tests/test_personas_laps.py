"""What people said they like, against what they stated as their preferences themselves: LAPS (MIT, informagi/laps).

Run with `pytest -m slow -s tests/test_personas_laps.py` to see the table. Words are content words; a value counts as
found where at least half of its words are in what was extracted. Intervals are a bootstrap over workers."""
import json

import numpy as np
import pytest

from rlhi.feedback import content_words, split_sentences, stated_preferences


def sessions(folder, split):
    "One entry per session: worker, turns, values stated by the worker, which of them are likes and dislikes."
    for topic in ("recipe", "movie"):
        for person in json.loads((folder / f"{topic}_dataset_{split}.json").read_text("utf-8")):
            for session in person["sessions"]:
                turns = [{"role": turn["role"].lower(), "content": turn["message"]} for turn in session["dialogue"]]
                values = [(key, str(value)) for key, value in session["preferences"].items() for value in value]
                values = [(key, set(content_words(value))) for key, value in values]
                if any(words for _, words in values):
                    yield person["worker_id"], turns, [(key, words) for key, words in values if words]


def counts(values, said):
    "Words right, words said, words stated; values found, values."
    stated = set().union(*(words for _, words in values))
    found = sum(len(words & said) >= len(words) / 2 for _, words in values)
    return [len(said & stated), len(said), len(stated), found, len(values)]


def measures(table):
    right, said, stated, found, values = np.moveaxis(np.asarray(table, float).sum(-2), -1, 0)
    return np.stack([right / said, right / stated, 2 * right / (said + stated), found / values], -1)


def with_interval(table, workers, seed=0, resamples=1000):
    "Precision, recall, F1, share of values found; each with a 95 % interval."
    groups = [np.sum([row for row, worker in zip(table, workers) if worker == name], axis=0) for name in dict.fromkeys(workers)]
    draws = np.random.default_rng(seed).integers(len(groups), size=(resamples, len(groups)))
    low, high = np.percentile(measures(np.array(groups)[draws]), [2.5, 97.5], axis=0)
    return [f"{point:.3f} [{a:.3f}, {b:.3f}]" for point, a, b in zip(measures(groups), low, high)]


@pytest.mark.slow
def test_stated_preferences_against_laps(shared_data):
    rows = list(sessions(shared_data / "laps", "val"))
    workers = [worker for worker, _, _ in rows]
    found = [stated_preferences(turns) for _, turns, _ in rows]
    extracted = [set().union(*(item["words"] for item in mine)) for mine in found]
    everything = [set(content_words(" ".join(t["content"] for t in turns if t["role"] == "user"))) for _, turns, _ in rows]
    unasked = [set(content_words(" ".join(s for t in turns if t["role"] == "user" for s in split_sentences(t["content"])
                                          if not s.endswith("?")))) for _, turns, _ in rows]
    other = [extracted[(i + len(rows) // 2) % len(rows)] for i in range(len(rows))]
    arms = {"stated_preferences": extracted, "all words but questions": unasked, "all words of the user": everything,
            "another session's": other}
    tables = {name: [counts(values, said) for (_, _, values), said in zip(rows, arm)] for name, arm in arms.items()}
    print(f"\nLAPS val: {len(rows)} sessions, {len(set(workers))} workers; precision, recall, F1 of words, values found")
    for name, table in tables.items():
        print(f"{name:26}", *with_interval(table, workers), sep="  ")
    stances = [(("dislike" in key or key == "allergies"), item["stance"] == "avoids") for (_, _, values), mine in zip(rows, found)
               for key, words in values if key.endswith("like") or key == "allergies"
               for item in mine if words <= set(item["words"])]
    agree = np.mean([a == b for a, b in stances])
    print(f"stance (likes or avoids) as in LAPS: {agree:.3f} of {len(stances)} statements")

    score = {name: measures(table) for name, table in tables.items()}
    assert score["stated_preferences"][2] > score["all words of the user"][2] + 0.02  # better than taking everything
    assert score["stated_preferences"][3] > 0.7 and score["another session's"][3] < 0.2
    assert agree > 0.75
