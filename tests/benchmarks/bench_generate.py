"""Tokens per second of generation on this machine, with equal answers asserted: pytest -m bench -s FILE.

8 to 64 prompts of about 60 tokens, 32 new tokens each, SmolLM2-135M-Instruct: beside transformers' own `generate` on
the same batch; and 16 prompts with a common beginning of 130 tokens, computed together and each alone."""
import functools
import time

import pytest
import torch

from rlhi.generate import Sampling, load_backend, resolve_model
from rlhi.local import load_model, prefill

THINGS = ("cook rice", "write a loop", "plant a tree", "fix a bike", "learn chess", "bake bread", "tie a knot", "sing")
TALKS = [[{"role": "user", "content": f"Explain how to {thing} on day {day}, in a way that a beginner can follow, "
           "with two examples and a short summary."}] for day in range(8) for thing in THINGS]
PERSONA = [{"role": "system", "content": "Be helpful. " + "The user likes short answers and plain words. " * 12}]
NEW = 32


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def backend(request):
    return load_backend("smollm2", progress=False, dtype=request.param)


@functools.lru_cache(maxsize=1)
def plain_model(dtype):
    """The model as transformers loads it."""
    model = load_model(resolve_model("smollm2"), dtype=dtype)[0]
    model.set_attn_implementation("sdpa")
    return model


def by_transformers(backend, talks) -> list[str]:
    """Greedy answers by transformers' own loop: one left-padded batch."""
    tokenizer = backend.tokenizer
    batch = tokenizer.pad({"input_ids": [backend.tokens(talk) for talk in talks]}, padding_side="left",
                          return_tensors="pt")
    ids = plain_model(backend.dtype).generate(**batch, max_new_tokens=NEW, do_sample=False)
    new = ids[:, batch["input_ids"].shape[1]:]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def ours(backend, talks) -> list[str]:
    return backend.chat(talks, Sampling(max_new_tokens=NEW, temperature=0))


@pytest.mark.bench
@pytest.mark.parametrize("size", [8, 16, 32, 64])
def test_tokens_per_second(backend, size):
    for run in (ours, by_transformers):
        run(backend, TALKS[:1])
    results, seconds = {}, {}
    for name, run in (("rlhi", ours), ("transformers", by_transformers)):
        start = time.perf_counter()
        results[name] = run(backend, TALKS[:size])
        seconds[name] = time.perf_counter() - start
    tokens = sum(len(backend.tokenizer(text).input_ids) for text in results["rlhi"])
    equal = sum(a == b for a, b in zip(results["rlhi"], results["transformers"]))
    print(f"\n{backend.dtype}, {size:3} answers, {torch.get_num_threads()} threads, {tokens} new tokens: "
          + ", ".join(f"{name} {tokens / value:.0f} tokens/s" for name, value in seconds.items())
          + f"; {equal} of {size} answers equal")
    begin = sum(a[:20] == b[:20] for a, b in zip(results["rlhi"], results["transformers"]))
    # Rounding may part two equally good words; in bfloat16 it does so in many answers, but seldom at the first words.
    assert (equal if backend.dtype == "float32" else begin) >= 0.85 * size


@pytest.mark.bench
def test_shared_beginning(backend):
    prompts = [backend.tokens(PERSONA + talk) for talk in TALKS[:16]]
    with torch.inference_mode():
        start = time.perf_counter()
        longest = max(map(len, prompts))
        shared = {place: logits.clone() for place, _, logits in prefill(backend.model, prompts, longest)}
        middle = time.perf_counter()
        alone = [next(prefill(backend.model, [prompt], len(prompt)))[2].clone() for prompt in prompts]
        end = time.perf_counter()
    print(f"\n16 prompts, {sum(map(len, prompts))} tokens: together {middle - start:.1f} s, alone {end - middle:.1f} s")
    assert all(torch.allclose(shared[place], logits, atol=1e-2) for place, logits in enumerate(alone))
