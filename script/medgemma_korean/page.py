"""The pages of the report: files of a run in, one self-contained HTML file and its figures out.

Every number on a page is written with the file and the key it came from (`data-source="scores/base.json#mcq.accuracy"`,
relative to the page), so that a test, or a reader, can look it up. Jinja2 and matplotlib are imported inside functions.
"""

from __future__ import annotations

import base64
import html
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medgemma_korean import cli, mcq, plots, progress, records, report
from medgemma_korean.paths import RunPaths
from medgemma_korean.profiles import ModelProfile
from medgemma_korean.stage import RECORD_NAME, read_record, vouch, vouched

TEMPLATES = Path(__file__).parent / "templates"
NOT_A_DEVICE = (
    "This model is a research artefact. It is not a medical device, must not be used for diagnosis or treatment, and "
    "its answers need a physician's judgement."
)
NOT_A_DEVICE_KOREAN = (
    "이 모델은 연구 결과물이다. 의료기기가 아니며, 진단이나 치료에 써서는 안 되고, 답은 의사의 판단을 거쳐야 한다."
)
FORMS = {
    "percent": "{:.1%}",
    "change": "{:+.1%}",
    "points": "{:+.1f}",  # of a share
    "bits": "{:.3f}",
    "mass": "{:.4f}",
    "count": "{:,}",
    "p": "{:.2g}",
    "plain": "{:g}",
    "seconds": "{:,.1f} s",
    "gigabytes": "{:,.2f} GB",
}
SCALES = {"points": 100, "gigabytes": 1e-9}


class Markup(str):
    """Text that is HTML already; Jinja2 leaves what has this method as it is."""

    def __html__(self) -> str:
        return self


def text(value: Any) -> Markup:
    """Any text as HTML."""
    return Markup(html.escape(str(value)))


def key_text(keys: Sequence[str | int]) -> str:
    """Keys joined by dots; a dot inside a key is written %2E."""
    return ".".join(str(key).replace("%", "%25").replace(".", "%2E") for key in keys)


@dataclass(frozen=True)
class Source:
    """A JSON file whose numbers are shown. name: its path relative to the page."""

    name: str
    content: Any

    def at(self, *keys: str | int) -> Any:
        value = self.content
        for key in keys:
            value = value[key]
        return value

    def number(self, form: str, *keys: str | int) -> Markup:
        """The number under the keys, with its origin; "" for null. A list counts its entries."""
        value, origin = self.at(*keys), f"{self.name}#{key_text(keys)}"
        if value is None:
            return Markup("")
        value = len(value) if isinstance(value, list) else value
        scale = SCALES.get(form, 1)
        shown, told = FORMS[form].format(scale * value), f' data-scale="{scale:g}"' if scale != 1 else ""
        return Markup(f'<span class="n" data-source="{html.escape(origin)}"{told}>{html.escape(shown)}</span>')

    def text(self, *keys: str | int) -> Markup:
        """Text under the keys, with its origin: numbers that were put into words where they were measured."""
        origin = f"{self.name}#{key_text(keys)}"
        return Markup(f'<span data-source="{html.escape(origin)}">{html.escape(str(self.at(*keys)))}</span>')

    def ranged(self, *keys: str | int) -> Markup:
        """`33.3% (21.1% to 48.0%)` of a score."""
        value, low, high = (self.number("percent", *keys, part) for part in ("accuracy", "lower", "upper"))
        return Markup(f'{value} <span class="range">({low} to {high})</span>')

    def setting(self, *keys: str | int) -> Markup:
        """A value of any kind; a number with its origin."""
        value = self.at(*keys)
        if isinstance(value, bool) or value is None:
            return text({True: "yes", False: "no", None: "–"}[value])
        if isinstance(value, int | float):
            return self.number("count" if isinstance(value, int) else "plain", *keys)
        return text(", ".join(map(str, value)) if isinstance(value, list) else value)


@dataclass
class Table:
    """Cells are Markup, or text that is escaped. wraps: columns that hold sentences."""

    head: Sequence[str]
    rows: list[Sequence[Any]]
    wraps: bool = False


@dataclass
class Figure:
    """An image with its title in both languages, and the sentence below it."""

    key: str
    korean: str
    english: str
    caption: str
    svg: bytes
    png: bytes

    @property
    def address(self) -> str:
        return "data:image/svg+xml;base64," + base64.b64encode(self.svg).decode("ascii")


