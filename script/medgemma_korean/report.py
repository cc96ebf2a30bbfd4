"""The final table, the HTML report and the model cards, made from the JSON files that the stages left.

Numbers are never computed twice: everything shown is read from a stage record or an evaluation file.
"""

from __future__ import annotations

import html
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medgemma_korean import cli, mcq, modeling, records
from medgemma_korean.cli import PipelineError
from medgemma_korean.paths import RunPaths, show
from medgemma_korean.profiles import ModelProfile
from medgemma_korean.sources import BY_KEY, HAI_DEF
from medgemma_korean.stage import RECORD_NAME, read_record

NOT_A_DEVICE = (
    "This model is a research artefact. It is not a medical device, must not be used for diagnosis or treatment, and "
    "its answers need a physician's judgement."
)


def evaluations(paths: RunPaths) -> dict[str, dict[str, Any]]:
    """The evaluation of every model of the run that exists, in the order of the chain."""
    places = {
        "base": paths.scores("base"),
        "extended": paths.scores("extended"),
        "00": paths.trained_00 / "evaluation.json",
        "01": paths.trained_01 / "evaluation.json",
        "merged": paths.scores("merged"),
        "02": paths.trained_02 / "evaluation.json",
    }
    return {name: records.read_json(file) for name, file in places.items() if file.is_file()}


def trained_parameters(paths: RunPaths) -> dict[str, int]:
    """Parameters that trained in each stage, from the records."""
    folders = {"00": paths.trained_00, "01": paths.trained_01, "02": paths.trained_02}
    found = {name: read_record(folder / RECORD_NAME) for name, folder in folders.items()}
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
    for name, evaluation in found.items():
        bits, tokens, score = evaluation["bits_per_character"], evaluation["tokens_per_character"], evaluation["mcq"]
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


def gates(paths: RunPaths) -> list[str]:
    """One line for every gate that was judged."""
    places = (
        ("train_00", paths.trained_00),
        ("train_01", paths.trained_01),
        ("add_lora --second", paths.another_lora_added),
        ("train_02", paths.trained_02),
    )
    lines = []
    for name, folder in places:
        record = read_record(folder / RECORD_NAME)
        gate = record.get("gate") if record else None
        if gate:
            why = "; ".join(gate["reasons"]) or f"English {gate['english_ratio'] - 1:+.1%}, McNemar p {gate['p']:.2g}"
            lines.append(f"{name}: {'passed' if gate['passed'] else 'FAILED'} ({why})")
    return lines


def warnings(paths: RunPaths) -> list[str]:
    """What the stages warned of."""
    folders = (
        paths.tokenizer,
        paths.raw_lora_added,
        paths.trained_00,
        paths.trained_01,
        paths.another_lora_added,
        paths.trained_02,
    )
    found = [read_record(folder / RECORD_NAME) for folder in folders]
    return [f"{record['program']}: {text}" for record in found if record for text in record["warnings"]]


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


# the extension -------------------------------------------------------------------------------------------


def extension(paths: RunPaths) -> dict[str, Any] | None:
    """The verdict on the extended tokenizer: the whole one of add_lora, else that of prepare_tokenizer; or None."""
    for file in (paths.raw_lora_added / "verdict.json", paths.tokenizer / "tokenizer_info.json"):
        if file.is_file():
            return records.read_json(file)
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
    runs that were not trained on the same number of characters: then bits per character compare nothing.
    """
    result, characters = [], {}
    for paths in runs:
        record = read_record(paths.trained_00 / RECORD_NAME)
        if record is None:
            raise PipelineError(f"{show(paths.trained_00)}: stage 00 of {paths.name} is not complete")
        characters[paths.name] = record["counts"]["korean_characters"]
        new = records.read_json(paths.tokenizer / "tokenizer_info.json")["new_tokens"]
        found = evaluations(paths)
        for name, numbers in (
            ("extended", ["", "", ""]),
            ("00", [f"{characters[paths.name]:,}", f"{record['steps']:,}", f"{record['tokens']:,}"]),
        ):
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
    return result


# model card ---------------------------------------------------------------------------------------------


def _loading(base: Path, dtype: str) -> tuple[str, str]:
    """(code that loads a base, what it imports). Of a multimodal one the text model, which the adapter is for."""
    file = base / "config.json"
    if not file.is_file() or "text_config" not in records.read_json(file):
        code = f"model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.{dtype})"
        return code, "AutoModelForCausalLM, AutoTokenizer"
    mapping = f"key_mapping = {json.dumps(modeling.TEXT_OF_MULTIMODAL)}  # the names of its text model's weights"
    code = f"""{mapping}
