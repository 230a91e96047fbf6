"""Training on small random weights: losses against TRL and closed forms, nothing lost in silence, kills survived."""
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rlhi.batches import (ConversationOrder, PackedCollator, TrainConfig, plan, reference_key, reference_pass,
                          sequences_of, split_held_out, tokenise)
from rlhi.generate import resolve_model
from rlhi.train import _arguments, _dataset, dpo_loss, launch, learning_curve, train, trainer_class

WORDS = "bread rain seven quiet river paint orange window metal garden".split()


def message(role, *numbers):
    return {"role": role, "content": " ".join(WORDS[n % 10] for n in numbers)}


def make_pairs(count, users=3):
    return [{"pair_id": f"p{n}", "user_id": f"u{n % users}", "conversation_id": f"c{n}", "kept": True, "reason": None,
             "prompt": [message("system", 1, n % users), message("user", n, n + 3, 7)],
             "chosen": [message("assistant", n, n + 1)], "rejected": [message("assistant", n + 2, n + 5, 3)]}
            for n in range(count)]


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(resolve_model("tiny"))


# --- the loss


def test_loss_is_log_two_where_nothing_moved():
    equal = torch.tensor([-3.0, -50.0])
    assert torch.allclose(dpo_loss(equal, equal - 1, equal, equal - 1), torch.full((2,), math.log(2)))


def test_loss_goes_to_log_two_as_beta_goes_to_zero():
    given = torch.tensor([-1.0]), torch.tensor([-9.0]), torch.tensor([-4.0]), torch.tensor([-4.0])
    assert dpo_loss(*given, beta=1e-9).item() == pytest.approx(math.log(2), abs=1e-7)


def test_loss_of_a_known_margin():
    # margin (-1 + 4) - (-9 + 4) = 8, times 0.5: -log sigmoid(4)
    given = torch.tensor([-1.0]), torch.tensor([-9.0]), torch.tensor([-4.0]), torch.tensor([-4.0])
    assert dpo_loss(*given, beta=0.5).item() == pytest.approx(math.log(1 + math.exp(-4)))


def test_gradient_lifts_chosen_and_lowers_rejected_by_equal_amounts():
    chosen, rejected = torch.tensor([-5.0], requires_grad=True), torch.tensor([-5.0], requires_grad=True)
    dpo_loss(chosen, rejected, torch.tensor([-5.0]), torch.tensor([-5.0]), beta=0.1).sum().backward()
    assert chosen.grad.item() == pytest.approx(-0.05) and rejected.grad.item() == pytest.approx(0.05)


# --- packed batches against TRL's own


def trl_and_packed(rows, tokenizer, sharing, loss_type="sigmoid", **settings):
    """Loss and gradients of one batch: TRL's collator and forward pass, then ours, same weights and references."""
    from rlhi.prefix import add_prefix_head
    from transformers import AutoModelForCausalLM
    results = []
    for mode in ("none", sharing):
        config = TrainConfig(sharing=mode, loss_type=loss_type, lora_r=0, batch_size=len(rows), **settings)
        items, rejected = tokenise(rows, tokenizer, config)
        assert not rejected
        model = AutoModelForCausalLM.from_pretrained(resolve_model("tiny"), dtype=torch.float32)
        for number, item in enumerate(items):  # references away from the policy, so that the loss is not flat
            item["ref_chosen_logps"], item["ref_rejected_logps"] = -30.0 - number, -40.0 + 2 * number
        arguments = _arguments(config, Path("unused"), 1, 1, False)
        arguments.precompute_ref_log_probs, arguments.label_smoothing = True, 0.1
        trainer = trainer_class("dpo")(
            model=model, args=arguments, train_dataset=_dataset(items, 0, config), processing_class=tokenizer,
            data_collator=None if mode == "none" else PackedCollator(mode))
        if mode != "none":
            add_prefix_head(model, 200)
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(items))])
        loss = trainer.compute_loss(model, batch)
        loss.backward()
        metrics = {name: values[-1] for name, values in trainer._metrics["train"].items() if name != "num_tokens"}
        results.append((loss.item(), {n: p.grad for n, p in model.named_parameters()}, metrics))
    return results