@dataclass
class Page:
    """What is written: the HTML, the figures beside it by file name, and the JSON that it cites."""

    html: str
    images: dict[str, bytes]
    summary: dict[str, Any]
    problems: list[str] = field(default_factory=list)  # what matplotlib complained of, a missing glyph above all


@dataclass
class _Sources:
    """The files of one run, as the page cites them."""

    paths: RunPaths
    home: Path
    problems: list[str] = field(default_factory=list)

    def of(self, file: Path) -> Source | None:
        if not file.is_file():
            return None
        return Source(os.path.relpath(file, self.home), records.read_object(file, repair="move it away"))

    def record(self, folder: Path) -> Source | None:
        """The record of a model folder. Raises PipelineError for what is none."""
        return self.of(folder / RECORD_NAME) if read_record(folder / RECORD_NAME) else None


def _figure(problems: list[str], key: str, korean: str, english: str, caption: str, draw: Any, *args: Any) -> Figure:
    """Draw one figure; matplotlib's warnings are collected instead of printed."""
    with warnings.catch_warnings(record=True) as caught, plots.style():
        warnings.simplefilter("always")
        drawn = draw(*args)
        svg, png = plots.image(drawn, "svg"), plots.image(drawn, "png")
    problems += [f"{key}: {warning.message}" for warning in caught if warning.category is UserWarning]
    return Figure(key, korean, english, caption, svg, png)


def _render(template: str, **values: Any) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = Markup((TEMPLATES / "report.css").read_text(encoding="utf-8"))
    return environment.get_template(template).render(style=style, **values)


def _name(key: str) -> str:
    return plots.label(plots.STAGES, key)


# the page of a run --------------------------------------------------------------------------------------


def run_page(paths: RunPaths, profile: ModelProfile, others: Sequence[RunPaths] = ()) -> Page:
    """The report of one run. Raises PipelineError for a damaged file, and as `report.beside` does."""
    sources = _Sources(paths, paths.report)
    summary = records.read_back(report.summary(paths, profile, others))
    derived = Source("summary.json", summary)
    found = {
        name: sources.of(file)
        for name, file in report.evaluation_files(paths).items()
        if name in summary["evaluations"]
    }
    stages = {name: sources.record(folder) for name, folder in report.model_folders(paths).items()}
    stages = {name: record for name, record in stages.items() if record}
    page = _render(
        "report.html",
        name=paths.name,
        model=profile.name,
        warnings_medical=(NOT_A_DEVICE_KOREAN, NOT_A_DEVICE),
        unfinished=_unfinished(paths),
        glance=_glance(derived, found),
        chain=_chain(derived, found),
        chain_figures=(chain_figures := _chain_figures(sources.problems, found)),
        precisions=sorted({source.content.get("precision", "") for source in found.values()}),
        unlike_texts=report.unlike_texts({name: source.content for name, source in found.items()}),
        gates=_gates(stages),
        notes=[derived.text("warnings", number) for number in range(len(summary["warnings"]))],
        training=_training(derived, stages),
        training_figures=(training_figures := _training_figures(sources, profile, found)),
        exams=_exams(found),
        exam_figures=(exam_figures := _exam_figures(sources.problems, found)),
        contamination=_contamination(derived),
        looks=derived.number("count", "test_looks"),
        validations=_validations(sources),
        extension=_extension(sources),
        beside=Table(report.BESIDE, _texts(derived, "beside")) if others else None,
        failed=_failed(sources),
        samples=_samples(found),
        rationales=derived.text("rationales"),
        ledger=_ledger(sources),
        licences=Table(
            ["자료 source", "사용 허가 licence"], [list(row) for row in report.licences(paths, profile)], True
        ),
        settings=_settings(stages),
        versions=_versions(stages),
    )
    figures = [*chain_figures, *training_figures, *exam_figures]
    return Page(page, {f"{figure.key}.png": figure.png for figure in figures}, summary, sources.problems)


def _texts(source: Source, key: str) -> list[list[Markup]]:
    """A table of texts."""
    return [[source.text(key, i, j) for j in range(len(row))] for i, row in enumerate(source.at(key))]


