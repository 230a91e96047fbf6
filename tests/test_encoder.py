"""The encoder: rows of several texts, training on a question that needs the context, and the shipped adapter."""
import hashlib
import json

import numpy as np
import pytest

from rlhi.encoder import PIECES, clip_tokens, cross_logprobs, encode_texts, load_minilm, train_cross_encoder
from rlhi.followups import ADAPTER, KINDS, read_examples


def test_a_row_holds_the_edges_of_every_text_between_separators():
    tokenizer, _ = load_minilm()
    long = " ".join(f"word{n}" for n in range(400))
    row, end = encode_texts(tokenizer, ("short", long, ""))
    assert row[0] == tokenizer.cls_token_id and row.count(tokenizer.sep_token_id) == 3
    assert tokenizer.decode(row[1:end]) == "short" and row[end] == tokenizer.sep_token_id
    assert len(row) == 1 + (end - 1) + 1 + sum(PIECES[1]) + 1 + 0 + 1
    ids = tokenizer(long, add_special_tokens=False, verbose=False)["input_ids"]
    assert clip_tokens(tokenizer, long, 5, 3) == ids[:5] + ids[-3:]
    assert len(clip_tokens(tokenizer, "x y " * 500_000, 20, 10)) == 30  # only the edges are tokenised


@pytest.mark.slow
def test_it_learns_a_question_that_the_message_alone_cannot_answer(tmp_path):
    # Every message stands before a "yes" once and before a "no" three times; only with the request can they be told.
    animals = ("bee", "whale", "horse", "crow")
    texts = [(f"how old is a {a}", f"tell me about a {b}", "...") for a in animals for b in animals]
    labels = np.array([int(a == b) for a in animals for b in animals])
    counts = np.where(labels == 1, 2.0, 2 / 3)
    losses = train_cross_encoder(texts * 20, np.tile(labels, 20), np.tile(counts, 20), 2, tmp_path / "animals", epochs=5)
    guess = cross_logprobs(texts, tmp_path / "animals").argmax(1)
    assert losses[-1] < 0.6 * losses[0] and (guess == labels).mean() >= 15 / 16
    assert sorted(path.name for path in (tmp_path / "animals").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "head.safetensors"]


def test_company_and_order_do_not_change_a_row():
    texts = [("shorter", "write a poem about the sea", "The sea is wide. " * 30), ("", "", ""),
             ("thanks", "write a poem", "Roses are red."), ("continue " * 200, "x", "y")]
    together, alone = cross_logprobs(texts, ADAPTER), [cross_logprobs([text], ADAPTER)[0] for text in texts]
    assert np.allclose(together, alone, atol=1e-4)
    assert np.array_equal(together[::-1], cross_logprobs(texts[::-1], ADAPTER))
    assert np.allclose(np.exp(together).sum(1), 1) and together.shape == (4, len(KINDS))
    assert cross_logprobs([], ADAPTER).shape == (0, len(KINDS))


def test_the_shipped_adapter_was_trained_on_the_shipped_examples():
    about = json.loads((ADAPTER / "trained_on.json").read_text())
    examples = read_examples()
    said = json.dumps(examples, ensure_ascii=False).encode()
    assert about["examples"] == len(examples) and about["sha256"] == hashlib.sha256(said).hexdigest()
    config = json.loads((ADAPTER / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "sentence-transformers/all-MiniLM-L6-v2"
    assert sum(path.stat().st_size for path in ADAPTER.iterdir()) < 2**20


def test_the_context_decides():
    # The same words after a text and after a list of names: changing it, and asking for more.
    from rlhi.followups import kind_probabilities
    poem = {"message": "make it rhyme", "previous": "write a poem about rain", "reply": "Rain falls on the roof.",
            "earlier": []}
    names = {"message": "give me five more", "previous": "five names for a cat", "reply": "Tom, Felix, Luna, Kit, Ash",
             "earlier": []}
    found = kind_probabilities([poem, names]).argmax(1)
    assert [KINDS[place] for place in found] == ["reattempt_with_feedback", "continuation"]
