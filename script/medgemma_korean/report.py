"""What a report tells: the models of a run, its gates, warnings, curves and data, and how two runs compare.

Numbers are never computed twice: what is shown is read from a stage record or an evaluation file, and what follows
from them (changes, intervals of changes) is written to `summary.json` before it is shown. `page` lays it out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from medgemma_korean import cli, contamination, evaluation, mcq, records, statistics
from medgemma_korean.cli import PipelineError
from medgemma_korean.paths import RunPaths, show
from medgemma_korean.profiles import ModelProfile
from medgemma_korean.sources import BY_KEY
from medgemma_korean.stage import RECORD_NAME, read_record, vouched

NOT_A_DEVICE = (
    "This model is a research artefact. It is not a medical device, must not be used for diagnosis or treatment, and "
    "its answers need a physician's judgement."
)


LANGUAGES = evaluation.LANGUAGES
BEFORE = "evaluation_before.json"  # in a folder trained on a plain base: the scores of that base
FAILED = "failed_questions.json"  # in a trained folder: what failed most often over its looks at dev


def trained_folders(paths: RunPaths) -> dict[str, Path]:
    """Where each training puts its result, in the order of the chain."""
    return {"00": paths.trained_00, "01": paths.trained_01, "02": paths.trained_02, "loop": paths.loop}


def run_files(paths: RunPaths) -> dict[str, Path]:
    """Where the scores of `evaluation.run_folders` lie, by the same names."""
    trained = {name: folder / "evaluation.json" for name, folder in trained_folders(paths).items()}
    return {
        "base": paths.scores("base"),
        "extended": paths.scores("extended"),
        "00": trained["00"],
        "01": trained["01"],
        "merged": paths.scores("merged"),
        "02": trained["02"],
        "loop": trained["loop"],
    }


def evaluation_files(paths: RunPaths) -> dict[str, Path]:
    """Where the evaluation of every model that is shown lies, in the order of the chain.

    Where the final model was trained on a plain base (--base-model), "base" is that one and not the run's raw model.
    Raises PipelineError for a damaged record.
    """
    files = run_files(paths)
    scored = [name for name, file in files.items() if file.is_file()]
    if scored and (folder := trained_folders(paths).get(final_of(scored))):
        if "base_files" in (read_record(folder / RECORD_NAME) or {}):
            files["base"] = folder / BEFORE
    return files


def evaluations(paths: RunPaths) -> dict[str, dict[str, Any]]:
    """The evaluation of every model of the run that exists, in the order of the chain.

    Raises PipelineError for a file that holds something else.
    """
    return {name: _evaluation(file) for name, file in evaluation_files(paths).items() if file.is_file()}


def _evaluation(file: Path) -> dict[str, Any]:
    found = records.read_json(file)
    parts = ("mcq", "bits_per_character", "tokens_per_character")
    whole = isinstance(found, dict) and all(isinstance(found.get(part), dict) for part in parts)
    if not whole or not all(isinstance(v, (int, float)) for part in parts[1:] for v in found[part].values()):
        raise PipelineError(f"{show(file)}: not an evaluation; move it away, and that model counts as not scored")
    return found


def final_of(found: Iterable[str]) -> str:
    """The model that a run hands over: that of stage 02, else the last one that was scored."""
    return "02" if "02" in found else list(found)[-1]


def trained_parameters(paths: RunPaths) -> dict[str, int]:
    """Parameters that trained in each stage, from the records."""
    found = {name: read_record(folder / RECORD_NAME) for name, folder in trained_folders(paths).items()}
    return {name: sum(record["trainable"].values()) for name, record in found.items() if record}


COLUMNS = [
    "model",
    "bits/char Korean",
    "medical",
    "English",
    "tokens/char Korean",
    "medical",
    "dev accuracy (95 % interval)",
    "majority",
    "",
    "trained",
]


def rows(found: dict[str, dict[str, Any]], trained: dict[str, int]) -> list[list[str]]:
    """One row a model: bits and tokens per character, dev accuracy with interval and baseline, trained parameters."""
    result = []
    for name, scores in found.items():
        bits, tokens, score = scores["bits_per_character"], scores["tokens_per_character"], scores["mcq"]
        result.append(
            [
                name,
                *[f"{bits[language]:.3f}" for language in ("korean", "medical", "english")],
                *[f"{tokens[language]:.3f}" for language in ("korean", "medical")],
                f"{score['accuracy']:.1%} ({score['lower']:.1%} to {score['upper']:.1%})",
                f"{score['majority_accuracy']:.1%} ({score['majority_letter']})",
                "within chance" if mcq.within_chance(score) else "above chance",
                f"{trained[name]:,}" if name in trained else "",
            ]
        )
    return result


def final_table(paths: RunPaths) -> str:
    """The table that a run ends with."""
    return cli.table(rows(evaluations(paths), trained_parameters(paths)), COLUMNS)


def model_folders(paths: RunPaths) -> dict[str, Path]:
    """The folders of the model stages by the driver's names, in the order of the chain; each holds a record."""
    return {
        "prepare_tokenizer": paths.tokenizer,
        "add_lora": paths.raw_lora_added,
        "train_00": paths.trained_00,
        "train_01": paths.trained_01,
        "add_lora --second": paths.another_lora_added,
        "train_02": paths.trained_02,
        "train_01_02_loop": paths.loop,
    }


