"""Make a base to train on and a fresh adapter beside it; with --second, merge what was trained and start anew.

Reads   model/raw/<model>/, model/tokenizer/<name>/                     (--second: model/01_trained/<name>/)
Writes  model/raw_lora_added/<name>/{base,adapter}/                     (--second: model/01_another_lora_added/...)
        model/report/<name>/scores/{base,extended}.json                 (--second: merged.json)

    python script/model/add_lora.py --model tiny
    python script/model/add_lora.py --model tiny --second

The base is text-only, unquantised, its tied matrix resized and every new row initialised. It is saved first; the
adapter is trained from there, so that no checkpoint carries the whole matrix.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from medgemma_korean import chain, cli, records
from medgemma_korean.cli import log
from medgemma_korean.paths import RunPaths, show
from medgemma_korean.profiles import ModelProfile
from medgemma_korean.stage import Input, Stage

FORMAT = 1
SEED = 17


def score(folder: Path, tokenizer_folder: Path, which: str, args, profile: ModelProfile, paths: RunPaths) -> dict:
    """Load a base in the run's precision, score it, and write `model/report/<name>/scores/<which>.json`."""
    precision = args.precision or profile.precision
    from medgemma_korean import evaluation, modeling
    from medgemma_korean import tokenizer as tokenizers

    model = modeling.load_base(folder, profile, modeling.pick_device(args.device), precision)
    tokenizer = tokenizers.load(tokenizer_folder)
    result = evaluation.evaluate(model, tokenizer, paths, profile, which=which, precision=precision)
    log.info("%s: %s", which, evaluation.summary(result))
    records.write_json(paths.scores(which), result)
    return result


def first(args: argparse.Namespace, profile: ModelProfile, paths: RunPaths, stage: Stage, seed: int) -> None:
    """Extend the raw model's rows and put the first adapter beside it."""
    from medgemma_korean import evaluation, modeling
    from medgemma_korean import tokenizer as tokenizers

    base_tokenizer, tokenizer = tokenizers.load(paths.raw_model), tokenizers.load(paths.tokenizer)
    with stage.work() as folder:
        model = modeling.load_text_model(paths.raw_model, profile.dtype)
        # The untouched model is scored as text-only too: the same class and precision as everything after it.
        plain = folder / "plain"
        modeling.save_model(model, plain)
        stage.tick(1, 5, "scoring the base")
        before = score(plain, paths.raw_model, "base", args, profile, paths)
        new_ids = modeling.extend_rows(model, base_tokenizer, tokenizer)
        modeling.generation_defaults(model, tokenizer)
        modeling.save_model(model, folder / "base")
        tokenizer.save_pretrained(folder / "base")
        modeling.write_base_info(
            folder / "base", deltas=[], new_ids=new_ids, tokenizer_sha256=tokenizers.fingerprint(paths.tokenizer)
        )
        for file in sorted(plain.iterdir()):
            file.unlink()
        plain.rmdir()
        stage.tick(3, 5, "scoring the extended base")
        after = score(folder / "base", folder / "base", "extended", args, profile, paths)
        trainable = save_fresh_adapter(model, folder, profile, second=False, new_ids=new_ids, seed=seed)
        stage.complete(
            counts={"new_rows": len(new_ids), "rows": model.config.vocab_size, "trainable": trainable},
            scores={"base": before["mcq"]["accuracy"], "extended": after["mcq"]["accuracy"]},
            metric=evaluation.summary(after),
        )