config = AutoConfig.from_pretrained(base).text_config
model = Gemma3ForCausalLM.from_pretrained(base, config=config, key_mapping=key_mapping, dtype=torch.{dtype})"""
    return code, "AutoConfig, AutoTokenizer, Gemma3ForCausalLM"


def model_card(
    paths: RunPaths,
    profile: ModelProfile,
    program: str,
    info: dict[str, Any],
    evaluation: dict[str, Any],
    base: Path,
    folder: Path,
    upstream: str | None = None,
) -> str:
    """README.md of a trained folder in the Hugging Face metadata form, with code that loads the adapter.

    upstream: what the base is and its terms, where it is not the run's own raw model.
    """
    relative = os.path.relpath(base, folder)
    score, bits = evaluation["mcq"], evaluation["bits_per_character"]
    terms = licences(paths, profile)
    lines = "\n".join(f"| {source} | {licence} |" for source, licence in terms)
    non_commercial = any("-nc" in licence for _, licence in terms)
    if upstream is None and profile.source != "build":
        upstream = f"The base model is {profile.source} under the {HAI_DEF}; they pass on."
    upstream = f"\n{upstream}" if upstream else ""
    load, names = _loading(base, profile.dtype)
    return f"""---
language: [ko, en]
library_name: peft
pipeline_tag: text-generation
license: other
tags: [medical, korean, medgemma, lora]
---
# {paths.name}, {program}

A LoRA adapter of the MedGemma Korean pipeline. {NOT_A_DEVICE}

## Use

