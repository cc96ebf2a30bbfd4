"""Make a base to train on and a fresh adapter beside it; with --second, merge what was trained and start anew.

Reads   model/raw/<model>/, model/tokenizer/<name>/                     (--second: model/01_trained/<name>/)
Writes  model/raw_lora_added/<name>/{base,adapter}/, verdict.json       (--second: model/01_another_lora_added/...)
        model/report/<name>/scores/{base,extended}.json                 (--second: merged.json)

    python script/model/add_lora.py --model tiny
    python script/model/add_lora.py --model tiny --second
    python script/model/add_lora.py --model medgemma-27b --precision nf4

The base is text-only, unquantised, its tied matrix grown and every new row initialised. Weights pass through memory a
file at a time, so that a 27B needs less than 16 GB; only a probe and scoring load a model.

Before anything is scored the precision of scoring and training is chosen, and a quantised one probed; the choice, its
reason and its numbers lie beside the base in precision.json. The first time the raw model is probed, for the extended
base too: the linear layers, which are all that is quantised, are the same weights in both, and they are measured on
text that the model can read; with fresh rows the same text would measure how well it guesses. --second probes the
merged base, whose linear layers are new, in the first base's precision. If it fails there another one is chosen, and
the raw model is scored again in that one (scores/base-<precision>.json): scores in two precisions compare nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from medgemma_korean import chain, cli, precision, records
from medgemma_korean.cli import PipelineError, log
from medgemma_korean.paths import RunPaths, show
from medgemma_korean.profiles import ModelProfile
from medgemma_korean.stage import Input, Stage

FORMAT = 3
SEED = 17
CHECKED_TOKENS = 128  # of held-out exam questions, to which a merged and an unmerged model must answer alike


def score(
    folder: Path,
    which: str,
    choice: precision.Choice,
    args: argparse.Namespace,
    profile: ModelProfile,
    paths: RunPaths,
    also: Callable[[Any, Any, dict], Any] | None = None,
    file: Path | None = None,
) -> tuple[dict, Any]:
    """Load a base in the chosen precision, score it, and write `model/report/<name>/scores/<which>.json`, or `file`.

    Returns the scores and what `also(model, tokenizer, scores)` returns, asked while the model is loaded.
    """
    from medgemma_korean import evaluation, modeling
    from medgemma_korean import tokenizer as tokenizers

    model = modeling.load_base(folder, profile, modeling.pick_device(args.device), choice.precision)
    tokenizer = tokenizers.load(folder)
    result = evaluation.evaluate(model, tokenizer, paths, profile, which=which, precision=choice.precision)
    log.info("%s: %s", which, evaluation.summary(result))
    more = also(model, tokenizer, result) if also else None
    records.write_json(file or paths.scores(which), result)
    del model
    modeling.free_memory()
    return result, more


AGAIN = "make that model again with --force"


def require_own_tokenizer(paths: RunPaths, base_tokenizer: Any, tokenizer: Any) -> None:
    """Raise PipelineError when the extended tokenizer was not made from the raw model's."""
    from medgemma_korean import tokenizer as tokenizers

    again = paths.command("model/prepare_tokenizer", "--force")
    made_for = records.read_object(paths.tokenizer / "tokenizer_info.json", "hashes", repair=f"run: {again}")["hashes"].get("base")
    old, new = base_tokenizer.get_vocab(), tokenizer.get_vocab()
    moved = sum(new.get(piece) != i for piece, i in old.items())
    if made_for != tokenizers.fingerprint(paths.raw_model) or moved:
        raise PipelineError(
            f"{show(paths.tokenizer)} does not belong to {show(paths.raw_model)}: it was made from another tokenizer"
            f"{f', and {moved:,} tokens have other ids' if moved else ''}; run: {again}"
        )


# the first base -----------------------------------------------------------------------------------------


