"""Seconds and memory of scoring exam questions: option letters beside answers generated one by one, and a wide head.

Reads   a base folder and exam questions (data/02_refined/02_kor_med_test/dev.jsonl of a run); the second table reads
        nothing: its weights and tokens are random
Writes  two tables to stdout, with --json the numbers

    .venv/bin/python tests/bench/bench_evaluation.py --base model/raw/tiny \\
        --items data/sample/02_refined/02_kor_med_test/dev.jsonl
    .venv/bin/python tests/bench/bench_evaluation.py --only memory --hidden 2560 --layers 34 --device cuda:0  # the 4B

| way | what is done |
|---|---|
| letter | `evaluation.score_letters`: left-padded batches, one forward pass, logits of the last position alone |
| letter, one by one | the same with batches of one |
| generate, batched | `evaluation.generate_letters`, 16 new tokens at most; a model that has learned to stop uses two |
| generate, one by one | greedy, 16 new tokens that are forced: what a loop over the questions costs |

Memory is the most resident memory (on a card: allocated) from before the model is made to the end of scoring, without
what the libraries took, over the bytes of its weights. The rows are those of Gemma 3 with 10,000 new ones, the rest by
default the shape of its smallest model; "all logits" are those that a forward pass without `logits_to_keep` would make.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import used_memory  # beside this file

from medgemma_korean import cli, evaluation, mcq, modeling, profiles, prompts
from medgemma_korean import tokenizer as tokenizers
from medgemma_korean.memory import GB

NEW_TOKENS = 16
ROWS = tokenizers.rows_for(262_145 + 10_000)
GENERATED = "generate, one by one"


# speed --------------------------------------------------------------------------------------------------


def forced(model: Any, tokenizer: Any, items: list[dict[str, Any]]) -> None:
    """Every item alone, 16 new tokens whatever the model says."""
    import torch

    device = next(model.parameters()).device
    with torch.inference_mode():
        for item in items:
            ids = torch.tensor([prompts.render(tokenizer, prompts.mcq_direct(item))[0]], device=device)
            whole = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=NEW_TOKENS,
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                use_cache=True,
            )
            assert whole.shape[1] == ids.shape[1] + NEW_TOKENS


def ways(model: Any, tokenizer: Any, items: list[dict[str, Any]], batch: int) -> dict[str, Callable[[], Any]]:
    return {
        "letter": lambda: evaluation.score_letters(model, tokenizer, items, batch),
        "letter, one by one": lambda: evaluation.score_letters(model, tokenizer, items, 1),
        "generate, batched": lambda: evaluation.generate_letters(model, tokenizer, items, batch, NEW_TOKENS),
        GENERATED: lambda: forced(model, tokenizer, items),
    }


def speed(base: Path, file: Path, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds of each way by rounds, the ways in turn; every one is first done once on two items."""
    profile = profiles.get("tiny")
    model = modeling.load_base(base, profile, args.device, args.precision).eval()
    tokenizer, items = tokenizers.load(base), mcq.read_items(file, also=("id",))[: args.number]
    for way in ways(model, tokenizer, items[:2], args.batch).values():
        way()
    todo = ways(model, tokenizer, items, args.batch)
    seconds: dict[str, list[float]] = {name: [] for name in todo}
    used: dict[str, list[float]] = {name: [] for name in todo}
    for _ in range(args.rounds):
        for name, way in todo.items():
            begun, cpu = time.perf_counter(), time.process_time()
            way()
            seconds[name].append(time.perf_counter() - begun)
            used[name].append(time.process_time() - cpu)
    found = {
        name: {
            "seconds": statistics.median(seconds[name]),
            "cpu": statistics.median(used[name]),
            "items": len(items),
        }
        for name in todo
    }
    for entry in found.values():
        entry["times"] = found[GENERATED]["seconds"] / entry["seconds"]
        entry["cpu_times"] = found[GENERATED]["cpu"] / entry["cpu"]
    return found


# memory -------------------------------------------------------------------------------------------------


class Rows:
    """Stands in for a tokenizer of ROWS pieces where only widths and ids count: every character is a token."""

    pad_token_id, bos_token_id, eos_token_id = 0, 2, 1


