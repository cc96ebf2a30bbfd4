"""The catalogue: every data set and model that the pipeline knows, with its licence, its files and what it is used for.

A row says what is known and how well: `columns_seen`, `rows_seen` and `seen` tell what a card, a file list or working
public code showed, and what is still to be confirmed at the first download.

    print(sources.listing())                      # what `download_all.py --list` prints
    sources.matches(BY_KEY["namu_wiki"], name)    # is this file of the repository one that is wanted
"""

from __future__ import annotations

import re
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from urllib.parse import urlsplit

from medgemma_korean import cli, profiles

KINDS = (
    "plain text",
    "dictionary",
    "MCQ",
    "translation",
    "instruction",
    "reasoning",
    "evaluation only",
    "model",
)
STAGES = ("00", "01", "02", "all", "later")
PLACES = ("hub", "url", "manual")
QUALITIES = ("original Korean", "original English", "translation", "synthetic", "curated")

HAI_DEF = "Health AI Developer Foundations terms"


@dataclass(frozen=True)
class Source:
    """One row of the catalogue."""

    key: str  # also the name of its folder, so that a model card finds the licence of a folder
    id: str  # repository on the hub, or an address, or "manual"
    kind: str  # one of KINDS
    stage: str  # the stage that uses it, one of STAGES
    licence: str
    place: str = "hub"  # hub, url (one archive) or manual (a person brings it)
    alternatives: tuple[str, ...] = ()  # further addresses of a url source, tried in order on 404
    config: str = ""  # of the data set, where it has several
    # Names inside the repository, the archive (url) or the folder (manual). `*` stands for anything but "/", in the
    # last part of a name only. See `matches` for what it never stands for.
    files: tuple[str, ...] = ()
    seen: str = ""  # where these names were seen: a commit or a page. Empty: they are guesses
    columns: tuple[str, ...] = ()  # required; "a|b" is one column under either name
    columns_seen: bool = True  # False: second-hand, so a missing column is a warning and not an error
    rows: tuple[tuple[str, int], ...] = ()  # of a split, or of the files that have this part in their name
    rows_seen: bool = True  # False: rounded or second-hand
    gated: bool = False  # terms must be accepted on its page first
    optional: bool = False  # may be left out when it cannot be had
    quality: str = "original Korean"  # one of QUALITIES
    folder: str = ""  # below 01_raw; empty for models and for what is never fetched
    revision: str | None = None  # a commit; None is the newest, which the download records
    gigabytes: float | None = None  # to download
    tokens: str = ""  # of Korean plain text, estimated, in billions: "5-6B"
    default: bool = False  # fetched by download_all without being asked (a model: with its --model)
    note: str = ""  # a trap, or what it is good for

    def __post_init__(self) -> None:
        for value, known in (
            (self.kind, KINDS),
            (self.stage, STAGES),
            (self.place, PLACES),
            (self.quality, QUALITIES),
        ):
            if value not in known:
                raise ValueError(f"{self.key}: {value!r} is none of {', '.join(known)}")
        if not (self.key and self.id and self.licence):
            raise ValueError(f"{self.key or self.id}: a key, an id and a licence are needed")
        if any("*" in pattern.rpartition("/")[0] for pattern in self.files):
            raise ValueError(f"{self.key}: `*` stands in the last part of a name only, so that few folders are listed")
        if (self.place == "url") != self.id.startswith("https://") and self.place != "manual":
            raise ValueError(f"{self.key}: a url source, and no other, has an address as its id")
        if self.kind == "evaluation only" and (self.default or self.stage != "later"):
            raise ValueError(f"{self.key}: no stage may use what serves evaluation only")
        if self.default and self.place == "manual":
            raise ValueError(f"{self.key}: what a person brings cannot be fetched by default")

    @property
    def size(self) -> str:
        """`3.03 GB, 867,024 rows`, as far as it is known."""
        gigabytes = "" if self.gigabytes is None else f"{self.gigabytes:g} GB"
        return ", ".join(filter(None, [gigabytes, _rows(self)]))


