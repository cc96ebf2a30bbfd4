"""The table of wrong inputs: which program, what is wrong, the exit code, and what its message must say.

`bad_input_runs.py` runs them, `test_bad_inputs.py` asserts them, `bad_inputs.md` shows them.
"""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hub_repositories as published

from medgemma_korean import records

RAW, REFINED = "data/sample/01_raw", "data/sample/02_refined"
TEXT, DICTIONARY, EXAM = (f"{RAW}/{n}" for n in ("00_korean", "01_medical_dict", "02_kor_med_test"))
PAIRS = f"{RAW}/03_korean_english"
BASE, TRAINED = "model/raw_lora_added/tiny/base", "model/00_trained/tiny"
Change = Callable[[Path], None]


@dataclass(frozen=True)
class Case:
    """One wrong input.

    cause, step: parts of the message, what is wrong and what to do.
    start: the root it begins with, one of empty, sample, refined, chain. prepare: what is made wrong in it.
    hub: what a hub on this machine publishes. bound: run without the right to pass over permission bits.
    """

    program: str
    title: str
    argv: tuple[str, ...] = ()
    cause: str = ""
    step: str = ""
    prepare: Change | None = None
    start: str = "empty"
    code: int = 2
    hub: Callable[[Any], None] | None = None
    bound: bool = False
    environment: dict[str, str] = field(default_factory=dict)


# what is made wrong ---------------------------------------------------------------------------------------


def has(name: str, content: bytes | str) -> Change:
    """A file with that content."""

    def change(root: Path) -> None:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))

    return change


def folder(name: str, mode: int = 0o755) -> Change:
    def change(root: Path) -> None:
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name).chmod(mode)

    return change


def link(name: str, target: str) -> Change:
    def change(root: Path) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(target)

    return change


def mode(name: str, bits: int) -> Change:
    return lambda root: (root / name).chmod(bits)


def without(*names: str) -> Change:
    """These files or folders are gone."""
    import shutil

    def change(root: Path) -> None:
        for name in names:
            shutil.rmtree(root / name) if (root / name).is_dir() else (root / name).unlink()

    return change


def cut(name: str, share: float = 0.5) -> Change:
    """The file ends in its middle."""

    def change(root: Path) -> None:
        content = (root / name).read_bytes()
        (root / name).write_bytes(content[: int(len(content) * share)])

    return change


def recoded(name: str, encoding: str) -> Change:
    def change(root: Path) -> None:
        text = (root / name).read_bytes().decode("utf-8")
        (root / name).write_bytes(text.encode(encoding, "replace"))

    return change


def row(name: str, number: int, **values: Any) -> Change:
    """Row `number` (from 1) of a JSONL file has these values; None takes the key out."""

    def change(root: Path) -> None:
        lines = (root / name).read_text(encoding="utf-8").splitlines()
        changed = json.loads(lines[number - 1]) | values
        lines[number - 1] = json.dumps({k: v for k, v in changed.items() if v is not None}, ensure_ascii=False)
        (root / name).write_text("\n".join(lines) + "\n", encoding="utf-8")

    return change


def line(name: str, number: int, content: bytes) -> Change:
    """Line `number` (from 1) of a file is this."""

    def change(root: Path) -> None:
        lines = (root / name).read_bytes().split(b"\n")
        lines[number - 1] = content
        (root / name).write_bytes(b"\n".join(lines))

    return change


def values(name: str, **changed: Any) -> Change:
    """These values stand in a JSON object, whose seal holds; None takes the key out."""

    def change(root: Path) -> None:
        found = json.loads((root / name).read_text(encoding="utf-8")) | changed
        found = {k: v for k, v in found.items() if v is not None}
        found = records.sealed(found) if records.SEAL in found else found
        (root / name).write_text(json.dumps(found), encoding="utf-8")

    return change


def vouched(change: Change) -> Change:
    """A change that the stage records know of, as if the stage itself had made its output so."""

    def whole(root: Path) -> None:
        change(root)
        for file in root.glob("model/*/*/stage.json"):
            record = json.loads(file.read_text(encoding="utf-8"))
            for name, entry in record["outputs"].items():
                made = file.parent / name
                if made.is_file() and records.sha256(made) != entry["sha256"]:
                    about = made.stat()
                    entry |= {"size": about.st_size, "mtime_ns": about.st_mtime_ns, "sha256": records.sha256(made)}
            records.write_sealed(file, record)

    return whole


def copied(name: str, target: str) -> Change:
    import shutil

    return lambda root: shutil.copytree(root / name, root / target, dirs_exist_ok=True)


def moved(name: str, target: str) -> Change:
    def change(root: Path) -> None:
        (root / target).parent.mkdir(parents=True, exist_ok=True)
        (root / name).rename(root / target)

    return change


def each(*changes: Change) -> Change:
    def change(root: Path) -> None:
        for one in changes:
            one(root)

    return change


def header(length: int) -> bytes:
    """A safetensors file whose header claims to be so long."""
    return struct.pack("<Q", length) + b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}' + b"\0" * 4


DEEP = b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"
NOISE = bytes(range(128, 256)) * 8
ITEM = {
    "question": "혈압이 가장 높은 때는?",
    "A": "아침",
    "B": "점심",
    "C": "저녁",
    "D": "밤",
    "E": "새벽",
    "answer": 1,
    "exam_type": "doctor",
    "year": 2020,
    "period": 1,
    "q_number": 1,
}


# the driver -----------------------------------------------------------------------------------------------

DRIVER = "run_full_pipeline.sh"
CASES: list[Case] = [
    Case(DRIVER, "an option that does not exist", ("--frobnicate",), "--frobnicate: no such option", "see --help"),
    Case(DRIVER, "a word without an option", ("tiny",), "tiny: no such option", "see --help"),
    Case(DRIVER, "a value is missing at the end", ("--model",), "--model needs a value", "see --help"),
    Case(DRIVER, "a value is missing before an option", ("--name", "--plan"), "--name needs a value", "see --help"),
    Case(DRIVER, "a switch with a value", ("--status=yes",), "yes: no such option", "see --help"),
    Case(DRIVER, "an unknown model", ("--model", "gpt-5"), "gpt-5: unknown", "known are tiny, medgemma-4b"),
    Case(DRIVER, "an empty model name", ("--model", ""), "unknown", "known are tiny, medgemma-4b"),
    Case(DRIVER, "a data folder that is not there", ("--data-dir", "no/such"), "no/such: no such folder", "01_raw"),
    Case(DRIVER, "a file as data folder", ("--data-dir", "a.txt"), "a.txt", "01_raw", has("a.txt", "x")),
    Case(DRIVER, "a name that leaves the folder", ("--name", "../x"), "'../x'", "use letters, digits"),
    Case(DRIVER, "a name with a line break", ("--name", "a\nb"), "a\\nb", "use letters, digits"),
    Case(
        DRIVER, "a data folder with a line break", ("--data-dir", "a\nb", "--plan"), "a\\nb", "--name", folder("a\nb")
    ),
    Case(DRIVER, "no epochs", ("--epochs-00", "0"), "0 is not at least 1", "--help"),
    Case(DRIVER, "a number in words", ("--max-samples", "many"), "'many' is not a whole number", "--help"),
    Case(DRIVER, "a number that is a fraction", ("--epochs-02", "1.5"), "'1.5' is not a whole number", "--help"),
    Case(DRIVER, "a stage that does not exist", ("--from", "bake"), "is no stage", "the stages are download refine"),
    Case(DRIVER, "an ambiguous stage", ("--from", "train"), "train_00 or train_01 or train_02", "the stages are"),
    Case(DRIVER, "an empty stage", ("--to", ""), "--to", "the stages are"),
    Case(DRIVER, "the first stage after the last", ("--from", "train_02", "--to", "refine"), "comes after", "exchange"),
    Case(DRIVER, "two modes", ("--plan", "--stop"), "--plan and --stop exclude each other", "leave one out"),
    Case(DRIVER, "--json without --status", ("--json",), "--json goes with --status", "--status --json"),
    Case(DRIVER, "no processes", ("--processes", "0"), "--processes 0: not a number", "give 1 or more"),
    Case(DRIVER, "processes in words", ("--processes", "two"), "--processes two: not a number", "give 1 or more"),
    Case(DRIVER, "--shard without processes", ("--shard",), "--shard goes with --processes", "--processes"),
    Case(DRIVER, "an unknown precision", ("--precision", "int3"), "int3", "8bit"),
    Case(DRIVER, "new tokens in words", ("--new-tokens", "lots"), "lots", "auto"),
    Case(DRIVER, "a negative count", ("--min-count", "-1"), "-1", "--help"),
    Case(DRIVER, "a device that does not exist", ("--device", "banana", "--plan"), "banana", "use cuda:0 or cpu"),
    Case(
        DRIVER,
        "a run that is not there is stopped",
        ("--stop", "--name", "night"),
        "nothing of the run night",
        "--status",
    ),
    Case(DRIVER, "nothing to verify", ("--verify",), "no complete stage", "run_full_pipeline.sh"),
    Case(
        DRIVER,
        "the root is a file",
        (),
        "a.txt/logs cannot be made",
        "MEDGEMMA_KOREAN_ROOT",
        has("a.txt", "x"),
        environment={"MEDGEMMA_KOREAN_ROOT": "a.txt"},
    ),
    Case(
        DRIVER,
        "a root with a line break",
        (),
        "line break",
        "MEDGEMMA_KOREAN_ROOT",
        folder("a\nb"),
        environment={"MEDGEMMA_KOREAN_ROOT": "a\nb"},
    ),
    Case(DRIVER, "the logs are a file", ("--to", "download"), "logs", "move it away", has("logs", "x")),
    Case(
        DRIVER,
        "a stage fails for its input",
        ("--to", "download"),
        "korean_medical_dict.jsonl is missing",
        "MANUAL_DATA",
        without(f"{DICTIONARY}/korean_medical_dict.jsonl"),
        "sample",
    ),
]

