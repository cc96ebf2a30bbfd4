"""Build `tiny`: a real Gemma-3 of a few million weights, with a tokenizer of Gemma's structure, from the sample text.

Reads   data/sample/pretrain/{ko,en}/*.jsonl
Writes  model/raw/tiny/ : config, safetensors, tokenizer.json, tokenizer.model

    python script/model/build_tiny_model.py

The tokenizer is a byte-fallback SentencePiece BPE; the model is pre-trained for a fixed number of steps, so that
the measurements of later stages mean something. The same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import time

from medgemma_korean import cli, prompts, records
from medgemma_korean.cli import PipelineError, log
from medgemma_korean.profiles import TinyShape
from medgemma_korean.stage import Input, Stage

FORMAT = 1


def read_texts(folder) -> list[str]:
    """All documents, Korean and English in turn, so that every batch of the pre-training holds both."""
    by_language = [
        [row["text"] for file in records.row_files(folder / language) for row in records.read_rows(file)]
        for language in ("ko", "en")
    ]
    if not all(by_language):
        raise PipelineError(f"{folder}: needs ko/*.jsonl and en/*.jsonl with rows that have a text")
    longest = max(map(len, by_language))
    return [texts[i] for i in range(longest) for texts in by_language if i < len(texts)]


def exercises(texts: list[str], seed: int) -> list[tuple[str, str]]:
    """(prompt, letter): one gap-filling question a text, in the exam's form, the right letters spread evenly.

    MedGemma has seen dialogue and letter answers before this pipeline touches it; so should its stand-in, or its
    first scores would be those of a model that always says the same letter.
    """
    rng = random.Random(seed)
    words = [[w for w in re.findall(r"[가-힣]{2,6}|[a-z]{4,12}", text)] for text in texts]
    found = []
    for number, text in enumerate(texts):
        sentences = [s for s in re.split(r"(?<=[.?!])\s+", text) if 20 <= len(s) <= 120]
        if not sentences or not words[number]:
            continue
        sentence = rng.choice(sentences)
        inside = [w for w in words[number] if w in sentence]
        others = sorted({w for other in rng.sample(words, min(8, len(words))) for w in other} - set(words[number]))
        if not inside or len(others) < 4:
            continue
        gap, letter = rng.choice(inside), prompts.LETTERS[len(found) % 5]
        options = dict(zip(prompts.LETTERS.replace(letter, ""), rng.sample(others, 4), strict=True)) | {letter: gap}
        found.append((prompts.mcq_direct({"question": sentence.replace(gap, "____", 1), **options}), letter))
    return found


def new_model(shape: TinyShape, tokenizer):
    """A Gemma-3 of that shape with random weights (seeded), rows padded to a multiple of 64 as Gemma's are."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    from medgemma_korean.tokenizer import rows_for

    config = Gemma3TextConfig(
        vocab_size=rows_for(len(tokenizer)),
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        query_pre_attn_scalar=shape.head_dim,
        sliding_window=shape.sliding_window,
        max_position_embeddings=shape.context,
        # Gemma alternates local layers with a global one; the last of every three is global here.
        layer_types=["full_attention" if i % 3 == 2 else "sliding_attention" for i in range(shape.layers)],
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    return Gemma3ForCausalLM(config)


def pretrain(model, tokenizer, texts: list[str], shape: TinyShape, seed: int, tick) -> float:
    """Ordinary language modelling on blocks of text for a fixed number of steps; returns the last mean loss."""
    import torch

    from medgemma_korean.tokenizer import encode

    asked = exercises(texts, seed)
    stream: list[int] = []
    for number, text in enumerate(texts):
        stream += [tokenizer.bos_token_id, *encode(tokenizer, text), tokenizer.eos_token_id]
        if number < len(asked):
            stream += prompts.render(tokenizer, *asked[number])[0]
    blocks = torch.tensor(stream[: len(stream) // shape.length * shape.length]).view(-1, shape.length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=shape.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=shape.learning_rate, total_steps=shape.steps, pct_start=0.05
    )
    order = torch.Generator().manual_seed(seed)
    queue = torch.empty(0, dtype=torch.long)
    recent: list[float] = []
    model.train()
    for step in range(1, shape.steps + 1):
        if len(queue) < shape.batch:
            queue = torch.cat([queue, torch.randperm(len(blocks), generator=order)])
        batch, queue = blocks[queue[: shape.batch]], queue[shape.batch :]
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        if not torch.isfinite(loss):
            raise AssertionError(f"loss is {loss.item()} at step {step}")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        recent = [*recent[-19:], loss.item()]
        if step % 60 == 0 or step == shape.steps:
            tick(step, shape.steps, sum(recent) / len(recent))
    return sum(recent) / len(recent)


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--seed", type=cli.seed, help="seed of weights and order (default: the profile's)")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    profile, paths = cli.resolve(args)
    if profile.tiny is None:
        raise PipelineError(f"{profile.name} is not built here; script/model/download_model.py fetches it")
    cli.start_logging(paths, "build_tiny_model")
    shape = profile.tiny
    seed = shape.seed if args.seed is None else args.seed
    stage = Stage(
        "build_tiny_model",
        paths,
        outputs=[paths.raw_model],
        inputs=[Input("pre-training text", paths.pretrain)],
        settings={**vars(shape), "seed": seed},
        format=FORMAT,
        force=args.force,
        driver_stage="download",
        record_inside=True,
    )
    if (code := stage.already_complete()) is not None:
        return code

    from medgemma_korean import modeling
    from medgemma_korean import tokenizer as tokenizers

    modeling.set_up_torch(seed)
    texts = read_texts(paths.pretrain)
    with stage.work() as folder:
        tokenizers.build_base(folder, texts, shape.base_vocab)
        tokenizer = tokenizers.load(folder)
        model = new_model(shape, tokenizer)
        log.info(
            "building a Gemma-3 of %s weights, %s token ids, from %s",
            f"{sum(p.numel() for p in model.parameters()):,}",
            f"{len(tokenizer):,}",
            cli.count(len(texts), "document"),
        )
        started = time.monotonic()

        def tick(step: int, steps: int, loss: float) -> None:
            rate = step / (time.monotonic() - started)
            log.info("pre-training step %d of %d, loss %.3f, %.1f steps/s", step, steps, loss, rate)
            stage.tick(step, steps, f"loss {loss:.3f}")

        loss = pretrain(model, tokenizer, texts, shape, seed, tick)
        model.generation_config = modeling.generation_config(tokenizer, model.config.vocab_size)
        modeling.save_model(model.eval(), folder)
        stage.complete(
            counts={"documents": len(texts), "characters": sum(map(len, texts))},
            steps=shape.steps,
            scores={"loss": loss},
            metric=f"loss {loss:.3f}",
        )
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