def _unfinished(paths: RunPaths) -> list[str]:
    """What the progress file says of stages that have begun and are not complete."""
    entries = progress.read_state(paths)["stages"].items()
    return [
        f"{stage}: {e['state']}"
        for stage, e in entries
        if e["state"] not in ("complete", "skipped") and stage != "report"
    ]


def _glance(derived: Source, found: Mapping[str, Source]) -> list[dict[str, Any]]:
    """The tiles at the top: what changed from the first model to the final one."""
    change = derived.content["change"]
    if change is None:
        return []
    first, last = found[change["from"]], found[change["to"]]
    against = last.content.get("against_base")
    other = Markup(text("다른 문제·글 not comparable: other questions or texts"))
    tiles = [
        {
            "title": "정답률 dev accuracy",
            "before": first.number("percent", "mcq", "accuracy"),
            "after": last.number("percent", "mcq", "accuracy"),
            "change": other
            if change["accuracy"] is None
            else Markup(f"{derived.number('points', 'change', 'accuracy')} points"),
            "note": Markup(
                f"95 %: {last.number('percent', 'mcq', 'lower')} to {last.number('percent', 'mcq', 'upper')}"
                + (f"; McNemar p\u00a0{last.number('p', 'against_base', 'p')}" if against else "")
            ),
            "chance": mcq.within_chance(last.content["mcq"]),
        }
    ]
    for language in report.LANGUAGES:
        keys = ("bits_per_character", language)
        tiles.append(
            {
                "title": f"{plots.label(plots.LANGUAGES, language)} bits/char",
                "before": first.number("bits", *keys),
                "after": last.number("bits", *keys),
                "change": derived.number("change", "change", *keys) or other,
                "note": "낮을수록 좋다 lower is better",
                "chance": False,
            }
        )
    return tiles


CHAIN = ["모델 model", *report.COLUMNS[1:]]


def _chain(derived: Source, found: Mapping[str, Source]) -> Table:
    """The table that the run ends with, its numbers with their origin."""
    rows = []
    for name, source in found.items():
        score = source.content["mcq"]
        parameters = ("trained_parameters", name)
        rows.append(
            [
                _name(name),
                *(source.number("bits", "bits_per_character", n) for n in ("korean", "medical", "english")),
                *(source.number("bits", "tokens_per_character", n) for n in ("korean", "medical")),
                source.ranged("mcq"),
                Markup(f"{source.number('percent', 'mcq', 'majority_accuracy')} ({text(score['majority_letter'])})"),
                "within chance" if mcq.within_chance(score) else "above chance",
                derived.number("count", *parameters) if name in derived.at("trained_parameters") else "",
            ]
        )
    return Table(CHAIN, rows)


def _chain_figures(problems: list[str], found: Mapping[str, Source]) -> list[Figure]:
    if not found:
        return []
    scores = {name: source.content["mcq"] for name, source in found.items()}
    bits = {name: source.content["bits_per_character"] for name, source in found.items()}
    figures = [
        _figure(
            problems, "accuracy", "단계별 정답률", "Accuracy by stage",
            "Dev questions, by option letters, with the 95 % Wilson interval. The dashed line is what always answering "
            "the commonest letter gives; an interval that reaches it shows nothing.",
            plots.accuracy, scores, report.final_of(found),
        ),
    ]  # fmt: skip
    # The extended model is one of the run's raw model, whatever base the final one has.
    if {"base", "extended"} <= found.keys() and not found["base"].name.endswith(report.BEFORE):
        tokens = [found[name].content["tokens_per_character"] for name in ("base", "extended")]
        figures.append(
            _figure(
                problems, "tokens", "글자당 토큰", "Tokens per character",
                "Before and after the extension of the tokenizer; fewer tokens make the same text cheaper.",
                plots.tokens, *tokens,
            )
        )  # fmt: skip
    figures.append(
        _figure(
            problems, "bits", "글자당 비트", "Bits per character by stage",
            "Held-out text, lower is better, comparable across tokenizers. Each panel has its own scale.",
            plots.bits, bits,
        )
    )  # fmt: skip
    return figures


def _gates(stages: Mapping[str, Source]) -> Table:
    rows = []
    for name, record in stages.items():
        gate = record.content.get("gate")
        if gate:
            verdict = Markup('<b class="good">통과 passed</b>' if gate["passed"] else '<b class="bad">실패 FAILED</b>')
            reasons = "; ".join(gate["reasons"])
            change = record.number("p", "gate", "p")
            rows.append([name, verdict, change, record.number("bits", "gate", "english_ratio"), reasons])
    return Table(["단계 stage", "판정 verdict", "McNemar p", "English bits / base", "이유 reasons"], rows, True)


