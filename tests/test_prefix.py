"""Packed passes against one row at a time, in float64, on random weights of several layouts."""
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from rlhi.prefix import (add_prefix_head, check_supported, packed_scores, sequence_logprobs, sequence_scores,
                         tree_attention, use_tree_attention)
from rlhi.tries import Forest, first_fit, packs, plant

VOCABULARY = 61
SMALL = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=1024, pad_token_id=0, bos_token_id=1, eos_token_id=2)


def make(layout="Llama", **changes):
    import transformers
    config = getattr(transformers, f"{layout}Config")(**SMALL | changes)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).double().eval()


@pytest.fixture(scope="module")
def llama():
    return make()


def one_row_at_a_time(model, prompt, answer):
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1:-1]
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum()


tokens = st.lists(st.integers(3, VOCABULARY - 1), min_size=1, max_size=8)


@st.composite
def forests(draw):
    """Prompts that branch from each other (empty history = one token), answers that repeat or extend each other."""
    trunk = draw(st.sampled_from([1, 3, 40, 200])) * [draw(st.integers(3, VOCABULARY - 1))]
    prompts = [trunk]
    for branch in draw(st.lists(tokens, max_size=4)):
        base = prompts[draw(st.integers(0, len(prompts) - 1))]
        prompts.append(base[:draw(st.integers(1, len(base)))] + branch)
    answers = draw(st.lists(tokens, min_size=1, max_size=3))
    answers += [answers[0], answers[0] + answers[-1]]  # identical, and one a prefix of the other
    return [(draw(st.sampled_from(prompts)), answer) for answer in answers for _ in range(2)]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(sequences=forests(), shared=st.booleans())
def test_any_forest_scores_like_single_rows(llama, sequences, shared):
    groups = None if shared else list(range(len(sequences)))
    use_tree_attention(llama, 300)
    with torch.no_grad():
        packed = packed_scores(llama, plant(sequences, groups)).log_probs.sum(1)
        single = torch.stack([one_row_at_a_time(llama, *sequence) for sequence in sequences])
    torch.testing.assert_close(packed, single, rtol=1e-10, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(sequences=forests())
def test_a_forest_holds_each_prefix_once_and_gives_every_sequence_back(sequences):
    forest = plant(sequences)
    whole = [prompt + answer for prompt, answer in sequences]
    assert [forest.tokens[path].tolist() for path in forest.paths] == whole
    assert len(forest.tokens) == len({tuple(ids[:n + 1]) for ids in whole for n in range(len(ids))})
    for path in forest.paths:
        assert forest.positions[path].tolist() == list(range(len(path)))
        # Along a path each token must see all before it, which the interval test of the block mask has to allow.
        assert all(forest.subtree_end[path[:-1]] > path[1:])
    assert [start for start, _, _ in forest.chains][1:] == [end for _, end, _ in forest.chains][:-1]


@settings(max_examples=40, deadline=None)
@given(sequences=forests())
def test_the_interval_mask_is_the_ancestor_mask(sequences):
    forest = plant(sequences)
    size = len(forest.tokens)
    row, column = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    interval = (column <= row) & (row < forest.subtree_end[column])
    ancestors = torch.zeros(size, size, dtype=torch.bool)
    for path in forest.paths:
        for depth, token in enumerate(path):
            ancestors[token, path[:depth + 1]] = True
    assert torch.equal(interval, ancestors)


def test_flex_attention_with_the_block_mask_equals_the_segments():
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    forest = plant([([5] * 40, [6, 7]), ([5] * 40, [6, 8, 9]), ([5] * 17 + [4], [3] * 60)])
    size, end = len(forest.tokens), forest.subtree_end
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, size, 16), torch.randn(1, 2, size, 16), torch.randn(1, 2, size, 16)
    mask = create_block_mask(lambda b, h, q, k: (k <= q) & (q < end[k]), 1, 1, size, size, device="cpu")
    flex = flex_attention(query, key, value, block_mask=mask, scale=0.25, enable_gqa=True)
    segments, _ = tree_attention(torch.nn.Module(), query, key, value, None, scaling=0.25, forest=forest)
    torch.testing.assert_close(flex.transpose(1, 2), segments, rtol=1e-5, atol=1e-5)


PAIRS = [([5] * 30 + [7], [8, 9, 10]), ([5] * 30 + [7], [8, 11]), ([5, 6], [9]), ([5, 6], [10] * 20)]


@pytest.mark.parametrize("layout, changes", [
    ("Llama", {}), ("Qwen2", {}), ("Qwen3", {"head_dim": 8}), ("Mistral", {"sliding_window": None}),
    ("Gemma", {"head_dim": 8}), ("Gemma3Text", {"head_dim": 8}), ("Cohere", {}), ("Granite", {"logits_scaling": 3.0}),
    ("Phi3", {}), ("Olmo2", {})])
