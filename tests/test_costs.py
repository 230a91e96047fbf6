"""Costs: closed forms, proportions, where measured speeds enter, and that every profile can be priced."""
from pathlib import Path

import pytest

from rlhi.costs import (ASSUMPTIONS, assumptions, cost_table, count_weights, measure_training, reached, sensitivity,
                        speeds, stages)
from rlhi.reproduce import read_profile

ROOT = Path(__file__).resolve().parents[1]
PAPER = read_profile("paper", ROOT)


def by_stage(rows):
    return {row["stage"]: row for row in rows}


def test_roofline_by_hand():
    a = assumptions(parameters=1e9, bytes_per_weight=2, kv_bytes_per_token=1e4, peak_flops=1e14, bandwidth=1e12, prefill_efficiency=0.5,
                    decode_efficiency=0.5, train_efficiency=0.4, decode_batch=10)
    found = speeds(a, context=1000)
    assert found["prefill"] == pytest.approx(0.5 * 1e14 / 2e9)
    assert found["decode"] == pytest.approx(10 * 0.5 * 1e12 / (2e9 + 10 * 1000 * 1e4))
    assert found["train"] == pytest.approx(0.4 * 1e14 / 8e9)


def test_the_papers_stages_by_hand():
    a = assumptions()
    rows = by_stage(stages(PAPER, a, kept=1.0))
    assert rows["candidates (UBR)"]["calls"] == 20_000 * 64
    assert rows["candidates (UBR)"]["tokens written"] == 20_000 * 64 * a["answer_tokens"]
    assert rows["rewrites (UGR)"]["calls"] == 20_000 * 2, "the logged answer is replaced, then rewritten"
    assert rows["rewards"]["calls"] == 20_000 * 64 + 2 * 20_000
    pair, single = a["prompt_tokens"] + 2 * a["answer_tokens"], a["prompt_tokens"] + a["answer_tokens"]
    assert rows["training"]["tokens trained"] == pytest.approx(20_000 * (4 * pair + 2 * single))
    questions = 200 * 6 * 2
    assert rows["UserEval"]["calls"] == questions * 6 * 3 * 2
    assert rows["UserEval"]["judge dollars"] == pytest.approx(questions * 36 * (1800 * 2 + 600 * 8) / 1e6)


def test_totals_hours_and_measured_speeds():
    a = assumptions()
    table = cost_table(PAPER, a)
    total = table[-1]
    assert total["stage"] == "all" and total["GPU-hours"] == pytest.approx(sum(r["GPU-hours"] for r in table[:-1]))
    twice = by_stage(cost_table(PAPER, a, measured={"decode": 2 * speeds(a)["decode"]}))["candidates (UBR)"]["GPU-hours"]
    read = by_stage(stages(PAPER, a))["candidates (UBR)"]["tokens read"] / speeds(a)["prefill"] / 3600
    assert twice - read == pytest.approx((by_stage(table)["candidates (UBR)"]["GPU-hours"] - read) / 2)
    assert by_stage(cost_table(PAPER, a, kept=0.5))["training"]["GPU-hours"] < by_stage(cost_table(PAPER, a, kept=1.0))["training"]["GPU-hours"]


def test_adapters_are_small_and_whole_models_are_not():
    full, lora = (by_stage(cost_table({**PAPER, "lora_rank": rank}, assumptions()))["training"]["disk (GB)"] for rank in (0, 16))
    assert full == pytest.approx(7 * 16.06, rel=1e-3) and lora < 0.2 * full


@pytest.mark.parametrize("name", ["tiny", "demo", "lab", "paper"])
def test_every_profile_has_a_price_and_only_the_paper_pays_judges(name):
    table = by_stage(cost_table(read_profile(name, ROOT), assumptions()))
    assert table["all"]["GPU-hours"] > 0
    assert (table["all"]["judge dollars"] > 0) is (name == "paper")
    assert (table["follow-ups"]["GPU-hours"] > 0) is (name == "paper")


def test_every_assumption_has_a_source_and_most_of_them_matter():
    assert all(a.source and a.unit for a in ASSUMPTIONS) and len({a.name for a in ASSUMPTIONS}) == len(ASSUMPTIONS)
    moved = {row["name"] for what in ("GPU-hours", "judge dollars", "disk (GB)", "GPU dollars") for row in sensitivity(PAPER, what)}
    assert set(assumptions()) - moved <= {"feedback_share"}, "limits of the profile may hide the share of feedback"
    rows = sensitivity(PAPER)
    assert all(row["low"] <= row["value"] <= row["high"] for row in rows) and rows[0]["high"] - rows[0]["low"] >= rows[-1]["high"] - rows[-1]["low"]
    with pytest.raises(ValueError, match="unknown assumptions"):
        assumptions(speed=1)


def test_measured_shares_are_the_inverse_of_the_roofline():
    a = assumptions(kv_bytes_per_token=0.0)
    speed = speeds(a)
    shares = reached({**speed, "train_share": 0.2}, a["parameters"], a["decode_batch"], a["peak_flops"], a["bandwidth"],
                     a["bytes_per_weight"])
    assert shares["prefill_efficiency"] == pytest.approx(a["prefill_efficiency"])
    assert shares["decode_efficiency"] == pytest.approx(a["decode_efficiency"])
    again = speeds(a | shares)
    assert (again["prefill"], again["decode"]) == pytest.approx((speed["prefill"], speed["decode"]))
    assert again["train"] == pytest.approx(0.2 * a["peak_flops"] / (8 * a["parameters"]))


def test_weights_counted_without_loading_are_those_of_the_loaded_model():
    from rlhi.generate import resolve_model
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(resolve_model("tiny"))
    layers = sum(w.numel() for w in model.model.layers.parameters())
    assert count_weights("tiny") == layers + model.config.vocab_size * model.config.hidden_size


def test_training_is_measured_by_training():
    seen = measure_training("tiny", pairs=4, words=24)
    assert seen["train"] > 0 and 0 < seen["train_share"] < 1
