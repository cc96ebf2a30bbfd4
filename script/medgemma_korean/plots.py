"""The figures of the report: plain numbers in, a matplotlib figure out, and its bytes as SVG and PNG.

matplotlib is imported inside functions. Its default font has no Hangul, so the labels are set in the font that lies
in `fonts/`. Figures are narrow, so that on a phone their text keeps its size; what varies (names, titles, captions) is
text of the page around them.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

FONT = Path(__file__).parent / "fonts" / "plot-labels-kr.ttf"
FAMILY = "Plot Labels KR"
WIDTH = 4.4  # inches: 420 CSS pixels, shown at 330 on a phone of 360
ACCENT, GREY, LIGHT, INK = "#0b6e6e", "#7d858c", "#d5d9dc", "#22262a"
PNG_DPI = 200
LABEL = 18  # characters beside an axis; the page's table has the whole name

# A short Korean label and an English one for every model of the chain.
STAGES = {
    "base": ("원본", "base"),
    "extended": ("확장", "extended"),
    "00": ("00", "plain text"),
    "01": ("01", "dictionary"),
    "merged": ("병합", "merged"),
    "02": ("02", "questions"),
    "loop": ("반복", "loop"),
}
EXAMS = {
    "doctor": ("의사", "doctor"),
    "nurse": ("간호사", "nurse"),
    "pharm": ("약사", "pharm"),
    "dentist": ("치과의사", "dentist"),
}
LANGUAGES = {"korean": ("한국어", "Korean"), "medical": ("의학", "medical"), "english": ("영어", "English")}


def label(names: Mapping[str, tuple[str, str]], key: str) -> str:
    """`원본 base`; a key that is not in the table stands for itself."""
    return " ".join(dict.fromkeys(names.get(key, (key, key))))


@contextlib.contextmanager
def style() -> Iterator[None]:
    """matplotlib's settings for everything here; those of the caller come back afterwards."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells that it builds its font cache
    import matplotlib
    from matplotlib import font_manager

    if FAMILY not in {entry.name for entry in font_manager.fontManager.ttflist}:
        font_manager.fontManager.addfont(FONT)
    with matplotlib.rc_context(
        {
            "font.family": [FAMILY],
            "font.size": 10,
            "axes.unicode_minus": False,  # the font has the hyphen, not U+2212
            "axes.edgecolor": LIGHT,
            "axes.labelcolor": INK,
            "axes.titlesize": 10,
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.axisbelow": True,
            "axes.grid": True,
            "grid.color": "#eceef0",
            "text.color": INK,
            "text.parse_math": False,  # a $ in the name of an exam is a $
            "xtick.color": INK,
            "ytick.color": INK,
            "xtick.labelsize": 9.5,
            "ytick.labelsize": 9.5,
            "xtick.major.size": 0,
            "ytick.major.size": 0,
            "legend.frameon": False,
            "legend.fontsize": 9.5,
            "svg.fonttype": "path",  # no font is needed where the page is read
            "svg.hashsalt": "medgemma-korean",  # the same numbers give the same bytes
        }
    ):
        yield


def _figure(height: float, panels: int = 1, **options: Any) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(panels, 1, squeeze=False, **options)[:, 0]
    return figure, list(axes)