def first(args: argparse.Namespace, profile: ModelProfile, paths: RunPaths, stage: Stage) -> None:
    """Extend the raw model's rows and put the first adapter beside it."""
    from medgemma_korean import checkpoints, evaluation, modeling
    from medgemma_korean import tokenizer as tokenizers

    base_tokenizer, tokenizer = tokenizers.load(paths.raw_model), tokenizers.load(paths.tokenizer)
    require_own_tokenizer(paths, base_tokenizer, tokenizer)
    new_ids = list(range(len(base_tokenizer), len(tokenizer)))
    texts = evaluation.held_out_texts(paths, profile)
    look = {"window": profile.score_window, "batch": profile.score_batch}
    with stage.work() as folder:
        stage.tick(1, 7, "choosing the precision")
        device = modeling.pick_device(args.device)
        choice = precision.choose(paths.raw_model, args.precision, profile, paths, device, measured_on="base")
        stage.warnings += choice.warnings
        # The untouched model is scored as text-only too: the same class and precision as everything after it.
        stage.tick(2, 7, "scoring the base")

        def mean_state(model: Any, tokenizer: Any, scores: dict) -> Any:
            return evaluation.mean_state(model, tokenizer, texts["english"], **look) if args.shift else None

        before, state = score(paths.raw_model, "base", choice, args, profile, paths, also=mean_state)
        stage.tick(3, 7, "extending the rows")
        raw = checkpoints.Checkpoint(paths.raw_model)
        old = raw.tensor(checkpoints.MATRIX)
        rows = tokenizers.rows_for(len(tokenizer), at_least=len(old))
        pieces = tokenizer.convert_ids_to_tokens(new_ids)
        parts = [tokenizers.encode(base_tokenizer, piece.replace("▁", " ")) for piece in pieces]
        shift = args.shift * state / state.square().sum() if args.shift else None
        matrix = checkpoints.grown(old, len(base_tokenizer), rows, checkpoints.mean_rows(old, parts, shift))
        checkpoints.extend(raw, folder / "base", profile.dtype, matrix)
        finish_base(folder / "base", paths.tokenizer, [], new_ids, rows)
        precision.store(choice, folder / "base")
        stage.tick(4, 7, "a fresh adapter")
        trainable = save_fresh_adapter(folder, profile, second=False, new_ids=new_ids, seed=args.seed)
        stage.tick(5, 7, "scoring the extended base")

        def init_look(model: Any, tokenizer: Any, scores: dict) -> dict[str, dict[str, float]]:
            bits, trained = scores["bits_per_character"], old[: len(base_tokenizer)]
            return rows_look(model, tokenizer, texts, bits, new_ids, trained, args.seed, **look)

        after, rows_seen = score(folder / "base", "extended", choice, args, profile, paths, also=init_look)
        verdict = judge(paths, before, after, rows_seen, args.shift)
        records.write_json(folder / "verdict.json", verdict)
        if new_ids and verdict["verdict"] != "extend":
            stage.warnings.append(f"verdict on the extension: {verdict['verdict']} ({verdict['reason']})")
        stage.complete(
            counts={"new_rows": len(new_ids), "rows": rows, "trainable": trainable},
            scores={"base": before["mcq"]["accuracy"], "extended": after["mcq"]["accuracy"]},
            metric=evaluation.summary(after),
            precision=choice.as_dict(),
        )


def finish_base(base: Path, tokenizer_folder: Path, deltas: list[str], new_ids: list[int], rows: int) -> None:
    """Tokenizer, generation settings and `base_info.json` beside the weights of a base."""
    from medgemma_korean import modeling
    from medgemma_korean import tokenizer as tokenizers

    tokenizers.copy(tokenizer_folder, base)
    modeling.generation_config(tokenizers.load(base), rows).save_pretrained(base)
    modeling.write_base_info(base, deltas=deltas, new_ids=new_ids, tokenizer_sha256=tokenizers.fingerprint(base))