# Where the file names of a repository were never seen: row files at the root or in data/, where uploads put them.
SOMEWHERE = tuple(f"{folder}*{suffix}" for folder in ("", "data/") for suffix in (".parquet", ".jsonl", ".json"))
TEXT_FILES = ("*.jsonl", "*.jsonl.gz", "*.json", "*.parquet")
EXAMS = ("doctor", "nurse", "pharm", "dentist")
QUESTION = ("question", "A", "B", "C", "D", "E", "answer")
# What training needs of a model; other weights of the same model (original/, consolidated, .bin, .gguf) stay there.
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
)
# kcd8_merged repeats kcd8_easy, _medium and _hard. Its split is called "test" although it is no test of anything here.
CONCEPTS = ("kcd8_merged", "atc_easy", "atc_medium", "atc_hard")
CONCEPT_FILES = tuple(
    f"{folder}*{name}*.json*"
    for concept in CONCEPTS
    for folder, name in (("", concept), ("data/", concept), (f"{concept}/", ""))
    for name in (name, f"{name}*test")
)


def _medical(key: str, repository: str, kind: str, licence: str, quality: str, **more: object) -> Source:
    """A medical set of the hub that no stage reads yet; by default its file names are guesses."""
    values = {"files": SOMEWHERE, "folder": f"by_source/{key}"} | more
    return Source(key, repository, kind, "later", licence, quality=quality, **values)