def _legend(figure: Any, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Above the axes, never over data."""
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), handlelength=1.4, columnspacing=1.2)


def _percent(axis: Any, decimals: int = 0) -> None:
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0, decimals=decimals))


def _range(ax: Any, y: float, score: Mapping[str, Any], colour: str) -> None:
    """An accuracy and its interval on the line y."""
    low, value, high = score["lower"], score["accuracy"], score["upper"]
    ax.errorbar(
        [value], [y], xerr=[[max(value - low, 0)], [max(high - value, 0)]],
        fmt="o", ms=5.5, color=colour, elinewidth=2, capsize=0,
        clip_on=False,  # a marker on the edge, at 0 %, is whole
    )  # fmt: skip


def _at_right(ax: Any, y: float, text: str, colour: str = INK) -> None:
    """A value beside the axes, where nothing is drawn."""
    ax.text(1.02, y, text, transform=ax.get_yaxis_transform(), va="center", fontsize=9.5, color=colour)


def accuracy(scores: Mapping[str, Mapping[str, Any]], final: str) -> Any:
    """Dev accuracy of every model with its interval, and what always answering the commonest letter gives."""
    figure, (ax,) = _figure(1.0 + 0.36 * len(scores))
    for y, (name, score) in enumerate(scores.items()):
        _range(ax, y, score, ACCENT if name == final else GREY)
        _at_right(ax, y, f"{score['accuracy']:.1%}")
        ax.plot([score["majority_accuracy"]] * 2, [y - 0.5, y + 0.5], "--", color=INK, lw=1)
    ax.set_yticks(range(len(scores)), [label(STAGES, name) for name in scores])
    ax.set_ylim(len(scores) - 0.5, -0.5)
    ax.set_xlim(0, min(1.0, max(0.5, *(s["upper"] * 1.05 for s in scores.values()))))
    ax.grid(axis="y", visible=False)
    _percent(ax.xaxis)
    ax.set_title("- - 최빈 보기 majority letter", fontsize=9.5)
    ax.set_xlabel("정답률 dev accuracy, 95 %")
    return figure


def bits(found: Mapping[str, Mapping[str, float]]) -> Any:
    """Bits per character of every model, a panel a language, each with its own scale."""
    figure, axes = _figure(4.6, len(LANGUAGES), sharex=True)
    for ax, language in zip(axes, LANGUAGES, strict=True):
        values = [found[name][language] for name in found]
        ax.plot(range(len(values)), values, "-o", color=ACCENT, lw=1.8, ms=5)
        for x, value in enumerate(values):
            ax.annotate(f"{value:.3f}", (x, value), (0, 6), textcoords="offset points", ha="center", fontsize=8.5,
                        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6})  # fmt: skip
        spread = max(max(values) - min(values), 0.02 * max(values))
        ax.set_ylim(min(values) - 0.25 * spread, max(values) + 0.55 * spread)
        ax.set_title(label(LANGUAGES, language))
        ax.grid(axis="x", visible=False)
    axes[-1].set_xticks(range(len(found)), [STAGES.get(name, (name,))[0] for name in found])
    axes[-1].set_xlim(-0.5, len(found) - 0.5)
    return figure


def curves(found: Mapping[str, Sequence[tuple[float, float]]], from_zero: bool = False) -> Any:
    """(step, value) of each stage, a panel a stage."""
    figure, axes = _figure(0.5 + 1.35 * len(found), len(found))
    for ax, (name, points) in zip(axes, found.items(), strict=True):
        steps, values = zip(*points, strict=True)
        ax.plot(steps, values, "-" if len(points) > 1 else "o", color=ACCENT, lw=1.5)
        ax.set_title(label(STAGES, name))
        ax.set_xlim(0, max(steps) * 1.02)
        if from_zero:
            ax.set_ylim(bottom=0)
        _whole_steps(ax)
    axes[-1].set_xlabel("스텝 step")
    return figure


def learning_rates(found: Mapping[str, Sequence[tuple[float, float]]]) -> Any:
    """The learning rate of each stage, a panel a stage."""
    from matplotlib.ticker import FuncFormatter

    figure = curves(found, from_zero=True)
    for ax in figure.axes:
        ax.yaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value:.0e}".replace("e-0", "e-") if value else "0")
        )
        ax.yaxis.get_major_locator().set_params(nbins=3)
    return figure


def _whole_steps(ax: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def forgetting(found: Mapping[str, Sequence[Mapping[str, Any]]], base: Mapping[str, float], most: float) -> Any:
    """Held-out Korean and English while training: bits per character against the base, a panel a stage.

    found: the looks of each stage, with `korean_bits` and `english_bits`. most: the ratio at which the gate fails.
    """
    figure, axes = _figure(0.9 + 1.35 * len(found), len(found), sharey=True)
    handles: dict[str, Any] = {}
    for ax, (name, looks) in zip(axes, found.items(), strict=True):
        for language, colour, marker in (("korean", ACCENT, "o"), ("english", GREY, "s")):
            points = [(look["step"], look[f"{language}_bits"] / base[language] - 1) for look in looks
                      if f"{language}_bits" in look]  # fmt: skip
            if points:
                (handles[label(LANGUAGES, language)],) = ax.plot(
                    *zip(*points, strict=True), "-", marker=marker, color=colour, lw=1.5, ms=4.5
                )
        limit = ax.axhline(most - 1, ls="--", color=INK, lw=1)
        ax.set_title(label(STAGES, name))
        _percent(ax.yaxis)
        ax.set_xlim(left=0)
        _whole_steps(ax)
    handles["한도 gate, English"] = limit
    axes[-1].set_xlabel("스텝 step")
    _legend(figure, list(handles.values()), list(handles))
    return figure


def looks(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> Any:
    """Dev accuracy with its interval at every look of a training, a panel a stage."""
    figure, axes = _figure(0.5 + 1.35 * len(found), len(found), sharey=True)
    for ax, (name, entries) in zip(axes, found.items(), strict=True):
        steps, values = [e["step"] for e in entries], [e["accuracy"] for e in entries]
        ax.fill_between(steps, [e["lower"] for e in entries], [e["upper"] for e in entries], color="#d7eaea", lw=0)
        ax.plot(steps, values, "-o", color=ACCENT, lw=1.5, ms=4.5)
        ax.set_title(label(STAGES, name))
        ax.set_xlim(0, max(steps) * 1.02)
        ax.set_ylim(bottom=0)
        _percent(ax.yaxis)
        _whole_steps(ax)
    axes[-1].set_xlabel("스텝 step")
    return figure


def exams(first: Mapping[str, Any], last: Mapping[str, Any], names: tuple[str, str]) -> Any:
    """Accuracy by exam of two models with intervals; first and last map an exam to its score."""
    figure, (ax,) = _figure(1.0 + 0.62 * len(last))
    for y, exam in enumerate(last):
        if exam in first:
            _range(ax, y - 0.16, first[exam], GREY)
            _at_right(ax, y - 0.2, f"{first[exam]['accuracy']:.1%}", "#5c646b")
        _range(ax, y + 0.16, last[exam], ACCENT)
        _at_right(ax, y + 0.2, f"{last[exam]['accuracy']:.1%}", ACCENT)
    ax.set_yticks(range(len(last)), [drawable(label(EXAMS, exam)) for exam in last])
    ax.set_ylim(len(last) - 0.5, -0.5)
    ax.set_xlim(0, 1)
    ax.grid(axis="y", visible=False)
    _percent(ax.xaxis)
    ax.set_xlabel("정답률 dev accuracy, 95 %")
    _legend(figure, [_dot(GREY), _dot(ACCENT)], [label(STAGES, name) for name in names])
    return figure


def _dot(colour: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], marker="o", ls="", color=colour)


def letters(scores: Mapping[str, Mapping[str, Any]]) -> Any:
    """The letters that a model answers beside those of the key, a panel a model."""
    from matplotlib.patches import Patch

    figure, axes = _figure(0.8 + 1.35 * len(scores), len(scores))
    for ax, (name, score) in zip(axes, scores.items(), strict=True):
        known = [key for key in score["predicted"] if score["predicted"][key] or score["gold"].get(key)]
        places = range(len(known))
        for shift, counts, colour in ((-0.2, score["gold"], LIGHT), (0.2, score["predicted"], ACCENT)):
            heights = [counts.get(key, 0) for key in known]
            bars = ax.bar([x + shift for x in places], heights, 0.38, color=colour)
            ax.bar_label(bars, fontsize=8.5, padding=1)
        ax.set_xticks(places, known)
        ax.set_title(label(STAGES, name))
        ax.margins(y=0.2)
        ax.grid(visible=False)
        ax.set_yticks([])
    _legend(figure, [Patch(color=LIGHT), Patch(color=ACCENT)], ["정답 key", "답 answered"])
    return figure


def tokens(before: Mapping[str, float], after: Mapping[str, float]) -> Any:
    """Tokens per character of the base's and of the extended tokenizer, by language."""
    figure, (ax,) = _figure(2.3)
    for y, language in enumerate(LANGUAGES):
        ax.plot([before[language], after[language]], [y, y], color=LIGHT, lw=3, zorder=1)
        ax.plot([before[language]], [y], "o", color=GREY, ms=7)
        ax.plot([after[language]], [y], "o", color=ACCENT, ms=7)
        _at_right(ax, y, f"{before[language]:.3f}→{after[language]:.3f}")
    ax.set_yticks(range(len(LANGUAGES)), [label(LANGUAGES, language) for language in LANGUAGES])
    ax.set_ylim(len(LANGUAGES) - 0.5, -0.5)
    ax.set_xlim(0, 1.08 * max(*before.values(), *after.values()))
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("글자당 토큰 tokens per character")
    _legend(figure, [_dot(GREY), _dot(ACCENT)], [label(STAGES, "base"), label(STAGES, "extended")])
    return figure


def two_runs(stages: Mapping[str, Mapping[str, Any]]) -> Any:
    """Dev accuracy of two runs by stage; stages maps a name to {"accuracy", "lower", "upper"}, each a pair."""
    figure, (ax,) = _figure(1.0 + 0.62 * len(stages))
    for y, (_, entry) in enumerate(stages.items()):
        for run, shift, colour in ((0, -0.16, GREY), (1, 0.16, ACCENT)):
            _range(ax, y + shift, {key: entry[key][run] for key in ("accuracy", "lower", "upper")}, colour)
            _at_right(ax, y + shift * 1.25, f"{entry['accuracy'][run]:.1%}", "#5c646b" if run == 0 else ACCENT)
    ax.set_yticks(range(len(stages)), [label(STAGES, name) for name in stages])
    ax.set_ylim(len(stages) - 0.5, -0.5)
    ax.set_xlim(0, min(1.0, max(0.5, *(max(entry["upper"]) * 1.05 for entry in stages.values()))))
    ax.grid(axis="y", visible=False)
    _percent(ax.xaxis)
    ax.set_xlabel("정답률 dev accuracy, 95 %")
    _legend(figure, [_dot(GREY), _dot(ACCENT)], ["첫째 A", "둘째 B"])
    return figure


def drawable(text: str) -> str:
    """The text with a □ for every character that the font lacks, cut to the length of a label."""
    from matplotlib.ft2font import FT2Font

    has = FT2Font(str(FONT)).get_charmap()
    text = text if len(text) <= LABEL else text[: LABEL - 1] + "…"
    return "".join(c if ord(c) in has else "□" for c in text)


def image(figure: Any, kind: str) -> bytes:
    """The bytes of a figure as "svg" or "png", free of time and version."""
    target = io.BytesIO()
    metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    figure.savefig(target, format=kind, dpi=PNG_DPI, metadata=metadata)
    return target.getvalue()