def _training(derived: Source, stages: Mapping[str, Source]) -> Table:
    head = [
        "단계 stage",
        "steps",
        "tokens",
        "best step",
        "loss",
        "precision",
        "rows a forward pass",
        "processes",
        "time",
        "memory",
        "GPU memory",
    ]
    rows = []
    for name, record in stages.items():
        known = record.content

        def number(form: str, key: str, record: Source = record) -> Any:
            return record.number(form, key) if key in record.content else ""

        memory = known.get("peak_memory", {})
        precision = known.get("settings", {}).get("precision", "")
        chosen = known.get("precision")
        if isinstance(chosen, dict):
            precision = chosen.get("precision", precision)
        rows.append(
            [
                name,
                *(number("count", key) for key in ("steps", "tokens", "best_step")),
                number("bits", "loss"),
                precision,
                *(number("count", key) for key in ("micro_batch", "processes")),
                number("seconds", "seconds"),
                *(
                    record.number("gigabytes", "peak_memory", kind) if kind in memory else ""
                    for kind in ("main", "gpu")
                ),
            ]
        )
    return Table(head, rows)


def _training_figures(sources: _Sources, profile: ModelProfile, found: Mapping[str, Source]) -> list[Figure]:
    folders = {n: f for n, f in report.trained_folders(sources.paths).items() if (f / RECORD_NAME).is_file()}
    losses = {name: curve for name, folder in folders.items() if (curve := report.curve(folder, "loss"))}
    rates = {name: curve for name, folder in folders.items() if (curve := report.curve(folder, "learning_rate"))}
    history = {
        name: source.content.get("validation_history", [])
        for name, folder in folders.items()
        if (source := sources.of(folder / "training_info.json"))
    }
    monitored = {name: looks for name, looks in history.items() if any("english_bits" in look for look in looks)}
    accuracies = {
        name: known for name, looks in history.items() if (known := [look for look in looks if "accuracy" in look])
    }
    figures, problems = [], sources.problems
    if losses:
        figures.append(
            _figure(
                problems, "loss", "학습 손실", "Training loss",
                "Of every optimizer step, nats a supervised token; stages are of different text and do not compare.",
                plots.curves, losses,
            )
        )  # fmt: skip
    if rates:
        figures.append(
            _figure(
                problems, "learning_rate", "학습률", "Learning rate",
                "Of the first parameter group, as the schedule set it.",
                plots.learning_rates, rates,
            )
        )  # fmt: skip
    if monitored and "base" in found:
        figures.append(
            _figure(
                problems, "forgetting", "망각 곡선", "Forgetting",
                "Bits per character of held-out text while training, against the base: below zero is better. The "
                "dashed line is where the gate fails for English.",
                plots.forgetting, monitored, found["base"].content["bits_per_character"], profile.gate_english,
            )
        )  # fmt: skip
    if accuracies:
        figures.append(
            _figure(
                problems, "looks", "학습 중 정답률", "Accuracy while training",
                "Looks at dev with their 95 % intervals; the best of several looks flatters.",
                plots.looks, accuracies,
            )
        )  # fmt: skip
    return figures


def _exams(found: Mapping[str, Source]) -> Table:
    """Accuracy by exam of every model, and what could not be read."""
    exams = sorted({exam for source in found.values() for exam in source.content["mcq"].get("exams", {})})
    rows = []
    for name, source in found.items():
        cells: list[Any] = [_name(name)]
        for exam in exams:
            has = exam in source.content["mcq"].get("exams", {})
            cells.append(source.ranged("mcq", "exams", exam) if has else "")
        rows.append([*cells, source.number("count", "mcq", "unparsed"), source.number("count", "mcq", "n")])
    head = [plots.label(plots.EXAMS, exam) for exam in exams]
    return Table(["모델 model", *head, "unparsed", "questions"], rows)