SOURCES: tuple[Source, ...] = (
    # plain text, stage 00 ---------------------------------------------------------------------------------
    Source(
        key="namu_wiki",
        id="heegyu/namuwiki",
        kind="plain text",
        stage="00",
        licence="cc-by-nc-sa-2.0",
        files=("namuwiki_20210301.parquet",),
        seen="d0db4f72a12fafd95d495dd79f32f81bf61cc6ef",
        columns=("text",),
        rows=(("train", 867_024),),
        folder="00_korean/namu_wiki",
        gigabytes=3.03,
        tokens="5-6B",
        default=True,
        note="raw namu mark-up of March 2021; makes weights non-commercial",
    ),
    Source(
        key="wikipedia-korean",
        id="wikimedia/wikipedia",
        kind="plain text",
        stage="00",
        licence="cc-by-sa-3.0 and GFDL",
        config="20231101.ko",
        files=("20231101.ko/*.parquet",),
        seen="f51bff45e0d40969824aade7727a533b8811fe12",  # train-0000{0,1,2}-of-00003.parquet
        columns=("text",),
        rows=(("train", 647_897),),
        folder="00_korean/wikipedia-korean",
        gigabytes=0.783,
        tokens="1B",
        default=True,
    ),
    Source(
        key="c4_korean",
        id="allenai/c4",
        kind="plain text",
        stage="00",
        licence="odc-by",
        config="ko",
        # A quarter of the 1,024 train shards, by name: listing their folder takes a hundred requests. The validation
        # shard is not fetched.
        files=tuple(f"multilingual/c4-ko.tfrecord-{shard:05d}-of-01024.json.gz" for shard in range(256)),
        seen="public code reads shard 00000 and its text",
        columns=("text",),
        folder="00_korean/c4_korean",
        gigabytes=3.0,  # what is taken by default; all of it is far more
        tokens="1B",
        default=True,
        note="web text; as many of the first shards as --max-gb holds",
    ),
    Source(
        key="english_replay",
        id="wikimedia/wikipedia",
        kind="plain text",
        stage="00",
        licence="cc-by-sa-3.0 and GFDL",
        config="20231101.en",
        files=("20231101.en/train-00000-of-00041.parquet",),
        seen="b04c8d1ceb2f5cd4588862100d08de323dccfbaa",
        columns=("text",),
        rows=(("train", 156_289),),
        quality="original English",
        folder="00_english_replay",
        gigabytes=0.42,
        default=True,
        note="one of 41 shards, replayed against forgetting",
    ),
    Source(
        key="namuwiki_extracted",
        id="heegyu/namuwiki-extracted",
        kind="plain text",
        stage="00",
        licence="cc-by-nc-sa-2.0",
        files=("namuwiki_20210301_extracted.parquet",),
        seen="fc2d644b41dfd3a43c3a3a8b0a5f966adfc36997",
        columns=("text",),
        rows=(("train", 565_000),),
        rows_seen=False,
        folder="00_korean/namuwiki_extracted",
        gigabytes=2.63,
        note="namu_wiki already cleaned: take one of the two, not both",
    ),
    Source(
        key="wikipedia_ko_2024",
        id="lcw99/wikipedia-korean-20240501",
        kind="plain text",
        stage="00",
        licence="apache-2.0 by its tag",
        files=("data/*.parquet",),
        seen="8e9d21864e0dbe3e31fe8e82699477db38393788",  # the folder, not the names in it
        columns=("text",),
        columns_seen=False,
        rows=(("train", 515_425),),
        folder="00_korean/wikipedia_ko_2024",
        note="newer than wikipedia-korean and mostly the same text; Wikipedia's own terms are cc-by-sa",
    ),
    Source(
        key="aihub",
        id="https://www.aihub.or.kr",
        kind="plain text",
        stage="00",
        licence="AI Hub terms: no redistribution",
        place="manual",
        files=TEXT_FILES,
        seen="what refine_00_plain_text reads",
        columns=("text",),
        gated=True,
        optional=True,
        folder="00_korean/aihub",
        gigabytes=10.0,
        tokens="10-15B",
        note="about 10 GB of text; an account of a Korean resident and an application for each set: MANUAL_DATA.md",
    ),
    # dictionary and sentence pairs, stage 01 --------------------------------------------------------------
    Source(
        key="medical_dict",
        id="manual",
        kind="dictionary",
        stage="01",
        licence="as its publisher says",
        place="manual",
        files=("*.jsonl", "*.json"),
        seen="dictionary_files.MANUAL_FILES names all five",
        quality="curated",
        folder="01_medical_dict",
        rows=(("terms", 4_049),),
        rows_seen=False,
        note="five files: MANUAL_DATA.md",
    ),
    Source(
        key="opus_tatoeba_ko_en",
        id="https://object.pouta.csc.fi/OPUS-Tatoeba/v2023-04-12/moses/en-ko.txt.zip",
        kind="translation",
        stage="01",
        licence="cc-by-2.0-fr",
        place="url",
        alternatives=("https://object.pouta.csc.fi/OPUS-Tatoeba/v2022-03-03/moses/en-ko.txt.zip",),
        files=("Tatoeba.en-ko.en", "Tatoeba.en-ko.ko"),  # aligned by line
        quality="curated",
        folder="03_korean_english/opus_tatoeba_ko_en",
        default=True,
        note="the address was seen for other pairs of this version, not for this one",
    ),
    Source(
        key="tatoeba_sentences",
        id="sentence-transformers/parallel-sentences-tatoeba",
        kind="translation",
        stage="01",
        licence="cc-by-2.0-fr of Tatoeba",
        config="en-ko",
        files=("en-ko/*.parquet",),
        seen="523087399e7e3ac691bf1efe8a16196a8f645775",  # train-00000-of-00001.parquet
        columns=("english", "non_english"),
        quality="curated",
        folder="03_korean_english/tatoeba_sentences",
        gigabytes=0.0003,
        optional=True,
        note="the same sentences, where OPUS cannot be reached; its card states no licence of its own",
    ),
    Source(
        key="news_ko_en",
        id=(
            "https://github.com/jungyeul/korean-parallel-corpora/raw/master/"
            "korean-english-news-v1/korean-english-park.train.tar.gz"
        ),
        kind="translation",
        stage="01",
        licence="cc-by-nc-nd-3.0",
        place="url",
        files=("korean-english-park.train.en", "korean-english-park.train.ko"),
        seen="Korpora and other public code unpack these",
        quality="curated",
        folder="03_korean_english/news_ko_en",
        optional=True,
        note="train archive only. Its READMEs say BY-NC-ND, a later notice BY-SA: read it before you use it",
    ),
    # exam questions, stage 02 -----------------------------------------------------------------------------
    Source(
        key="kor_med_test",
        id="sean0042/KorMedMCQA",
        kind="MCQ",
        stage="02",
        licence="cc-by-nc-2.0",
        config=" ".join(EXAMS),
        files=tuple(f"{e}/{split}-*.parquet" for e in EXAMS for split in ("train", "dev", "test", "fewshot")),
        seen="79efd6f91edfc8036330d7a4daa88b9f2deb9a82",  # data/ holds the CSV files of March 2024
        columns=("subject", "year", "period", "q_number", *QUESTION),
        rows=(("train", 3_401), ("dev", 1_059), ("test", 3_009), ("fewshot", 20)),
        folder="02_kor_med_test",
        gigabytes=0.002,
        default=True,
        note="dev and test are never trained on; one revision held doctor's train twice, so its sizes are asserted",
    ),
    # medical sets that no stage reads yet -----------------------------------------------------------------
    _medical(
        "asan_healthinfo",
        "ChuGyouk/Asan-AMC-Healthinfo",
        "instruction",
        "none; do not redistribute",
        "original Korean",
        columns=("instruction", "output"),
        rows=(("train", 19_200),),
        rows_seen=False,
        note="web text of a hospital; `input` is empty",
    ),
    _medical(
        "healthsearchqa_ko",
        "ChuGyouk/HealthSearchQA-ko",
        "instruction",
        "unknown",
        "synthetic",
        files=("healthsearchqa_ans_gpt4o_qtrans.json",),
        seen="942204047c3237c3b27da714fa3bc83ed60c50f8",
        columns=("question_ko", "answer_ko"),
        rows=(("train", 3_170),),
        rows_seen=False,
        gigabytes=0.005,
        note="translated questions, answers of GPT-4o",
    ),
    _medical(
        "ai_healthcare_qa",
        "ChuGyouk/AI_healthcare_QA",
        "instruction",
        "cc-by-nc-sa-4.0",
        "synthetic",
        columns=("question", "answer"),
        columns_seen=False,
        rows=(("train", 12_100),),
        rows_seen=False,
        gated=True,
        note="answers of GPT-4o, by public lists of it",
    ),
    _medical(
        "kormedconceptsqa",
        "ChuGyouk/KorMedConceptsQA",
        "instruction",
        "cc-by-nc-3.0",
        "curated",
        config=" ".join(CONCEPTS),
        files=CONCEPT_FILES,
        columns=("question", "option1", "option2", "option3", "option4", "answer", "answer_id"),
        rows=(("kcd8_merged", 17_293), ("atc", 18_900)),
        rows_seen=False,  # those of atc are what a total of 73.2k leaves
        gated=True,  # its card asks for contact information
        note="made from the official code lists; kcd8_merged repeats the other kcd8 sets, which are not fetched",
    ),
    _medical(
        "komedinstruct",
        "ChuGyouk/KoMedInstruct-52k",
        "instruction",
        "apache-2.0",
        "translation",
        columns=("instruction", "input", "output"),
        rows=(("train", 52_000),),
        rows_seen=False,
        note="`input` may be a literal <noinput>; nearly half of the outputs end with a redundant 정답은: …",
    ),
    _medical(
        "genmedgpt_ko",
        "ChuGyouk/GenMedGPT-5k-ko",
        "instruction",
        "mit",
        "translation",
        columns=("instruction", "input", "output"),
        rows=(("train", 5_450),),
        rows_seen=False,
        note="`instruction` is always the same: the question is `input`",
    ),
    _medical(
        "question_pairs_ko",
        "ChuGyouk/medical_questions_pairs_ko",
        "instruction",
        "unknown",
        "translation",
        columns=("question_1_ko", "question_2_ko", "label"),
        rows=(("train", 3_048),),
        optional=True,
        note="pairs of questions that mean the same or not, by `label`",
    ),
    _medical(
        "pubmedvision_enko",
        "ChuGyouk/PubMedVision-EnKo",
        "instruction",
        "apache-2.0",
        "translation",
        files=(),
        columns_seen=False,
        rows=(("two configs", 1_294_000),),
        rows_seen=False,
        optional=True,
        folder="",
        note="images: out of scope",
    ),
    _medical(
        "medical_o1_reasoning_ko",
        "ChuGyouk/medical-o1-reasoning-SFT-Ko",
        "reasoning",
        "apache-2.0",
        "translation",
        files=("data/*.parquet",),
        seen="a929b9edf0176daf0a15e13a71503be417ba6cff",  # train-00000-of-00001.parquet
        columns=("Question", "Complex_Cot|Complex_CoT", "Response"),
        rows=(("train", 25_682),),
        gigabytes=0.047,
    ),
    _medical(
        "chain_of_diagnosis_ko",
        "ChuGyouk/ChainofDiagnosis-Ko",
        "reasoning",
        "unknown",
        "translation",
        columns=("question", "chain", "diagnosis"),
        columns_seen=False,
        rows=(("train", 39_100),),
        rows_seen=False,
        gated=True,
        optional=True,
        note="its columns are guesses of public code that never ran",
    ),
    _medical(
        "medical_reasoning_kormedmcqa",
        "ChuGyouk/medical-reasoning-train-kormedmcqa",
        "reasoning",
        "cc-by-nc",
        "synthetic",
        columns=(*QUESTION, "thinking", "response"),
        rows=(("train", 8_751),),
        optional=True,
        note="8,751 rows for 3,401 train items: match each to a train item and drop what touches dev, test or fewshot",
    ),
    _medical(
        "medexpqa_ko",
        "ChuGyouk/MedExpQA-Kor",
        "reasoning",
        "cc-by-4.0",
        "translation",
        columns_seen=False,
        rows=(("train", 497),),
        optional=True,
        note="its columns are not known",
    ),
    _medical(
        "medqa_ko",
        "ChuGyouk/MedQA",
        "MCQ",
        "cc-by-4.0",
        "translation",
        files=("medqa_train_trans.jsonl",),  # never medqa_test_trans, nor the English medqa_edited_*
        seen="https://huggingface.co/datasets/ChuGyouk/MedQA/tree/main",
        columns=("question_ko", "A_ko", "B_ko", "C_ko", "D_ko", "answer_idx"),
        columns_seen=False,
        rows=(("train", 10_178),),  # inferred
        rows_seen=False,
        gigabytes=0.019,
        note="four options",
    ),
    _medical(
        "medqa_evol_ko",
        "ChuGyouk/MedQA-Evol-Korean",
        "MCQ",
        "unknown",
        "synthetic",
        columns=("input", "output"),
        rows=(("train", 51_800),),
        rows_seen=False,
        note="the options stand inside the text",
    ),
    _medical(
        "kormedlawqa",
        "snuh/KorMedLawQA",
        "MCQ",
        "apache-2.0",
        "synthetic",
        files=("data/*.jsonl",),
        columns=("question", "options", "answer"),
        columns_seen=False,
        rows=(("train", 13_388),),
        rows_seen=False,
        note="medical law, many items in English; made by GPT-4o-mini, by public lists of it",
    ),
    _medical(
        "chest_radiology_enko",
        "ChuGyouk/chest_radiology_enko",
        "translation",
        "none stated",
        "synthetic",
        files=("data/train-00000-of-00001.parquet",),
        seen="public code reads it",
        columns=("kor", "eng"),
        rows=(("train", 244),),
        optional=True,
    ),
    # evaluation only: fetched when named, never trained on ------------------------------------------------
    _medical(
        "pubmedqa_ko",
        "ChuGyouk/PubMedQA-test-Ko",
        "evaluation only",
        "mit",
        "translation",
        columns=("QUESTION", "CONTEXTS", "LONG_ANSWER"),
        columns_seen=False,
        rows=(("test", 500),),
    ),
    _medical(
        "kormedmcqa_v",
        "seongsubae/KorMedMCQA-V",
        "evaluation only",
        "cc-by-nc-sa-4.0",
        "original Korean",
        config="doctor",
        files=("*.parquet", "data/*.parquet", "doctor/*.parquet"),
        columns=("subject", "year", "period", "q_number", "images", *QUESTION),
        rows=(("test", 1_534),),
        note="with images; its configs are called as those of kor_med_test",
    ),
    # base models ------------------------------------------------------------------------------------------
    Source(
        key="medgemma-4b",
        id="google/medgemma-4b-it",
        kind="model",
        stage="all",
        licence=HAI_DEF,
        files=MODEL_FILES,
        seen="public copies of it",
        gated=True,
        quality="curated",
        gigabytes=8.5,
        default=True,
    ),
    Source(
        key="medgemma-27b",
        id="google/medgemma-27b-text-it",  # google/medgemma-27b-it is another, multimodal model
        kind="model",
        stage="all",
        licence=HAI_DEF,
        files=MODEL_FILES,
        seen="public copies of it",
        gated=True,
        quality="curated",
        gigabytes=55.0,
        default=True,
    ),
)

