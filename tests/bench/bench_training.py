"""Seconds, tokens per second and memory of a training step: new rows as we train them beside other ways.

Reads   nothing: weights and tokens are random, in the shape of a model; no file is made of them
Writes  a table to stdout, with --json the numbers

    .venv/bin/python tests/bench/bench_training.py --shape 4b --precision 8bit,bf16     # on a card
    .venv/bin/python tests/bench/bench_training.py --shape 27b --precision nf4 --accumulation 1 --rounds 1
    .venv/bin/python tests/bench/bench_training.py --shape 4b --layers 2 --precision bf16 --length 256 --accumulation 1
    .venv/bin/python tests/bench/bench_training.py --shape 2,640,2048,4,1,256 --precision fp32 --length 256

| variant | what trains |
|---|---|
| frozen | LoRA on all linear layers, and no row |
| ours | and the new rows, kept apart from the old ones (`token_rows`) |
| library | and the new rows, by PEFT's `trainable_token_indices` as it is |
| modules_to_save | and both matrices whole and no longer tied, by PEFT's `modules_to_save` |

A step is what training makes of it: rows of two documents laid end to end by TRL's collator, its fused head with its
metrics, gradient checkpointing as in the profile, bfloat16 by autocast on a card (for an fp32 base too, as training has
it; here on a CPU for a bfloat16 base, so that it takes the same path), the norm clipped, AdamW with two rates. Not in
it: reading data, logging, checkpoints.

Every measurement is a process of its own, the variants take turns in rounds, and a first step, which makes Adam's
moments, is not timed. Peak memory is that of all its steps: what torch has allocated and reserved on a card; on a CPU
the most resident memory of the whole process, which may take what is free when it starts (--memory: less). "Of frozen"
divides medians of the same run, on a CPU those of processor seconds, which other work on it changes less. "Predicted"
is `medgemma_korean.memory`, for modules_to_save frozen and 16 bytes a parameter; it counts 1 GB for context and
libraries, which torch's own numbers on a card leave out.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import used_memory  # beside this file

from medgemma_korean import batches, cli, memory, modeling, profiles, shapes, token_rows
from medgemma_korean import tokenizer as tokenizers
from medgemma_korean.memory import GB
from medgemma_korean.profiles import ModelProfile
from medgemma_korean.shapes import Shape

VARIANTS = ("frozen", "ours", "library", "modules_to_save")
PROFILES = {"tiny": "tiny", "4b": "medgemma-4b", "27b": "medgemma-27b"}
MATRICES = ["embed_tokens", "lm_head"]
NEW_SHARE = 0.1  # of the tokens: about what 10,000 new pieces are of real Korean text
LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate")


# what is measured ---------------------------------------------------------------------------------------


def model_of(args: argparse.Namespace) -> tuple[ModelProfile, Shape, int]:
    """(profile, shape with the extended rows, new tokens): of a model, or of numbers with the profile of the 4B."""
    profile = profiles.get(PROFILES.get(args.shape, "medgemma-4b"))
    if args.shape == "tiny":
        tiny = profile.tiny
        base = tokenizers.rows_for(tiny.base_vocab)
        shape = Shape(
            tiny.layers, tiny.hidden, tiny.intermediate, tiny.heads, tiny.kv_heads, tiny.head_dim, base, tiny.base_vocab
        )
    else:
        shape = shapes.SHAPES[profile.source]
        if args.shape not in PROFILES:
            shape = Shape(*map(int, args.shape.split(",")), rows=shape.rows, ids=shape.ids)
    if args.ids:
        shape = replace(shape, ids=args.ids, rows=tokenizers.rows_for(args.ids))
    new = profile.new_tokens if args.new_tokens is None else args.new_tokens
    rows = tokenizers.rows_for(shape.ids + new, at_least=shape.rows)
    shape = replace(shape, layers=args.layers or shape.layers, rows=rows)
    return replace(profile, lora_rank=args.rank or profile.lora_rank), shape, new


def trainable(variant: str, profile: ModelProfile, shape: Shape, new: int) -> dict[str, int]:
    """Parameters that train: LoRA, and rows or whole matrices."""
    rows = {"frozen": 0, "modules_to_save": 2 * shape.rows}.get(variant, new) * shape.hidden
    return {"lora": shapes.lora_parameters(shape, profile.lora_rank), "rows": rows}


def predicted(variant: str, case: memory.Case) -> float:
    """Bytes of a step as `memory` predicts them. case: of our way."""
    shape, frozen = case.shape, memory.total(replace(case, new_tokens=0))
    if variant == "frozen":
        return frozen
    if variant == "modules_to_save":
        return frozen + shapes.TRAINED_BYTES * 2 * shape.rows * shape.hidden
    ours = memory.new_row_bytes(shape, case.tokens, case.new_tokens, case.element)
    return memory.total(case) + (memory.library_rows_bytes(shape, case.element) - ours) * (variant == "library")


def planned(variant: str, precision: str, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    """What is known of a measurement before it is made: bytes, and parameters that train."""
    profile, shape, new = model_of(args)
    settings = replace(profile.plain_text, micro_batch=args.micro_batch, max_length=args.length, batch=args.micro_batch)
    case = memory.Case(shape, settings, precision, dtype, profile.lora_rank, new, profile.gradient_checkpointing)
    return {"predicted": predicted(variant, case), "trainable": trainable(variant, profile, shape, new)}


def rows_of(number: int, length: int, shape: Shape, new: int, seed: int) -> list[batches.Row]:
    """Packed rows of two documents each, of random tokens; a tenth of them new ones."""
    rng, rows = random.Random(seed), []
    for _ in range(number):
        ids = array("i", (rng.randrange(3, shape.ids) for _ in range(length)))
        for place in rng.sample(range(length), round(NEW_SHARE * length) if new else 0):
            ids[place] = shape.ids + rng.randrange(new)
        rows.append({"input_ids": ids, "labels": ids, "seq_lengths": [length // 3, length - length // 3]})
    return rows


# a model of random weights ------------------------------------------------------------------------------


def config_of(shape: Shape) -> Any:
    """As published for the 4B and the 27B: five layers in six see 1,024 tokens, positions of the others stretched by 8.

    head_dim of the 27B is not hidden / heads, and its queries are scaled by the latter.
    """
    from transformers import Gemma3TextConfig

    return Gemma3TextConfig(
        vocab_size=shape.rows,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        query_pre_attn_scalar=shape.head_dim if shape.head_dim == 256 else shape.hidden // shape.heads,
        sliding_window=1024,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        use_cache=False,
    )


def random_base(shape: Shape, precision: str, dtype: Any, device: str) -> Any:
    """A frozen model as `modeling.load_base` leaves it, made on the device a layer at a time: a quantised one is never
    there unquantised.
    """
    import torch
    from transformers import Gemma3ForCausalLM
    from transformers.integrations import bitsandbytes as quantising

    with torch.device("meta"):
        model = Gemma3ForCausalLM._from_config(config_of(shape), dtype=dtype)
    settings = modeling._quantization(precision, dtype)
    if settings is not None:
        quantising.replace_with_bnb_linear(model, modules_to_not_convert=["lm_head"], quantization_config=settings)
        quantise = {"8bit": quantising.Bnb8bitQuantize, "nf4": quantising.Bnb4bitQuantize}[precision](None).convert
        # What PEFT chooses its LoRA layers by.
        model.is_loaded_in_8bit, model.is_loaded_in_4bit = precision == "8bit", precision == "nf4"
    for name, module in model.named_modules():
        if name == "lm_head":
            continue
        if settings is not None and hasattr(module, "source_cls"):
            weight = torch.empty(module.out_features, module.in_features, dtype=dtype, device=device)
            weight.normal_(std=model.config.initializer_range)
            module.weight = quantise({f"{name}.weight": weight}, model=model)[f"{name}.weight"]
            module.support_avx512bf16_for_cpu = False  # as load_base does for nf4
        else:
            module.to_empty(device=device, recurse=False)
            model._init_weights(module)
    model.lm_head.weight = model.model.embed_tokens.weight
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    return model.requires_grad_(False)


def with_adapter(base: Any, variant: str, profile: ModelProfile, new_ids: list[int], seed: int) -> Any:
    """The model ready to train, as `training` makes it: TRL's head on it, and everything that trains in float32."""
    from trl.trainer.utils import add_fused_lm_head

    if variant == "modules_to_save":
        from peft import LoraConfig, get_peft_model
        from transformers import set_seed

        # The way not taken, so that nothing else builds it: LoRA as in modeling.fresh_adapter.
        rank, targets = profile.lora_rank, list(profile.target_modules)
        config = LoraConfig(
            r=rank, lora_alpha=profile.lora_scale * rank, target_modules=targets, modules_to_save=MATRICES,
            task_type="CAUSAL_LM",
        )  # fmt: skip
        set_seed(seed)
        model = get_peft_model(base, config)
    else:
        ids = [] if variant == "frozen" else new_ids
        model = modeling.fresh_adapter(base, profile, second=False, new_ids=ids, seed=seed)
    layer = token_rows.layer_of(model)
    assert (layer is not None) == (variant in ("ours", "library"))
    if variant == "ours":
        token_rows.apart(model)
    assert layer is None or ("get_merged_weights" in vars(layer)) == (variant == "ours")
    add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy", "is_top1"))
    if variant == "ours":
        token_rows.after_head(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if profile.gradient_checkpointing:
        model.enable_input_require_grads()  # as SFTTrainer does
        model.gradient_checkpointing_enable()
    return model.train()


def trained_rows(model: Any) -> list[Any]:
    """The trained rows, or the trained matrices."""
    kinds = ("trainable_tokens", "modules_to_save")
    return [p for name, p in model.named_parameters() if p.requires_grad and any(kind in name for kind in kinds)]


# a measurement --------------------------------------------------------------------------------------------


def measure(
    variant: str, precision: str, dtype: Any, device: str, autocast: bool, args: argparse.Namespace
) -> dict[str, Any]:
    """A warm-up step and `args.steps` timed ones of a fresh model."""
    import torch
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    profile, shape, new = model_of(args)
    modeling.set_up_torch(args.seed)
    base = random_base(shape, precision, dtype, device)
    ids = list(range(shape.ids, shape.ids + new))
    model = with_adapter(base, variant, profile, ids, args.seed)
    rows = trained_rows(model)
    lora = [p for p in model.parameters() if p.requires_grad and all(p is not row for row in rows)]
    settings = profile.plain_text
    groups = [{"params": lora}, *([{"params": rows, "lr": settings.row_learning_rate}] if rows else [])]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, weight_decay=0.0)
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    kind = device.partition(":")[0]

    def micro_batches(step: int) -> list[dict[str, Any]]:
        made = rows_of(args.micro_batch * args.accumulation, args.length, shape, new, args.seed * 1000 + step)
        return [collate(made[at : at + args.micro_batch]) for at in range(0, len(made), args.micro_batch)]

    def gradients(batch: Sequence[dict[str, Any]]) -> float:
        """The loss of a step as SFTTrainer.compute_loss has it, and its gradients."""
        supervised, loss = sum(int((part["labels"] != -100).sum()) for part in batch), 0.0
        for part in batch:
            part = {name: value.to(device) if hasattr(value, "to") else value for name, value in part.items()}
            with torch.autocast(kind, torch.bfloat16, enabled=autocast):
                output = model(**part, use_cache=False, fused_lm_head=True)
                one = -output.log_probs.sum() / supervised
            one.backward()
            metrics = output.entropy.detach().sum() + output.is_top1.sum()  # read by the trainer at every pass
            assert metrics.isfinite()
            loss += one.item()
        return loss

    def synchronise() -> None:
        if kind == "cuda":
            torch.cuda.synchronize()

    used_memory.forget_peak(kind)
    found: dict[str, Any] = {"loss": [], "grad_norm": [], "seconds": [], "cpu": []}
    for step in range(1 + args.steps):
        batch = micro_batches(step)
        synchronise()
        begun, used = time.perf_counter(), time.process_time()
        loss = gradients(batch)
        if step == 0 and rows:
            found["rows_grad_norm"] = torch.nn.utils.get_total_norm([p.grad for p in rows]).item()
        norm = torch.nn.utils.clip_grad_norm_([*lora, *rows], settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        synchronise()
        if step:
            found["seconds"].append(time.perf_counter() - begun)
            found["cpu"].append(time.process_time() - used)
        found["loss"].append(loss)
        found["grad_norm"].append(norm.item())
    counts = {"lora": sum(p.numel() for p in lora), "rows": sum(p.numel() for p in rows)}
    return {**found, "trainable": counts, **_peak(kind)}


def _peak(kind: str) -> dict[str, int]:
    found = {"peak": used_memory.peak(kind)}
    if kind == "cuda":
        import torch

        found["reserved"] = torch.cuda.max_memory_reserved()
    return found


def machine(device: str) -> str:
    """What computes, and the versions of what computes on it."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in LIBRARIES)
    if device.startswith("cuda"):
        import torch

        card = torch.cuda.get_device_properties(device)
        return f"{card.name}, {card.total_memory / GB:.0f} GB, CUDA {torch.version.cuda}; {versions}"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    ram = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GB
    return f"{os.cpu_count()} cores, {name}, {ram:.0f} GB; {versions}"


def alone(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One measurement in this process: what is planned, and then what was found or that memory did not suffice."""
    import torch

    variant, precision = args.variants[0], args.precision[0]
    profile, device = model_of(args)[0], modeling.pick_device(args.device)
    computing = modeling.compute_dtype(profile, device)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}.get(precision, computing)
    # As training has it on a card; on a CPU it has none, and it is there for what has bfloat16 weights.
    autocast = (computing if device != "cpu" else dtype) is torch.bfloat16
    yield planned(variant, precision, modeling.dtype_name(dtype), args) | {
        "machine": machine(device),
        "autocast": autocast,
    }
    if device == "cpu":
        import resource

        limit = int(min(args.memory * GB if args.memory else shapes.free_ram(), shapes.free_ram()))
        # Memory that is asked for beyond it is refused, or the system would end a process, perhaps another one.
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    elif args.memory:
        torch.cuda.set_per_process_memory_fraction(args.memory * GB / torch.cuda.get_device_properties(0).total_memory)
    try:
        yield measure(variant, precision, dtype, device, autocast, args)
    except (MemoryError, RuntimeError) as error:
        if not cli.out_of_memory(error):
            raise
        yield {"out_of_memory": str(error).splitlines()[0] if str(error) else type(error).__name__}


