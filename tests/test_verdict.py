"""The verdict's lines at their thresholds, and the word that they come to."""

import pytest

from medgemma_korean import verdict
from medgemma_korean.verdict import Line, decide, init_lines


def test_one_failing_line_decides():
    good, bad, told = Line("a", True, "is fine"), Line("b", False, "is not"), Line("c", None, "1 GB")
    assert decide([good, told]) == ("extend", "a: is fine")
    assert decide([good, bad, told]) == ("do not extend", "b: is not")
    assert decide([told]) == ("extend", "nothing was measured")
    word, reason = decide([Line(str(i), False, "x") for i in range(5)])
    assert (word, reason) == ("do not extend", "0: x; 1: x; 2: x; and 2 more")


def test_report_begins_with_the_word():
    lines = [Line("a", True, "is fine"), Line("long name", False, "is not"), Line("c", None, "1 GB")]
    assert verdict.report(lines, *decide(lines)).split("\n") == [
        "DO NOT EXTEND: long name: is not",
        "  a          passed  is fine",
        "  long name  FAILED  is not",
        "  c                  1 GB",
    ]
    assert verdict.report(lines[:1], *decide(lines[:1])).startswith("EXTEND: a: is fine\n")


def test_lines_are_plain_values():
    line = Line("a", None, "b")
    assert line.as_dict() == {"name": "a", "passed": None, "text": "b"} and Line(**line.as_dict()) == line


@pytest.mark.parametrize("after, passed", [(0.87, True), (0.8701, False), (1.2, False), (0.5, True)])
def test_medical_text_needs_13_percent_fewer_tokens(after, passed):
    lines = verdict.compression_lines(
        {"korean": 1.0, "medical": 1.0}, {"korean": 1.1, "medical": after}, {"medical": 9999}
    )
    assert [(line.name, line.passed) for line in lines] == [
        ("compression, korean", None),
        ("compression, medical", passed),
    ]
    assert "asked for -13%" in lines[1].text and "1.000 -> 1.100 tokens per character (+10.0%)" in lines[0].text


def test_a_few_characters_are_not_judged():
    (line,) = verdict.compression_lines({"terms": 1.0}, {"terms": 0.99}, {"terms": 999})
    assert line.passed is None and "999 characters are too few" in line.text
    (line,) = verdict.compression_lines({"terms": 1.0}, {"terms": 0.99}, {"terms": 1000})
    assert line.passed is False
    (line,) = verdict.compression_lines({"terms": 0.0}, {"terms": 0.0}, {})  # no text: no division by zero
    assert line.passed is None


def test_95_percent_of_the_tokens_are_used():
    assert verdict.use_line([100] * 95 + [0] * 5, 100, 0.5).passed is True
    line = verdict.use_line([100] * 94 + [99] * 5 + [0], 100, 0.5)
    assert line.passed is False and "94.0% of the new tokens are used 100 times" in line.text
    assert "1 (1.0%) never; 50% occur in held-out Korean" in line.text
    assert verdict.use_line([], 100, 0).passed is None


def test_updates_are_judged_at_the_5th_percentile():
    assert verdict.spread([3.0, 1.0, 2.0]) == {"minimum": 1.0, "5th_percentile": 1.0, "median": 2.0}
    assert verdict.spread([]) == {"minimum": 0.0, "5th_percentile": 0.0, "median": 0.0}
    assert verdict.updates_line([1.0] * 5 + [100.0] * 95, 100).passed is True
    line = verdict.updates_line([1.0] * 6 + [100.0] * 94, 100)
    assert line.passed is False and "1 times at least, 1 at the 5th percentile (asked for 100), 100 in the" in line.text
    assert verdict.updates_line([], 100).passed is None


@pytest.mark.parametrize(
    "hidden, new, rows, added, training",
    [
        (2560, 2_000, 264_192, 10, 0.08),
        (2560, 10_000, 272_192, 51, 0.41),
        (5376, 10_000, 272_192, 107, 0.86),
        (5376, 24_000, 286_208, 258, 2.06),
    ],
)
def test_memory_is_that_of_the_reference(hidden, new, rows, added, training):
    found = verdict.memory(262_145 + new, rows, 262_208, hidden, new)
    assert round(found["added_mb"]) == added
    assert round(found["row_training_gb"], 2) == training
    line = verdict.memory_line(found)
    assert line.passed is None and f"{rows:,} rows" in line.text


def test_provenance_names_hashes_counts_and_versions():
    line = verdict.provenance_line({"base": "a" * 64, "corpus": "b" * 64}, 1234, 1, {"tokenizers": "0.23"})
    expected = "sha256 base aaaaaaaaaaaa, corpus bbbbbbbbbbbb; 1,234 distinct words of 1 document; tokenizers 0.23"
    assert (line.passed, line.text) == (None, expected)


@pytest.mark.parametrize(
    "mass, change, passed",
    [
        (0.03, 0.01, [True, True]),
        (0.031, -0.2, [False, True]),
        (0.0, 0.011, [True, False]),
        (float("nan"), float("nan"), [False, False]),
    ],
)
def test_new_rows_must_not_be_felt_in_english(mass, change, passed):
    lines = init_lines(mass, change, 2)
    assert [line.passed for line in lines] == passed
    assert all("shift 2" in line.text for line in lines)
    word, reason = decide(lines)
    assert word == ("extend" if all(passed) else "do not extend")
    if not passed[0]:
        assert reason.startswith("new rows, mass on English: ")