BY_KEY = {source.key: source for source in SOURCES}

# for the downloads --------------------------------------------------------------------------------------

# A word for held-out rows in a file name. "latest" and "device" are other words.
_HELD_OUT = re.compile(r"(?<![a-z])(?:test|dev|val|valid|validation|eval|evaluation|fewshot)(?![a-z])", re.IGNORECASE)
_METADATA = ("dataset_infos.json", "dataset_info.json")  # of the hub's tools, never rows


@cache
def _expression(pattern: str) -> re.Pattern[str]:
    return re.compile("[^/]*".join(re.escape(part) for part in pattern.split("*")))


def _held_out(name: str) -> set[str]:
    return {word.lower() for word in _HELD_OUT.findall(name)}


def matches(source: Source, name: str) -> bool:
    """True for a file (`data/train.parquet`) of the repository that is one of the source's.

    A wildcard never stands for held-out rows: a name that says test, dev or validation matches only a pattern that
    says so too, except in a source that serves evaluation.
    """
    for pattern in source.files:
        if pattern == name:
            return True
        if "*" not in pattern or name.rpartition("/")[2] in _METADATA or not _expression(pattern).fullmatch(name):
            continue
        if source.kind == "evaluation only" or _held_out(name) <= _held_out(pattern):
            return True
    return False


