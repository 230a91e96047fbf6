"""Shared prompts against TRL: pairs per second, peak memory and equality of results, in one table.

    python tests/benchmarks/bench_prefix.py                      # CPU, SmolLM2-135M, float32, LoRA
    python tests/benchmarks/bench_prefix.py --shape llama-8b     # one CUDA GPU, bfloat16, random weights of 8B's shape

Lengths come from ../shared/data/wildchat where it is present (logged WildChat conversations: history and request as
prompt, the answer as rejected, the answer after it as chosen), else from log-normals with the medians written below.
Whole conversations are drawn, and before each prompt stands a persona of `--persona` tokens, the same for all pairs of
a conversation, since a prompt of this method holds one. `--persona 0` leaves it out.
All settings work on the same pairs in one process, warmed up and alternated; a figure is a median, with its range.
The peer is TRL's own DPOTrainer with precomputed references on both sides, equal weights, adapter, dtype and
checkpointing. Time is collation, forward and backward; the optimizer step is the same for all.
"""
import argparse
import ctypes
import gc
import json
import random
import statistics
import tempfile
import threading
import time
from pathlib import Path

import torch
from tqdm import tqdm

from rlhi.batches import PackedCollator, TrainConfig, plan, sequences_of
from rlhi.generate import resolve_model
from rlhi.prefix import add_prefix_head, sequence_logprobs, sequence_scores
from rlhi.train import (_adapter, _arguments, _dataset, matmul_speed, scored_tokens, trainer_class,
                        training_flops)
from rlhi.tries import plant

WILDCHAT = Path(__file__).resolve().parents[3] / "shared" / "data" / "wildchat" / "conversations.jsonl"
SIMULATED = {"prompt": (380, 1.1), "answer": (230, 0.8)}  # log-normal: median tokens, sigma

TASTES = ("Keep answers short.", "Give the reason before the result.", "The user writes code in Python and knows it well.",
          "Prefers bullet points to prose.", "Dislikes headings in short answers.", "Asks for sources and dates.",
          "Wants numbers with their units.", "Likes a worked example.", "Writes fiction and cares about its tone.",
          "Corrects answers that assume an American reader.", "Does not want an apology.", "Reads on a small screen.",
          "Prefers plain words to terms of the trade.", "Wants to be asked when a request is unclear.",
          "Often continues the same task over many turns.", "Likes tables for comparisons.")


def persona_text(draw, count: int, tokenizer) -> list[int]:
    """A persona of so many tokens: sentences about a user in a drawn order."""
    ids = []
    while len(ids) < count:
        ids += tokenizer(" ".join(draw.sample(TASTES, len(TASTES))), add_special_tokens=False)["input_ids"]
    return ids[:count]


def wildchat_pairs(tokenizer, longest: int, seed: int, persona: int = 0):
    """(conversation, prompt ids, chosen ids, rejected ids) of real follow-ups that fit; whole conversations in random
    order, so that any first few are a sample."""
    found, draw = {}, random.Random(seed)
    for number, line in enumerate(WILDCHAT.open()):
        messages = json.loads(line)["messages"][:8]
        texts = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages]
        ids = [tokenizer(text[:6000], add_special_tokens=False)["input_ids"] for text in texts]
        who = persona_text(draw, persona, tokenizer)
        for turn in range(1, len(ids) - 2, 2):
            prompt, rejected, chosen = sum(ids[:turn], who), ids[turn], ids[turn + 2]
            if messages[turn]["role"] == "assistant" and len(prompt) + max(len(rejected), len(chosen)) <= longest:
                found.setdefault(number, []).append((number, prompt, chosen, rejected))
        if number > 600:
            break
    groups = list(found.values())
    draw.shuffle(groups)
    return [pair for group in groups for pair in group]