def _exam_figures(problems: list[str], found: Mapping[str, Source]) -> list[Figure]:
    if not found:
        return []
    first, last = next(iter(found)), report.final_of(found)
    scores = {name: found[name].content["mcq"] for name in dict.fromkeys((first, last))}
    figures = []
    if exams := scores[last].get("exams"):
        figures.append(
            _figure(
                problems, "exams", "시험별 정답률", "Accuracy by exam",
                "With 95 % Wilson intervals; a single exam has few questions.",
                plots.exams, scores[first].get("exams", {}), exams, (first, last),
            )
        )  # fmt: skip
    figures.append(
        _figure(
            problems, "letters", "보기 분포", "Letters answered",
            "How often each option letter was answered, beside how often it is right. A model that always answers one "
            "letter knows nothing.",
            plots.letters, scores,
        )
    )  # fmt: skip
    return figures


def _validations(sources: _Sources) -> list[dict[str, Any]]:
    """The scores that `validation_kor_med_test` left, a table a file."""
    tables = []
    for file in sorted((sources.paths.report / "validation").glob("*.json")):
        source = sources.of(file)
        models = source.content.get("models") if isinstance(source.content, dict) else None
        if not isinstance(models, dict) or not all(isinstance(m, dict) and "mcq" in m for m in models.values()):
            continue
        tables.append(
            {
                "title": file.stem,
                "table": _validation(source, models),
                "outdated": [_name(name) for name in report.outdated(sources.paths, models)],
            }
        )
    return tables


# What a mode or an option of `validation_kor_med_test` adds to a model's result: title, form, keys.
EXTRA = (
    ("거부 refused", "count", ("mcq", "refused")),
    ("cut off", "count", ("cut_off",)),
    ("mean of rotations", "percent", ("rotations", "mean_accuracy")),
    ("same option in all", "percent", ("rotations", "consistency")),
    ("vote of rotations", "percent", ("rotations", "vote_accuracy")),
    ("reasoning format", "bits", ("reasoning", "format")),
    ("with the answer", "bits", ("reasoning", "combined")),
    ("official exact match", "percent", ("harness", "micro")),
)


def _has(found: Any, form: str, keys: Sequence[str]) -> bool:
    """Whether there is a number under the keys; a count of zero is none."""
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found is not None and not (form == "count" and found == 0)


def _validation(source: Source, models: Mapping[str, Any]) -> Table:
    """A row a model; columns of what only some calls measure where one model has them."""
    parts = [
        part for part in ("clean", "touched") if any(m.get("contamination", {}).get(part) for m in models.values())
    ]
    extra = [entry for entry in EXTRA if any(_has(m, *entry[1:]) for m in models.values())]
    rows = []
    for name, found in models.items():
        keys = ("models", name)
        counts = [source.number("count", *keys, "mcq", key) for key in ("correct", "n")]
        against = next((key for key in ("against_file", "against_first") if found.get(key)), None)
        row: list[Any] = [
            _name(name),
            Markup("/".join(counts)),
            source.ranged(*keys, "mcq"),
            source.number("percent", *keys, "mcq", "majority_accuracy"),
            source.number("count", *keys, "mcq", "unparsed"),
            source.number("p", *keys, against, "p") if against else "",
        ]
        row += [source.number(form, *keys, *where) if _has(found, form, where) else "" for _, form, where in extra]
        for part in parts:
            has = found.get("contamination", {}).get(part)
            row.append(source.ranged(*keys, "contamination", part) if has else "")
        rows.append(row)
    head = ["모델 model", "right", "accuracy (95 % interval)", "majority", "unparsed", "McNemar p"]
    head += [*(title for title, _, _ in extra), *(f"{part} items" for part in parts)]
    return Table(head, rows)


def _contamination(derived: Source) -> list[Table]:
    """Exam items that stand in the text that training reads, by source, and every model's accuracy without them."""
    known = derived.at("contamination")
    if not known:
        return []
    first = next(iter(known))  # every split was looked for in the same sources
    rows: list[list[Any]] = []
    for name in known[first]["sources"]:
        cells = [derived.number("count", "contamination", first, "sources", name, "rows")]
        cells += [derived.number("count", "contamination", split, "sources", name, "touched") for split in known]
        rows.append([name, *cells])
    together = [
        Markup(f"{derived.number('count', *keys, 'touched')} of {derived.number('count', *keys, 'checked')}")
        for keys in (("contamination", split) for split in known)
    ]
    head = ["학습 자료 training text", "rows read", *(f"{split} items touched" for split in known)]
    tables = [Table(head, [*rows, ["전체 all of it", "", *together]])]
    if known.get("dev", {}).get("touched"):  # else every item is clean, and the chain has the accuracies
        models = known["dev"]["models"]
        keys = ("contamination", "dev", "models")
        lines = [
            [_name(name), *(derived.ranged(*keys, name, part) if parts[part] else "" for part in ("clean", "touched"))]
            for name, parts in models.items()
        ]
        tables.append(Table(["모델 model", "clean dev items (95 % interval)", "touched dev items"], lines))
    return tables