def in_own_process(variant: str, precision: str, argv: Sequence[str]) -> dict[str, Any]:
    """A measurement; one that the system ended for its memory is none."""
    command = [sys.executable, __file__, *argv, "--variants", variant, "--precision", precision, "--alone"]
    done = subprocess.run(command, capture_output=True, text=True)
    found: dict[str, Any] = {}
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            found |= json.loads(line)
    if done.returncode == -9:
        return {**found, "out_of_memory": "ended by the system"}
    if done.returncode:
        raise RuntimeError(f"{variant} in {precision}: exit {done.returncode}\n{done.stderr[-3000:]}")
    return found


# the table ------------------------------------------------------------------------------------------------


def lines(results: dict[str, dict[str, list[dict[str, Any]]]], tokens: int) -> Iterator[str]:
    """A row for every precision and variant. results: {precision: {variant: its runs}}; tokens: of a step."""
    runs = [run for variants in results.values() for of in variants.values() for run in of]
    card = any("reserved" in run for run in runs)
    clock = "seconds" if card else "cpu"
    heads = ["precision", "variant", "s a step", "least to most", "tokens/s", "of frozen"]
    heads += ["peak GB", "reserved GB" if card else "CPU s", "predicted GB", "LoRA", "rows"]
    yield f"| {' | '.join(heads)} |"
    yield f"|{'---|' * len(heads)}"
    for precision, variants in results.items():
        frozen = _all(variants.get("frozen", []), clock)
        for variant, of in variants.items():
            cells = ["out of memory", "", "", "", "", ""]
            if not any("out_of_memory" in run for run in of):
                seconds, used = _all(of, "seconds"), statistics.median(_all(of, clock))
                middle = statistics.median(seconds)
                cells = [
                    f"{middle:.3g}",
                    f"{min(seconds):.3g} to {max(seconds):.3g}",
                    f"{tokens / middle:,.0f}",
                    f"{used / statistics.median(frozen):.2f}" if frozen else "",
                    f"{max(run['peak'] for run in of) / GB:.2f}",
                    f"{max(run['reserved'] for run in of) / GB:.2f}" if card else f"{used:.3g}",
                ]
            yield f"| {' | '.join([precision, variant, *cells, *_planned_cells(of[0])])} |"