def simulated_pairs(vocabulary: int, longest: int, seed: int, persona: int = 0):
    draw = random.Random(seed)
    length = lambda kind: max(4, round(SIMULATED[kind][0] * 2.718 ** draw.gauss(0, SIMULATED[kind][1])))
    tokens = lambda count: [draw.randrange(100, vocabulary) for _ in range(count)]
    while True:
        sizes = persona + length("prompt"), length("answer"), length("answer")
        if sizes[0] + max(sizes[1:]) <= longest:
            yield 0, *(tokens(size) for size in sizes)


class Peak:
    """Largest memory of this process (or GPU) while a block runs, above what it held before, in MiB."""

    def __enter__(self):
        self.on_gpu, self.stop, self.top = torch.cuda.is_available(), False, 0
        gc.collect()
        if not self.on_gpu:
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the run before freed is given back first
        self.base = self.now()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def now(self):
        return torch.cuda.memory_allocated() if self.on_gpu else int(open("/proc/self/statm").read().split()[1]) * 4096

    def watch(self):
        while not self.stop:
            self.top = max(self.top, self.now())
            time.sleep(0.005)

    def __exit__(self, *_):
        self.stop = True
        self.thread.join()
        top = torch.cuda.max_memory_allocated() if self.on_gpu else self.top
        self.mib = (top - self.base) / 2 ** 20


def clock(action):
    """Seconds and peak MiB of one run. Giving back the memory of the run before is not part of its time."""
    with Peak() as peak:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        action()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return seconds, peak.mib


def alternate(settings: dict, repeats: int, warm: int = 1):
    """Run every setting in turn, again and again; {name: (median s, fastest, slowest, peak MiB)}."""
    seen = {name: [] for name in settings}
    rounds = [(turn, name) for turn in range(repeats + warm) for name in settings]
    for turn, name in tqdm(rounds, desc="alternating", unit="run"):
        result = clock(settings[name])
        if turn >= warm:
            seen[name].append(result)
    return {name: (statistics.median(t for t, _ in runs), min(t for t, _ in runs), max(t for t, _ in runs),
                   max(m for _, m in runs)) for name, runs in seen.items()}


def build(shape: str):
    """One model that both sides use: SmolLM2, or random weights of a large shape."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
    path = resolve_model("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(path)
    if shape == "smollm2":
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), tokenizer
    config = LlamaConfig(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                         num_attention_heads=32, num_key_value_heads=8, rope_theta=500000.0)
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), tokenizer


def item(prompt: list[int], chosen: list[int], rejected: list[int]) -> dict:
    """A prepared pair, with made-up reference log-probabilities."""
    return {"row": {}, "prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected,
            "ref_chosen_logps": -2.0 * len(chosen), "ref_rejected_logps": -2.0 * len(rejected)}


def trainers(model, tokenizer, items, checkpointing):
    """The same wrapped model under TRL's collator and forward, and under ours."""
    plain = TrainConfig(sharing="none", gradient_checkpointing=checkpointing)
    arguments = _arguments(plain, Path(tempfile.gettempdir()) / "rlhi-bench", 1, 1, False)  # nothing is written there
    arguments.precompute_ref_log_probs = True
    trainer = trainer_class("dpo")(model=model, args=arguments, train_dataset=_dataset(items, 0, plain),
                                   processing_class=tokenizer, peft_config=_adapter(plain, model))
    for name, weight in trainer.model.named_parameters():  # a fresh adapter is zero and would hide half the gradients
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02, generator=torch.Generator(weight.device).manual_seed(0))
    if checkpointing:  # which the Trainer switches on only when it trains
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
        trainer.model.train()
    return trainer, trainer.data_collator, PackedCollator("pair")


def gradients(trainer, collator, items):
    trainer.model.zero_grad(set_to_none=True)
    total = 0.0
    for group in items:
        batch = trainer._prepare_inputs(collator(group))
        loss = trainer.compute_loss(trainer.model, batch) * len(group) / sum(map(len, items))
        loss.backward()
        total += loss.item()
    return total, {n: p.grad.double() for n, p in trainer.model.named_parameters() if p.grad is not None}