# operate --------------------------------------------------------------------------------------------------

PLAN, STATUS, STOP, VERIFY, LAUNCH, NOTE = (
    f"operate/{name}" for name in ("plan", "status", "stop", "verify", "launch", "note")
)
RECORD = f"{REFINED}/.stages/refine_00_plain_text.json"
CASES += [
    Case(PLAN, "an option that does not exist", ("--frob",), "--frob", "see ./run_full_pipeline.sh --help"),
    Case(
        VERIFY, "a record that is a list", (), "refine_00_plain_text.json", "move it away", has(RECORD, "[]"), "refined"
    ),
    Case(VERIFY, "a record of nonsense", (), "not valid JSON", "move it away", has(RECORD, "{{{"), "refined"),
    Case(
        VERIFY,
        "a record nested 100,000 deep",
        (),
        "refine_00_plain_text.json",
        "move it away",
        has(RECORD, DEEP),
        "refined",
    ),
    Case(
        VERIFY,
        "a record with a number of 5,000 digits",
        (),
        "not valid JSON (nested too deeply or too long a number)",
        "move it away",
        has(RECORD, '{"program": ' + "9" * 5000 + "}"),
        "refined",
    ),
    Case(
        NOTE,
        "a state that does not exist",
        ("stage", "--stage", "download", "--state", "sleeping"),
        "invalid choice: 'sleeping' (choose from",
        "see note.py --help",
    ),
    Case(NOTE, "a stage that does not exist", ("stage", "--stage", "01"), "invalid choice: '01'", "see note.py --help"),
    Case(STATUS, "an unknown model", ("--model", "Tiny"), "Tiny: unknown", "known are tiny"),
    Case(STOP, "nothing runs", (), "nothing of the run tiny is running", "--status"),
    Case(
        STOP,
        "a pid file with words",
        (),
        "nothing of the run tiny is running",
        "--status",
        has("logs/pipeline_tiny.pid", "not a pid\n"),
    ),
    Case(
        VERIFY,
        "a record that is a number",
        (),
        "refine_00_plain_text.json: not a stage record",
        "move it away",
        has(RECORD, "7"),
        "refined",
    ),
    Case(
        VERIFY,
        "a record with outputs of another type",
        (),
        "refine_00_plain_text.json: not a stage record",
        "move it away",
        values(RECORD, outputs=["a", 1]),
        "refined",
    ),
    Case(
        VERIFY,
        "a refined file was edited",
        (),
        "00_plain_text/train.jsonl",
        "--force",
        has(f"{REFINED}/00_plain_text/train.jsonl", '{"text": "x"}\n'),
        "refined",
    ),
    Case(LAUNCH, "no number", (), "number", "see launch.py --help"),
    Case(LAUNCH, "no processes", ("0", "script/train/train_00_plain_text.py"), "0 is not at least 1", "--help"),
    Case(LAUNCH, "no program", ("2",), "no program to start", "launch.py 2 script/train"),
    Case(
        LAUNCH,
        "a program that is not there",
        ("2", "script/train/nothing.py"),
        "script/train/nothing.py: no such program",
        "they are in script/train/",
    ),
]

# download -------------------------------------------------------------------------------------------------

D_TEXT, D_DICT = "download/download_00_plain_text", "download/download_01_medical_dict"
D_PAIRS, D_EXAM = "download/download_01_english_korean", "download/download_02_kor_med_test"
D_MORE, D_MODEL, D_ALL = (f"download/download_{name}" for name in ("instruction", "model", "all"))
LARGE = ("--model", "medgemma-4b")
NAMU, WIKI = "heegyu/namuwiki", "wikimedia/wikipedia"
DOCTOR = "doctor/dev-00000-of-00001.parquet"


def publishes(kind: str, name: str, files: dict[str, Any], fault: tuple = (), gated: bool = False, **options: Any):
    """A hub with one repository, and one fault where it is named."""

    def prepare(hub: Any) -> None:
        hub.add(kind, name, files, gated=gated)
        if fault:
            hub.fault(*fault, **options)

    return prepare


def exam(**replaced: bytes) -> Callable[[Any], None]:
    return publishes("dataset", "sean0042/KorMedMCQA", published.exam_files() | replaced)


def model(**replaced: bytes | None) -> Callable[[Any], None]:
    """The small model with these files instead; None leaves one out."""
    names = {name.replace(".", "_").replace("-", "_"): name for name in published.small_model_files()}
    files = published.small_model_files() | {names.get(key, key): content for key, content in replaced.items()}
    return publishes("model", "google/medgemma-4b-it", {k: v for k, v in files.items() if v is not None})


def namu(content: bytes | None = None, *fault: Any, **options: Any) -> Callable[[Any], None]:
    files = published.text_files()[NAMU]
    name = "namuwiki_20210301.parquet"
    return publishes("dataset", NAMU, files | ({name: content} if content is not None else {}), fault, **options)


