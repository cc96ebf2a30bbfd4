"""The catalogue: every data set and model that the pipeline knows, with its licence and what it is used for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """One row. `files` are patterns inside the repository; `text` lists the names its text column may have."""

    key: str
    id: str
    kind: str  # plain text, replay, dictionary, translation, MCQ, model
    stage: str  # the stage that uses it
    licence: str
    files: tuple[str, ...] = ()
    text: tuple[str, ...] = ("text",)
    gated: bool = False
    quality: str = "original Korean"
    folder: str = ""  # below 01_raw
    revision: str | None = None
    size: str = ""


NON_COMMERCIAL = "cc-by-nc"
HAI_DEF = "Health AI Developer Foundations terms"

SOURCES: tuple[Source, ...] = (
    Source(
        "namu_wiki",
        "heegyu/namuwiki",
        "plain text",
        "00",
        "cc-by-nc-sa-2.0",
        files=("*.parquet", "data/*.parquet"),
        folder="00_korean/namu_wiki",
        size="867,024 documents, 2.8 GB",
    ),
    Source(
        "wikipedia-korean",
        "wikimedia/wikipedia",
        "plain text",
        "00",
        "cc-by-sa-3.0 and GFDL",
        files=("20231101.ko/*.parquet",),
        folder="00_korean/wikipedia-korean",
        size="about 648,000 documents",
    ),
    Source(
        "c4_korean",
        "allenai/c4",
        "plain text",
        "00",
        "odc-by",
        files=("multilingual/c4-ko.tfrecord-0000?-of-*.json.gz",),
        folder="00_korean/c4_korean",
        size="a bounded prefix",
    ),
    Source(
        "english_replay",
        "wikimedia/wikipedia",
        "replay",
        "00",
        "cc-by-sa-3.0 and GFDL",
        files=("20231101.en/train-00000-of-*.parquet",),
        folder="00_english_replay",
        quality="original English",
        size="one shard",
    ),
    Source(
        "medical_dict",
        "manual",
        "dictionary",
        "01",
        "as its publisher says",
        folder="01_medical_dict",
        quality="curated",
        size="4,049 terms expected",
    ),
    Source(
        "opus_tatoeba_ko_en",
        "sentence-transformers/parallel-sentences-tatoeba",
        "translation",
        "01",
        "cc-by-2.0-fr",
        files=("en-ko/*.parquet",),
        folder="03_korean_english/opus_tatoeba_ko_en",
        quality="curated",
    ),
    Source(
        "kor_med_test",
        "sean0042/KorMedMCQA",
        "MCQ",
        "02",
        "cc-by-nc-2.0",
        files=("data/*.parquet", "*/*.parquet"),
        folder="02_kor_med_test",
        size="3,401 train, 1,059 dev, 3,009 test",
    ),
    Source(
        "medgemma-4b",
        "google/medgemma-4b-it",
        "model",
        "all",
        HAI_DEF,
        files=("*.safetensors", "*.json", "tokenizer.model", "chat_template.jinja"),
        gated=True,
        quality="curated",
        size="8.5 GB",
    ),
    Source(
        "medgemma-27b",
        "google/medgemma-27b-text-it",
        "model",
        "all",
        HAI_DEF,
        files=("*.safetensors", "*.json", "tokenizer.model", "chat_template.jinja"),
        gated=True,
        quality="curated",
        size="55 GB",
    ),
)

BY_KEY = {source.key: source for source in SOURCES}


def raw_licences(keys: list[str]) -> list[tuple[str, str]]:
    """(key, licence) of the named sources; a folder that the catalogue does not know is its owner's to clear."""
    return [(key, BY_KEY[key].licence if key in BY_KEY else "not in the catalogue; check it yourself") for key in keys]