def show(title, rows, unit_count, unit, work: float = 0.0, ceiling: float = 1.0):
    """A table; with `work`, operations that no setting can do without, also how much of the ceiling they make up."""
    print(f"\n{title}\n| setting | {unit}/s | median s (fastest to slowest) | peak MiB over weights | rlhi is |"
          + " useful work, of the ceiling |" * bool(work))
    print("|---|---|---|---|---|" + "---|" * bool(work))
    ours = next(row for name, row in rows.items() if name.startswith("rlhi"))
    for name, (median, low, high, peak) in rows.items():
        print(f"| {name} | {unit_count / median:.3f} | {median:.2f} ({low:.2f} to {high:.2f}) | {peak:.0f} | "
              f"{median / ours[0]:.2f}x as fast |" + f" {work / median / ceiling:.0%} |" * bool(work))


def bounds(items: list[dict]) -> tuple[int, dict[str, float]]:
    """Tokens with every prompt written out and no padding, and how many of them each setting saves or adds."""
    counted = plan(items, "pair")
    together = sum(len(plant([s for i in items[start:start + 4] for s in sequences_of(i)]).tokens)
                   for start in range(0, len(items), 4))
    rows = [max(len(i["chosen_ids"]), len(i["rejected_ids"])) + len(i["prompt_ids"]) for i in items]
    padded = sum(2 * len(rows[s:s + 4]) * max(rows[s:s + 4]) for s in range(0, len(rows), 4))
    return counted["tokens"], {"pair": counted["unique_tokens"], "conversation": together, "padded at batch 4": padded}


def gradient_gap(left, right) -> float:
    """Largest relative difference of a weight's gradient."""
    return max(((right[1][name] - grad).norm() / grad.norm()).item() for name, grad in left[1].items())


def compare(left, right, dtype, noise: float) -> None:
    """Losses and gradients of two ways, printed, and asserted to be equal up to rounding.

    `noise` is how far TRL is from itself at another batch size: no two orders of summing are closer than that.
    """
    gap, tolerance = gradient_gap(left, right), 1e-5 if dtype == torch.float32 else 2e-2
    print(f"loss {left[0]:.7f} and {right[0]:.7f}, relative difference {abs(left[0] - right[0]) / abs(left[0]):.1e}; "
          f"largest relative difference of {len(left[1])} gradients {gap:.1e}")
    assert abs(left[0] - right[0]) <= max(tolerance * abs(left[0]), 1e-3 if tolerance > 1e-4 else 0), "losses differ"
    assert gap <= max(tolerance, 2 * noise), "gradients differ"


def bench_training(options, model, tokenizer, pairs):
    items = [item(*pair[1:]) for pair in pairs[:options.pairs]]
    total, tokens = bounds(items)
    print(f"{len(items)} pairs of {len({pair[0] for pair in pairs[:options.pairs]})} conversations, prompts of "
          f"{sorted(len(i['prompt_ids']) for i in items)} tokens; {total} tokens in all; "
          + ", ".join(f"{name} {count}" for name, count in tokens.items()))
    for name in ("pair", "conversation"):
        print(f"token bounds when prompts are shared by {name}: {total / tokens[name]:.2f}x over one pair at a time, "
              f"{tokens['padded at batch 4'] / tokens[name]:.2f}x over batch 4")
    work = training_flops(model, {"unique_tokens": tokens["conversation"]}, scored_tokens(items))[1]
    trainer, theirs, _ = trainers(model, tokenizer, items, options.checkpointing)
    ours = {name: PackedCollator(name) for name in ("conversation", "pair")}
    add_prefix_head(model, options.max_length)
    split = lambda size: [items[start:start + size] for start in range(0, len(items), size)]
    reference = gradients(trainer, theirs, split(1))
    noise = gradient_gap(reference, gradients(trainer, theirs, split(2)))
    print(f"TRL at batch 1 against itself at batch 2: largest relative difference of a gradient {noise:.1e}")
    for name, collator in ours.items():
        print(f"TRL at batch 1 against rlhi, prompts shared by {name}: ", end="")
        compare(reference, gradients(trainer, collator, split(4)), model.dtype, noise)
    settings = {f"rlhi, shared by {name}, batch 4": lambda collator=collator: gradients(trainer, collator, split(4))
                for name, collator in ours.items()}
    for size in options.peer_batches:
        settings[f"TRL, batch {size}"] = lambda size=size: gradients(trainer, theirs, split(size))
    ceiling = matmul_speed(model.device.type, model.dtype)
    print(f"measured ceiling of this device {ceiling / 1e12:.2f} TFLOP/s; useful work counts each distinct token once")
    show("DPO, forward and backward", alternate(settings, options.repeats, warm=0), len(items), "pairs", work, ceiling)


