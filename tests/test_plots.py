"""The figures draw the numbers they are given, every glyph is there, and the same numbers give the same bytes."""

import io
import warnings

import pytest
from report_fixtures import NAMES, evaluation_of

from medgemma_korean import plots

SCORES = {name: evaluation_of(name, right=12 + 6 * i) for i, name in enumerate([*NAMES, "loop"])}
MCQ = {name: scores["mcq"] for name, scores in SCORES.items()}
BITS = {name: scores["bits_per_character"] for name, scores in SCORES.items()}
TOKENS = {name: scores["tokens_per_character"] for name, scores in SCORES.items()}
CURVES = {"00": [(1, 7.0), (2, 6.5), (3, 6.25)], "02": [(1, 4.0)]}
LOOKS = {
    "00": [
        {"step": 10, "korean_bits": 5.0, "english_bits": 3.0},
        {"step": 20, "korean_bits": 4.5, "english_bits": 3.1},
    ],
    "02": [{"step": 7, "korean_bits": 4.4, "english_bits": 3.2, "accuracy": 0.3, "lower": 0.2, "upper": 0.4}],
}
PAIR = {"base": {"accuracy": [0.2, 0.3], "lower": [0.1, 0.2], "upper": [0.3, 0.4]}}
BASE = {"korean": 6.0, "english": 3.0}

FIGURES = {
    "accuracy": (plots.accuracy, MCQ, "02"),
    "bits": (plots.bits, BITS),
    "curves": (plots.curves, CURVES),
    "learning_rates": (plots.learning_rates, {"00": [(1, 0.0), (2, 2e-3), (3, 1e-4)]}),
    "forgetting": (plots.forgetting, LOOKS, BASE, 1.05),
    "looks": (plots.looks, {"02": LOOKS["02"]}),
    "exams": (plots.exams, MCQ["base"]["exams"], MCQ["02"]["exams"], ("base", "02")),
    "letters": (plots.letters, {"base": MCQ["base"], "02": MCQ["02"]}),
    "tokens": (plots.tokens, TOKENS["base"], TOKENS["extended"]),
    "two_runs": (plots.two_runs, PAIR),
}


def drawn(key):
    draw, *args = FIGURES[key]
    with plots.style():
        return draw(*args)


@pytest.mark.parametrize("key", FIGURES)
def test_every_glyph_is_in_the_font(key):
    with plots.style(), warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = drawn(key)
        assert plots.image(figure, "svg") and plots.image(figure, "png")


def test_a_glyph_that_is_missing_is_noticed_and_drawable_avoids_it():
    from matplotlib.figure import Figure

    def draw(text):
        with plots.style():
            figure = Figure()
            figure.text(0.5, 0.5, text)
            plots.image(figure, "png")

    with pytest.warns(UserWarning, match="missing from font"):
        draw("漢")
    assert plots.drawable("한글 漢字 abc") == "한글 □□ abc"
    assert plots.drawable("x" * 18) == "x" * 18 and plots.drawable("x" * 19) == "x" * 17 + "…"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(plots.drawable("漢 $x$ 뷁 –→ 의사"))