def rows_look(
    model: Any,
    tokenizer: Any,
    texts: dict[str, list[str]],
    bits: dict[str, float],
    new_ids: list[int],
    old: Any,
    seed: int,
    **look: int,
) -> dict[str, dict[str, float]]:
    """Bits per character (`bits`, of the texts, as the model is) and the probability that new tokens take on English
    text; and both, for comparison, with the rows that the library would have put there. The model is left as it was."""
    import torch

    from medgemma_korean import checkpoints, evaluation

    def mass() -> dict[str, float]:
        return {"english_mass": evaluation.token_mass(model, tokenizer, texts["english"], new_ids, **look)}

    if not new_ids:
        return {}
    found = {"mean of constituents": bits | mass()}
    weight = model.get_input_embeddings().weight
    kept = weight[new_ids].clone()
    torch.manual_seed(seed)
    with torch.no_grad():
        weight[new_ids] = checkpoints.library_rows(old, len(new_ids)).to(weight)
        theirs = {name: evaluation.bits_per_character(model, tokenizer, texts[name], **look) for name in texts}
        found["library default"] = theirs | mass()
        weight[new_ids] = kept
    return found


def judge(paths: RunPaths, before: dict, after: dict, rows_seen: dict[str, dict[str, float]], shift: float) -> dict:
    """The whole verdict on the extension: the tokenizer's lines and those of the new rows; logged and returned."""
    from medgemma_korean import report, verdict

    info = records.read_json(paths.tokenizer / "tokenizer_info.json")
    lines = [verdict.Line(**line) for line in info["lines"]]
    if rows_seen:
        mass = rows_seen["mean of constituents"]["english_mass"]
        english = after["bits_per_character"]["english"] / before["bits_per_character"]["english"] - 1
        lines = [line for line in lines if line.name != verdict.NOT_RUN.name] + verdict.init_lines(mass, english, shift)
    word, reason = verdict.decide(lines) if rows_seen else (info["verdict"], info["reason"])
    judged = {
        "verdict": word,
        "reason": reason,
        "lines": [line.as_dict() for line in lines],
        "base": before["bits_per_character"],
        "rows": rows_seen,
        "shift": shift,
    }
    log.info("%s", cli.table(report.rows_table(judged), report.ROWS_COLUMNS))
    log.info("verdict: %s (%s)", word, reason)
    return judged


# the second base ----------------------------------------------------------------------------------------


def second(args: argparse.Namespace, profile: ModelProfile, paths: RunPaths, stage: Stage, link: chain.Link) -> None:
    """Merge the first adapter and its rows, unquantised, and put a fresh adapter on top."""
    from medgemma_korean import checkpoints, evaluation, modeling
    from medgemma_korean import tokenizer as tokenizers

    chain.check_tokenizer(link.base, link.adapter)
    before = records.read_object(paths.scores("base"), "precision", repair=AGAIN)
    evaluation.require_current(before, paths, profile, f"run: {paths.command('model/add_lora', '--force')}")
    with stage.work() as folder:
        info, base = modeling.base_info(link.base), folder / "base"
        stage.tick(1, 5, "merging")
        if link.adapter is None:
            log.info("nothing was trained yet; the fresh adapter goes on the unmerged base")
            deltas, checkpoint = info["deltas"], checkpoints.Checkpoint(link.base)
            checkpoints.write(base, checkpoint.config, iter(checkpoint), profile.dtype)
        else:
            assert link.fingerprint not in info["deltas"], "this adapter is in its base already"
            question = evaluation.held_out_texts(paths, profile)["medical"]
            ids = tokenizers.encode(tokenizers.load(link.base), "\n".join(question))[:CHECKED_TOKENS]
            checkpoints.merge(link.base, link.adapter, base, profile.dtype, ids)
            deltas = [*info["deltas"], link.fingerprint]
        finish_base(base, link.base, deltas, info["new_ids"], modeling.text_config(base).vocab_size)
        stage.tick(2, 5, "a fresh adapter")
        trainable = save_fresh_adapter(folder, profile, second=True, new_ids=[], seed=args.seed)
        stage.tick(3, 5, "choosing the precision")
        choice = precision.choose(
            base, args.precision, profile, paths, modeling.pick_device(args.device), measured_on="merged",
            preferred=precision.chosen(link.base, profile), stages=("02",),
        )  # fmt: skip
        stage.warnings += choice.warnings
        precision.store(choice, base)
        stage.tick(4, 5, "scoring the merged base")
        after, _ = score(base, "merged", choice, args, profile, paths)
        if before["precision"] != choice.precision:
            log.info("the base was scored in %s, and is scored again in %s", before["precision"], choice.precision)
            file = paths.scores(f"base-{choice.precision}")
            stage.beside.append(file)
            before, _ = score(paths.raw_model, "base", choice, args, profile, paths, file=file)
        gate = evaluation.gate(before, after, profile)
        stage.complete(
            counts={"trainable": trainable, "deltas": len(deltas)},
            scores={"merged": after["mcq"]["accuracy"]},
            gate=gate,
            metric=evaluation.summary(after),
            precision=choice.as_dict(),
        )