def _extension(sources: _Sources) -> dict[str, Any] | None:
    judged = report.extension(sources.paths)
    if not judged:
        return None
    whole = sources.of(sources.paths.raw_lora_added / "verdict.json")
    info = sources.of(sources.paths.tokenizer / "tokenizer_info.json")
    lines = [
        [line["name"], {True: "passed", False: "failed", None: ""}[line["passed"]], line["text"]]
        for line in judged["lines"]
    ]
    rows = []
    if whole and whole.content.get("rows"):
        rows.append(["base model", *(whole.number("bits", "base", n) for n in report.LANGUAGES), ""])
        for name in whole.content["rows"]:
            keys = ("rows", name)
            bits = [whole.number("bits", *keys, n) for n in report.LANGUAGES]
            rows.append([name, *bits, whole.number("mass", *keys, "english_mass")])
    return {
        "new": info.number("count", "new_tokens") if info else "",
        "verdict": judged["verdict"],
        "reason": judged["reason"],
        "lines": Table(["항목 line", "", "측정 what was found"], lines, True),
        "rows": Table(report.ROWS_COLUMNS, rows) if rows else None,
    }


def _failed(sources: _Sources) -> list[tuple[str, Table, Markup]]:
    """(stage, the questions that failed most often over its looks at dev, how many looks there were)."""
    tables = []
    for name, folder in report.trained_folders(sources.paths).items():
        source = sources.of(folder / report.FAILED)
        if source is None or not source.content["questions"]:
            continue
        rows = [
            [
                entry["question_id"],
                source.number("count", "questions", i, "fail_count"),
                entry["expected"],
                entry["last_predicted"] or "–",
                source.number("count", "questions", i, "last_failed_step"),
                entry["question_preview"],
            ]
            for i, entry in enumerate(source.content["questions"])
        ]
        head = ["문항 question", "failed", "정답 expected", "last predicted", "at step", "question"]
        tables.append((_name(name), Table(head, rows, True), source.number("count", "looks")))
    return tables


def _samples(found: Mapping[str, Source]) -> list[dict[str, Any]]:
    """Each prompt with the answer of every stage that was asked it."""
    answers: dict[str, list[tuple[str, str]]] = {}
    for name, source in found.items():
        for sample in source.content.get("samples") or []:
            answers.setdefault(sample["prompt"], []).append((_name(name), sample["answer"]))
    return [{"prompt": prompt, "answers": by_stage} for prompt, by_stage in answers.items()]


def _ledger(sources: _Sources) -> list[dict[str, Any]]:
    """What refining read, kept and dropped, a table a program."""
    tables = []
    for file in sorted((sources.paths.refined / ".stages").glob("refine_*.json")):
        source = sources.of(file)
        lines = []
        for keys in _leaves(source.content["counts"], ("counts",)):
            if source.at(*keys) not in (0, [], {}, None, ""):  # every check that dropped nothing would be a line
                value = source.at(*keys)
                shown = source.number("count", *keys) if isinstance(value, list) else source.setting(*keys)
                lines.append([" / ".join(map(str, keys[1:])), shown])
        tables.append({"title": file.stem, "table": Table(["항목 count", "수 number"], lines)})
    return tables