@pytest.mark.parametrize("key", FIGURES)
def test_no_text_leaves_the_figure_or_covers_another(key):
    """Labels, values and legends, as they are laid out: inside the figure, and apart from each other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    with plots.style():
        figure = drawn(key)
        FigureCanvasAgg(figure).draw()
        boxes = [
            (text.get_text(), text.get_window_extent())
            for text in figure.findobj(Text)
            if text.get_text().strip() and text.get_visible() and _is_shown(text, figure)
        ]
    for text, box in boxes:
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1, text
    for i, (text, box) in enumerate(boxes):
        for other, its in boxes[i + 1 :]:
            width = min(box.x1, its.x1) - max(box.x0, its.x0)
            height = min(box.y1, its.y1) - max(box.y0, its.y0)
            assert width <= 1 or height <= 2, (text, other)


def _is_shown(text, figure):
    """Ticks outside of the limits keep their label and are not drawn."""
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            if text in [label for tick in axis.majorTicks for label in (tick.label1, tick.label2)]:
                return text in axis.get_ticklabels() and any(
                    text in (tick.label1, tick.label2) for tick in axis._update_ticks()
                )
    return True


@pytest.mark.parametrize("key", FIGURES)
def test_the_same_numbers_give_the_same_bytes(key):
    for kind in ("svg", "png"):
        with plots.style():
            assert plots.image(drawn(key), kind) == plots.image(drawn(key), kind)


def test_a_png_is_sharp_and_as_wide_as_the_page_expects():
    from PIL import Image

    with plots.style():
        image = Image.open(io.BytesIO(plots.image(drawn("accuracy"), "png")))
    assert image.size[0] == round(plots.WIDTH * plots.PNG_DPI)


def test_the_settings_of_the_caller_come_back():
    import matplotlib

    before = matplotlib.rcParams.copy()
    drawn("bits")
    assert matplotlib.rcParams.copy() == before


def test_accuracies_and_intervals_are_those_given():
    (ax,) = drawn("accuracy").axes
    for container, (name, score) in zip(ax.containers, MCQ.items(), strict=True):
        line, _, (bar,) = container.lines
        assert list(line.get_xdata()) == [score["accuracy"]]
        (low, _), (high, _) = bar.get_segments()[0]
        assert (low, high) == pytest.approx((score["lower"], score["upper"]))
        assert (line.get_color() == plots.ACCENT) == (name == "02")
    dashed = [line for line in ax.lines if line.get_linestyle() == "--"]
    assert [line.get_xdata()[0] for line in dashed] == [score["majority_accuracy"] for score in MCQ.values()]
    assert {f"{score['accuracy']:.1%}" for score in MCQ.values()} <= {text.get_text() for text in ax.texts}


def test_bits_and_curves_are_those_given():
    for ax, language in zip(drawn("bits").axes, ("korean", "medical", "english"), strict=True):
        values = [bits[language] for bits in BITS.values()]
        assert list(ax.lines[0].get_ydata()) == values
        assert [text.get_text() for text in ax.texts] == [f"{value:.3f}" for value in values]
    for ax, points in zip(drawn("curves").axes, CURVES.values(), strict=True):
        assert list(zip(*ax.lines[0].get_data(), strict=True)) == points


def test_forgetting_is_against_the_base_with_the_gate():
    for ax, looks in zip(drawn("forgetting").axes, LOOKS.values(), strict=True):
        for line, language in zip(ax.lines, ("korean", "english"), strict=False):
            expected = [look[f"{language}_bits"] / BASE[language] - 1 for look in looks]
            assert list(line.get_ydata()) == pytest.approx(expected)
        assert ax.lines[-1].get_ydata()[0] == pytest.approx(0.05)


def test_letters_are_counted_beside_the_key():
    figure = drawn("letters")
    for ax, score in zip(figure.axes, (MCQ["base"], MCQ["02"]), strict=True):
        gold, predicted = ax.containers
        assert [bar.get_height() for bar in gold] == [score["gold"][letter] for letter in "ABCDE"]
        assert [bar.get_height() for bar in predicted] == [score["predicted"][letter] for letter in "ABCDE"]
        assert [tick.get_text() for tick in ax.get_xticklabels()] == list("ABCDE")


def test_the_font_may_be_shipped():
    """Under its licence, and not under the name that the licence reserves."""
    from matplotlib.ft2font import FT2Font

    licence = (plots.FONT.parent / "OFL.txt").read_text(encoding="utf-8")
    assert "SIL OPEN FONT LICENSE" in licence and "Reserved Font Name Nanum" in licence
    font = FT2Font(str(plots.FONT))
    assert font.family_name == plots.FAMILY and "nanum" not in (font.family_name + font.postscript_name).lower()