def bench_reference(options, model, tokenizer, pairs):
    groups = {}
    for pair in pairs:
        groups.setdefault(pair[0], []).append(pair)
    chosen = sorted(groups.values(), key=len, reverse=True)[:options.conversations]
    sequences = [(p, answer) for group in chosen for _, p, c, r in group for answer in (c, r)]
    unique = len(plant(sequences).tokens)
    total = sum(len(p) + len(a) for p, a in sequences)
    print(f"\n{len(sequences)} answers of {len(chosen)} conversations: {total} tokens, {unique} unique, "
          f"bound {total / unique:.2f}x")

    def unshared():
        with torch.no_grad():
            return [model(input_ids=(ids := torch.tensor([p + a], device=model.device)), use_cache=False,
                          labels=ids.clone().index_fill_(1, torch.arange(len(p), device=model.device), -100),
                          fused_lm_head=True).log_probs.double().sum().item() for p, a in sequences]

    shared = lambda: sequence_logprobs(model, *zip(*sequences))
    gap = max(abs(a - b) / abs(b) for a, b in zip(shared(), unshared()))
    print(f"largest relative difference of the log-probabilities {gap:.1e}")
    assert gap < (1e-5 if model.dtype == torch.float32 else 2e-2)
    show("Reference pass over conversation tries", alternate({"rlhi, tries": shared, "TRL's head, one row at a time":
         unshared}, options.repeats, warm=0), len(sequences), "answers")


