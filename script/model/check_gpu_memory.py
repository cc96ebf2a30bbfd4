"""Predicts whether a model's training stages fit into memory, before anything is loaded.

Reads   model/raw/<model>/config.json and model/tokenizer/<name>/tokenizer_info.json where they are
Writes  nothing

    python script/model/check_gpu_memory.py --model medgemma-4b
    python script/model/check_gpu_memory.py --model medgemma-27b --stage 00 --precision nf4 --available 48
    python script/model/check_gpu_memory.py --model medgemma-27b --precision bf16 --shards 4 --available 80

Compares with the free memory of the CUDA device, or of the machine on a CPU. Exit code 2 when a stage does not fit;
the message names what would. GB are 10^9 bytes. Every number is a prediction from shapes, not a measurement.
"""

from __future__ import annotations

import argparse
import sys

from medgemma_korean import cli, memory, modeling
from medgemma_korean.cli import PipelineError
from medgemma_korean.memory import GB
from medgemma_korean.shapes import BITS, free_ram


def library_line(cases: dict[str, memory.Case]) -> str | None:
    """What PEFT's own way of training rows would take more, at most; None where no stage trains rows."""
    more = [
        memory.library_rows_bytes(case.shape, case.element)
        - memory.new_row_bytes(case.shape, case.tokens, case.new_tokens, case.element)
        for case in cases.values()
        if case.new_tokens
    ]
    return f"the library's way of training rows would add {max(more) / GB:.1f} GB." if more else None


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, device=True, force=False)
    parser.add_argument("--stage", choices=(*memory.STAGES, "all"), default="all")
    parser.add_argument("--precision", choices=("auto", *BITS), default="auto", help="of the frozen base")
    parser.add_argument("--micro-batch", type=cli.positive_int, metavar="N", help="rows a forward pass")
    parser.add_argument("--max-length", type=cli.positive_int, metavar="N", help="tokens a row")
    parser.add_argument(
        "--shards", type=cli.positive_int, default=1, metavar="N", help="cards that share the weights (bf16, fp32)"
    )
    parser.add_argument(
        "--available", type=cli.positive_float, metavar="GB", help="compare with a card of that size instead"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    profile, paths = cli.resolve(args)
    if args.available:
        available, where, dtype = args.available * GB, "as given", profile.dtype
    else:
        available, where = memory.available_bytes(args.device)
        dtype = modeling.dtype_name(modeling.compute_dtype(profile, modeling.pick_device(args.device)))
    cases = memory.cases(
        profile,
        paths,
        precision=profile.precision if args.precision == "auto" else args.precision,
        dtype=dtype,
        stages=memory.STAGES if args.stage == "all" else [args.stage],
        shards=args.shards,
        micro_batch=args.micro_batch,
        max_length=args.max_length,
    )
    print(memory.table({stage: memory.predict(case) for stage, case in cases.items()}, available))
    first = next(iter(cases.values()))
    streaming, ram = memory.streaming_bytes(first.shape, profile.dtype), free_ram()
    print(
        f"\n{profile.name}, base in {first.precision}, computing in {dtype}, gradient checkpointing "
        f"{'on' if first.checkpointing else 'off'}; there: {where}. These are predictions, not measurements."
    )
    if line := library_line(cases):
        print(line)
    print(f"add_lora and merges need up to {streaming / GB:.1f} GB of main memory, {ram / GB:.1f} GB are free.")
    problems = [
        f"stage {stage}: {memory.gap(case, available, where)}"
        for stage, case in cases.items()
        if memory.total(case) > available
    ]
    if streaming > ram and not args.available:  # --available is about another machine
        problems.append(f"add_lora and merges need {streaming / GB:.1f} GB of main memory; use a machine with more")
    if problems:
        raise PipelineError("does not fit\n  " + "\n  ".join(problems))
    print(f"verdict: fits, with {(available - max(map(memory.total, cases.values()))) / GB:.1f} GB to spare")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