def save_fresh_adapter(
    folder: Path, profile: ModelProfile, *, second: bool, new_ids: list[int], seed: int
) -> dict[str, int]:
    """`adapter/` beside `base/`, with the tokenizer that belongs to both."""
    from medgemma_korean import checkpoints
    from medgemma_korean import tokenizer as tokenizers

    made = checkpoints.fresh_adapter(
        folder / "base", folder / "adapter", profile, second=second, new_ids=new_ids, seed=seed
    )
    tokenizers.copy(folder / "base", folder / "adapter")
    log.info("fresh adapter: %s LoRA and %s token-row parameters", f"{made['lora']:,}", f"{made['rows']:,}")
    return made


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, device=True)
    parser.add_argument("--second", action="store_true", help="merge what was trained and add the second adapter")
    parser.add_argument(
        "--precision",
        choices=("auto", *precision.PRECISIONS),
        default="auto",
        help="of the frozen base while it is scored and trained (default: auto, the first that fits and passes)",
    )
    parser.add_argument(
        "--shift",
        type=cli.number,
        default=0.0,
        metavar="S",
        help="lower the logits of new rows by about S, against their use in English text (default: 0)",
    )
    parser.add_argument("--seed", type=cli.seed, default=SEED, help=f"seed of the adapter's weights (default: {SEED})")
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
        "precision": args.precision,  # as asked: the same command is complete without a probe
        "dtype": profile.dtype,
        "seed": args.seed,
    }
    link = None
    if args.second and args.shift:
        raise PipelineError("--shift is for new rows, of which --second makes none; leave it out")
    if args.second:
        link = chain.nearest(paths, "add_lora_second")
        inputs = link.inputs(paths)
    else:
        settings["shift"] = args.shift
        download = paths.command("download/download_model")
        tokenizer = paths.command("model/prepare_tokenizer")
        inputs = [
            Input("raw model", paths.raw_model, paths.raw_model / "stage.json", download),
            Input("tokenizer", paths.tokenizer, paths.tokenizer / "stage.json", tokenizer),
        ]
    inputs += chain.held_out_inputs(paths)
    of_base = ("base", *(f"base-{name}" for name in precision.PRECISIONS))  # gates compare with them
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
        beside=[paths.scores(which) for which in (*of_base, "merged" if args.second else "extended")],
        driver_stage="add_lora_second" if args.second else "add_lora",
        warnings=link.warnings if link else [],
    )
    if (code := stage.already_complete()) is not None:
        return code

    from medgemma_korean import modeling

    modeling.set_up_torch(args.seed)
    if link:
        log.info("starting from %s", show(link.folder))
        second(args, profile, paths, stage, link)
    else:
        first(args, profile, paths, stage)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