def second(args: argparse.Namespace, profile: ModelProfile, paths: RunPaths, stage: Stage, link, seed: int) -> None:
    """Merge the first adapter and its rows, unquantised, and put a fresh adapter on top."""
    from medgemma_korean import evaluation, modeling
    from medgemma_korean import tokenizer as tokenizers

    with stage.work() as folder:
        info = modeling.base_info(link.base)
        if link.adapter is None:
            log.info("nothing was trained yet; the fresh adapter goes on the unmerged base")
            merged, deltas = modeling.load_text_model(link.base, profile.dtype), info["deltas"]
        else:
            assert link.fingerprint not in info["deltas"], "this adapter is in its base already"
            merged = modeling.merge(link.base, link.adapter, profile)
            deltas = [*info["deltas"], link.fingerprint]
        tokenizer = tokenizers.load(link.base)
        modeling.generation_defaults(merged, tokenizer)
        modeling.save_model(merged, folder / "base")
        tokenizer.save_pretrained(folder / "base")
        modeling.write_base_info(
            folder / "base", deltas=deltas, new_ids=info["new_ids"], tokenizer_sha256=info["tokenizer_sha256"]
        )
        trainable = save_fresh_adapter(merged, folder, profile, second=True, new_ids=[], seed=seed)
        stage.tick(2, 4, "scoring the merged base")
        after = score(folder / "base", folder / "base", "merged", args, profile, paths)
        gate = evaluation.gate(records.read_json(paths.scores("base")), after, profile)
        stage.complete(
            counts={"trainable": trainable, "deltas": len(deltas)},
            scores={"merged": after["mcq"]["accuracy"]},
            gate=gate,
            metric=evaluation.summary(after),
        )


def save_fresh_adapter(model, folder: Path, profile: ModelProfile, *, second: bool, new_ids: list[int], seed: int):
    """Put a fresh adapter on an unquantised model and save it; at step 0 it reproduces its base bit for bit."""
    import torch

    from medgemma_korean import modeling

    ids = torch.arange(5, 5 + 32).unsqueeze(0)
    model.config.use_cache = False
    model.eval()
    with torch.no_grad():
        before = model(input_ids=ids).logits
        adapted = modeling.fresh_adapter(model, profile, second=second, new_ids=new_ids, seed=seed).eval()
        assert torch.equal(adapted(input_ids=ids).logits, before), "a fresh adapter changes its base"
    # The published base, seen from the adapter: not the temporary neighbour that both are made in.
    adapted.peft_config["default"].base_model_name_or_path = "../base"
    modeling.save_adapter(adapted, folder / "adapter")
    trainable = modeling.trainable_parameters(adapted)
    log.info("fresh adapter: %s LoRA and %s token-row parameters", f"{trainable['lora']:,}", f"{trainable['rows']:,}")
    return trainable


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, device=True)
    parser.add_argument("--second", action="store_true", help="merge what was trained and add the second adapter")
    parser.add_argument("--precision", choices=("8bit", "nf4", "bf16", "fp32"), help="of the scores (default: profile)")
    parser.add_argument("--seed", type=int, default=SEED, help=f"seed of the adapter's weights (default: {SEED})")
    parser.add_argument("--allow-regression", action="store_true", help="go on where a gate failed")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    profile, paths = cli.resolve(args)
    cli.start_logging(paths, "add_lora")
    settings = {
        "rank": profile.second_rank if args.second else profile.lora_rank,
        "scale": profile.lora_scale,
        "dropout": profile.second_dropout if args.second else 0.0,
        "precision": args.precision or profile.precision,
        "dtype": profile.dtype,
        "seed": args.seed,
    }
    link = None
    if args.second:
        link = chain.nearest(paths, "add_lora_second")
        inputs = link.inputs(paths)
    else:
        download = paths.command("download/download_model")
        tokenizer = paths.command("model/prepare_tokenizer")
        inputs = [
            Input("raw model", paths.raw_model, paths.raw_model / "stage.json", download),
            Input("tokenizer", paths.tokenizer, paths.tokenizer / "stage.json", tokenizer),
        ]
    inputs += chain.held_out_inputs(paths)
    stage = Stage(
        "add_lora_second" if args.second else "add_lora",
        paths,
        outputs=[paths.another_lora_added if args.second else paths.raw_lora_added],
        inputs=inputs,
        settings=settings,
        format=FORMAT,
        force=args.force,
        allow_regression=args.allow_regression,
        record_inside=True,
        driver_stage="add_lora_second" if args.second else "add_lora",
        warnings=link.warnings if link else [],
    )
    if (code := stage.already_complete()) is not None:
        return code

    from medgemma_korean import modeling

    modeling.set_up_torch(args.seed)
    if link:
        log.info("starting from %s", show(link.folder))
        second(args, profile, paths, stage, link, args.seed)
    else:
        first(args, profile, paths, stage, args.seed)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
