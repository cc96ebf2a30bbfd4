"""Whether extending the tokenizer is worth it: measured lines, each with its threshold, and one word for all of them.

`prepare_tokenizer` makes the lines of the tokenizer, `add_lora` those of the new rows. A line passes, fails, or only
informs. The word is "do not extend" as soon as one fails; `--new-tokens auto` obeys it, a number is a person's choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from medgemma_korean import cli
from medgemma_korean.shapes import DTYPE_BYTES, TRAINED_BYTES

EXTEND, DO_NOT_EXTEND = "extend", "do not extend"
MIN_GAIN = 0.13  # share of the tokens saved on medical text: 1.15 times the characters a token
MIN_USED = 0.95  # share of the new tokens that the training mix uses often enough
MAX_MASS = 0.03  # probability that all new rows together take on English text before any training
MAX_CHANGE = 0.01  # relative rise of the English loss by the new rows
FEW_CHARACTERS = 1000  # a smaller held-out text is shown, not judged: a word more or less decides there


@dataclass(frozen=True)
class Line:
    """One measurement. passed: None where it only informs."""

    name: str
    passed: bool | None
    text: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def decide(lines: Sequence[Line]) -> tuple[str, str]:
    """("extend" | "do not extend", why): the lines that failed, or those that passed."""
    failed = [line for line in lines if line.passed is False]
    chosen = failed[:3] or [line for line in lines if line.passed][:1]
    more = f"; and {len(failed) - 3} more" if len(failed) > 3 else ""
    why = "; ".join(f"{line.name}: {line.text}" for line in chosen) + more
    return (DO_NOT_EXTEND if failed else EXTEND), why or "nothing was measured"


def report(lines: Sequence[Line], word: str, reason: str) -> str:
    """The word in capitals with its reason on the first line, then the table."""
    marks = {True: "passed", False: "FAILED", None: ""}
    rows = [[line.name, marks[line.passed], line.text] for line in lines]
    width = max((len(row[0]) for row in rows), default=0)
    return "\n".join(
        [f"{word.upper()}: {reason}", *(f"  {name:{width}}  {mark:6}  {text}" for name, mark, text in rows)]
    )


# the tokenizer ------------------------------------------------------------------------------------------


def compression_lines(
    before: Mapping[str, float], after: Mapping[str, float], medical: Mapping[str, int]
) -> list[Line]:
    """Tokens per character before and after, a line a held-out set.

    medical: the sets that are judged and their characters; with fewer than 1,000 characters a set only informs.
    """
    lines = []
    for name in before:
        change = after[name] / before[name] - 1 if before[name] else 0.0
        text = f"{before[name]:.3f} -> {after[name]:.3f} tokens per character ({change:+.1%}"
        passed = None
        if name in medical and medical[name] >= FEW_CHARACTERS:
            passed = -change >= MIN_GAIN
            text += f", asked for {-MIN_GAIN:.0%}"
        elif name in medical:
            text += f", {medical[name]:,} characters are too few to judge by"
        lines.append(Line(f"compression, {name}", passed, text + ")"))
    return lines


def use_line(uses: Sequence[float], threshold: float, held_out: float) -> Line:
    """uses: of each new token in all epochs of the whole training mix. held_out: share of them in held-out Korean."""
    if not uses:
        return Line("use", None, "no new tokens")
    share = sum(n >= threshold for n in uses) / len(uses)
    unused = sum(n == 0 for n in uses)
    text = (
        f"{share:.1%} of the new tokens are used {threshold:g} times or more in all epochs of the training mix "
        f"(asked for {MIN_USED:.0%}); {unused} ({unused / len(uses):.1%}) never; "
        f"{held_out:.0%} occur in held-out Korean"
    )
    return Line("use", share >= MIN_USED, text)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Minimum, 5th percentile and median (nearest rank); zeros where there are no values."""
    ordered = sorted(values) or [0.0]
    at = {"minimum": 0, "5th_percentile": len(ordered) // 20, "median": len(ordered) // 2}
    return {name: round(ordered[i], 1) for name, i in at.items()}


def updates_line(updates: Sequence[float], threshold: float) -> Line:
    """updates: how often the planned stage 00 meets each new token."""
    if not updates:
        return Line("updates", None, "no new tokens")
    found = spread(updates)
    low = found["5th_percentile"]
    text = (
        f"the planned stage 00 meets a new token {found['minimum']:,g} times at least, {low:,g} at the 5th percentile "
        f"(asked for {threshold:g}), {found['median']:,g} in the median"
    )
    return Line("updates", low >= threshold, text)


def memory(ids: int, rows: int, old_rows: int, hidden: int, new_tokens: int) -> dict[str, float]:
    """What the new rows cost: added megabytes in bf16, and gigabytes of training them (`token_rows`)."""
    return {
        "ids": ids,
        "rows": rows,
        "added_mb": round((rows - old_rows) * hidden * DTYPE_BYTES["bfloat16"] / 1e6, 3),
        "row_training_gb": round(new_tokens * hidden * TRAINED_BYTES / 1e9, 4),
    }


def memory_line(found: Mapping[str, float]) -> Line:
    """Informs; whether all of a training fits is check_gpu_memory's answer."""
    text = (
        f"{found['ids']:,} ids, {found['rows']:,} rows, {found['added_mb']:,.1f} MB more in bf16; row training "
        f"{found['row_training_gb']:.2g} GB"
    )
    return Line("memory", None, text)


def provenance_line(hashes: Mapping[str, str], words: int, documents: int, versions: Mapping[str, str]) -> Line:
    known = ", ".join(f"{name} {digest[:12]}" for name, digest in hashes.items())
    made = ", ".join(f"{name} {version}" for name, version in versions.items())
    counted = f"{cli.count(words, 'distinct word')} of {cli.count(documents, 'document')}"
    return Line("provenance", None, f"sha256 {known}; {counted}; {made}")


# the new rows -------------------------------------------------------------------------------------------


# In the place of `init_lines` until add_lora has measured them.
NOT_RUN = Line("init gate", None, "not run: add_lora measures the new rows")


def init_lines(english_mass: float, english_change: float, shift: float) -> list[Line]:
    """What fresh rows do to English text, measured with the model before any training.

    english_mass: mean probability that all new rows take together. english_change: relative change of the loss.
    shift: the shift of the rows that was chosen (0: plain means).
    """
    return [
        Line(
            "new rows, mass on English",
            english_mass <= MAX_MASS,
            f"{english_mass:.3f} of the probability (at most {MAX_MASS:g}), shift {shift:g}",
        ),
        Line(
            "new rows, English loss",
            english_change <= MAX_CHANGE,
            f"{english_change:+.2%} (at most {MAX_CHANGE:+.0%}), shift {shift:g}",
        ),
    ]
