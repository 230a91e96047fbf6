"""The checkers of tastes and of relevance: clear cases, cases that try to cheat, and any Unicode text."""
import json
import re
import statistics
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhi.checkers import DIMENSIONS, NO_PREFERENCE, read_data, relevance, satisfies

FILLER = ("Keep the tools clean and close at hand while you work. Look at the weather before you begin. "
          "Rest when the light fades and start again in the morning. Write down what you changed. ")
SHORT = "Cut the old wood in winter and leave three strong shoots on each plant."
LONG = FILLER * 4
BULLETS = "- Clean the tools first.\n- Look at the weather.\n- Cut the old wood."
STEPS = "1. Clean the tools first.\n2. Look at the weather.\n3. Cut the old wood."

EASY = "In simple terms, you cut the old bits. Think of it as a hair cut. The easy part is the top."
TECHNICAL = ("Calibrate the stochastic parameters; asymptotic variance and covariance dominate heuristic regression "
             "thresholds.")

CLEAR = [  # dimension, value, a text that fully satisfies, a text that fully violates
    ("length", "short", SHORT, LONG),
    ("length", "detailed", LONG, SHORT),
    ("layout", "bullets", BULLETS, FILLER),
    ("layout", "bullets", BULLETS, STEPS),
    ("layout", "numbered steps", STEPS, BULLETS),
    ("layout", "numbered steps", STEPS, FILLER),
    ("layout", "prose", FILLER, BULLETS),
    ("layout", "prose", FILLER, STEPS),
    ("headings", "headings", f"## Before\n{SHORT}\n\n## After\n{SHORT}", FILLER),
    ("examples", "examples", f"{FILLER}For example, a neighbour cut his roses in March.", FILLER),
    ("tone", "casual", "Hey, don't worry, it's gonna be fun!", "Furthermore, appropriate care is therefore advisable."),
    ("tone", "formal", "Furthermore, appropriate care is therefore advisable.", "Hey, don't worry, it's gonna be fun!"),
    ("expertise", "beginner", EASY,
     TECHNICAL),
    ("expertise", "expert",
     TECHNICAL,
     EASY),
    ("figures", "figures", "Wait 14 days and water with 2.5 litres.", FILLER),
    ("closing", "closing question", f"{FILLER}Would you like to hear more?", FILLER),
    ("closing", "no closing question", FILLER, f"{FILLER}Would you like to hear more?"),
]


@pytest.mark.parametrize("dimension, value, good, bad", CLEAR,
                         ids=[f"{d}-{v}-{i}" for i, (d, v, *_) in enumerate(CLEAR)])
def test_clear_cases_are_one_and_zero(dimension, value, good, bad):
    assert satisfies(dimension, value, good) == 1.0
    assert satisfies(dimension, value, bad) == 0.0


def test_every_taste_has_a_clear_case():
    assert {(d, v) for d, v, *_ in CLEAR} == {(d, v) for d, values in DIMENSIONS.items() for v in values}


@pytest.mark.parametrize("mark", ["-", "*", "•", "+", "–", "‣", "  -", "\t*"])
def test_any_bullet_mark(mark):
    text = "\n".join(f"{mark} item number {word} of the list" for word in ("one", "two", "three"))
    assert satisfies("layout", "bullets", text) == 1.0
    assert satisfies("layout", "prose", text) == 0.0


@pytest.mark.parametrize("form", ["{}. do it", "{}) do it", "({}) do it", "**{}. Title** do it", "Step {}: do it",
                                  "**{}.** do it",
                                  "### {}. do it", "Step {}. do it"])
def test_any_numbering_is_steps_and_never_bullets_or_figures(form):
    text = "\n".join(form.format(i) + " well with care" for i in (1, 2, 3))
    assert satisfies("layout", "numbered steps", text) == 1.0
    assert satisfies("layout", "bullets", text) == 0.0
    assert satisfies("figures", "figures", text) == 0.0


@pytest.mark.parametrize("text", [
    "One bullet is no list:\n- " + FILLER,
    "---\n" + FILLER + "\n***\n" + FILLER,  # rules
    "**Bold** start of a paragraph. " + FILLER + "\n*Emphasis* starts the next. " + FILLER,
    "-5 degrees is cold.\n-3 degrees is warmer. " + FILLER,
    "2.5 litres of water are enough.\n3.5 are too much. " + FILLER,
    "The war ended in\n1945. " + FILLER,
])
def test_lookalikes_are_prose(text):
    assert satisfies("layout", "prose", text) == 1.0


