"""Credit from replies: closed forms of the loss, exactness of the packed scores, and that training goes where it should."""
import numpy as np
import pytest
import torch

from rlhi.generate import Sampling
from rlhi.hindsight import (hindsight_cases, hindsight_loss, token_logprobs, train_hindsight, train_scripted_hindsight)
from rlhi.scripted_policy import COLUMN, ScriptedPolicy, log_shares
from rlhi.simulate import make_users, simulate_logs, true_followups


@pytest.fixture(scope="module")
def log():
    rows, truth = simulate_logs(make_users(8, shares={"honest": 1.0}), 3)
    return rows, true_followups(truth)


def test_the_gradient_is_that_of_half_the_squared_log_ratio():
    torch.manual_seed(0)
    logp, seen, mask = -torch.rand(3, 5).double(), -torch.rand(3, 5).double(), (torch.rand(3, 5) > 0.3).double()
    one, two = logp.clone().requires_grad_(), logp.clone().requires_grad_()
    hindsight_loss(one, seen, mask).backward()
    (0.5 * (seen - two) ** 2 * mask).sum().div(mask.sum()).backward()
    assert torch.allclose(one.grad, two.grad, atol=1e-12) and not one.grad[mask == 0].any()


def test_the_expected_gradient_is_that_of_the_divergence_from_hindsight():
    torch.manual_seed(1)
    theta, seen = torch.randn(7).double().requires_grad_(), torch.randn(7).double().log_softmax(0)
    policy = theta.log_softmax(0)
    ones = torch.ones(1, 1)
    expected = sum(policy[y].exp().detach() * torch.autograd.grad(hindsight_loss(policy[y].view(1, 1), seen[y].view(1, 1), ones),
                                                                  theta, retain_graph=True)[0] for y in range(7))
    exact = torch.autograd.grad((policy.exp() * (policy - seen)).sum(), theta)[0]
    assert torch.allclose(expected, exact, atol=1e-12)


def test_the_clip_bounds_the_advantage_and_not_its_sign():
    logp = torch.tensor([[-1.0, -1.0, -1.0]], requires_grad=True)
    hindsight_loss(logp, torch.tensor([[-9.0, -0.5, 6.0]]), torch.ones(1, 3), clip=2.0).backward()
    assert torch.allclose(logp.grad, -torch.tensor([[-2.0, 0.5, 2.0]]) / 3)


def test_cases_show_the_reply_before_the_answer_and_only_there(log):
    cases = hindsight_cases(*log, None)
    assert cases
    for case in cases:
        shown = case["hindsight"][-1]["content"]
        assert case["prompt"][-1]["content"] in shown and case["prompt"][:-1] == case["hindsight"][:-1]
        assert case["prompt"][-1]["role"] == "user" and case["completion"][0]["role"] == "assistant"
    assert hindsight_cases(*log, None, limit=2) == [c for c in cases if c in hindsight_cases(*log, None, limit=2)]
    assert hindsight_cases(log[0], [], None) == []


def test_packed_token_scores_equal_a_plain_forward_pass():
    from rlhi.generate import resolve_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(resolve_model("tiny"), dtype=torch.float32)
    prompts, answers = [[5, 6, 7, 8], [5, 6, 7, 8], [9, 10]], [[11, 12, 13], [11, 14], [15]]
    for prompt, answer, found in zip(prompts, answers, token_logprobs(model, prompts, answers), strict=True):
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            shares = model(ids).logits[0, :-1].log_softmax(-1)
        plain = shares.gather(1, ids[0, 1:, None])[-len(answer):, 0]
        assert torch.allclose(found, plain, atol=1e-5)


def test_the_surrogate_learns_what_the_replies_ask_for(log):
    policy = ScriptedPolicy()
    own = hindsight_cases(*log, None, policy, Sampling(seed=1))
    wanting = [{**case, "reply": "Shorter please."} for case in own]
    trained, curve = train_scripted_hindsight(policy, wanting, learning_rate=0.1, epochs=20, seed=0)
    known, offset, _ = policy.read(own[0]["prompt"])
    before, after = (np.exp(log_shares(p.logits(known, offset))) for p in (policy, trained))
    short, detailed = COLUMN["length", "short"], COLUMN["length", "detailed"]
    assert after[short] > before[short] + 0.15 and after[detailed] < before[detailed] - 0.1
    assert abs(after[COLUMN["tone", "formal"]] - before[COLUMN["tone", "formal"]]) < 1e-9  # nobody spoke of the tone
    assert not np.shares_memory(policy.weights, trained.weights)
    assert train_scripted_hindsight(policy, [])[1] == []


def test_a_model_moves_towards_hindsight_and_a_finished_run_is_read_back(log, tmp_path):
    cases = hindsight_cases(*log, None)[:2]
    settings = dict(learning_rate=5e-3, epochs=6, batch_size=2, lora_r=4, clip=None)
    done = train_hindsight(cases, "tiny", tmp_path, **settings)
    gap = [abs(row["advantage"]) for row in done["log"]]
    assert len(gap) == 6 and gap[-1] < gap[0] and done["rows"] == 2
    stamp = (tmp_path / "adapter_model.safetensors").stat().st_mtime_ns
    assert train_hindsight(cases, "tiny", tmp_path, **settings) == done
    assert (tmp_path / "adapter_model.safetensors").stat().st_mtime_ns == stamp


def test_cases_that_do_not_fit_are_counted_or_refused(log, tmp_path):
    with pytest.raises(ValueError, match="max_length=8"):
        train_hindsight(hindsight_cases(*log, None)[:2], "tiny", tmp_path, max_length=8)