ONE = (*LARGE, "--source", "namu_wiki")
CASES += [
    Case(D_TEXT, "an unknown source", ("--source", "nope"), "--source nope: unknown", "known are namu_wiki"),
    Case(D_TEXT, "a size that is no number", ("--max-gb", "nan"), "nan is not a number above 0", "--help"),
    Case(D_TEXT, "an infinite size", ("--max-gb", "inf"), "inf is not a number above 0", "--help"),
    Case(D_TEXT, "a negative size", ("--max-gb", "-3"), "-3 is not a number above 0", "--help"),
    Case(D_TEXT, "no connections", ("--connections", "0"), "0 is not at least 1", "--help"),
    Case(D_TEXT, "the folder of sources is a file", (), "00_korean", "move it away", has(TEXT, "x")),
    Case(
        D_TEXT,
        "a source in UTF-16",
        (),
        "line 1: not UTF-8",
        "iconv -f utf-16",
        recoded(f"{TEXT}/namu_wiki/train.jsonl", "utf-16"),
        "sample",
    ),
    Case(
        D_TEXT,
        "a cut gzip file",
        (),
        "damaged or cut gz file",
        "bring it anew",
        has(f"{TEXT}/c4_korean/part.json.gz", gzip.compress(b'{"text": "x"}\n' * 999)[:40]),
        "sample",
    ),
    Case(
        D_TEXT,
        "a damaged Parquet file",
        (),
        "damaged or cut Parquet file",
        "bring it anew",
        has(f"{TEXT}/c4_korean/part.parquet", NOISE),
        "sample",
    ),
    Case(
        D_TEXT,
        "rows without a text",
        (),
        'no "text" column; found body',
        "take that line out",
        has(f"{TEXT}/namu_wiki/train.jsonl", '{"body": "x"}\n'),
        "sample",
    ),
    Case(
        D_TEXT,
        "a repository that is not there",
        ONE,
        "heegyu/namuwiki",
        "download_00_plain_text.py",
        hub=lambda hub: None,
    ),
    Case(
        D_TEXT,
        "a hub that answers with a page",
        ONE,
        "heegyu/namuwiki",
        "download_00_plain_text.py",
        hub=lambda hub: hub.serve("/api/datasets/heegyu/namuwiki", b"<html>moved</html>"),
    ),
    Case(
        D_TEXT,
        "a published file is no Parquet file",
        ONE,
        "namuwiki_20210301.parquet",
        "bring it anew",
        hub=namu(NOISE),
    ),
    Case(
        D_TEXT,
        "a hub that answers with another kind of data",
        ONE,
        "heegyu/namuwiki",
        "download_00_plain_text.py",
        hub=lambda hub: hub.serve("/api/datasets/heegyu/namuwiki", b"[]"),
    ),
    Case(
        D_TEXT,
        "published names that leave the folder",
        ONE,
        "nothing in it is called",
        "see ",
        hub=publishes("dataset", NAMU, {"../../namuwiki_20210301.parquet": b"x"}),
    ),
    Case(D_TEXT, "the logs are a file", (), "logs: a file", "move it away", has("logs", "x"), "sample"),
    Case(
        D_TEXT,
        "no published file has the known name",
        ONE,
        "nothing in it is called",
        "see ",
        hub=publishes("dataset", NAMU, {"other.csv": b"x"}),
    ),
    Case(D_DICT, "no dictionary file", LARGE, "korean_medical_dict.jsonl is missing", "--skip-01"),
    Case(
        D_DICT,
        "an empty file",
        (),
        "korean_medical_dict.jsonl",
        "MANUAL_DATA.md",
        has(f"{DICTIONARY}/korean_medical_dict.jsonl", ""),
        "sample",
    ),
    Case(
        D_DICT,
        "binary noise",
        (),
        "korean_medical_dict.jsonl",
        "MANUAL_DATA.md",
        has(f"{DICTIONARY}/korean_medical_dict.jsonl", NOISE),
        "sample",
    ),
    Case(
        D_DICT,
        "a file in UTF-16",
        (),
        "bilingual_medical_dict.json",
        "MANUAL_DATA.md",
        recoded(f"{DICTIONARY}/bilingual_medical_dict.json", "utf-16"),
        "sample",
    ),
    Case(
        D_DICT,
        "a cut JSON file",
        (),
        "bilingual_medical_dict.json",
        "MANUAL_DATA.md",
        cut(f"{DICTIONARY}/bilingual_medical_dict.json"),
        "sample",
    ),
    Case(
        D_DICT,
        "a list of numbers",
        (),
        "bilingual_medical_dict.json",
        "MANUAL_DATA.md",
        has(f"{DICTIONARY}/bilingual_medical_dict.json", "[1, 2, 3]"),
        "sample",
    ),
    Case(
        D_DICT,
        "a term that is a number",
        (),
        "line 2",
        "MANUAL_DATA.md",
        row(f"{DICTIONARY}/korean_medical_dict.jsonl", 2, term=5),
        "sample",
    ),
    Case(
        D_DICT,
        "a line nested 100,000 deep",
        (),
        "korean_medical_dict.jsonl",
        "MANUAL_DATA.md",
        line(f"{DICTIONARY}/korean_medical_dict.jsonl", 3, DEEP),
        "sample",
    ),
    Case(
        D_DICT,
        "a folder where a file is expected",
        (),
        "korean_medical_dict.jsonl",
        "MANUAL_DATA.md",
        each(without(f"{DICTIONARY}/korean_medical_dict.jsonl"), folder(f"{DICTIONARY}/korean_medical_dict.jsonl")),
        "sample",
    ),
    Case(
        D_DICT,
        "a link to nothing",
        (),
        "korean_medical_dict.jsonl",
        "MANUAL_DATA.md",
        each(
            without(f"{DICTIONARY}/korean_medical_dict.jsonl"),
            link(f"{DICTIONARY}/korean_medical_dict.jsonl", "/no/such"),
        ),
        "sample",
    ),
    Case(
        D_DICT,
        "a file that may not be read",
        (),
        "korean_medical_dict.jsonl",
        "permission",
        mode(f"{DICTIONARY}/korean_medical_dict.jsonl", 0),
        "sample",
        bound=True,
    ),
    Case(D_PAIRS, "an unknown source", ("--source", "europarl"), "--source europarl: unknown", "known are opus"),
    Case(
        D_PAIRS,
        "other columns",
        (),
        'needs the columns "en" and "ko"',
        "rename them",
        has(f"{PAIRS}/sample_ko_en/train.jsonl", '{"a": "x", "b": "y"}\n'),
        "sample",
    ),
    Case(
        D_PAIRS,
        "a page instead of the archive",
        LARGE,
        "damaged archive",
        "delete it",
        hub=lambda hub: hub.serve(published.OPUS, b"<html>moved</html>"),
    ),
    Case(
        D_PAIRS,
        "sides of different lengths",
        LARGE,
        "they are not aligned",
        "--update",
        hub=lambda hub: hub.serve(published.OPUS, published.pairs_zip(**{"Tatoeba__en-ko__ko": "하나\n".encode()})),
    ),
    Case(D_EXAM, "a split is missing", (), "dev.jsonl", "bring it", without(f"{EXAM}/dev.jsonl"), "sample"),
    Case(
        D_EXAM,
        "a split without questions",
        (),
        "dev.jsonl: no usable questions",
        "bring the split anew",
        has(f"{EXAM}/dev.jsonl", ""),
        "sample",
    ),
    Case(
        D_EXAM,
        "an answer out of range",
        (),
        "dev.jsonl, row 1: ",
        "correct that row",
        row(f"{EXAM}/dev.jsonl", 1, answer=6),
        "sample",
    ),
    Case(
        D_EXAM,
        "a published shard is missing",
        LARGE,
        "doctor dev: 0 rows, expected 164",
        "--update",
        hub=publishes(
            "dataset", "sean0042/KorMedMCQA", {k: v for k, v in published.exam_files().items() if k != DOCTOR}
        ),
    ),
    Case(
        D_EXAM,
        "a published shard without answers",
        LARGE,
        "answer",
        "--update",
        hub=exam(**{DOCTOR: published.parquet([{"question": "x", "A": "1"}])}),
    ),
    Case(D_MORE, "nothing is asked for", LARGE, "say what to get", "--key KEY"),
    Case(D_MORE, "an unknown key", ("--key", "nope"), "--key nope: unknown", "known are"),
    Case(D_MORE, "an unknown kind", ("--kind", "poetry"), "poetry", "instruction"),
    Case(
        D_MODEL, "a word that is no hub id", ("--hub-id", "medgemma"), "medgemma: not a hub id", "google/medgemma-4b-it"
    ),
    Case(
        D_MODEL, "a hub id that leaves the folder", ("--hub-id", "../x"), "../x: not a hub id", "google/medgemma-4b-it"
    ),
    Case(
        D_MODEL,
        "terms that nobody accepted",
        LARGE,
        "google/medgemma-4b-it needs its terms accepted",
        "accept them, then run",
        hub=lambda hub: (
            publishes("model", "google/medgemma-4b-it", published.small_model_files(), gated=True)(hub),
            hub.tokens.update({published.TOKEN: set()}),
        ),
    ),
    Case(
        D_MODEL,
        "a token that the hub does not know",
        LARGE,
        "the hub refuses your token",
        "hf auth login",
        environment={"HF_TOKEN": "hf_anotherLoopbackTokenOfNobody"},
        hub=publishes("model", "google/medgemma-4b-it", published.small_model_files(), gated=True),
    ),
    Case(
        D_MODEL,
        "no token for a gated model",
        LARGE,
        "needs its terms accepted",
        "hf auth login",
        environment={"HF_TOKEN": ""},
        hub=publishes("model", "google/medgemma-4b-it", published.small_model_files(), gated=True),
    ),
    Case(
        D_MODEL,
        "an offline machine",
        LARGE,
        "HF_HUB_OFFLINE",
        "download_model.py",
        environment={"HF_HUB_OFFLINE": "1"},
        hub=lambda hub: None,
    ),
    Case(
        D_MODEL,
        "pickled weights alone",
        LARGE,
        "google/medgemma-4b-it: no safetensors weights in it",
        "see ",
        hub=model(
            model_00001_of_00002_safetensors=None,
            model_00002_of_00002_safetensors=None,
            model_safetensors_index_json=None,
        ),
    ),
    Case(
        D_MODEL,
        "a Llama under a hub id",
        ("--hub-id", "someone/llama"),
        "a model of the kind llama, not Gemma 3",
        "see ",
        hub=publishes(
            "model", "someone/llama", published.small_model_files() | {"config.json": b'{"model_type": "llama"}'}
        ),
    ),
    Case(
        D_MODEL,
        "an adapter alone under a hub id",
        ("--hub-id", "someone/adapter"),
        "an adapter alone is no base",
        "see ",
        hub=publishes("model", "someone/adapter", {"adapter_config.json": b"{}", "tokenizer.json": b"{}"}),
    ),
    Case(
        D_MODEL,
        "a configuration of nonsense",
        ("--hub-id", "someone/odd"),
        "its config.json is not that of a model",
        "see ",
        hub=publishes("model", "someone/odd", published.small_model_files() | {"config.json": b"[" * 100_000}),
    ),
    Case(D_ALL, "the dictionary is missing", LARGE, "korean_medical_dict.jsonl is missing", "--skip-01"),
    Case(D_ALL, "an unknown model", ("--model", "medgemma-2b"), "medgemma-2b: unknown", "known are tiny"),
]