def memory(args: argparse.Namespace) -> dict[str, float]:
    """Bytes of a model's weights, and the peak of scoring letters with it, both without what was there before."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    kind = torch.device(args.device).type
    dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    before = used_memory.now(kind)
    heads = max(1, args.hidden // 160)
    config = Gemma3TextConfig(
        vocab_size=args.rows,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 16 // 5,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        head_dim=256,
        tie_word_embeddings=True,
        sliding_window=1024,
    )
    with torch.device(args.device):
        model = Gemma3ForCausalLM(config).to(dtype).eval().requires_grad_(False)
    model.config.use_cache = False
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    used_memory.forget_peak(kind)
    generator = torch.Generator().manual_seed(1)
    lengths = [args.length - 7 * (i % 5) for i in range(2 * args.batch)]
    encoded = [torch.randint(3, args.rows, (n,), generator=generator).tolist() for n in lengths]
    items = [{"id": str(i), "answer": "A", **dict.fromkeys(prompts.LETTERS, "가")} for i in range(len(encoded))]
    found = _score(model, items, encoded, args.batch)
    assert len(found) == len(items) and all(row["predicted"] for row in found)
    peak = used_memory.peak(kind) - before
    logits = args.batch * args.length * args.rows * 4
    return {"weights": weights, "peak": peak, "times": peak / weights, "logits": logits, "rows": args.rows}


def _score(model: Any, items: list[dict[str, Any]], encoded: list[list[int]], batch: int) -> list[dict[str, Any]]:
    """`score_letters` on ready token ids: what it does after the prompts are made."""
    real_render, real_ids = prompts.render, evaluation.letter_ids
    given = iter(encoded)
    prompts.render = lambda *_: (next(given), 0)
    evaluation.letter_ids = lambda _: {letter: 100 + i for i, letter in enumerate(prompts.LETTERS)}
    try:
        asked = [{**item, "question": "?"} for item in items]
        return evaluation.score_letters(model, Rows(), asked, batch)
    finally:
        prompts.render, evaluation.letter_ids = real_render, real_ids


# the program --------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, metavar="P", help="folder of a Gemma 3 with its tokenizer")
    parser.add_argument("--items", type=Path, metavar="FILE", help="refined exam questions")
    parser.add_argument("--number", type=cli.positive_int, default=30, metavar="N", help="of them (default: 30)")
    parser.add_argument("--batch", type=cli.positive_int, default=8, metavar="N", help="items a batch (default: 8)")
    parser.add_argument("--rounds", type=cli.positive_int, default=3, metavar="N")
    parser.add_argument("--precision", choices=("8bit", "nf4", "bf16", "fp32"), default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=cli.positive_int, default=ROWS, metavar="N", help=f"of the head ({ROWS:,})")
    parser.add_argument("--hidden", type=cli.positive_int, default=640, metavar="N")
    parser.add_argument("--layers", type=cli.positive_int, default=18, metavar="N")
    parser.add_argument("--length", type=cli.positive_int, default=512, metavar="N", help="tokens a prompt")
    parser.add_argument("--only", choices=("speed", "memory"))
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    cli.quiet_libraries()
    modeling.set_up_torch(1)
    found: dict[str, Any] = {}
    if args.only != "speed":  # first, while nothing else is in memory
        found["memory"] = memory(args)
        row = found["memory"]
        print(
            cli.table(
                [
                    [
                        f"{args.rows:,}",
                        *(f"{row[k] / GB:.2f}" for k in ("weights", "peak", "logits")),
                        f"{row['times']:.2f}",
                    ]
                ],
                ["rows", "weights GB", "peak GB", "all logits GB", "peak of weights"],
            )
        )
    if args.only != "memory":
        if not args.base or not args.items:
            print("error: --base and --items are needed for the speed table", file=sys.stderr)
            return cli.EXIT_INPUT
        found["speed"] = speed(args.base, args.items, args)
        lines = [
            [
                name,
                f"{e['seconds']:.2f}",
                f"{e['cpu']:.2f}",
                f"{e['items'] / e['seconds']:.1f}",
                f"{e['times']:.1f}",
                f"{e['cpu_times']:.1f}",
            ]
            for name, e in found["speed"].items()
        ]
        header = ["way", "seconds", "CPU seconds", "items a second", "times as fast", "by CPU seconds"]
        print("\n" + cli.table(lines, header))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
