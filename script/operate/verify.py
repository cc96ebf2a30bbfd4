"""Check everything that a run has finished, from its files alone: `./run_full_pipeline.sh --verify`.

Reads   every stage record of the run, the files that it describes, the raw data, and the models
Writes  nothing

    python script/operate/verify.py --model medgemma-4b
    python script/operate/verify.py --model medgemma-4b --quick     # hashes and records alone

For every record: it is as it was written, its outputs have the recorded sha256, its fingerprint is that of its
identity, and what it read is still what the stages before it (or the raw data) hold. Then every model is loaded on the
CPU, as training and scoring load it, and answers some dev questions, and reads held-out text where that is cheap: the
numbers must be those of its evaluation. All problems are listed. Exit codes: 0 sound, 2 not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from medgemma_korean import cli, progress, records, shapes
from medgemma_korean.cli import PipelineError
from medgemma_korean.paths import RunPaths, show
from medgemma_korean.profiles import ModelProfile
from medgemma_korean.stage import check_outputs, no_record, read_record

ITEMS = 4  # dev questions that a model answers again, drawn by seed
SEED = 17
# How far a number may be from the recorded one, which may come from another device and another batch: nats of a
# letter's log-probability (more for an unlikely one), and the share of bits per character. Another batch alone makes
# 0.01 nats on a CPU in 8-bit; what another device makes is not measured yet.
NATS = {"fp32": 0.01, "bf16": 0.25, "8bit": 0.25, "nf4": 0.25}
BITS = {"fp32": 0.001, "bf16": 0.01, "8bit": 0.01, "nf4": 0.01}
LIKELY = 5.0  # nats below certainty, up to which a log-probability has to be that close
CHEAP = 1e12  # bytes of weights times characters of text, up to which text is read again: seconds on a CPU
HELD = 1e9  # bytes that Python and the libraries take beside the weights


# records and files --------------------------------------------------------------------------------------


def records_of(profile: ModelProfile, paths: RunPaths) -> Iterator[tuple[str, Path]]:
    """(program, record) of everything that is complete: stages, the loop, pages of the report, validations."""
    for programs in progress.records_of(paths, profile.tiny is not None).values():
        yield from programs.items()
    yield "train_01_02_loop", paths.loop / "stage.json"
    for file in sorted(paths.report.rglob(".stages/*.json")):
        yield f"report {file.stem}", file


def problems_of(record_path: Path, paths: RunPaths) -> list[str]:
    """What is wrong with one complete stage. A damaged record is a problem, not an end."""
    try:
        record = read_record(record_path) or {}
        found = check_outputs(record_path, thorough=True) + progress.changed_inputs(record_path, paths, thorough=True)
        if records.digest_of(record["identity"]) != record["fingerprint"]:
            found.append(f"{show(record_path)}: the fingerprint is not that of its identity")
    except PipelineError as error:
        return [str(error)]
    except (KeyError, TypeError, AttributeError):
        return [str(no_record(record_path))]
    return found


# models -------------------------------------------------------------------------------------------------


def evaluations(paths: RunPaths) -> dict[str, Path]:
    """Model, as `evaluation.candidates` takes it -> the file with its scores, where both are there."""
    from medgemma_korean import evaluation, report

    folders, files = evaluation.run_folders(paths), report.run_files(paths)
    return {
        name: files[name]
        for name, folder in folders.items()
        if (folder / "stage.json").is_file() and files[name].is_file()
    }


def weight_bytes(base: Path, precision: str) -> float:
    """Main memory that a base takes at most: its files, twice where they are widened; quantised ones pass through."""
    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    return size * (2 if precision == "fp32" and _halves(base) else 1)


def _halves(base: Path) -> bool:
    config = records.read_json(base / "config.json")
    return config.get("dtype", config.get("torch_dtype")) != "float32"


def check_model(candidate: Any, file: Path, profile: ModelProfile, paths: RunPaths) -> tuple[list[str], str]:
    """(problems, what was done) of one model: load it, and compare a sample with what was recorded."""
    from medgemma_korean import batches, evaluation

    recorded = records.read_json(file)
    precision = recorded["precision"]
    need, free = weight_bytes(candidate.base, precision) + HELD, shapes.free_ram()
    if need > free:
        return [], f"not loaded: up to {need / 1e9:.1f} GB of main memory, {free / 1e9:.1f} GB are free"
    ((_, model, tokenizer),) = evaluation.loaded([candidate], profile, "cpu", precision)
    items = batches.sample(evaluation.dev_items(paths), ITEMS, SEED)
    then = {row["id"]: row for row in recorded["predictions"]}
    problems = []
    for now in evaluation.score_letters(model, tokenizer, items, profile.score_batch):
        problems += differing(then.get(now["id"]), now, NATS[precision])
    done = f"loads, answers {cli.count(len(items), 'dev question')} as recorded"
    held_out = evaluation.held_out_texts(paths, profile)
    texts, now = held_out["medical"], {"texts": evaluation.text_digests(held_out)}
    if "medical" in evaluation.other_texts(recorded, now):
        done += "; the medical text is another one by now"  # a changed input, which is told of its stage
    elif (need - HELD) * sum(map(len, texts)) <= CHEAP:
        bits = evaluation.bits_per_character(model, tokenizer, texts, profile.score_window, profile.score_batch)
        was = recorded["bits_per_character"]["medical"]
        if not abs(bits - was) <= BITS[precision] * was:
            problems.append(f"medical bits per character are {bits:.4f} now, and {was:.4f} were recorded")
        done += ", and reads text so too"
    return [f"{problem} ({show(file)})" for problem in problems], done


def differing(then: Mapping[str, Any] | None, now: Mapping[str, Any], most: float) -> list[str]:
    """How an answer of a model differs from the recorded one, beyond `most` nats."""
    if then is None:
        return [f"no answer to the dev question {now['id']} was recorded"]
    before, after = then["log_probs"], now["log_probs"]
    if before.keys() != after.keys():
        return [f"{now['id']}: log-probabilities of {', '.join(after) or 'nothing'} now, of {', '.join(before)} then"]
    for letter in after:
        gap, allowed = abs(after[letter] - before[letter]), most * max(1.0, abs(before[letter]) / LIKELY)
        if not gap <= allowed:
            what = f"{gap:.3f} nats from the recorded one, more than {allowed:.2g}"
            return [f"{now['id']}: the log-probability of {letter} is {what}"]
    # The letter is that of the recorded numbers, and where another was as likely, the other is no problem.
    chosen = then["predicted"]
    if before and (chosen not in before or max(before.values()) - before[chosen] > 0):
        return [f"{now['id']}: the recorded letter {chosen} is not that of its log-probabilities"]
    if before and max(after.values()) - after[chosen] > 2 * most:
        return [f"{now['id']}: {now['predicted']} is answered now, and {chosen} was recorded"]
    return []


def check_models(profile: ModelProfile, paths: RunPaths) -> list[str]:
    """Load every model that has scores, print a line each; what is wrong."""
    files = evaluations(paths)
    if not files:
        return []
    from medgemma_korean import evaluation, modeling

    cli.quiet_libraries()
    modeling.set_up_torch(SEED)
    found = []
    for name, file in files.items():
        title = f"model {name}"
        try:
            (candidate,) = evaluation.candidates(paths, [name])
            problems, done = check_model(candidate, file, profile, paths)
        except PipelineError as error:
            problems, done = [str(error)], ""
        except (KeyError, TypeError, AttributeError) as error:
            problems, done = [f"{show(file)}: not an evaluation ({type(error).__name__}: {error})"], ""
        modeling.free_memory()
        print(f"{title:30}{cli.count(len(problems), 'problem') if problems else done}", flush=True)
        found += [f"{title}: {problem}" for problem in problems]
    return found


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, force=False)
    parser.add_argument("--quick", action="store_true", help="hashes and records alone; load no model")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    profile, paths = cli.resolve(args)
    found: list[str] = []
    checked = 0
    for program, record_path in records_of(profile, paths):
        if not record_path.is_file():
            continue
        problems = problems_of(record_path, paths)
        checked += 1
        print(f"{program:30}{'sound' if not problems else cli.count(len(problems), 'problem')}", flush=True)
        found += [f"{program}: {problem}" for problem in problems]
    if not checked:
        raise PipelineError(f"the run {paths.name} has no complete stage to verify; ./run_full_pipeline.sh makes them")
    if args.quick:
        print("models: not loaded (--quick)")
    elif found:
        print("models: not loaded, for the files are not sound")
    else:
        found += check_models(profile, paths)
    if found:
        raise PipelineError(
            f"{cli.count(len(found), 'problem')}:\n  "
            + "\n  ".join(found)
            + "\nBring back what was there, or make it again: the same command with --force (it stays as .previous)"
        )
    print(f"{cli.count(checked, 'complete stage')}, all sound")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