def assert_equal_gradients(plain, packed):
    for name, gradient in plain.items():
        assert (packed[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name


@pytest.mark.parametrize("sharing, loss_type", [
    ("pair", "sigmoid"), ("conversation", "ipo"),
    *(pytest.param("pair", name, marks=pytest.mark.slow) for name in (
        "hinge", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero",
        "apo_down", "discopop", "sft", "sigmoid_norm"))])
def test_loss_metrics_and_every_gradient_equal_trl(tokenizer, sharing, loss_type):
    plain, packed = trl_and_packed(make_pairs(4), tokenizer, sharing, loss_type)
    assert packed[0] == pytest.approx(plain[0], rel=1e-5)
    assert packed[2] == pytest.approx(plain[2], rel=1e-4, abs=1e-4)
    assert_equal_gradients(plain[1], packed[1])


def test_an_added_imitation_loss_is_the_weighted_sum_of_both_and_equals_trl(tokenizer):
    pairs = make_pairs(4)
    (plain, gradients, _), (packed, ours, _) = trl_and_packed(pairs, tokenizer, "pair", sft_weight=0.7)
    preferred, imitated = (trl_and_packed(pairs, tokenizer, "pair", loss_type=name)[0][0] for name in ("sigmoid", "sft"))
    assert plain == pytest.approx(preferred + 0.7 * imitated, rel=1e-6) and abs(imitated) > 0.1
    assert packed == pytest.approx(plain, rel=1e-5)
    assert_equal_gradients(gradients, ours)


def follow_up_pairs(conversations, turns):
    """Pairs of whole conversations: the rejected answer of a turn is part of the next prompt."""
    rows = []
    for n in range(conversations):
        prompt = [message("system", 1, n), message("user", n, 4)]
        for turn in range(turns):
            rejected = [message("assistant", n, turn, 6)]
            rows.append({"pair_id": f"{n} {turn}", "user_id": f"u{n}", "conversation_id": f"c{n}", "kept": True,
                         "prompt": prompt, "chosen": [message("assistant", n, 2, turn)], "rejected": rejected})
            prompt = [*prompt, *rejected, message("user", turn, 8)]
    return rows[::2] + rows[1::2]  # turns of a conversation lie apart


def test_conversations_stay_together_in_an_order_that_changes_by_epoch(tokenizer):
    items, _ = tokenise(follow_up_pairs(5, 3), tokenizer, TrainConfig())
    order, again = ConversationOrder(items, seed=4), ConversationOrder(items, seed=4)
    first = list(order)
    assert sorted(first) == list(range(15)) and first == list(again) == list(order)
    names = [items[place]["row"]["conversation_id"] for place in first]
    assert [len(set(names[start:start + 3])) for start in range(0, 15, 3)] == [1] * 5
    order.set_epoch(1)
    assert list(order) != first and sorted(order) == sorted(first)
    lonely = [{"row": {"pair_id": "a"}}, {"row": {"pair_id": "b"}}]
    assert sorted(ConversationOrder(lonely, 0)) == [0, 1]


def test_training_by_conversation_computes_fewer_tokens_and_the_batches_it_says(tmp_path, tokenizer, monkeypatch):
    rows, seen = follow_up_pairs(4, 3), []
    call = PackedCollator.__call__
    monkeypatch.setattr(PackedCollator, "__call__", lambda self, items: (
        seen.append([tuple(item["prompt_ids"]) for item in items]), call(self, items))[1])
    result = train(rows, "tiny", tmp_path / "together", sharing="conversation", batch_size=3, epochs=2, checkpoints=0)
    items, _ = tokenise(rows, tokenizer, TrainConfig())
    name = {tuple(item["prompt_ids"]): item["row"]["conversation_id"] for item in items}
    assert len(seen) == 8 and all(len({name[prompt] for prompt in batch}) == 1 for batch in seen)
    assert [name[batch[0]] for batch in seen[:4]] != [name[batch[0]] for batch in seen[4:]]
    pair, together = plan(items, "pair"), plan(items, "conversation")
    assert result.summary["unique_tokens"] == together["unique_tokens"] < pair["unique_tokens"] < pair["tokens"]
    longest = [max(len(i["prompt_ids"]) + len(i["rejected_ids"]) for i in items if i["row"]["conversation_id"] == c)
               for c in ("c0", "c1", "c2", "c3")]
    assert together["unique_tokens"] >= sum(longest)
    assert 0 < result.summary["utilisation"] < 1


def test_a_batch_in_parts_has_the_gradient_of_the_whole(tmp_path, tokenizer):
    settings = dict(batch_size=5, epochs=2, learning_rate=1e-3, lora_layers=1, checkpoints=0)
    whole = train(make_pairs(5), "tiny", tmp_path / "whole", **settings)
    parts = train(make_pairs(5), "tiny", tmp_path / "parts", token_budget=70, **settings)
    items, _ = tokenise(make_pairs(5), tokenizer, TrainConfig())
    ready = [item | {"ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0, "index": 0} for item in items]
    assert len(PackedCollator("pair", token_budget=70)(ready)["parts"]) > 1
    for left, right in zip(whole.log, parts.log, strict=True):
        assert right["loss"] == pytest.approx(left["loss"], rel=1e-5)
        assert right["gradient_norm"] == pytest.approx(left["gradient_norm"], rel=1e-4)


def test_the_pure_loss_is_trls(tokenizer):
    rows = make_pairs(2)
    (loss, *_), _ = trl_and_packed(rows, tokenizer, "pair")
    from rlhi.prefix import sequence_logprobs
    from transformers import AutoModelForCausalLM
    items, _ = tokenise(rows, tokenizer, TrainConfig())
    model = AutoModelForCausalLM.from_pretrained(resolve_model("tiny"), dtype=torch.float32)
    logps = torch.tensor(sequence_logprobs(model, *zip(*[s for item in items for s in sequences_of(item)])))
    pure = dpo_loss(logps[::2], logps[1::2], torch.tensor([-30.0, -31.0]), torch.tensor([-40.0, -38.0]))
    assert pure.mean().item() == pytest.approx(loss, rel=1e-5)


def test_tokens_are_those_of_trl(tokenizer):
    from trl import DPOConfig, DPOTrainer
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    rows = [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in make_pairs(3)]
    model = AutoModelForCausalLM.from_pretrained(resolve_model("tiny"), dtype=torch.float32)
    theirs = DPOTrainer(model=model, args=DPOConfig("unused", bf16=False, use_cpu=True, report_to="none",
                                                    precompute_ref_log_probs=True, per_device_train_batch_size=3),
                        train_dataset=Dataset.from_list(rows), processing_class=tokenizer).train_dataset
    items, _ = tokenise(make_pairs(3), tokenizer, TrainConfig())
    for item, their in zip(items, theirs):
        assert all(item[name] == their[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    reference_pass(model, items, "key")
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        assert [item[name] for item in items] == pytest.approx(theirs[name], rel=1e-5)


# --- rows


def test_rows_that_do_not_fit_are_named_not_cut(tokenizer):
    rows = make_pairs(4)
    rows[1]["prompt"][1]["content"] = "bread " * 400
    rows[2]["rejected"] = rows[2]["chosen"]
    rows[3] |= {"kept": False, "reason": "too short"}
    ready, rejected = tokenise(rows, tokenizer, TrainConfig(max_length=200))
    assert [item["row"]["pair_id"] for item in ready] == ["p0"]
    assert [(r["row"], r["source"]) for r in rejected] == [(1, "p1"), (2, "p2"), (3, "p3")]
    assert "do not fit max_length=200" in rejected[0]["reason"] and "same tokens" in rejected[1]["reason"]
    assert rejected[2]["reason"] == "too short"


def test_held_out_users_are_never_trained_on(tokenizer):
    items, _ = tokenise(make_pairs(12, users=4), tokenizer, TrainConfig())
    ready, held = split_held_out(items, 0.25, seed=1)
    users = [{item["row"]["user_id"] for item in side} for side in (ready, held)]
    assert not users[0] & users[1] and len(users[1]) == 1 and len(ready) + len(held) == 12
    assert split_held_out(items[:1], 0.5, seed=1) == (items[:1], [])


def test_plan_counts_what_is_saved(tokenizer):
    items, _ = tokenise(make_pairs(2), tokenizer, TrainConfig())
    apart, shared = plan(items, "none"), plan(items, "pair")
    prompts = sum(len(item["prompt_ids"]) for item in items)
    assert apart["duplicates_saved"] == 0 and shared["duplicates_saved"] >= prompts
    assert shared["tokens"] == apart["tokens"] == shared["unique_tokens"] + shared["duplicates_saved"]


def test_a_stale_reference_is_computed_again(tokenizer):
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(resolve_model("tiny"), dtype=torch.float32)
    key = reference_key(resolve_model("tiny"), tokenizer)
    rows = [row | {"ref_key": name, "ref_chosen_logp": 1.0, "ref_rejected_logp": 2.0}
            for row, name in zip(make_pairs(2), (key, "of another model"))]
    items, _ = tokenise(rows, tokenizer, TrainConfig())
    reference_pass(model, items, key)
    assert (items[0]["ref_chosen_logps"], items[0]["ref_rejected_logps"]) == (1.0, 2.0)
    assert items[1]["ref_chosen_logps"] < -10


# --- whole runs


def test_a_run_learns_its_pairs_and_a_second_call_computes_nothing(tmp_path, capsys):
    pairs = make_pairs(6)
    settings = dict(epochs=4, batch_size=3, learning_rate=2e-3, lora_layers=1, held_out_share=0.3)
    result = train(pairs, "tiny", tmp_path / "run", **settings)
    assert result.log[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert result.log[-1]["loss"] < 0.6 and result.log[-1]["accuracy"] == 1.0
    assert "held_out_accuracy" in result.log[-1] and result.summary["held_out"] == 2
    assert all(row["ref_key"] and row["ref_chosen_logp"] < 0 for row in result.rows)
    said = capsys.readouterr().out
    assert "duplicates saved" in said and "first batch: shared and separate prompts differ by" in said
    before = (tmp_path / "run" / "adapter_model.safetensors").stat().st_mtime_ns
    again = train(pairs, "tiny", tmp_path / "run", **settings)
    assert again.log == result.log and (tmp_path / "run" / "adapter_model.safetensors").stat().st_mtime_ns == before
    other = train(pairs, "tiny", tmp_path / "run", **settings | {"epochs": 1})
    assert other.summary["steps"] == 2 and "is replaced" in capsys.readouterr().out


def test_frozen_states_change_the_time_and_not_the_training(tmp_path, monkeypatch):
    import rlhi.train
    settings = dict(epochs=2, batch_size=2, lora_layers=1, learning_rate=1e-3)
    cached = train(make_pairs(4), "tiny", tmp_path / "cached", **settings)
    frozen = rlhi.train._frozen_layer
    monkeypatch.setattr(rlhi.train, "_frozen_layer", lambda *given: (frozen(*given)[0], False))
    plain = train(make_pairs(4), "tiny", tmp_path / "plain", **settings)
    for one, two in zip(cached.log, plain.log, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
        assert one["gradient_norm"] == pytest.approx(two["gradient_norm"], rel=1e-3)


def test_sft_on_answers_and_on_chosen_sides_agree(tmp_path):
    pairs = make_pairs(3)
    rows = [{"prompt": p["prompt"], "completion": p["chosen"], "user_id": p["user_id"]} for p in pairs]
    runs = [train(given, "tiny", tmp_path / name, "sft", sharing=sharing, epochs=1, batch_size=3)
            for given, name, sharing in ((pairs, "a", "pair"), (rows, "b", "pair"), (rows, "c", "none"))]
    losses = [run.log[0]["loss"] for run in runs]
    assert losses[0] == losses[1] and losses[2] == pytest.approx(losses[0], rel=1e-5)


def test_full_fine_tuning_saves_a_model(tmp_path):
    from transformers import AutoModelForCausalLM
    result = train(make_pairs(2), "tiny", tmp_path, lora_r=0, batch_size=2, checkpoints=0, learning_rate=1e-3)
    trained = AutoModelForCausalLM.from_pretrained(result.adapter)
    start = AutoModelForCausalLM.from_pretrained(resolve_model("tiny"))
    assert not torch.equal(trained.model.layers[0].mlp.up_proj.weight, start.model.layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize("settings, complaint", [
    ({"betta": 1}, "unknown settings betta; TrainConfig has method, beta"),
    ({"sharing": "some"}, "expected one of none, pair"), ({"method": "ppo"}, "expected one of dpo, sft"),
    ({"sft_weight": -1.0}, "sft_weight is -1.0; expected 0 or more"),
    ({"sft_weight": 0.5, "token_budget": 64}, "a loss that is a mean over pairs; found .* sft_weight 0.5"),
    ({"loss_type": "sft", "token_budget": 64}, "a loss that is a mean over pairs; found .* loss sft")])
def test_wrong_settings_are_explained(tmp_path, settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        train(make_pairs(1), "tiny", tmp_path, **settings)


def test_rows_none_of_which_can_be_used_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="none of the 2 rows .* max_length=5"):
        train(make_pairs(2), "tiny", tmp_path, max_length=5)


def test_the_learning_curve_joins_training_and_validation():
    history = [{"step": 1, "epoch": 0.5, "loss": 0.7, "rewards/margins": 0.1},
               {"step": 1, "epoch": 0.5, "eval_loss": 0.8}, {"step": 2, "epoch": 1.0, "train_runtime": 3.0}]
    assert learning_curve(history) == [{"step": 1, "epoch": 0.5, "loss": 0.7, "margin": 0.1, "held_out_loss": 0.8}]


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_with_the_same_adapter(tmp_path):
    (tmp_path / "pairs.json").write_text(json.dumps(make_pairs(8)))
    script = ("import json, sys; from rlhi.train import train; "
              "train(json.load(open(sys.argv[1])), 'tiny', sys.argv[2], epochs=6, batch_size=2, checkpoints=11)")
    run = lambda out: [sys.executable, "-c", script, str(tmp_path / "pairs.json"), str(tmp_path / out)]
    subprocess.run(run("whole"), check=True)
    for _ in range(2):
        process = subprocess.Popen(run("killed"), start_new_session=True)
        seen = set((tmp_path / "killed").glob("checkpoints/*"))
        while process.poll() is None and set((tmp_path / "killed").glob("checkpoints/*/trainer_state.json")) <= seen:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "killed" / "done.json").exists()
    subprocess.run(run("killed"), check=True)
    for name in ("adapter_model.safetensors", "learning_curve.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path):
    settings = dict(epochs=2, learning_rate=1e-3, lora_layers=1, checkpoints=0)
    one = train(make_pairs(4), "tiny", tmp_path / "one", batch_size=4, **settings)
    two = launch(make_pairs(4), "tiny", tmp_path / "two", processes=2, batch_size=2, **settings)
    assert two.summary["steps"] == one.summary["steps"] == 2
    for left, right in zip(one.log, two.log, strict=True):
        assert right["loss"] == pytest.approx(left["loss"], rel=1e-4)
        assert right["gradient_norm"] == pytest.approx(left["gradient_norm"], rel=1e-3)


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path):
    runs = [train(make_pairs(3), "tiny", tmp_path / str(on), batch_size=3, epochs=2, learning_rate=1e-3,
                  gradient_checkpointing=on) for on in (False, True)]
    for left, right in zip(runs[0].log, runs[1].log, strict=True):
        assert right["loss"] == pytest.approx(left["loss"], rel=1e-5)
        assert right["gradient_norm"] == pytest.approx(left["gradient_norm"], rel=1e-4)