def test_code_blocks_are_no_lists_headings_or_figures():
    code = "```yaml\n# settings\n- one: 12\n- two: 13\n1. three\n2. four\n```\n"
    text = FILLER + "\n" + code + FILLER
    assert satisfies("layout", "prose", text) == 1.0
    assert satisfies("headings", "headings", text) == 0.0
    assert satisfies("figures", "figures", text) == 0.0
    assert satisfies("layout", "prose", code) == 0.0  # nothing but code is not prose either


def test_nested_bullets_share_the_list():
    text = "1. Clean the tools\n   - knife and saw\n   - rake and hoe\n2. Cut the wood\n   - old wood\n   - dead wood"
    bullets, steps = satisfies("layout", "bullets", text), satisfies("layout", "numbered steps", text)
    assert 0 < bullets < 1 and 0 < steps < 1 and bullets + steps == pytest.approx(1)


def test_one_heading_is_half_and_headings_without_text_are_none():
    assert satisfies("headings", "headings", f"# Title\n{SHORT}") == 0.5
    assert satisfies("headings", "headings", f"**Title**\n{SHORT}\n\n**Other:**\n{SHORT}") == 1.0
    assert satisfies("headings", "headings", f"Title\n=====\n{SHORT}\n\nOther\n-----\n{SHORT}") == 1.0
    assert satisfies("headings", "headings", "# A\n# B\n# C\n") == 0.0
    assert satisfies("headings", "headings", "#hashtag #another\n" + SHORT) == 0.0


def test_examples_need_a_case_after_the_words():
    assert satisfies("examples", "examples", "I can give examples. For example.") == 0.0
    assert satisfies("examples", "examples", "Use hard wood such as oak.") == 0.5
    assert satisfies("examples", "examples", "**Example:** the oak in our yard grew well.") == 1.0


def test_figures_must_differ():
    assert satisfies("figures", "figures", "Wait 5 minutes.") == 0.5
    assert satisfies("figures", "figures", "5 5 5 5 5") == 0.5
    assert satisfies("figures", "figures", "In step 1 and step 2 you wait.") == 0.0


@pytest.mark.parametrize("end", ["?", "? ", "?**", "?\n\n", '?"', "？", "? 😊"])
def test_closing_question_with_decoration(end):
    assert satisfies("closing", "closing question", FILLER + "Would you like to hear more" + end) == 1.0


def test_closing_is_about_the_end_only():
    assert satisfies("closing", "closing question", "Would you like to hear more? " + FILLER) == 0.0
    assert satisfies("closing", "closing question", FILLER + "?") == 0.0
    assert satisfies("closing", "closing question", FILLER + "OK?") == 0.0
    assert satisfies("closing", "no closing question", FILLER + "Let me know if you need more.") == 0.5


@pytest.mark.parametrize("dimension, value, found", [("mood", "happy", "mood"), ("length", "huge", "huge")])
def test_unknown_tastes_are_named(dimension, value, found):
    with pytest.raises(ValueError, match=found):
        satisfies(dimension, value, "text")


def test_no_preference_is_always_met_and_blank_text_meets_nothing():
    assert satisfies("length", NO_PREFERENCE, "") == 1.0
    for dimension, values in DIMENSIONS.items():
        for value in values:
            assert satisfies(dimension, value, " \n\t…") == 0.0


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=400))
def test_any_text_gives_scores_and_opposites_share_at_most_one(text):
    for dimension, values in DIMENSIONS.items():
        scores = [satisfies(dimension, value, text) for value in values]
        assert all(0.0 <= s <= 1.0 for s in scores)
        assert sum(scores) <= 1.0 + 1e-9


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200), st.text(max_size=400))
def test_relevance_of_any_text_is_between_zero_and_one(request, answer):
    assert 0.0 <= relevance(request, answer) <= 1.0


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["- one two three", "1. one two three", "Plain words here.", "## Title", "", "```",
                                 "Is it so?", "For example, a b c d.", "12 of 40", "don't!"]), max_size=15))
def test_mixtures_of_markup_keep_the_bounds(lines):
    text = "\n".join(lines)
    for dimension, values in DIMENSIONS.items():
        assert sum(satisfies(dimension, value, text) for value in values) <= 1.0 + 1e-9


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 300))
def test_longer_is_never_shorter(n):
    shorter, longer = "word " * n + "end", "word " * (n + 1) + "end"
    assert satisfies("length", "short", shorter) >= satisfies("length", "short", longer)
    assert satisfies("length", "detailed", shorter) <= satisfies("length", "detailed", longer)


