"""Seeded documents for the tests of refinement, unlike each other, in every format; the program as a user runs it."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
SAMPLE = REPOSITORY / "data" / "sample" / "01_raw"
REAL = REPOSITORY.parent / "shared" / "real_data" / "01_raw"
PROGRAM = REPOSITORY / "script" / "refine" / "refine_00_plain_text.py"


# documents ----------------------------------------------------------------------------------------------


def rows(path: Path) -> list[dict]:
    # Not splitlines: U+2028 and its kind stand inside of texts.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@cache
def vocabulary(language: str = "ko") -> tuple[str, ...]:
    """The distinct words of the sample's encyclopedia, or of its English text."""
    source, letters = {
        "ko": ("00_korean/wikipedia-korean", r"[가-힣]{2,8}"),
        "en": ("00_english_replay", r"[A-Za-z]{2,12}"),
    }[language]
    text = " ".join(row["text"] for row in rows(SAMPLE / source / "train.jsonl"))
    return tuple(sorted(set(re.findall(rf"(?<!\S){letters}(?!\S)", text))))


def document(rng: random.Random, language: str = "ko", length: tuple[int, int] = (50, 300)) -> str:
    """Sentences of random words, some words more often than others, as in real text."""
    words = vocabulary(language)
    drawn = [words[int(len(words) * rng.random() ** 1.5)] for _ in range(rng.randint(*length))]
    for at in range(9, len(drawn), 10):
        drawn[at] += "." if at % 40 != 9 else ".\n\n"
    return " ".join(drawn).replace("\n ", "\n").strip()


def edited(rng: random.Random, text: str, share: float) -> str:
    """The text with a share of its words exchanged for others."""
    words = text.split(" ")
    for at in rng.sample(range(len(words)), round(share * len(words))):
        words[at] = rng.choice(vocabulary())
    return " ".join(words)


def as_namuwiki(text: str) -> str:
    """The text as a page of NamuWiki; cleaning gives the text again."""
    words = text.split(" ")
    words[1] = f"'''{words[1]}'''"
    words[3] = f"[[{words[3]}]]"
    words[5] = f"[[어떤 문서|{words[5]}]][* 각주에 쓴 말]"
    return "[[분류:시험]]\n[목차]\n" + " ".join(words)


def write(file: Path, texts: Sequence[str]) -> Path:
    """A file of documents in the format that its name says; a folder of `save_to_disk` for a name without a suffix."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    if file.name.endswith(".jsonl"):
        file.write_text(lines, encoding="utf-8")
    elif file.name.endswith(".jsonl.gz"):
        file.write_bytes(gzip.compress(lines.encode(), compresslevel=1, mtime=0))
    elif file.suffix == ".json":
        file.write_text(json.dumps([{"text": text} for text in texts], ensure_ascii=False), encoding="utf-8")
    elif file.suffix == ".txt":
        file.write_text("\n\n".join(re.sub(r"\n\n+", "\n", text) for text in texts), encoding="utf-8")
    elif file.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"text": texts}), file, row_group_size=300)
    else:
        import datasets

        datasets.disable_progress_bars()
        datasets.Dataset.from_dict({"text": texts}).save_to_disk(file, num_shards=2)
    return file


# the program --------------------------------------------------------------------------------------------


def raw_of(root: Path) -> Path:
    return root / "data" / "sample" / "01_raw"


def refined_of(root: Path) -> Path:
    return root / "data" / "sample" / "02_refined"


def make_root(root: Path, korean: dict[str, Sequence[str]], exam: Path = SAMPLE / "02_kor_med_test") -> Path:
    """A project root with the sample's English text and exam, and Korean documents: {file below 00_korean: texts}."""
    for folder, name in ((SAMPLE / "00_english_replay", "00_english_replay"), (exam, "02_kor_med_test")):
        shutil.copytree(folder, raw_of(root) / name, copy_function=shutil.copyfile)
        (raw_of(root) / name).chmod(0o755)
    for file, texts in korean.items():
        write(raw_of(root) / "00_korean" / file, texts)
    return root


def begin(root: Path, *args: object, within: Sequence[str] = (), program: Path = PROGRAM) -> subprocess.Popen:
    """The program in a process group of its own; what it prints goes to one pipe."""
    return subprocess.Popen(
        [*within, sys.executable, str(program), *map(str, args)],
        env={**os.environ, "MEDGEMMA_KOREAN_ROOT": str(root)},
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(root: Path, *args: object, **options) -> tuple[int, str]:
    """(exit code, what was printed) of the program."""
    process = begin(root, *args, **options)
    text, _ = process.communicate(timeout=600)
    return process.returncode, text


def outputs(root: Path) -> dict[str, str]:
    """sha256 of everything that was published, and nothing hidden: {file below 02_refined: digest}."""
    refined = refined_of(root)
    return {
        str(file.relative_to(refined)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(refined.rglob("*"))
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(refined).parts)
    }


def shards_of(root: Path) -> dict[str, int]:
    """The finished shards and when they were made: {name: nanoseconds}."""
    return {file.stem: file.stat().st_mtime_ns for file in (refined_of(root) / ".shards").glob("[!.]*.json")}


def book_of(root: Path, folder: str = "00_plain_text") -> dict:
    return json.loads((refined_of(root) / folder / "ledger.json").read_text(encoding="utf-8"))


def record_of(root: Path) -> dict:
    return json.loads((refined_of(root) / ".stages" / "refine_00_plain_text.json").read_text(encoding="utf-8"))


def dropped_of(book: dict, source: str) -> dict[str, int]:
    """How many documents of a source were dropped, by reason."""
    found = book["sources"][source]["dropped"].items()
    return {reason: pair["documents"] for reason, pair in found if pair["documents"]}


def kept_texts(root: Path, folder: str = "00_plain_text") -> list[str]:
    return [r["text"] for split in ("train", "validation") for r in rows(refined_of(root) / folder / f"{split}.jsonl")]