# refine ---------------------------------------------------------------------------------------------------

R_TEXT, R_DICT = "refine/refine_00_plain_text", "refine/refine_01_medical_dict"
R_PAIRS, R_EXAM, R_ALL = "refine/refine_01_english_korean", "refine/refine_02_kor_med_test", "refine/refine_all"
WITH = ("--data-dir", "my data 한글")
CASES += [
    Case(R_TEXT, "no workers", ("--workers", "0"), "0 is not at least 1", "--help"),
    Case(R_TEXT, "an unknown executor", ("--executor", "cloud"), "cloud", "slurm"),
    Case(
        R_TEXT,
        "a cluster without a partition",
        ("--executor", "slurm"),
        "name a partition",
        "--partition",
        start="sample",
    ),
    Case(
        R_TEXT,
        "examples before anything is refined",
        ("--show", "too_short"),
        "nothing is refined here yet",
        "run: python",
        start="sample",
    ),
    Case(R_TEXT, "no raw text", (), "does not exist", "download_00_plain_text", without(TEXT), "sample"),
    Case(
        R_TEXT,
        "an empty folder of sources",
        (),
        "00_korean",
        "download_00_plain_text",
        each(without(TEXT), folder(TEXT)),
        "sample",
    ),
    Case(
        R_TEXT,
        "a file where sources are expected",
        (),
        "00_korean: a file",
        "move it away",
        each(without(TEXT), has(TEXT, "x")),
        "sample",
    ),
    Case(
        R_TEXT,
        "rows beside the sources",
        (),
        "stands beside the folders",
        "move it",
        has(f"{TEXT}/train.jsonl", '{"text": "x"}\n'),
        "sample",
    ),
    Case(
        R_TEXT,
        "a link to nothing",
        (),
        "a link to something that does not exist",
        "remove it",
        link(f"{TEXT}/gone", "/no/such"),
        "sample",
    ),
    Case(
        R_TEXT,
        "a source in CP949",
        (),
        "it reads as CP949",
        "iconv -f cp949",
        recoded(f"{TEXT}/namu_wiki/train.jsonl", "cp949"),
        "sample",
    ),
    Case(
        R_TEXT,
        "a file that ends in the middle of a character",
        (),
        "cut in the middle of a character",
        "bring the file anew",
        cut(f"{TEXT}/namu_wiki/train.jsonl", 0.501),
        "sample",
    ),
    Case(
        R_TEXT,
        "a line nested 100,000 deep",
        (),
        "nested too deeply",
        "take that line out",
        line(f"{TEXT}/namu_wiki/train.jsonl", 2, DEEP),
        "sample",
    ),
    Case(
        R_TEXT,
        "a number of 10,000 digits",
        (),
        "too long a number",
        "take that line out",
        line(f"{TEXT}/namu_wiki/train.jsonl", 2, b'{"text": ' + b"9" * 10_000 + b"}"),
        "sample",
    ),
    Case(
        R_TEXT,
        "a text that is a list",
        (),
        '"text" is a list',
        "take that line out",
        row(f"{TEXT}/namu_wiki/train.jsonl", 2, text=["a"]),
        "sample",
    ),
    Case(
        R_TEXT,
        "a line of 10 MB without an end",
        (),
        "not valid JSON",
        "take that line out",
        line(f"{TEXT}/namu_wiki/train.jsonl", 2, b'{"text": "' + b"x" * 10_000_000),
        "sample",
    ),
    Case(
        R_TEXT,
        "a source of NUL bytes",
        (),
        "not valid JSON",
        "take that line out",
        has(f"{TEXT}/namu_wiki/train.jsonl", b"\0" * 4096),
        "sample",
    ),
    Case(
        R_TEXT,
        "nothing but rubbish",
        (),
        "no train document is left",
        "see the counts",
        each(without(TEXT), has(f"{TEXT}/mine/a.jsonl", '{"text": "!!"}\n' * 9)),
        "sample",
    ),
    Case(R_TEXT, "no held-out questions", (), "02_kor_med_test does not exist", "download_02", without(EXAM), "sample"),
    Case(
        R_TEXT,
        "a source that may not be read",
        (),
        "permission",
        "chmod",
        mode(f"{TEXT}/namu_wiki/train.jsonl", 0),
        "sample",
        bound=True,
    ),
    Case(
        R_DICT,
        "a dictionary file is missing",
        (),
        "lacks bilingual_medical_dict.json",
        "--skip-01",
        without(f"{DICTIONARY}/bilingual_medical_dict.json"),
        "sample",
    ),
    Case(
        R_DICT,
        "NaN as a definition",
        (),
        "bilingual_medical_dict.json",
        "MANUAL_DATA.md",
        has(f"{DICTIONARY}/bilingual_medical_dict.json", '{"Fever": NaN}'),
        "sample",
    ),
    Case(
        R_DICT,
        "no usable entry",
        (),
        "no usable entry",
        "MANUAL_DATA.md",
        each(
            *(
                has(f"{DICTIONARY}/{name}", '{"term": "", "definition": ""}\n')
                for name in ("korean_medical_dict.jsonl", "korean_animal_medical_dict.jsonl")
            ),
            *(has(f"{DICTIONARY}/bilingual_medical_dict{name}.json", "{}") for name in ("", "_categorized", "_ko_en")),
        ),
        "sample",
    ),
    Case(
        R_DICT,
        "the refined folder may not be written",
        (),
        "no permission for",
        "chmod",
        folder(REFINED, 0o555),
        "sample",
        bound=True,
    ),
    Case(R_PAIRS, "no pairs", (), "does not exist", "download_01_english_korean", without(PAIRS), "sample"),
    Case(
        R_PAIRS,
        "a pair without Korean",
        (),
        'row 3: needs the texts "en" and "ko"',
        "mend it",
        row(f"{PAIRS}/sample_ko_en/train.jsonl", 3, ko=None),
        "sample",
    ),
    Case(
        R_PAIRS,
        "a row that is a list",
        (),
        "line 2: expected a JSON object",
        "correct that line",
        line(f"{PAIRS}/sample_ko_en/train.jsonl", 2, b"[1]"),
        "sample",
    ),
    Case(
        R_PAIRS,
        "no usable pair",
        (),
        "no usable pair",
        "bring others",
        has(f"{PAIRS}/sample_ko_en/train.jsonl", '{"en": "x", "ko": "y"}\n'),
        "sample",
    ),
    Case(R_EXAM, "no exam questions", (), "does not exist", "download_02_kor_med_test", without(EXAM), "sample"),
    Case(
        R_EXAM,
        "the test split is missing",
        (),
        "lacks test.jsonl",
        "download_02",
        without(f"{EXAM}/test.jsonl"),
        "sample",
    ),
    Case(
        R_EXAM,
        "an answer out of range",
        (),
        "dev.jsonl, row 2: ",
        "correct that row",
        row(f"{EXAM}/dev.jsonl", 2, answer=9),
        "sample",
    ),
    Case(
        R_EXAM,
        "an answer of another type",
        (),
        "dev.jsonl, row 2: ",
        "correct that row",
        row(f"{EXAM}/dev.jsonl", 2, answer=[1]),
        "sample",
    ),
    Case(
        R_EXAM,
        "an option is missing",
        (),
        "dev.jsonl, row 2: ",
        "correct that row",
        row(f"{EXAM}/dev.jsonl", 2, C=None),
        "sample",
    ),
    Case(
        R_EXAM,
        "an infinite year",
        (),
        "year is inf, not a whole number",
        "correct that row",
        row(f"{EXAM}/dev.jsonl", 2, year=float("inf")),
        "sample",
    ),
    Case(
        R_EXAM,
        "a key twice",
        (),
        "(exam, year, period, number) twice",
        "number them anew",
        each(
            *(
                row(f"{EXAM}/dev.jsonl", n, year=2021, period=1, q_number=1, subject="doctor", question=f"혈압 {n}?")
                for n in (1, 2)
            )
        ),
        "sample",
    ),
    Case(
        R_EXAM,
        "every training question stands in dev",
        (),
        "no train question is left",
        "bring others",
        lambda root: (root / EXAM / "train.jsonl").write_bytes((root / EXAM / "dev.jsonl").read_bytes()),
        "sample",
    ),
    Case(
        R_EXAM,
        "training rows of another kind",
        (),
        "train.jsonl, row 1: missing column",
        "correct that row",
        has(f"{EXAM}/train.jsonl", '{"question": "x"}\n'),
        "sample",
    ),
    Case(
        R_EXAM,
        "a hostile record",
        (),
        "not a stage record",
        "move it away",
        has(f"{REFINED}/.stages/refine_02_kor_med_test.json", '{"identity": 1, "outputs": 2, "home": 3}'),
        "sample",
    ),
    Case(
        R_EXAM,
        "the record of another program",
        (),
        "it is of refine_00_plain_text, not of refine_02_kor_med_test",
        "--force",
        lambda root: (root / REFINED / ".stages/refine_02_kor_med_test.json").write_bytes((root / RECORD).read_bytes()),
        "refined",
    ),
    Case(R_ALL, "no raw data", (), "does not exist", "download"),
    Case(
        R_ALL,
        "a data folder that is a link to nothing",
        ("--data-dir", "gone"),
        "gone",
        "01_raw",
        link("gone", "/no/such"),
    ),
    Case(
        R_ALL,
        "a data folder without 01_raw, its name with a space and Hangul",
        WITH,
        "my data",
        "--name",
        folder("my data 한글"),
    ),
    Case(
        R_ALL,
        "the same with a name",
        (*WITH, "--name", "한글"),
        "01_raw",
        "--data-dir 'my data 한글'",
        folder("my data 한글"),
    ),
    Case(
        R_ALL,
        "a data folder that may not be entered",
        ("--data-dir", "closed"),
        "permission",
        "chmod",
        folder("closed", 0),
        bound=True,
    ),
    Case(
        R_ALL, "a data folder that links to itself", ("--data-dir", "round"), "round", "01_raw", link("round", "round")
    ),
]