def gates(paths: RunPaths) -> list[str]:
    """One line for every gate that was judged."""
    lines = []
    for name, folder in model_folders(paths).items():
        record = read_record(folder / RECORD_NAME)
        gate = record.get("gate") if record else None
        if gate:
            why = "; ".join(gate["reasons"]) or f"English {gate['english_ratio'] - 1:+.1%}, McNemar p {gate['p']:.2g}"
            lines.append(f"{name}: {'passed' if gate['passed'] else 'FAILED'} ({why})")
    return lines


def warnings(paths: RunPaths) -> list[str]:
    """What the stages warned of."""
    found = [read_record(folder / RECORD_NAME) for folder in model_folders(paths).values()]
    return [f"{record['program']}: {text}" for record in found if record for text in record.get("warnings", [])]


def _folders(place: Path) -> list[str]:
    return [p.name for p in sorted(place.iterdir()) if p.is_dir() and not p.name.startswith(".")]


def licences(paths: RunPaths, profile: ModelProfile) -> list[tuple[str, str]]:
    """(source, licence) of everything that the run's data folder holds."""
    found = []
    if paths.raw_korean.is_dir():
        found += _folders(paths.raw_korean)
    if paths.raw_english.is_relative_to(paths.raw) and paths.raw_english.is_dir():
        found.append("english_replay")
    found += [
        key
        for key, place in (("kor_med_test", paths.raw_mcq), ("medical_dict", paths.raw_dictionary))
        if place.is_dir()
    ]
    if paths.raw_pairs.is_dir():
        found += _folders(paths.raw_pairs)
    if profile.source == "build" and paths.data.name == "sample":
        return [("the project's own sample data", "Apache-2.0")]
    return [(key, BY_KEY[key].licence if key in BY_KEY else "not in the catalogue") for key in found]