def prefixes(source: Source) -> list[str]:
    """The folders of the repository to list for its patterns, "" for the root; none where all names are exact.

    A folder may be missing in the repository where names are guesses.
    """
    return sorted({pattern.rpartition("/")[0] for pattern in source.files if "*" in pattern})


def exact(source: Source) -> list[str]:
    """The names that need no listing, in order."""
    return [name for name in source.files if "*" not in name]


def check_columns(source: Source, found: Iterable[str]) -> list[str]:
    """The required columns that are not among `found`, in words: `no column Complex_Cot or Complex_CoT`."""
    there = set(found)
    missing = (names for column in source.columns if there.isdisjoint(names := column.split("|")))
    return [f"no column {' or '.join(names)}" for names in missing]


# the listing --------------------------------------------------------------------------------------------

WIDTH = 140  # characters; only an address may be longer
HEADER = ["key", "id", "licence", "stage", "quality", "gated", "size", "fetched"]
LEGEND = """\
fetched  yes: by download_all.py, without being asked. --model: with that model. by name: when you name its key
         (download_00_plain_text.py and download_01_english_korean.py --source KEY, download_instruction.py --key KEY).
         by you: MANUAL_DATA.md. never: out of scope.
licence  It passes on to what is trained: one with -nc makes the weights non-commercial. "~" before rows: about."""
# Korean tokens that continued pre-training is known to need.
NEEDED = (("minimum", "2B"), ("effective", "10-50B"), ("best", "50-100B"))