def _leaves(value: Any, keys: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The keys to everything that is no dictionary."""
    if isinstance(value, dict):
        return [leaf for key, inner in value.items() for leaf in _leaves(inner, (*keys, key))]
    return [keys]


def _settings(stages: Mapping[str, Source]) -> Table:
    """A row a setting, a column a stage."""
    flat = {name: _leaves(record.content.get("settings", {}), ("settings",)) for name, record in stages.items()}
    flat = {name: [keys for keys in found if len(keys) > 1] for name, found in flat.items()}
    known = list(dict.fromkeys(keys for found in flat.values() for keys in found))
    rows = [
        [" / ".join(keys[1:]), *(stages[name].setting(*keys) if keys in flat[name] else "" for name in flat)]
        for keys in known
    ]
    return Table(["설정 setting", *flat], rows)


def _versions(stages: Mapping[str, Source]) -> Table:
    """The libraries that every stage ran with; one column where they are the same."""
    columns: dict[str, tuple[list[str], Mapping[str, str]]] = {}
    for name, record in stages.items():
        found = record.content.get("versions", {})
        columns.setdefault(records.digest_of(found), ([], found))[0].append(name)
    known = list(dict.fromkeys(library for _, found in columns.values() for library in found))
    head = ["all stages"] if len(columns) == 1 else [", ".join(names) for names, _ in columns.values()]
    rows = [[library, *(found.get(library, "") for _, found in columns.values())] for library in known]
    return Table(["라이브러리 library", *head], rows)


# the page of two runs -----------------------------------------------------------------------------------


def compare_page(runs: Sequence[RunPaths], cited: str) -> Page:
    """Two runs side by side. cited: the name of the JSON file, beside the page, that will hold what is shown."""
    found = records.read_back(report.compared(runs))
    source, problems = Source(cited, found), []
    accuracy, bits, reasons = [], [], []
    for name, entry in found["stages"].items():
        keys = ("stages", name)

        def side(index: int, keys: tuple[str, ...] = keys) -> Markup:
            value, low, high = (source.number("percent", *keys, p, index) for p in ("accuracy", "lower", "upper"))
            return Markup(f'{value} <span class="range">({low} to {high})</span>')

        change: Any = source.number("points", *keys, "change", "accuracy")
        test: list[Any] = ["", "", ""]
        if entry["paired"]:
            low, high = (source.number("points", *keys, "paired", end) for end in ("lower", "upper"))
            change = Markup(f'{change} <span class="range">({low} to {high})</span>')
            test = [
                source.number("count", *keys, "paired", "wrong_to_right"),
                source.number("count", *keys, "paired", "right_to_wrong"),
                source.number("p", *keys, "paired", "p"),
            ]
        else:
            reasons.append(f"{name}: {entry['not_paired']}")
        reasons += [f"{name}: {reason}" for reason in entry["change"]["not_compared"]]
        accuracy.append([_name(name), side(0), side(1), change, *test])
        cells: list[Any] = [_name(name)]
        for language in report.LANGUAGES:
            pair = [source.number("bits", *keys, "bits_per_character", i, language) for i in (0, 1)]
            share = source.number("change", *keys, "change", "bits_per_character", language)
            joint = "→" if share else "|"
            cells.append(Markup(f'{pair[0]} {joint} {pair[1]} <span class="range">({share or "other texts"})</span>'))
        bits.append(cells)
    figure = _figure(
        problems, "compare", "두 실행의 정답률", "Accuracy of both runs", "Dev questions with 95 % Wilson intervals.",
        plots.two_runs, found["stages"],
    )  # fmt: skip
    page = _render(
        "compare.html",
        runs=found["runs"],
        accuracy=Table(
            [
                "모델 model",
                "A (95 % interval)",
                "B (95 % interval)",
                "B − A, points (95 % interval)",
                "only B right",
                "only A right",
                "McNemar p",
            ],
            accuracy,
        ),  # fmt: skip
        bits=Table(["모델 model", *(plots.label(plots.LANGUAGES, n) for n in report.LANGUAGES)], bits),
        reasons=reasons,
        figures_drawn=[figure],
    )
    return Page(page, {Path(cited).with_suffix(".png").name: figure.png}, found, problems)


def write(page: Page, file: Path, cited: Path) -> bool:
    """Write a page, its figures and the JSON it cites, and a record of them; False where all of it is there already."""
    begun = time.monotonic()
    images = {file.parent / name: content for name, content in page.images.items()}
    same = (
        vouched(file)
        and file.is_file()
        and file.read_text(encoding="utf-8") == page.html
        and cited.is_file()
        and records.read_json(cited) == page.summary
        and all(image.is_file() and image.read_bytes() == content for image, content in images.items())
    )
    for problem in page.problems:
        cli.log.warning("a figure of the report: %s", problem)
    if same:
        return False
    records.write_json(cited, page.summary)
    for image, content in images.items():
        records.write_bytes(image, content)
    records.write_text(file, page.html)
    vouch("report", [file, cited, *images], time.monotonic() - begun)
    return True