def outdated(paths: RunPaths, models: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Which of the run's own models were other weights when these results of `validation_kor_med_test` were made."""
    found = []
    for name, result in models.items():
        if name not in run_files(paths) or "weights" not in result:
            continue
        try:
            (now,) = evaluation.candidates(paths, [name])
        except PipelineError:  # not there any more, or not whole: what was scored is gone
            found.append(name)
            continue
        if now.weights() != result["weights"]:
            found.append(name)
    return found


# the exam questions ---------------------------------------------------------------------------------------

SPLITS = ("dev", "test")


def test_scores_stand(paths: RunPaths, models: Sequence[str]) -> bool:
    """Whether the report's own scores of the test split are there, of these models as they are now.

    models: as `evaluation.candidates` takes them. Raises PipelineError as that does.
    """
    file = paths.report / "validation" / "test-letter.json"
    if not vouched(file):
        return False
    known = records.read_object(file, "models", repair="move it away")["models"]
    now = evaluation.candidates(paths, models)
    return all(known.get(model.name, {}).get("weights") == model.weights() for model in now)


def contaminated(
    paths: RunPaths, profile: ModelProfile, found: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """For each split that is there, its items that stand in the training text: {"checked", "sources", "touched"}.

    dev also has "models": each model's accuracy on clean and on touched items (`contamination.accuracies`).
    """
    result: dict[str, dict[str, Any]] = {}
    for split in SPLITS:
        file = paths.mcq / f"{split}.jsonl"
        if not file.is_file() or not (items := mcq.read_items(file, also=("id",))):
            continue
        known = contamination.ledger(paths, split, items, built=profile.tiny is not None)
        result[split] = {key: known[key] for key in contamination.PARTS}
    if "dev" in result:
        touched = result["dev"]["touched"]
        result["dev"]["models"] = {
            name: contamination.accuracies(scores["predictions"], touched)
            for name, scores in found.items()
            if scores.get("predictions")
        }
    return result


# the extension -------------------------------------------------------------------------------------------


def extension(paths: RunPaths) -> dict[str, Any] | None:
    """The verdict on the extended tokenizer: the whole one of add_lora, else that of prepare_tokenizer; or None."""
    for file in (paths.raw_lora_added / "verdict.json", paths.tokenizer / "tokenizer_info.json"):
        if file.is_file():
            return records.read_object(file, repair="move it away")
    return None


BESIDE = [
    "stage 00 of",
    "new tokens",
    "Korean characters",
    "steps",
    "tokens",
    "bits/char Korean",
    "medical",
    "English",
    "tokens/char Korean",
    "medical",
]


def beside(runs: Sequence[RunPaths]) -> list[list[str]]:
    """Stage 00 of several runs, a row each, before and after. Raises PipelineError for a run that lacks one, and for
    runs that were not trained on the same number of characters, or scored on the same texts: then bits per character
    compare nothing.
    """
    result, characters, scored = [], {}, {}
    for paths in runs:
        record = read_record(paths.trained_00 / RECORD_NAME)
        if record is None:
            raise PipelineError(
                f"{show(paths.trained_00)}: stage 00 of {paths.name} is not complete; train it, or name another run"
            )
        characters[paths.name] = record["counts"]["korean_characters"]
        new = records.read_object(paths.tokenizer / "tokenizer_info.json", "new_tokens")["new_tokens"]
        found = evaluations(paths)
        for name, numbers in (
            ("extended", ["", "", ""]),
            ("00", [f"{characters[paths.name]:,}", f"{record['steps']:,}", f"{record['tokens']:,}"]),
        ):
            scored[f"{paths.name} {name}"] = found[name]
            bits, tokens = found[name]["bits_per_character"], found[name]["tokens_per_character"]
            label = f"{paths.name}, {'before' if name == 'extended' else 'after'}"
            result.append(
                [
                    label,
                    f"{new:,}",
                    *numbers,
                    *(f"{bits[language]:.3f}" for language in ("korean", "medical", "english")),
                    *(f"{tokens[language]:.3f}" for language in ("korean", "medical")),
                ]
            )
    if len(set(characters.values())) > 1:
        numbers = ", ".join(f"{name} {number:,}" for name, number in characters.items())
        raise PipelineError(
            f"the runs were trained on different numbers of Korean characters ({numbers}); "
            "train stage 00 of each with the same --max-characters"
        )
    if names := unlike_texts(scored):
        raise PipelineError(
            f"the runs were scored on different held-out texts ({', '.join(names)}); "
            "make each from the same refined data with a profile that scores as many characters"
        )
    return result


def rationale_line(paths: RunPaths) -> str:
    """How many train questions have a rationale, and the share of training rows that are in the detailed form."""
    record = read_record(paths.record("refine_02_kor_med_test"))
    counts = record["counts"] if record else {"train": {"kept": 0}, "rationales": 0}
    number, rows = counts["rationales"], counts["train"]["kept"] + counts["rationales"]
    return f"rationales: {number:,}, detailed form: {100 * number / rows if rows else 0:.0f} %"


ROWS_COLUMNS = ["new rows before training", "bits/char Korean", "medical", "English", "their probability on English"]


def rows_table(judged: dict[str, Any]) -> list[list[str]]:
    """The model right after extension, with its rows and with those the library would have made, beside the base."""
    base = judged["base"]
    lines = [["base model", *(f"{base[language]:.3f}" for language in LANGUAGES), ""]]
    for name, seen in judged["rows"].items():
        values = [f"{seen[n]:.3f} ({seen[n] / base[n] - 1:+.1%})" for n in LANGUAGES]
        lines.append([name, *values, f"{seen['english_mass']:.4f}"])
    return lines


# a training ---------------------------------------------------------------------------------------------


def training_log(folder: Path) -> Path | None:
    """The trainer's log of a finished training: the newest checkpoint's, which holds every step from the first on.

    It is one of the stage's outputs, and so compared by content; `logs/metrics_<name>.jsonl` is shared by all tries.
    """
    found = [p for p in folder.glob("checkpoint-*/trainer_state.json") if p.parent.name[11:].isdigit()]
    return max(found, key=lambda file: int(file.parent.name[11:]), default=None)


def curve(folder: Path, key: str) -> list[tuple[int, float]]:
    """(step, value) of "loss" or "learning_rate" through a training; empty where its checkpoints are gone."""
    file = training_log(folder)
    if file is None:
        return []
    history = records.read_object(file, repair="move it away").get("log_history", [])
    return [(entry["step"], entry[key]) for entry in history if "loss" in entry and key in entry]


# comparisons --------------------------------------------------------------------------------------------


def change(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """From the first model to the final one: accuracy in points, bits per character as a share; None for one model."""
    if len(found) < 2:
        return None
    names = (list(found)[0], final_of(found))
    before, after = (found[name] for name in names)
    return {"from": names[0], "to": names[1], **_difference(before, after)}


def _difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """The change of each number; None where it is one of other items or texts, with the reason in "not_compared"."""
    unlike, reasons = evaluation.other_texts(before, after), []
    bits = {
        language: after["bits_per_character"][language] / before["bits_per_character"][language] - 1
        for language in LANGUAGES
        if language not in unlike
    }
    accuracy = after["mcq"]["accuracy"] - before["mcq"]["accuracy"]
    if evaluation.other_items(before, after):
        accuracy = None
        reasons.append("the dev questions are other ones, so that the accuracies do not compare")
    if unlike:
        reasons.append(f"bits per character ({', '.join(unlike)}) are of other held-out texts and do not compare")
    bits = {language: bits.get(language) for language in LANGUAGES}
    return {"accuracy": accuracy, "bits_per_character": bits, "not_compared": reasons}


def unlike_texts(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The held-out texts, by name, that were not the same for all of these evaluations."""
    digests = [scores.get("texts", {}) for scores in found.values()]
    return [name for name in LANGUAGES if len({side[name] for side in digests if name in side}) > 1]


def paired_interval(both: int, gained: int, lost: int, neither: int) -> tuple[float, float]:
    """Interval (95 %) of the change in accuracy of two models on the same items, from how many each answers right.

    Newcombe's square-and-add of the two Wilson intervals, with the correlation of the answers (R. G. Newcombe, Improved
    confidence intervals for the difference between binomial proportions based on paired data, Statistics in Medicine
    17, 1998, method 10).
    """
    n = both + gained + lost + neither
    before, after = (both + lost) / n, (both + gained) / n
    low_before, high_before = statistics.wilson(both + lost, n)
    low_after, high_after = statistics.wilson(both + gained, n)
    product = (both + lost) * (gained + neither) * (both + gained) * (lost + neither)
    excess = both * neither - gained * lost
    excess = max(excess - n / 2, 0) if excess > 0 else excess  # the method's correction for continuity
    phi = excess / math.sqrt(product) if product else 0.0

    def side(first: float, second: float) -> float:
        return math.sqrt(max(first**2 - 2 * phi * first * second + second**2, 0.0))

    down = side(after - low_after, high_before - before)
    up = side(high_after - after, before - low_before)
    return after - before - down, after - before + up


def paired(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Exact McNemar test of two evaluations, and an interval (95 %) of the change in accuracy.

    Raises PipelineError where nothing can be compared: other items, another precision, no predictions.
    """
    for side in (before, after):
        if not side.get("predictions"):
            raise PipelineError(f"{side['which']}: its answers, item by item, are not there")
    evaluation.require_paired(before, after)
    found = evaluation.compare_rows(before, after)
    gained, lost, right = found["wrong_to_right"], found["right_to_wrong"], after["mcq"]["correct"]
    lower, upper = paired_interval(right - gained, gained, lost, after["mcq"]["n"] - right - lost)
    return {key: found[key] for key in ("wrong_to_right", "right_to_wrong", "p")} | {"lower": lower, "upper": upper}


def compared(runs: Sequence[RunPaths]) -> dict[str, Any]:
    """Two runs, stage by stage: accuracy and bits per character of both, their difference, the paired test.

    Raises PipelineError for a run without scores, and for two runs without a common stage.
    """
    found = [evaluations(paths) for paths in runs]
    for paths, scores in zip(runs, found, strict=True):
        if not scores:
            known = sorted(p.parent.parent.name for p in paths.models.glob("report/*/scores/base.json"))
            raise PipelineError(
                f"run {paths.name!r} has no scores ({show(paths.report)}); "
                f"runs that have: {', '.join(known) or 'none yet'}"
            )
    if runs[0].name == runs[1].name:
        raise PipelineError(f"--compare {runs[0].name} {runs[1].name}: that is one run; name two")
    common = [name for name in found[0] if name in found[1]]
    if not common:
        raise PipelineError(f"{runs[0].name} and {runs[1].name} have no stage in common that both have scored")
    stages = {}
    for name in common:
        pair = [scores[name] for scores in found]
        entry: dict[str, Any] = {
            key: [side["mcq"][key] for side in pair] for key in ("n", "correct", "accuracy", "lower", "upper")
        }
        entry |= {"precision": [side.get("precision", "") for side in pair], "change": _difference(*pair)}
        entry["bits_per_character"] = [side["bits_per_character"] for side in pair]
        try:
            entry |= {"paired": paired(*pair), "not_paired": None}
        except (PipelineError, ValueError) as error:
            entry |= {"paired": None, "not_paired": str(error)}
        stages[name] = entry
    return {"runs": [paths.name for paths in runs], "stages": stages}


COMPARED = [
    "model",
    "A: dev accuracy (95 % interval)",
    "B",
    "B - A",
    "McNemar p",
    "bits/char Korean",
    "medical",
    "English",
]


def compared_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """The table of `compared` for the terminal, a row a stage."""
    result = []
    for name, entry in found["stages"].items():
        test, bits, change = entry["paired"], entry["bits_per_character"], entry["change"]
        sides = [f"{entry['accuracy'][i]:.1%} ({entry['lower'][i]:.1%} to {entry['upper'][i]:.1%})" for i in (0, 1)]
        interval = f" ({test['lower']:+.1%} to {test['upper']:+.1%})" if test else ""
        result.append(
            [
                name,
                *sides,
                "other questions" if change["accuracy"] is None else f"{change['accuracy']:+.1%}{interval}",
                f"{test['p']:.2g}" if test else "not comparable",
                *(
                    f"{bits[0][n]:.3f}, {bits[1][n]:.3f} (other texts)"
                    if change["bits_per_character"][n] is None
                    else f"{bits[0][n]:.3f} -> {bits[1][n]:.3f}"
                    for n in LANGUAGES
                ),
            ]
        )
    return result


# what the page needs beside the files that it shows -----------------------------------------------------


def summary(paths: RunPaths, profile: ModelProfile, others: Sequence[RunPaths] = ()) -> dict[str, Any]:
    """`summary.json`: the evaluations without their answers, and everything that follows from the files of the run."""
    found = evaluations(paths)
    return {
        "name": paths.name,
        "model": profile.name,
        "evaluations": {
            name: {key: value for key, value in scores.items() if key not in ("predictions", "samples")}
            for name, scores in found.items()
        },
        "change": change(found),
        "gate_english": profile.gate_english,
        "trained_parameters": trained_parameters(paths),
        "gates": gates(paths),
        "warnings": warnings(paths),
        "extension": extension(paths),
        "rationales": rationale_line(paths),
        "beside": beside([paths, *others]) if others else [],
        "contamination": contaminated(paths, profile, found),
        "test_looks": len(evaluation.test_looks(paths)),
    }