# model ----------------------------------------------------------------------------------------------------

BUILD, TOKENS, LORA = "model/build_tiny_model", "model/prepare_tokenizer", "model/add_lora"
CARD, P_ALL = "model/check_gpu_memory", "model/prepare_all"
NEW = ("--new-tokens", "32")
CASES += [
    Case(BUILD, "a model that is not built", LARGE, "medgemma-4b is not built here", "download_model.py"),
    Case(BUILD, "a seed in words", ("--seed", "lucky"), "lucky", "--help"),
    Case(BUILD, "a seed beyond 64 bits", ("--seed", str(10**30)), "seed", "--help"),
    Case(BUILD, "the model folder is a file", (), "model", "move it away", has("model", "x")),
    Case(TOKENS, "a negative number of tokens", ("--new-tokens", "-5"), "-5", "auto", start="refined"),
    Case(
        TOKENS,
        "words without --compare",
        ("--words", "a.txt"),
        "--words goes with --compare",
        "add --compare",
        start="refined",
    ),
    Case(TOKENS, "no model yet", (), "model/raw/tiny does not exist", "download_model.py", start="refined"),
    Case(TOKENS, "no refined text yet", NEW, "does not exist", "refine", without(REFINED), "chain"),
    Case(
        TOKENS,
        "a list of words that is not there",
        ("--compare", "--words", "a.txt"),
        "a.txt: no such file",
        "give one with a word a line",
        start="chain",
    ),
    Case(
        TOKENS,
        "a tokenizer of nonsense",
        ("--force",),
        "tokenizer.json, line 1: not valid JSON",
        "bring it anew",
        vouched(has("model/raw/tiny/tokenizer.json", "{")),
        "chain",
    ),
    Case(
        TOKENS,
        "other settings than those of the tokenizer that is there",
        ("--new-tokens", "16"),
        "something differs",
        "--force",
        start="chain",
    ),
    Case(LORA, "an unknown precision", ("--precision", "int3"), "int3", "8bit"),
    Case(LORA, "a shift that is no number", ("--shift", "nan"), "nan is not a finite number", "--help"),
    Case(
        LORA,
        "a shift for the second adapter",
        ("--second", "--shift", "1"),
        "--shift is for new rows",
        "leave it out",
        start="chain",
    ),
    Case(
        LORA,
        "no tokenizer yet",
        (),
        "does not exist",
        "prepare_tokenizer",
        without("model/tokenizer", "model/raw_lora_added"),
        "chain",
    ),
    Case(LORA, "nothing trained yet", ("--second",), "does not exist or is incomplete", "run: python", start="refined"),
    Case(
        LORA,
        "weights without a byte",
        (),
        "model.safetensors",
        "--force",
        each(without("model/raw_lora_added"), has("model/raw/tiny/model.safetensors", "")),
        "chain",
    ),
    Case(
        LORA,
        "weights that were cut",
        (),
        "model.safetensors",
        "--force",
        each(without("model/raw_lora_added"), cut("model/raw/tiny/model.safetensors")),
        "chain",
    ),
    Case(
        LORA,
        "a tokenizer that is none",
        (),
        "its tokenizer cannot be read",
        "bring its files anew",
        vouched(each(without("model/raw_lora_added"), has("model/tokenizer/tiny/tokenizer.json", "{}"))),
        "chain",
    ),
    Case(
        LORA,
        "a tokenizer that the library cannot parse",
        (),
        "its tokenizer cannot be read",
        "bring its files anew",
        vouched(
            each(without("model/raw_lora_added"), values("model/tokenizer/tiny/tokenizer.json", model={"type": "Odd"}))
        ),
        "chain",
    ),
    Case(
        LORA,
        "a tokenizer of another model",
        (),
        "does not belong to",
        "--force",
        vouched(
            each(
                without("model/raw_lora_added"),
                values("model/tokenizer/tiny/tokenizer_info.json", hashes={"base": "0" * 64}),
            )
        ),
        "chain",
    ),
    Case(
        LORA, "a device that is not there", ("--device", "cuda:99", "--force"), "this machine has", "cpu", start="chain"
    ),
    Case(LORA, "a device that does not exist", ("--device", "banana"), "banana", "use cuda:0 or cpu"),
    Case(CARD, "a size that is no number", ("--available", "nan"), "nan", "--help"),
    Case(CARD, "a card that is too small", (*LARGE, "--available", "2"), "does not fit", "would fit: a card of"),
    Case(CARD, "no cards", ("--shards", "0"), "0 is not at least 1", "--help"),
    Case(CARD, "a stage that does not exist", ("--stage", "03"), "03", "all"),
    Case(P_ALL, "new tokens in words", ("--new-tokens", "lots"), "'lots' is neither a number", "--help"),
    Case(
        P_ALL,
        "a record of the model that is a number",
        (),
        "model/raw/tiny/stage.json: not a stage record",
        "move it away",
        has("model/raw/tiny/stage.json", "3"),
        "chain",
    ),
]

# train ----------------------------------------------------------------------------------------------------

T_TEXT, T_DICT = "train/train_00_plain_text", "train/train_01_medical_dict"
T_EXAM, LOOP, LOOK = "train/train_02_kor_med_test", "train/train_01_02_loop", "train/inspect_batches"
RAW_MODEL = "model/raw/tiny"
OTHER = ("--base-model", "other", "--output", "out", "--precision", "fp32", "--max-samples", "8", "--max-steps", "1")


def base(*changes: Change) -> Change:
    """A copy of the raw model in `other`, with these changes."""
    return each(copied(RAW_MODEL, "other"), without("other/stage.json"), *changes)


