"""Predicts whether a model's training stages fit into memory, before anything is loaded.

Reads   model/raw/<model>/config.json and model/tokenizer/<name>/tokenizer_info.json where they are
Writes  nothing

    python script/model/check_gpu_memory.py --model medgemma-4b
    python script/model/check_gpu_memory.py --model medgemma-27b --stage 00 --precision nf4 --available 48

Compares with the free memory of the CUDA device, or of the machine on a CPU. Exit code 2 when a stage does not fit;
the message names what would. GB are 10^9 bytes. Every number is a prediction from shapes, not a measurement.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace

from medgemma_korean import checkpoints, cli, modeling, profiles
from medgemma_korean.cli import PipelineError
from medgemma_korean.paths import RunPaths
from medgemma_korean.profiles import ModelProfile, StageSettings
from medgemma_korean.shapes import (
    BITS,
    DTYPE_BYTES,
    TRAINED_BYTES,
    Shape,
    extended_rows,
    free_ram,
    lora_parameters,
    read_shape,
    weight_bytes,
)

GB = 1e9
TILE_TOKENS, TILE_ROWS = 4096, 32768  # of the tile in which TRL 1.16 multiplies hidden states by the head
OVERHEAD = 1.0 * GB  # CUDA context, libraries, fragments of the allocator: usual size, an assumption
CARDS = (16, 24, 32, 40, 48, 80, 96, 141)  # GB of the cards that are sold


# memory of a training step ------------------------------------------------------------------------------


def row_temporaries(shape: Shape, element: int) -> float:
    """Two copies of the matrix (input and head side) and their two dense gradients.

    That is how PEFT's `trainable_token_indices` works: each side copies the matrix, writes the trained rows into
    the copy, and the backward pass makes a dense gradient of it.
    """
    return 4.0 * shape.rows * shape.hidden * element


def layer_activations(shape: Shape, element: int) -> float:
    """Bytes a token that the backward pass of one decoder layer with LoRA needs.

    Counted with `torch.autograd.graph.saved_tensors_hooks` on small Gemma 3 models of different widths, heads and
    FFN sizes (sdpa attention), in bfloat16 under autocast with fp32 LoRA and in float32; linear in each of them.
    """
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    if element == 2:
        return 28 * shape.hidden + 9 * shape.ffn + 15 * q + 5 * kv
    return 24 * shape.hidden + 16 * shape.ffn + 20 * q + 4 * kv


def activations(shape: Shape, tokens: int, element: int, checkpointing: bool) -> float:
    """All layers' activations; with gradient checkpointing every layer's input and one layer in full.

    Source: T. Chen et al., Training deep nets with sublinear memory cost, 2016: a segment is computed again when
    its gradient is due, so only one is alive at a time.
    """
    one = tokens * layer_activations(shape, element)
    return tokens * shape.layers * shape.hidden * element + one if checkpointing else shape.layers * one


def head_bytes(shape: Shape, tokens: int, element: int, rows_train: bool) -> float:
    """The logits of one tile, and the fp32 sums of gradients: of the hidden states, and of the head if rows train.

    Source: trl/kernels/chunked_logprob.py, TRL 1.16; the whole logits are never there.
    """
    tile = min(tokens, TILE_TOKENS) * min(shape.rows, TILE_ROWS) * element
    return tile + tokens * shape.hidden * 4 + (shape.rows * shape.hidden * 4 if rows_train else 0)


@dataclass(frozen=True)
class Case:
    """One stage of one model: what `predict` needs."""

    shape: Shape  # with the extended rows
    settings: StageSettings
    precision: str
    dtype: str
    rank: int
    new_tokens: int  # rows that train
    checkpointing: bool


def predict(case: Case) -> dict[str, float]:
    """Bytes of a training step by part. Their sum is the peak if all parts were largest at once: an upper estimate."""
    shape, settings = case.shape, case.settings
    element = 4 if case.precision == "fp32" else DTYPE_BYTES[case.dtype]
    tokens = settings.micro_batch * settings.max_length
    quantised = case.precision in ("8bit", "nf4")
    return {
        "base weights": weight_bytes(shape, case.precision, case.dtype),
        "LoRA, gradient, Adam": TRAINED_BYTES * lora_parameters(shape, case.rank),
        "trained rows, gradient, Adam": TRAINED_BYTES * case.new_tokens * shape.hidden,
        "copies and gradients of the matrix": row_temporaries(shape, element) if case.new_tokens else 0.0,
        "activations": activations(shape, tokens, element, case.checkpointing),
        "logits tile and head gradient": head_bytes(shape, tokens, element, case.new_tokens > 0),
        "a linear layer, dequantised": max(i * o for i, o in shape.linears) * element if quantised else 0.0,
        "context, libraries, fragments": OVERHEAD,
    }


def streaming_bytes(shape: Shape, dtype: str) -> float:
    """Main memory of add_lora and of merges, which pass a checkpoint through a file at a time: two copies of a file
    that is written, and the matrix before, after, and as it is written.
    """
    return 2 * checkpoints.SHARD_BYTES + 3 * shape.rows * shape.hidden * DTYPE_BYTES[dtype] + OVERHEAD


# verdict ------------------------------------------------------------------------------------------------


def cases(profile: ModelProfile, paths: RunPaths, args: argparse.Namespace) -> dict[str, Case]:
    shape = read_shape(profile, paths)
    new_tokens, rows = extended_rows(profile, paths, shape)
    shape = replace(shape, rows=rows)
    stages = {"00": profile.plain_text, "01": profile.dictionary, "02": profile.mcq}
    changes = {"micro_batch": args.micro_batch, "max_length": args.max_length}
    return {
        stage: Case(
            shape,
            profiles.with_overrides(settings, **changes),
            profile.precision if args.precision == "auto" else args.precision,
            profile.dtype,
            profile.lora_rank if stage != "02" else profile.second_rank,
            new_tokens if settings.row_learning_rate else 0,
            profile.gradient_checkpointing,
        )
        for stage, settings in stages.items()
        if args.stage in (stage, "all")
    }


def total(case: Case) -> float:
    return sum(predict(case).values())


def remedies(case: Case, available: float) -> list[str]:
    """What would make a stage fit, the mildest first; each is predicted, none is guessed."""
    smaller = replace(case.settings, micro_batch=1)
    shorter = replace(case.settings, max_length=max(case.settings.max_length // 2, 1))
    options = {
        "a forward pass of 1 row (--micro-batch 1 here, micro_batch in the profile)": replace(case, settings=smaller),
        f"rows of {shorter.max_length} tokens (--max-length {shorter.max_length})": replace(case, settings=shorter),
        "gradient checkpointing": replace(case, checkpointing=True),
        "4-bit weights (--precision nf4)": replace(case, precision="nf4"),
        "4-bit weights and a forward pass of 1 row": replace(case, precision="nf4", settings=smaller),
    }
    fits = [f"{name}, {total(o) / GB:.1f} GB" for name, o in options.items() if o != case and total(o) <= available]
    card = next((size for size in CARDS if size * GB >= total(case)), None)
    return [*fits, f"a card of {card} GB" if card else "several cards, which the programs do not use"]


def available_bytes(device: str | None) -> tuple[float, str]:
    """Free memory and where: of the CUDA device, else of the machine."""
    chosen = modeling.pick_device(device)
    if chosen.startswith("cuda"):
        import torch

        return float(torch.cuda.mem_get_info(chosen)[0]), f"{chosen} ({torch.cuda.get_device_name(chosen)})"
    return free_ram(), "main memory"


def table(parts: Mapping[str, Mapping[str, float]], available: float) -> str:
    names = list(next(iter(parts.values())))
    lines = [[name, *(f"{part[name] / GB:.2f}" for part in parts.values())] for name in names]
    lines.append(["needed", *(f"{sum(part.values()) / GB:.2f}" for part in parts.values())])
    lines.append(["there", *(f"{available / GB:.2f}" for _ in parts)])
    return cli.table(lines, ["GB, predicted", *(f"stage {stage}" for stage in parts)])


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, device=True, force=False)
    parser.add_argument("--stage", choices=("00", "01", "02", "all"), default="all")
    parser.add_argument("--precision", choices=("auto", *BITS), default="auto", help="of the frozen base")
    parser.add_argument("--micro-batch", type=cli.positive_int, metavar="N", help="rows a forward pass")
    parser.add_argument("--max-length", type=cli.positive_int, metavar="N", help="tokens a row")
    parser.add_argument(
        "--available", type=cli.positive_float, metavar="GB", help="compare with a card of that size instead"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    profile, paths = cli.resolve(args)
    found = cases(profile, paths, args)
    available, where = (args.available * GB, "as given") if args.available else available_bytes(args.device)
    print(table({stage: predict(case) for stage, case in found.items()}, available))
    first = next(iter(found.values()))
    streaming, ram = streaming_bytes(first.shape, first.dtype), free_ram()
    print(
        f"\n{profile.name}, base in {first.precision}, gradient checkpointing "
        f"{'on' if first.checkpointing else 'off'}; there: {where}. These are predictions, not measurements.\n"
        f"add_lora and merges need up to {streaming / GB:.1f} GB of main memory, {ram / GB:.1f} GB are free."
    )
    problems = [
        f"stage {stage} needs about {total(case) / GB:.1f} GB, {available / GB:.1f} GB are there; would fit: "
        + "; ".join(remedies(case, available))
        for stage, case in found.items()
        if total(case) > available
    ]
    if streaming > ram and not args.available:  # --available is about another machine
        problems.append(f"add_lora and merges need {streaming / GB:.1f} GB of main memory; use a machine with more")
    if problems:
        raise PipelineError("does not fit\n  " + "\n  ".join(problems))
    print(f"verdict: fits, with {(available - max(map(total, found.values()))) / GB:.1f} GB to spare")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