def _all(runs: Sequence[dict[str, Any]], clock: str) -> list[float]:
    return [value for run in runs for value in run.get(clock, [])]


def _planned_cells(plan: dict[str, Any]) -> list[str]:
    return [f"{plan['predicted'] / GB:.1f}", *(f"{plan['trainable'][name] / 1e6:,.1f} M" for name in ("lora", "rows"))]


def _names(known: Sequence[str]) -> Any:
    def names(text: str) -> list[str]:
        """argparse type: names between commas."""
        found = text.split(",")
        if unknown := [name for name in found if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
        return found

    return names


def _shape(text: str) -> str:
    """argparse type: a model's name, or six numbers."""
    if text not in PROFILES:
        parts = text.split(",")
        if len(parts) != 6 or not all(part.isdecimal() and int(part) for part in parts):
            raise argparse.ArgumentTypeError(f"{text!r}: {', '.join(PROFILES)}, or six numbers between commas")
    return text


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape", type=_shape, default="4b", metavar="SHAPE",
        help="tiny, 4b, 27b, or LAYERS,HIDDEN,FFN,HEADS,KV_HEADS,HEAD_DIM with the rest as of the 4b (default: 4b)",
    )  # fmt: skip
    parser.add_argument("--layers", type=cli.positive_int, metavar="N", help="cut to that depth")
    parser.add_argument("--ids", type=cli.positive_int, metavar="N", help="token ids of the base")
    parser.add_argument("--new-tokens", type=cli.positive_int, metavar="N", help="rows that train (default: 10,000)")
    parser.add_argument("--rank", type=cli.positive_int, metavar="N", help="of LoRA (default: the profile's)")
    parser.add_argument("--variants", type=_names(VARIANTS), default=list(VARIANTS), help="between commas (all)")
    parser.add_argument(
        "--precision", type=_names(list(shapes.BITS)), default=["8bit"], help="of 8bit, nf4, bf16, fp32 (8bit)"
    )
    parser.add_argument("--micro-batch", type=cli.positive_int, default=2, help="rows a forward pass (default: 2)")
    parser.add_argument("--length", type=cli.positive_int, default=512, help="tokens a row (default: 512)")
    parser.add_argument("--accumulation", type=cli.positive_int, default=16, help="passes a step (default: 16)")
    parser.add_argument("--steps", type=cli.positive_int, default=3, help="timed steps a process (default: 3)")
    parser.add_argument("--rounds", type=cli.positive_int, default=3, help="processes of each variant (default: 3)")
    parser.add_argument("--memory", type=cli.positive_float, metavar="GB", help="that a process may take at most")
    parser.add_argument("--device", help="cuda:0 or cpu (default: the card where there is one)")
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--predict", action="store_true", help="print what is predicted, and measure nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, after every process")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = make_parser().parse_args(argv)
    if args.alone:
        for part in alone(args):
            print(json.dumps(part), flush=True)
        return 0
    profile, shape, new = model_of(args)
    if args.predict:
        print("| precision | variant | predicted GB | LoRA | rows |\n|---|---|---|---|---|")
        for precision in args.precision:
            for variant in args.variants:
                plan = planned(variant, precision, profile.dtype, args)
                print(f"| {precision} | {variant} | {' | '.join(_planned_cells(plan))} |")
        return 0
    results: dict[str, dict[str, list[dict[str, Any]]]] = {p: {v: [] for v in args.variants} for p in args.precision}
    for turn in range(args.rounds):
        # In the opposite order every other round, so that what else the machine does meets all of them.
        pairs = [(precision, variant) for precision in args.precision for variant in args.variants]
        for precision, variant in pairs if turn % 2 == 0 else pairs[::-1]:
            runs = results[precision][variant]
            if any("out_of_memory" in run for run in runs):
                continue
            runs.append(in_own_process(variant, precision, argv))
            seconds = ", ".join(f"{s:.2f}" for s in runs[-1].get("seconds", [])) or "out of memory"
            print(f"round {turn + 1}: {precision}, {variant}: {seconds}", file=sys.stderr, flush=True)
            if args.json:
                args.json.write_text(json.dumps({"shape": vars(shape), "new_tokens": new, "runs": results}, indent=1))
    first = next(iter(next(iter(results.values())).values()))[0]
    tokens = args.micro_batch * args.length * args.accumulation
    print(f"{first['machine']}; load {os.getloadavg()[0]:.1f}")
    print(
        f"{shape.layers} layers of width {shape.hidden}, {shape.rows:,} rows, {new:,} of them new; "
        f"LoRA of rank {profile.lora_rank}; a step of {args.accumulation} x {args.micro_batch} x {args.length} = "
        f"{tokens:,} tokens, gradient checkpointing {'on' if profile.gradient_checkpointing else 'off'}\n"
    )
    print("\n".join(lines(results, tokens)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