def larger(name: str) -> Change:
    """A tokenizer with a hundred more pieces than its model has rows for."""

    def change(root: Path) -> None:
        spec = json.loads((root / name).read_text(encoding="utf-8"))
        vocabulary = spec["model"]["vocab"]
        spec["model"]["vocab"] = vocabulary | {f"piece{i}": len(vocabulary) + i for i in range(100)}
        (root / name).write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")

    return change


HOSTILE = "import os\nopen(os.environ['MEDGEMMA_KOREAN_ROOT'] + '/executed', 'w')\n"
CASES += [
    Case(T_TEXT, "a rate that is no number", ("--learning-rate", "nan"), "nan is not a number above 0", "--help"),
    Case(T_TEXT, "an infinite rate", ("--learning-rate", "inf"), "inf is not a number above 0", "--help"),
    Case(T_TEXT, "a share above one", ("--replay", "1.5"), "1.5 is not a share", "--help"),
    Case(T_TEXT, "no rows in a batch", ("--batch-size", "0"), "0 is not at least 1", "--help"),
    Case(
        T_TEXT,
        "one process that shares its base",
        ("--shard", "--force", "--precision", "fp32"),
        "--shard: one process",
        "num_processes",
        start="chain",
    ),
    Case(
        T_TEXT,
        "more characters than there are",
        ("--max-characters", "999999999", "--force"),
        "there are",
        "ask for fewer",
        start="chain",
    ),
    Case(T_TEXT, "no base yet", (), "does not exist", "add_lora", start="refined"),
    Case(
        T_TEXT,
        "an output that holds the base",
        ("--base-model", "other", "--output", "other"),
        "another --output",
        "--output",
        base(),
        "chain",
    ),
    Case(
        T_TEXT,
        "another precision than that of the scores",
        ("--precision", "bf16", "--force"),
        "was scored in fp32",
        "run: python",
        start="chain",
    ),
    Case(
        T_TEXT,
        "a file as base",
        ("--base-model", "a.gguf"),
        "that is a file",
        "it takes a folder",
        has("a.gguf", "x"),
        "chain",
    ),
    Case(
        T_TEXT,
        "an empty folder as base",
        ("--base-model", "a"),
        "no model there",
        "it takes a folder",
        folder("a"),
        "chain",
    ),
    Case(
        T_TEXT,
        "a base without weights",
        OTHER,
        "no safetensors weights",
        "Give a folder with",
        base(without("other/model.safetensors")),
        "chain",
    ),
    Case(
        T_TEXT,
        "pickled weights alone",
        OTHER,
        "pytorch_model.bin is pickled, and never loaded",
        "Give a folder with",
        base(moved("other/model.safetensors", "other/pytorch_model.bin")),
        "chain",
    ),
    Case(
        T_TEXT,
        "weights without a byte",
        OTHER,
        "no whole safetensors file",
        "Give a folder with",
        base(has("other/model.safetensors", "")),
        "chain",
    ),
    Case(
        T_TEXT,
        "weights that were cut",
        OTHER,
        "no whole safetensors file",
        "Give a folder with",
        base(cut("other/model.safetensors")),
        "chain",
    ),
    Case(
        T_TEXT,
        "a header that claims 10^18 bytes",
        OTHER,
        "no whole safetensors file",
        "Give a folder with",
        base(has("other/model.safetensors", header(10**18))),
        "chain",
    ),
    Case(
        T_TEXT,
        "a header of nonsense",
        OTHER,
        "no whole safetensors file",
        "Give a folder with",
        base(has("other/model.safetensors", struct.pack("<Q", 100_000) + b"[" * 100_000)),
        "chain",
    ),
    Case(
        T_TEXT,
        "an index of weights that is a list",
        OTHER,
        "not an index of weights",
        "bring it anew",
        base(has("other/model.safetensors.index.json", "[]")),
        "chain",
    ),
    Case(
        T_TEXT,
        "an index that names files outside",
        OTHER,
        "other/model.safetensors.index.json: '../../x.safetensors' is no name of a file below its folder",
        "nothing of it is used",
        base(has("other/model.safetensors.index.json", '{"weight_map": {"a": "../../x.safetensors"}}')),
        "chain",
    ),
    Case(
        T_TEXT,
        "an index that names numbers",
        OTHER,
        "not an index of weights",
        "bring it anew",
        base(has("other/model.safetensors.index.json", '{"weight_map": {"a": 5, "b": [1]}}')),
        "chain",
    ),
    Case(
        T_TEXT,
        "a Llama as base",
        OTHER,
        "a model of the kind llama, not Gemma 3",
        "Give a folder with",
        base(values("other/config.json", model_type="llama")),
        "chain",
    ),
    Case(
        T_TEXT,
        "a configuration that is a list",
        OTHER,
        "its config.json is not that of a model",
        "Give a folder with",
        base(has("other/config.json", "[1]")),
        "chain",
    ),
    Case(
        T_TEXT,
        "a configuration of negative layers",
        OTHER,
        "config.json cannot be read",
        "bring the model's own",
        base(values("other/config.json", num_hidden_layers=-1)),
        "chain",
    ),
    Case(
        T_TEXT,
        "a configuration of words",
        OTHER,
        "config.json cannot be read",
        "bring the model's own",
        base(values("other/config.json", hidden_size="wide")),
        "chain",
    ),
    Case(
        T_TEXT,
        "a configuration of another width",
        OTHER,
        "do not fit config.json",
        "bring both anew",
        base(values("other/config.json", hidden_size=48)),
        "chain",
    ),
    Case(
        T_TEXT,
        "a configuration nested 100,000 deep",
        OTHER,
        "config.json: not valid JSON (nested too deeply",
        "bring it anew",
        base(has("other/config.json", DEEP)),
        "chain",
    ),
    Case(
        T_TEXT,
        "code of its own (auto_map)",
        OTHER,
        "a model of the kind evil, not Gemma 3",
        "Give a folder with",
        base(
            values(
                "other/config.json",
                auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},
                model_type="evil",
            ),
            has("other/evil.py", HOSTILE),
        ),
        "chain",
    ),
    Case(
        T_TEXT,
        "a quantised base",
        OTHER,
        "quantised already",
        "unquantised",
        base(values("other/config.json", quantization_config={"load_in_4bit": True})),
        "chain",
    ),
    Case(
        T_TEXT,
        "an adapter as base",
        ("--base-model", f"{TRAINED}/checkpoint-2"),
        "an adapter alone",
        "give its base",
        start="chain",
    ),
    Case(
        T_TEXT,
        "a base whose tokenizer is another's",
        OTHER,
        "token ids, but",
        "bring its own tokenizer",
        base(larger("other/tokenizer.json")),
        "chain",
    ),
    Case(
        T_TEXT,
        "a base without a chat template",
        OTHER,
        "lacks",
        "instruction-tuned",
        base(without("other/chat_template.jinja")),
        "chain",
    ),
    Case(
        T_TEXT,
        "a base whose weights were edited",
        ("--force",),
        "is not what add_lora made",
        "--force",
        has(f"{BASE}/model.safetensors", header(10)),
        "chain",
    ),
    Case(
        T_TEXT,
        "refined text without a row",
        ("--force",),
        "00_plain_text/train.jsonl",
        "--force",
        has(f"{REFINED}/00_plain_text/train.jsonl", ""),
        "chain",
    ),
    Case(
        T_TEXT,
        "a failed gate before it",
        ("--force",),
        "the gate of add_lora failed",
        "--allow-regression",
        values("model/raw_lora_added/tiny/stage.json", gate={"passed": False, "reasons": ["English +9 %"]}),
        "chain",
        3,
    ),
    Case(
        T_TEXT,
        "a record without its keys",
        (),
        "not a stage record",
        "move it away",
        has("model/raw_lora_added/tiny/stage.json", "{}"),
        "chain",
    ),
    Case(
        T_TEXT,
        "a record that is a number",
        (),
        "not a stage record",
        "move it away",
        has(f"{TRAINED}/stage.json", "3"),
        "chain",
    ),
    Case(
        T_TEXT,
        "a tracker that is not installed",
        ("--report-to", "wandb"),
        "not installed",
        "pip install wandb",
        start="refined",
    ),
    Case(
        T_DICT,
        "no refined dictionary",
        (),
        "does not exist",
        "refine",
        without(f"{REFINED}/01_medical_dict.json", f"{REFINED}/.stages/refine_01_medical_dict.json"),
        "chain",
    ),
    Case(
        T_DICT,
        "the base was made anew",
        (),
        "is another one now",
        "--force",
        lambda root: values("model/raw_lora_added/tiny/stage.json", fingerprint="0" * 64)(root),
        "chain",
    ),
    Case(
        T_DICT,
        "an adapter without its base",
        (),
        "is gone or incomplete",
        "train again with --force",
        without("model/raw_lora_added"),
        "chain",
    ),
    Case(
        T_DICT,
        "a record whose base is elsewhere",
        (),
        "gone or incomplete",
        "train again with --force",
        values(f"{TRAINED}/stage.json", base_folder="../../elsewhere"),
        "chain",
    ),
    Case(
        T_DICT,
        "rows that are too long",
        ("--max-length", "4", "--precision", "fp32", "--allow-regression"),
        "longer than --max-length",
        "raise it",
        start="chain",
    ),
    Case(
        T_EXAM,
        "no second adapter yet",
        (),
        "does not exist",
        "add_lora",
        without("model/01_another_lora_added"),
        "chain",
    ),
    Case(
        T_EXAM,
        "the adapter's weights are cut",
        ("--precision", "fp32"),
        "adapter_model.safetensors",
        "--force",
        cut("model/01_another_lora_added/tiny/adapter/adapter_model.safetensors"),
        "chain",
    ),
    Case(
        LOOP,
        "a target above 100 %",
        ("--target-accuracy", "120"),
        "--target-accuracy 120",
        "at most 100",
        start="chain",
    ),
    Case(LOOP, "a target that is no number", ("--target-accuracy", "nan"), "nan", "--help", start="chain"),
    Case(LOOP, "no loops", ("--max-loops", "0"), "0 is not at least 1", "--help"),
    Case(
        LOOP,
        "fewer rows than a batch",
        ("--precision", "fp32", "--max-samples", "1"),
        "less than one batch",
        "use more",
        start="chain",
    ),
    Case(LOOK, "a stage that does not exist", ("--stage", "09"), "09", "loop"),
    Case(LOOK, "no rows to show", ("--stage", "00", "--rows", "-2"), "-2", "--help"),
    Case(
        LOOK,
        "nothing to start from",
        ("--stage", "02"),
        "model/tokenizer/tiny does not exist",
        "run: python",
        start="refined",
    ),
]