def bench_candidates(options, model, tokenizer, pairs):
    from transformers import LlamaForSequenceClassification
    config = model.config.__class__(**model.config.to_dict() | {"num_labels": 1})
    with torch.device(model.device):
        reward = LlamaForSequenceClassification(config).to(model.dtype).eval()
    reward.model.load_state_dict(model.base_model.state_dict())
    torch.nn.init.normal_(reward.score.weight, std=0.05, generator=torch.Generator(model.device).manual_seed(0))
    draw = random.Random(0)
    prompt = [draw.randrange(100, 40000) for _ in range(options.prompt)]
    answers = [[draw.randrange(100, 40000) for _ in range(options.prompt // 3)] for _ in range(16)]
    total, unique = 16 * options.prompt * 4 // 3, options.prompt + 16 * (options.prompt // 3)
    print(f"\n16 candidates of {options.prompt // 3} tokens, prompt of {options.prompt}: bound {total / unique:.2f}x")

    def unshared():
        with torch.no_grad():
            return [reward(input_ids=torch.tensor([prompt + a], device=model.device), use_cache=False).logits.item()
                    for a in answers]

    shared = lambda: sequence_scores(reward, [prompt] * 16, answers)
    gap = max(abs(a - b) for a, b in zip(shared(), unshared()))
    print(f"largest difference of the scores {gap:.1e}")
    assert gap < (1e-5 if model.dtype == torch.float32 else 2e-2)
    show("Reward of 16 candidates", alternate({"rlhi": shared, "one row at a time": unshared}, options.repeats, warm=0),
         16, "answers")


def random_pair(draw, prompt: int, answer: int):
    tokens = lambda count: [draw.randrange(100, 40000) for _ in range(count)]
    return item(tokens(prompt), tokens(answer), tokens(answer))


def bench_curve(options, model, tokenizer, pairs):
    """Twenty optimizer steps from the same weights on the same pairs, by TRL's forward and by ours."""
    items = [item(*pair[1:]) for pair in pairs[:8]]
    trainer, theirs, ours = trainers(model, tokenizer, items, options.checkpointing)
    add_prefix_head(model, options.max_length)
    weights = [w for w in trainer.model.parameters() if w.requires_grad]
    start, curves = [w.detach().clone() for w in weights], {}
    for name, collator in (("TRL", theirs), ("rlhi", ours)):
        with torch.no_grad():
            for weight, value in zip(weights, start):
                weight.copy_(value)
        optimizer, curves[name] = torch.optim.AdamW(weights, lr=2e-4), []
        for step in range(20):
            optimizer.zero_grad()
            group = [items[(2 * step + i) % len(items)] for i in range(2)]
            loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(collator(group)))
            loss.backward()
            optimizer.step()
            curves[name].append(loss.item())
    gap = max(abs(a - b) / abs(a) for a, b in zip(curves["TRL"], curves["rlhi"]))
    print("\nTwenty steps of AdamW at 2e-4, batch 2\n| step | TRL | rlhi |\n|---|---|---|")
    for step in (0, 4, 9, 14, 19):
        print(f"| {step + 1} | {curves['TRL'][step]:.6f} | {curves['rlhi'][step]:.6f} |")
    print(f"largest relative difference of the 20 losses {gap:.1e}")
    assert gap < (1e-3 if model.dtype == torch.float32 else 5e-2)


def bench_growth(options, model, tokenizer, pairs):
    """Time and memory of one pair as its prompt grows, and of N scored answers as N grows, beside the formulas."""
    draw, answer, rows = random.Random(0), 128, []
    lengths = [n for n in (256, 512, 1024, 2048, 4096) if n <= options.longest_prompt]
    trainer, theirs, ours = trainers(model, tokenizer, [random_pair(draw, 256, answer)], options.checkpointing)
    add_prefix_head(model, max(lengths) + answer)
    for prompt in lengths:
        pair = random_pair(draw, prompt, answer)
        seen = alternate({"rlhi": lambda: gradients(trainer, ours, [[pair]]),
                          "TRL": lambda: gradients(trainer, theirs, [[pair]])}, options.repeats, options.warm)
        rows.append({"kind": "pair", "prompt": prompt, "answer": answer, "n": 2, "rlhi_s": seen["rlhi"][0],
                     "peer_s": seen["TRL"][0], "rlhi_mib": seen["rlhi"][3], "peer_mib": seen["TRL"][3],
                     "formula": 2 * (prompt + answer) / (prompt + 2 * answer)})
    for n in (2, 4, 8, 16, 32, 64):
        prompt, answers = random_pair(draw, 300, 1)["prompt_ids"], [random_pair(draw, 1, 100)["chosen_ids"] for _ in range(n)]
        alone = lambda: [sequence_logprobs(trainer.model, [prompt], [a]) for a in answers]
        seen = alternate({"rlhi": lambda: sequence_logprobs(trainer.model, [prompt] * n, answers), "alone": alone},
                         options.repeats, options.warm)
        rows.append({"kind": "candidates", "prompt": 300, "answer": 100, "n": n, "rlhi_s": seen["rlhi"][0],
                     "peer_s": seen["alone"][0], "rlhi_mib": seen["rlhi"][3], "peer_mib": seen["alone"][3],
                     "formula": n * 400 / (300 + n * 100)})
    print("\n| kind | prompt | N | rlhi s | peer s | measured | formula | rlhi MiB | peer MiB |\n" + "|---" * 9 + "|")
    for row in rows:
        print(f"| {row['kind']} | {row['prompt']} | {row['n']} | {row['rlhi_s']:.2f} | {row['peer_s']:.2f} | "
              f"{row['peer_s'] / row['rlhi_s']:.2f}x | {row['formula']:.2f}x | {row['rlhi_mib']:.0f} | {row['peer_mib']:.0f} |")
    sizes = [row for row in rows if row["kind"] == "pair"]
    weights = sum(w.numel() * w.element_size() for w in model.parameters()) / 2 ** 20
    for side in ("rlhi", "peer"):
        # between the two sizes around 8 GiB, or beyond the two that are nearest to it
        last = max(sum(row[f"{side}_mib"] + weights < 8192 for row in sizes[:-1]), 1)
        small, large = sizes[last - 1:last + 1]
        slope = (large[f"{side}_mib"] - small[f"{side}_mib"]) / (large["prompt"] - small["prompt"])
        longest = small["prompt"] + (8192 - weights - small[f"{side}_mib"]) / slope
        print(f"longest prompt in 8 GiB with these answers, by the line from {small['prompt']} to {large['prompt']}: "
              f"{side} {longest:,.0f} tokens")
    if options.save:
        about = {"torch": torch.__version__, "threads": torch.get_num_threads(), "dtype": str(model.dtype), "shape": options.shape,
                 "checkpointing": options.checkpointing, "repeats": options.repeats, "date": time.strftime("%Y-%m-%d")}
        Path(options.save).write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["smollm2", "llama-8b"], default="smollm2", help="model")
    parser.add_argument("--pairs", type=int, default=8, help="pairs in each measured pass")
    parser.add_argument("--max-length", type=int, default=1024, help="longest prompt and answer, in tokens")
    parser.add_argument("--persona", type=int, default=120, help="tokens of the persona before every prompt")
    parser.add_argument("--peer-batches", type=int, nargs="+", default=[1, 2, 4], help="batch sizes of TRL")
    parser.add_argument("--prompt", type=int, default=300, help="prompt tokens of the candidates' part")
    parser.add_argument("--conversations", type=int, default=2, help="conversations of the reference part")
    parser.add_argument("--repeats", type=int, default=5, help="measured runs of every setting")
    parser.add_argument("--warm", type=int, default=1, help="unmeasured runs first, in the growth part")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing on both sides")
    parser.add_argument("--parts", nargs="+", default=["training", "reference", "candidates"],
                        help="and curve, growth")
    parser.add_argument("--longest-prompt", type=int, default=4096, help="of the growth part")
    parser.add_argument("--save", help="JSON file for the rows of the growth part")
    options = parser.parse_args()
    from trl.trainer.utils import add_fused_lm_head
    model, tokenizer = build(options.shape)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, "
          f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}, {model.dtype}, {options.shape}")
    real = WILDCHAT.exists() and options.shape == "smollm2"
    source = (wildchat_pairs(tokenizer, options.max_length, 0, options.persona) if real
              else simulated_pairs(40000, options.max_length, 0, options.persona))
    pairs = list(source) if real else [next(source) for _ in range(options.pairs)]
    print("lengths of WildChat conversations" if real else f"simulated lengths {SIMULATED}")
    add_fused_lm_head(model)
    if "reference" in options.parts and real:
        bench_reference(options, model, tokenizer, pairs)
    if "candidates" in options.parts:
        bench_candidates(options, model, tokenizer, pairs)
    if "training" in options.parts:
        bench_training(options, model, tokenizer, pairs)
    if "curve" in options.parts:
        bench_curve(options, model, tokenizer, pairs)
    if "growth" in options.parts:
        bench_growth(options, model, tokenizer, pairs)