def test_layouts_agree_in_value_and_gradient(layout, changes):
    model = make(layout, **changes)
    gradients = []
    for packed in (False, True):
        if packed:
            use_tree_attention(model, 100)
            values = packed_scores(model, plant(PAIRS)).log_probs.sum(1)
        else:
            values = torch.stack([one_row_at_a_time(model, *pair) for pair in PAIRS])
        model.zero_grad()
        (values * torch.tensor([1.0, -2.0, 0.5, 3.0])).sum().backward()
        gradients.append((values.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}))
    torch.testing.assert_close(gradients[1][0], gradients[0][0], rtol=1e-9, atol=1e-9)
    for name, gradient in gradients[0][1].items():  # the library's norms work in float32 whatever the model does
        assert (gradients[1][1][name] - gradient).norm() <= 1e-6 * gradient.norm(), name


def test_capped_logits_have_the_right_gradient():
    from rlhi.prefix import _TokenScores
    torch.manual_seed(0)
    rows, weight, bias = (torch.randn(*shape, dtype=torch.float64, requires_grad=True)
                          for shape in ((5, 4), (7, 4), (7,)))
    row, label = torch.tensor([0, 0, 2, 4, 4]), torch.tensor([1, 3, 3, 6, 6])
    apply = lambda *given: _TokenScores.apply(*given, row, label, 0.5, 2.0, 2)[0]
    assert torch.autograd.gradcheck(apply, (rows, weight, bias))


@pytest.mark.parametrize("layout, changes, reason", [
    ("Mistral", {"sliding_window": 64}, "window of 64 tokens"),
    ("Gemma2", {"head_dim": 8, "sliding_window": 4096}, "caps"),
    ("Qwen3Next", {"head_dim": 8, "num_experts": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8},
     "linear_attention"), ("Mamba", {}, "carry state"), ("Bloom", {}, "attention interface")])
def test_models_that_cannot_share_are_refused_by_name(layout, changes, reason):
    with pytest.raises(NotImplementedError, match=reason) as error:
        check_supported(make(layout, **changes), 100)
    assert layout in str(error.value) and 'sharing="none"' in str(error.value)


def test_a_window_longer_than_every_sequence_is_allowed():
    model = make("Mistral", sliding_window=64)
    want = [float(one_row_at_a_time(model, *pair)) for pair in PAIRS]
    assert sequence_logprobs(model, *zip(*PAIRS)) == pytest.approx(want, rel=1e-9)


def test_logprobs_do_not_depend_on_the_token_budget_and_leave_the_model_as_it_was(llama):
    llama.set_attn_implementation("sdpa")
    llama.train()
    wide, narrow = (sequence_logprobs(llama, *zip(*PAIRS), token_budget=budget) for budget in (4096, 8))
    assert wide == pytest.approx(narrow, rel=1e-12)
    assert llama.training and llama.config._attn_implementation == "sdpa"
    llama.eval()


def test_generation_is_unchanged_by_the_packed_head(llama):
    ids = torch.tensor([[3, 4, 5, 6]])
    plain = llama.generate(ids, max_new_tokens=8, do_sample=False)
    model = make()
    add_prefix_head(model, 100)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), plain)


def test_states_of_a_frozen_layer_give_the_same_scores(llama):
    sums, states = sequence_logprobs(llama, *zip(*PAIRS[:2]), layer=1)
    forest = plant(PAIRS[:2])
    forest.hidden = torch.empty(1, len(forest.tokens), 32, dtype=torch.float64)
    for path, (row, packed) in zip(forest.paths, states):
        forest.hidden[0, path] = row[packed]
    forest.first_layer = 1
    use_tree_attention(llama, 100)
    assert packed_scores(llama, forest).log_probs.sum(1).tolist() == pytest.approx(sums, rel=1e-12)


def test_reward_scores_equal_the_library_model():
    from transformers import AutoModelForSequenceClassification, LlamaConfig
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(LlamaConfig(**SMALL, num_labels=1)).double().eval()
    candidates = [([5] * 20, [random.Random(n).randrange(3, 60) for _ in range(3 + n)]) for n in range(8)]
    with torch.no_grad():
        want = [model(input_ids=torch.tensor([p + a])).logits.item() for p, a in candidates]
    assert sequence_scores(model, *zip(*candidates)) == pytest.approx(want, rel=1e-9)


def test_an_empty_prompt_or_answer_is_refused():
    for pair in (([], [3]), ([3], [])):
        with pytest.raises(ValueError, match="both need at least one"):
            plant([([3], [4]), pair])


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(1, 50), max_size=30), budget=st.integers(10, 60))
def test_first_fit_places_every_group_once_and_keeps_the_budget(sizes, budget):
    rows = first_fit(sizes, budget)
    assert sorted(index for row in rows for index in row) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in row) <= budget or len(row) == 1 for row in rows)
    assert len(rows) <= 2 * max(1, sum(min(s, budget) for s in sizes) / budget) + 1  # at worst twice the optimum


def test_packs_keep_common_beginnings_together():
    sequences = [([1] * 10, [2]), ([9] * 10, [2]), ([1] * 10, [3]), ([9] * 10, [3])]
    assert sorted(sorted(pack) for pack in packs(sequences, 12)) == [[0, 2], [1, 3]]


def test_moving_a_forest_keeps_it_whole():
    forest = plant(PAIRS)
    moved = forest.to("cpu")
    assert isinstance(moved, Forest) and torch.equal(moved.tokens, forest.tokens)
    assert moved.duplicates == forest.duplicates