# evaluate -------------------------------------------------------------------------------------------------

V_TEXT, V_EXAM, REPORT = "evaluate/validation_plain_text", "evaluate/validation_kor_med_test", "evaluate/report"
ONE_MODEL = ("--models", "00", "--precision", "fp32")
PREDICTED = {"id": "x", "gold": "A", "predicted": "A"}
CASES += [
    Case(V_TEXT, "a model that does not exist", ("--models", "07"), "07", "give base extended", start="chain"),
    Case(V_TEXT, "nothing to score", (), "run tiny has no models yet", "run: ./run_full", start="refined"),
    Case(V_TEXT, "an unknown precision", ("--precision", "fp64"), "fp64", "fp32"),
    Case(
        V_TEXT,
        "held-out text without a row",
        ONE_MODEL,
        "validation.jsonl",
        "refine_all.py",
        has(f"{REFINED}/00_plain_text/validation.jsonl", ""),
        "chain",
    ),
    Case(
        V_EXAM,
        "reasoning in letter mode",
        ("--reasoning",),
        "--reasoning goes with --mode generate",
        "--mode generate",
        start="chain",
    ),
    Case(V_EXAM, "six rotations", ("--rotations", "6"), "6", "--help"),
    Case(
        V_EXAM,
        "failed questions of the test split",
        ("--failed-questions", "--final"),
        "leave out --final",
        "--final",
        start="chain",
    ),
    Case(
        V_EXAM,
        "an exam that does not exist",
        (*ONE_MODEL, "--exams", "vet"),
        "--exams vet",
        "the split has",
        start="chain",
    ),
    Case(
        V_EXAM,
        "answers that are not there",
        (*ONE_MODEL, "--against", "a.jsonl"),
        "a.jsonl: no such file",
        "give a .jsonl",
        start="chain",
    ),
    Case(
        V_EXAM,
        "answers to other items",
        (*ONE_MODEL, "--against", "a.jsonl"),
        "holds other items",
        "same split",
        has("a.jsonl", json.dumps(PREDICTED) + "\n"),
        "chain",
    ),
    Case(
        V_EXAM,
        "answers that are none",
        (*ONE_MODEL, "--against", "a.json"),
        "no answers there",
        "give a .jsonl",
        has("a.json", '{"predictions": [1, 2]}'),
        "chain",
    ),
    Case(
        V_EXAM,
        "answers with ids of other types",
        (*ONE_MODEL, "--against", "a.jsonl"),
        "holds other items",
        "same split",
        has("a.jsonl", '{"id": [1], "gold": {}, "predicted": null}\n'),
        "chain",
    ),
    Case(
        V_EXAM,
        "a split is missing",
        ONE_MODEL,
        "dev.jsonl",
        "refine",
        without(f"{REFINED}/02_kor_med_test/dev.jsonl"),
        "chain",
    ),
    Case(V_EXAM, "a harness that is not installed", ("--mode", "harness"), "harness", "pip install", start="chain"),
    Case(V_EXAM, "a folder that is no model", ("--models", "nothing"), "nothing", "give base extended", start="chain"),
    Case(
        V_EXAM,
        "two models with one name",
        ("--models", "a/x/base", "b/x/base"),
        "--models b/x/base: both it and a/x/base would be called x--base",
        "rename a folder",
        lambda root: [copied("model/raw/tiny", f"{place}/x/base")(root) for place in "ab"],
        "chain",
    ),
    Case(
        V_EXAM,
        "failed questions of two trainings",
        ("--failed-questions", "--models", "00", "02"),
        "over the checkpoints of one training",
        "give one of --models 00 02",
        start="chain",
    ),
    Case(REPORT, "nothing was scored yet", (), "nothing was scored yet", "run_full_pipeline.sh"),
    Case(
        REPORT,
        "scores that are a list",
        (),
        "evaluation.json",
        "move it away",
        has(f"{TRAINED}/evaluation.json", "[]"),
        "chain",
    ),
    Case(
        REPORT,
        "scores with missing keys",
        (),
        "evaluation.json",
        "move it away",
        has(f"{TRAINED}/evaluation.json", "{}"),
        "chain",
    ),
    Case(REPORT, "two ways to compare", ("--beside", "a", "--compare", "a", "b"), "not allowed with", "--help"),
    Case(
        REPORT, "a run that does not exist beside", ("--beside", "nobody"), "nobody", "name another run", start="chain"
    ),
    Case(
        REPORT,
        "a comparison with a run that does not exist",
        ("--compare", "tiny", "nobody"),
        "nobody",
        "runs that have: tiny",
        start="chain",
    ),
    Case(
        REPORT,
        "a comparison that leaves the folder",
        ("--compare", "tiny", "../../x"),
        "--compare '../../x'",
        "use letters, digits",
        start="chain",
    ),
]

CASES += [
    Case(
        R_TEXT,
        "a source without a byte",
        (),
        "an empty file (0 bytes)",
        "remove it",
        has(f"{TEXT}/namu_wiki/train.jsonl", ""),
        "sample",
    ),
    Case(
        R_TEXT,
        "a packed source without a document",
        (),
        "no documents",
        "remove it",
        has(f"{TEXT}/c4_korean/a.json.gz", gzip.compress(b"")),
        "sample",
    ),
    Case(
        R_TEXT,
        "a Parquet file of other columns",
        (),
        'no "text" column; found body',
        "rename the column",
        has(f"{TEXT}/c4_korean/a.parquet", published.parquet([{"body": "x"}])),
        "sample",
    ),
]


# hostile JSON and text, over all programs -----------------------------------------------------------------