def _rows(source: Source) -> str:
    if not source.rows:
        return ""
    total = cli.count(sum(number for _, number in source.rows), "row")
    return total if source.rows_seen else f"~{total}"


def _amount(source: Source) -> str:
    """Gigabytes where they matter, else rows."""
    big = source.gigabytes is not None and source.gigabytes >= 0.1
    return f"{source.gigabytes:g} GB" if big else _rows(source) or "unknown"


def fetched(source: Source) -> str:
    """How it gets here: yes, --model, by name, by you or never."""
    if source.kind == "model":
        return "--model"
    if source.place == "manual":
        return "by you"
    if not source.folder:
        return "never"
    return "yes" if source.default else "by name"


def site(source: Source) -> str:
    """The owner of the repository, or the host, or who brings it."""
    if source.id.startswith("https://"):
        return urlsplit(source.id).netloc
    return source.id.split("/")[0] if "/" in source.id else "a person"


def _cells(source: Source) -> list[str]:
    gated = "yes" if source.gated else "no"
    about = [source.stage, source.quality, gated, _amount(source), fetched(source)]
    return [source.key, source.id, source.licence, *about]


def _left(rows: list[list[str]]) -> str:
    """`cli.table` with all columns left-aligned: they hold words."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    header, *padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return cli.table(padded, header)


def _by_kind(sources: Iterable[Source]) -> str:
    """The main table, a part for each kind. Addresses are too long for a column: they get two lines."""
    parts = []
    for kind in KINDS:
        found = [source for source in sources if source.kind == kind]
        lines = [kind.upper()] if found else []
        if short := [_cells(source) for source in found if source.place != "url"]:
            lines.append(_left([HEADER, *short]))
        for source in (source for source in found if source.place == "url"):
            key, address, licence, *about = _cells(source)
            lines.append(f"{key}  {address}  {licence}")
            lines.append("    " + ", ".join(f"{name} {cell}" for name, cell in zip(HEADER[3:], about, strict=True)))
        parts += ["\n".join(lines)] if lines else []
    return "\n\n".join(parts)


def _grouped(sources: Iterable[Source], title: str, group: Callable[[Source], str]) -> str:
    groups: dict[str, list[str]] = defaultdict(list)
    for source in sources:
        groups[group(source)].append(source.key)
    lines = [
        textwrap.fill(
            f"{name} ({len(keys)}): {', '.join(keys)}", WIDTH, initial_indent="  ", subsequent_indent="      "
        )
        for name, keys in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    ]
    return "\n".join([title.upper(), *lines])


def billions(tokens: str) -> tuple[float, float]:
    """The lower and the upper bound of an estimate: "5-6B" is (5, 6), "1B" is (1, 1)."""
    low, _, high = tokens.removesuffix("B").partition("-")
    return float(low), float(high or low)


def token_sum(sources: Iterable[Source]) -> str:
    """The sum of the sources' estimates as one estimate: "7-8B"."""
    bounds = [billions(source.tokens) for source in sources if source.tokens]
    low, high = sum(b[0] for b in bounds), sum(b[1] for b in bounds)
    return f"{low:g}B" if low == high else f"{low:g}-{high:g}B"