HOSTILE = ["a", "- ", "**", "1. ", "?", "# ", "for example ", "\n", " ", "<h1", "_ ", "don'", "suppose _", "?!", "。"]


@pytest.mark.parametrize("piece", HOSTILE)
def test_time_grows_in_step_with_the_text(piece):
    """Four times the text may take about four times as long; quadratic patterns take sixteen times."""
    def seconds(n: int) -> float:
        text = f"suppose {piece * (n // len(piece))}x"
        start = time.process_time()
        for dimension, values in DIMENSIONS.items():
            satisfies(dimension, values[0], text)
        relevance("How do I prune roses?", text)
        return time.process_time() - start
    assert seconds(100_000) < 10 * seconds(25_000) + 0.1


REQUEST = "How do I store homemade strawberry jam for the winter?"
ANSWER = ("Fill the jam into clean, hot jars and close them at once. Store the jars in a dark, cool cupboard, and it "
          "keeps until spring.")


def test_an_ordinary_answer_is_relevant():
    assert relevance(REQUEST, ANSWER) == 1.0


CHEATS = {
    "empty": "",
    "another topic": "Train your puppy with short sessions and small rewards, and end while it still enjoys the game.",
    "copy of the request": REQUEST,
    "copy as a statement": "Store homemade strawberry jam for the winter.",
    "copy three times": "Store homemade strawberry jam for the winter. " * 3,
    "loop": "Store the strawberry jam in jars. " * 12,
    "keyword list": "strawberry jam store winter jars cupboard cool dark sugar lid shelf spring fruit glass label",
    "refusal": "I'm sorry, but I cannot help with storing homemade strawberry jam, as I am only a language model.",
    "persona recital": "You like short answers with bullets and a formal tone. I prefer to give you brief replies "
                       "without questions at the end, as you asked for this style.",
    "persona recital on the topic": "Since you prefer short answers about storing homemade strawberry jam, here is a "
                                    "short answer in the style you like. Homemade strawberry jam for the winter.",
    "praise": "What a great question about homemade strawberry jam! Great choice to store strawberry jam!",
    "questions only": "Do you want to store strawberry jam? What kind of jars have you got for winter?",
}


@pytest.mark.parametrize("name", CHEATS)
def test_cheats_are_not_relevant(name):
    assert relevance(REQUEST, CHEATS[name]) <= 0.3, name


def test_relevance_takes_inflected_forms_and_messages():
    assert relevance("How can I prune apple trees?", "Pruning an apple tree is done in winter with a sharp, clean saw.") == 1
    messages = [{"role": "system", "content": "The user prefers short answers."}, {"role": "user", "content": REQUEST},
                {"role": "assistant", "content": "Hm."}, {"role": "user", "content": "Shorter please."}]
    assert relevance(messages, ANSWER) == 1.0
    assert relevance([], ANSWER) == 0.0


def test_stock_sentences_of_the_scripted_assistant_are_neutral():
    "A general sentence must not carry a taste by accident."
    for sentence in read_data("sentences")["general"] + read_data("sentences")["lead"]:
        text = sentence.replace("{subject}", "garden ponds").replace("{focus}", "the cost")
        assert satisfies("tone", "casual", text) == satisfies("examples", "examples", text) == 0.0, sentence
        assert satisfies("figures", "figures", text) == satisfies("closing", "closing question", text) == 0.0, sentence


def test_relevance_tells_the_right_answer_from_another_in_real_threads(shared_data):
    "WildChat: first English request with its own answer against the answer to another request."
    pairs = []
    for line in (shared_data / "wildchat" / "conversations.jsonl").open(encoding="utf-8"):
        messages = json.loads(line)["messages"]
        for a, b in zip(messages, messages[1:]):
            if (a["role"], b["role"]) == ("user", "assistant") and a["content"].isascii() and b["content"].isascii() \
                    and 30 < len(a["content"]) < 300 and len(re.findall(r"\w+", b["content"])) > 20:
                pairs.append((a["content"], b["content"]))
                break
    own = [relevance(q, a) >= 0.35 for q, a in pairs]
    other = [relevance(q, pairs[(i + 7) % len(pairs)][1]) >= 0.35 for i, (q, _) in enumerate(pairs)]
    assert len(pairs) > 150
    assert statistics.mean(own) > 0.8 and statistics.mean(other) < 0.15