SURROGATE = "\\ud83d 혈압이 높은 환자는 소금을 적게 먹고 운동을 한다. 약은 매일 같은 시간에 먹는다."
CASES += [
    Case(
        R_TEXT,
        "a file name that is no UTF-8",
        (),
        "the name is not UTF-8",
        "convmv -f cp949",
        lambda root: (root / TEXT / "namu_wiki" / b"\xc7\xd1.jsonl".decode("utf-8", "surrogateescape")).write_text(
            '{"text": "x"}'
        ),
        "sample",
    ),
    Case(
        D_DICT,
        "a record of nonsense",
        (),
        "download_01_medical_dict.json: not a stage record",
        "move it away",
        has(f"{RAW}/.stages/download_01_medical_dict.json", "[[["),
        "sample",
    ),
    Case(
        D_TEXT,
        "a hostile pin",
        ONE,
        "expected a JSON object, found list",
        "move it away",
        has("data/01_raw/.stages/origins/namu_wiki.json", "[1]"),
        hub=namu(),
    ),
    Case(
        D_TEXT,
        "a pin without its keys",
        ONE,
        "lacks revision, files",
        "move it away",
        has("data/01_raw/.stages/origins/namu_wiki.json", "{}"),
        hub=namu(),
    ),
    Case(
        TOKENS,
        "a tokenizer without merges",
        ("--force",),
        "holds no BPE merges",
        "bring that of a Gemma 3",
        vouched(values(f"{RAW_MODEL}/tokenizer.json", model={"type": "WordLevel", "vocab": {}})),
        "chain",
    ),
    Case(
        LORA,
        "the notes of the tokenizer are a list",
        (),
        "tokenizer_info.json: expected a JSON object",
        "prepare_tokenizer.py",
        vouched(each(without("model/raw_lora_added"), has("model/tokenizer/tiny/tokenizer_info.json", "[]"))),
        "chain",
    ),
    Case(
        LORA,
        "the notes of the tokenizer lack a key",
        (),
        "tokenizer_info.json: lacks hashes",
        "prepare_tokenizer.py",
        vouched(each(without("model/raw_lora_added"), has("model/tokenizer/tiny/tokenizer_info.json", "{}"))),
        "chain",
    ),
    Case(
        T_TEXT,
        "the choice of precision is a list",
        ("--force",),
        "not a choice of precision",
        "make the base again with --force",
        has(f"{BASE}/precision.json", "[]"),
        "chain",
    ),
    Case(
        T_TEXT,
        "a choice of precision with a number of 5,000 digits",
        ("--force",),
        "precision.json: not valid JSON (nested too deeply or too long a number)",
        "bring it anew",
        has(f"{BASE}/precision.json", '{"precision": ' + "9" * 5000 + "}"),
        "chain",
    ),
    Case(
        T_TEXT,
        "its folder is a link to a disk that is not there",
        (),
        "00_trained/tiny: a link to /no/such/disk, which is not there",
        "mount that disk, or remove the link",
        each(without("model/00_trained"), link("model/00_trained/tiny", "/no/such/disk")),
        "chain",
    ),
    Case(
        T_DICT,
        "the model before it is a link to a disk that is not there",
        (),
        "00_trained/tiny: a link to /no/such/disk, which is not there",
        "mount that disk, or remove the link",
        each(without("model/00_trained"), link("model/00_trained/tiny", "/no/such/disk")),
        "chain",
    ),
    Case(
        T_TEXT,
        "the notes of the base are a list",
        ("--force",),
        "base_info.json: expected a JSON object",
        "bring it anew",
        vouched(has(f"{BASE}/base_info.json", "[]")),
        "chain",
    ),
    Case(
        T_TEXT,
        "a record of outputs outside",
        ("--force",),
        "not a stage record",
        "move it away",
        values(
            "model/raw_lora_added/tiny/stage.json",
            outputs={"../../../../../../etc/passwd": {"size": 1, "mtime_ns": 1, "sha256": "0"}},
            fingerprint=7,
        ),
        "chain",
    ),
    Case(
        T_DICT,
        "the scores of the base are a list",
        ("--precision", "fp32"),
        "base.json: expected a JSON object",
        "again with --force",
        vouched(has("model/report/tiny/scores/base.json", "[]")),
        "chain",
    ),
    Case(
        T_DICT,
        "the scores of the base are missing",
        ("--precision", "fp32"),
        "base.json is missing",
        "add_lora.py",
        without("model/report/tiny/scores/base.json"),
        "chain",
    ),
    Case(
        T_DICT,
        "an adapter configuration that is a list",
        ("--precision", "fp32", "--max-steps", "1"),
        "final/adapter_config.json has 2 bytes",
        "--force",
        has(f"{TRAINED}/final/adapter_config.json", "[]"),
        "chain",
    ),
    Case(
        T_DICT,
        "a refined dictionary of another shape",
        ("--precision", "fp32"),
        "01_medical_dict.json has 8 bytes",
        "--force",
        has(f"{REFINED}/01_medical_dict.json", '{"a": 1}'),
        "chain",
    ),
    Case(
        V_EXAM,
        "an adapter of another rank",
        ONE_MODEL,
        "does not fit its base",
        "train again",
        values(f"{TRAINED}/final/adapter_config.json", r=64),
        "chain",
    ),
    Case(
        V_EXAM,
        "an adapter configuration that is a list",
        ONE_MODEL,
        "adapter_config.json: expected a JSON object",
        "bring the adapter anew",
        has(f"{TRAINED}/final/adapter_config.json", "[]"),
        "chain",
    ),
    Case(
        V_EXAM,
        "an adapter without weights",
        ONE_MODEL,
        "no adapter there",
        "train again",
        without(f"{TRAINED}/final/adapter_model.safetensors"),
        "chain",
    ),
    Case(
        V_EXAM,
        "an adapter that names code of its own",
        ONE_MODEL,
        "does not fit its base",
        "train again",
        values(
            f"{TRAINED}/final/adapter_config.json",
            auto_mapping={"base_model_class": "M", "parent_library": "evil"},
            peft_type="EVIL",
        ),
        "chain",
    ),
    Case(
        V_EXAM,
        "the count of looks is a number",
        (*ONE_MODEL, "--final", "--limit", "2"),
        "test_looks.json: not as it was written",
        "move it away",
        has("model/report/tiny/test_looks.json", "3"),
        "chain",
    ),
    Case(
        LORA,
        "the second adapter on a damaged first",
        ("--second", "--precision", "fp32", "--force"),
        "adapter_model.safetensors",
        "--force",
        each(without("model/01_another_lora_added"), cut(f"{TRAINED}/final/adapter_model.safetensors")),
        "chain",
    ),
    Case(
        REPORT,
        "scores that are no number",
        (),
        "not an evaluation",
        "move it away",
        values(f"{TRAINED}/evaluation.json", bits_per_character={"korean": "many"}, mcq={"n": "x"}),
        "chain",
    ),
    Case(
        REPORT,
        "notes of a training that are a list",
        (),
        "training_info.json: expected a JSON object",
        "move it away",
        has(f"{TRAINED}/training_info.json", "[]"),
        "chain",
    ),
    Case(
        PLAN,
        "a raw model of nonsense",
        ("--model", "medgemma-4b"),
        "config.json: expected a JSON object",
        "bring the model's own",
        has("model/raw/medgemma-4b/config.json", "[1]"),
    ),
]

# code of its own, and a hub that sends something else than it lists ----------------------------------------

SHARD = "namuwiki_20210301.parquet"
CASES += [
    Case(
        T_TEXT,
        "a Gemma 3 that names code of its own and has no layers",
        OTHER,
        "config.json cannot be read",
        "bring the model's own",
        base(
            values("other/config.json", auto_map={"AutoConfig": "evil.C"}, num_hidden_layers="x"),
            has("other/evil.py", HOSTILE),
        ),
        "chain",
    ),
    Case(
        D_TEXT,
        "a file that comes with other bytes, every time",
        ONE,
        "came with other content than announced",
        "--update",
        hub=namu(None, "altered", SHARD, None, where="cdn"),
    ),
    Case(
        D_TEXT,
        "a file that comes cut, every time",
        ONE,
        "came with other content than announced",
        "--update",
        hub=namu(None, "short", SHARD, None, where="cdn"),
    ),
    Case(
        D_TEXT,
        "a file that is listed and not there",
        ONE,
        "is listed but not found (404)",
        "--update",
        hub=namu(None, "status", SHARD, None, code=404, error_code="EntryNotFound", where="resolve"),
    ),
    Case(
        D_TEXT,
        "a hub that forbids",
        ONE,
        "heegyu/namuwiki",
        "download_00_plain_text.py",
        hub=namu(None, "status", "api", None, code=403),
    ),
]

# The cases of a program stand together, in the order in which the programs come above.
_ORDER = list(dict.fromkeys(case.program for case in CASES))
CASES.sort(key=lambda case: _ORDER.index(case.program))