def _tokens(sources: Iterable[Source]) -> str:
    """What plain text there is, against what is needed and what a run takes of it."""
    known = [source for source in sources if source.tokens]
    if not known:
        return ""
    rows = [[source.key, source.tokens, fetched(source)] for source in known]
    rows.append(["fetched without being asked", token_sum(s for s in known if s.default), ""])
    rows.append(["all of these", token_sum(known), ""])
    rows += [[f"needed: {what}", tokens, ""] for what, tokens in NEEDED]
    caps: dict[tuple[int, int], list[str]] = defaultdict(list)
    for profile in profiles.MODELS.values():
        if profile.tiny is None and profile.plain_text.max_rows:
            caps[profile.plain_text.max_rows, profile.plain_text.max_length].append(profile.name)
    capped = "; ".join(
        f"{' and '.join(names)} take at most {number:,} packed sequences of {length:,} tokens, about "
        f"{number * length / 1e6:.0f}M tokens, an epoch"
        for (number, length), names in caps.items()
    )
    sentence = f"These are estimates, not counts. What a run trains on is capped by its profile: {capped}."
    return "\n".join(
        [
            "TOKENS OF KOREAN PLAIN TEXT",
            textwrap.indent(cli.table(rows, ["", "tokens", "fetched"]), "  "),
            textwrap.fill(sentence, WIDTH, initial_indent="  ", subsequent_indent="  "),
        ]
    )


def _notes(sources: Iterable[Source]) -> str:
    lines = []
    for source in sources:
        note = source.note
        if not source.seen and source.place == "hub" and source.folder:
            note = "; ".join(filter(None, [note, "its file names were never seen, and are guessed"]))
        if note:
            text = f"{source.key}: {note}"
            lines.append(textwrap.fill(text, WIDTH, initial_indent="  ", subsequent_indent="      "))
    return "\n".join(["GOOD TO KNOW", *lines]) if lines else ""


def listing(sources: Iterable[Source] = SOURCES) -> str:
    """The catalogue for a terminal: by kind with a line for each source, by site, by quality, tokens, and notes."""
    sources = list(sources)
    parts = [
        _by_kind(sources),
        LEGEND,
        _grouped(sources, "by source", site),
        _grouped(sources, "by quality", lambda source: source.quality),
        _tokens(sources),
        _notes(sources),
    ]
    return "\n\n".join(part for part in parts if part)