```python
from pathlib import Path

import torch
from peft import PeftModel
from transformers import {names}

folder = Path(".")  # the folder of this README
base = folder / "{relative}"
{load}
model = PeftModel.from_pretrained(model, folder / "final").eval()
tokenizer = AutoTokenizer.from_pretrained(folder / "final")

turns = [{{"role": "user", "content": "Meaning of word 고혈압:"}}]
inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

## Results

Dev accuracy by option letters: {score["correct"]} of {score["n"]} = {score["accuracy"]:.1%}
(95 % interval {score["lower"]:.1%} to {score["upper"]:.1%}); always answering {score["majority_letter"]} gives
{score["majority_accuracy"]:.1%}{", so this is within chance" if mcq.within_chance(score) else ""}.
Bits per character on held-out text: Korean {bits["korean"]:.3f}, medical Korean {bits["medical"]:.3f},
English {bits["english"]:.3f}.

## Training

{info["steps"]} steps over {info["train_samples"]:,} rows, learning rate {info["learning_rate"]:g} at LoRA scale
{info["lora_scale"]:g}, {sum(info["trainable_parameters"].values()):,} parameters trained, checkpoint of step
{info["best_step"]} chosen on held-out data. Precision of the frozen base: {evaluation["precision"]}.

## Data and licences

| source | licence |
|---|---|
{lines}
{upstream}
{"Non-commercial sources make these weights non-commercial." if non_commercial else ""}
"""


# html ---------------------------------------------------------------------------------------------------

_STYLE = """
body{font:16px/1.5 system-ui,'Noto Sans KR','Malgun Gothic',sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{padding:.3rem .7rem;border-bottom:1px solid #ccc;text-align:right;white-space:nowrap}
td:first-child,th:first-child{text-align:left}
.answer td,.answer th{white-space:pre-wrap;text-align:left;vertical-align:top}
.answer td{min-width:9rem;overflow-wrap:anywhere}
.bar{display:flex;align-items:center;gap:.6rem;margin:.2rem 0}.bar i{display:block;height:.9rem;background:#3b6ea5}
.bar span:first-child{width:5rem}
"""


def _verdict_line(line: dict[str, Any]) -> list[str]:
    return [line["name"], {True: "passed", False: "failed", None: ""}[line["passed"]], line["text"]]


ROWS_COLUMNS = ["new rows before training", "bits/char Korean", "medical", "English", "their probability on English"]


def rows_table(judged: dict[str, Any]) -> list[list[str]]:
    """The model right after extension, with its rows and with those the library would have made, beside the base."""
    languages, base = ("korean", "medical", "english"), judged["base"]
    lines = [["base model", *(f"{base[language]:.3f}" for language in languages), ""]]
    for name, seen in judged["rows"].items():
        values = [f"{seen[n]:.3f} ({seen[n] / base[n] - 1:+.1%})" for n in languages]
        lines.append([name, *values, f"{seen['english_mass']:.4f}"])
    return lines


def html_page(paths: RunPaths, profile: ModelProfile, runs: Sequence[RunPaths] = ()) -> str:
    """One self-contained page: the chain, gates, samples, data counts, warnings, settings. No network, no script."""
    found, trained = evaluations(paths), trained_parameters(paths)
    sections = [
        f"<h1>{_e(paths.name)} 학습 보고서 / training report</h1>",
        f"<p>{_e(NOT_A_DEVICE)}</p>",
        "<h2>단계별 결과 / the chain</h2>",
        _table(COLUMNS, rows(found, trained)),
        "<p>Bits per character on held-out text, lower is better and comparable across tokenizers. Accuracy on the dev "
        "questions by option letters with the 95 % Wilson interval; the majority column is what always answering one "
        "letter gives.</p>",
        "<h2>한국어 bits per character</h2>",
        _bars({name: e["bits_per_character"]["korean"] for name, e in found.items()}),
        "<h2>관문 / gates</h2>",
        _list(gates(paths)),
    ]
    if judged := extension(paths):
        new = records.read_json(paths.tokenizer / "tokenizer_info.json")["new_tokens"]
        sections += [
            "<h2>토크나이저 / tokenizer</h2>",
            f"<p>{new:,} new tokens; verdict: <b>{_e(judged['verdict'])}</b> ({_e(judged['reason'])})</p>",
            _table(["line", "", "what was found"], [_verdict_line(line) for line in judged["lines"]], "answer"),
        ]
        if judged.get("rows"):
            sections += [
                "<p>The model right after extension, before any training, with its new rows and with those that the "
                "library would have made:</p>",
                _table(ROWS_COLUMNS, rows_table(judged)),
            ]
    if runs:
        sections += ["<h2>확장과 비확장 / beside other runs</h2>", _table(BESIDE, beside([paths, *runs]))]
    sections += ["<h2>예시 답변 / sample answers</h2>", _samples(found)]
    sections += ["<h2>데이터 / data</h2>", f"<p>{_e(rationale_line(paths))}</p>", _data(paths)]
    if notes := warnings(paths):
        sections += ["<h2>주의 / warnings</h2>", _list(notes)]
    sections += [
        "<h2>사용 허가 / licences</h2>",
        _table(["source", "licence"], [list(r) for r in licences(paths, profile)]),
    ]
    body = "\n".join(sections)
    return (
        '<!doctype html>\n<html lang="ko"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_e(paths.name)}</title><style>{_STYLE}</style></head>\n<body>{body}</body></html>\n"
    )


def _e(value: Any) -> str:
    return html.escape(str(value))


def _table(header: list[str], body: list[list[Any]], kind: str = "") -> str:
    head = "".join(f"<th>{_e(c)}</th>" for c in header)
    lines = "".join("<tr>" + "".join(f"<td>{_e(c)}</td>" for c in row) + "</tr>" for row in body)
    return f'<div class="wide {kind}"><table><tr>{head}</tr>{lines}</table></div>'


def _list(lines: list[str]) -> str:
    return "<ul>" + "".join(f"<li>{_e(line)}</li>" for line in lines) + "</ul>" if lines else "<p>none</p>"


def _bars(values: dict[str, float]) -> str:
    if not values:
        return "<p>none</p>"
    largest = max(values.values())
    return "".join(
        f'<div class="bar"><span>{_e(name)}</span><i style="width:{50 * value / largest:.1f}%"></i>'
        f"<span>{value:.3f}</span></div>"
        for name, value in values.items()
    )


def _samples(found: dict[str, dict[str, Any]]) -> str:
    stages = [name for name, evaluation in found.items() if evaluation.get("samples")]
    answers: dict[str, dict[str, str]] = {}
    for name in stages:
        for sample in found[name]["samples"]:
            answers.setdefault(sample["prompt"], {})[name] = sample["answer"]
    body = [[prompt, *[by_stage.get(name, "") for name in stages]] for prompt, by_stage in answers.items()]
    return _table(["prompt", *stages], body, "answer") if body else "<p>none</p>"


def rationale_line(paths: RunPaths) -> str:
    """How many train questions have a rationale, and the share of training rows that are in the detailed form."""
    record = read_record(paths.record("refine_02_kor_med_test"))
    counts = record["counts"] if record else {"train": {"kept": 0}, "rationales": 0}
    number, rows = counts["rationales"], counts["train"]["kept"] + counts["rationales"]
    return f"rationales: {number:,}, detailed form: {100 * number / rows if rows else 0:.0f} %"


def _data(paths: RunPaths) -> str:
    lines = []
    for file in sorted((paths.refined / ".stages").glob("refine_*.json")):
        for reason, number in _flat(records.read_json(file)["counts"]):
            if number != "0":  # every check that dropped nothing would be a line
                lines.append([file.stem, reason, number])
    return _table(["program", "count", "number"], lines)


def _flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [entry for key, inner in value.items() for entry in _flat(inner, f"{prefix}{key} / ")]
    if isinstance(value, list):
        return [(prefix.rstrip(" /"), len(value))]
    return [(prefix.rstrip(" /"), f"{value:,}" if isinstance(value, int) else value)]
