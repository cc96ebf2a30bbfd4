"""Small repositories in the shape of the published ones, for the loopback hub: names, layouts and columns as there."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

from loopback_hub import Hub

SAMPLE_RAW = Path(__file__).resolve().parents[1] / "data" / "sample" / "01_raw"
OPUS = "/OPUS-Tatoeba/v2023-04-12/moses/en-ko.txt.zip"
GATED = ("google/medgemma-4b-it", "google/medgemma-27b-text-it")
TOKEN = "hf_loopbackTokenThatAcceptedTheTerms"
SIZES = {  # rows of KorMedMCQA by exam and split, as published
    "doctor": {"train": 1890, "dev": 164, "test": 435, "fewshot": 5},
    "nurse": {"train": 582, "dev": 291, "test": 878, "fewshot": 5},
    "pharm": {"train": 632, "dev": 300, "test": 885, "fewshot": 5},
    "dentist": {"train": 297, "dev": 304, "test": 811, "fewshot": 5},
}


def parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def sample_texts(folder: str) -> list[str]:
    """The texts of a source of data/sample."""
    from medgemma_korean import records

    return [row["text"] for file in records.row_files(SAMPLE_RAW / folder) for row in records.read_rows(file)]


def exam_rows(exam: str, split: str, number: int) -> list[dict[str, Any]]:
    """Questions in KorMedMCQA's columns, each another one."""
    year = {"train": 2015, "dev": 2021, "test": 2022, "fewshot": 2021}[split]
    return [
        {
            "subject": exam,
            "year": year,
            "period": 1 + i // 100,
            "q_number": 1 + i % 100,
            "question": f"{exam} {split} {i}번: 다음 중 혈압이 {90 + i} mmHg인 환자의 처치로 옳은 것은?",
            **{letter: f"{exam} {i}번 {n}째 처치" for n, letter in enumerate("ABCDE", 1)},
            "answer": 1 + i % 5,
            "cot": "혈압을 먼저 본다." if split == "fewshot" else "",
        }
        for i in range(number)
    ]


@cache
def exam_files() -> dict[str, bytes]:
    """KorMedMCQA: a folder an exam, a shard a split."""
    return {
        f"{exam}/{split}-00000-of-00001.parquet": parquet(exam_rows(exam, split, number))
        for exam, sizes in SIZES.items()
        for split, number in sizes.items()
    } | {"README.md": b"# KorMedMCQA\n"}


def pairs_zip(pairs: list[tuple[str, str]] | None = None, **other: bytes) -> bytes:
    """The Moses archive of OPUS Tatoeba; other: file contents that replace or join its members."""
    pairs = pairs or [
        (f"The patient has had a fever for {i} days.", f"환자는 {i}일 동안 열이 났다.") for i in range(1, 60)
    ]
    members = {
        "README": b"OPUS Tatoeba\n",
        "LICENSE": b"CC BY 2.0 FR\n",
        "Tatoeba.en-ko.en": "".join(f"{en}\n" for en, _ in pairs).encode(),
        "Tatoeba.en-ko.ko": "".join(f"{ko}\n" for _, ko in pairs).encode(),
    } | {name.replace("__", "."): content for name, content in other.items()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@cache
def text_files() -> dict[str, dict[str, bytes]]:
    """The four plain-text repositories (the two of Wikipedia are one), by id."""

    def rows(folder: str) -> list[dict[str, Any]]:
        return [
            {"id": str(i), "url": f"wiki/{i}", "title": f"{i}", "text": t} for i, t in enumerate(sample_texts(folder))
        ]

    namu = [
        {"title": r["title"], "text": r["text"], "namespace": "0", "contributors": ""}
        for r in rows("00_korean/namu_wiki")
    ]
    web = rows("00_korean/c4_korean")

    def shard(part: list[dict[str, Any]]) -> bytes:
        lines = "".join(
            json.dumps({"text": r["text"], "timestamp": "2019", "url": r["url"]}, ensure_ascii=False) + "\n"
            for r in part
        )
        return gzip.compress(lines.encode(), mtime=0)

    half = len(web) // 2
    wiki = rows("00_korean/wikipedia-korean")
    return {
        "heegyu/namuwiki": {"namuwiki_20210301.parquet": parquet(namu), "README.md": b"# NamuWiki\n"},
        "wikimedia/wikipedia": {
            "20231101.ko/train-00000-of-00002.parquet": parquet(wiki[: len(wiki) // 2]),
            "20231101.ko/train-00001-of-00002.parquet": parquet(wiki[len(wiki) // 2 :]),
            "20231101.en/train-00000-of-00041.parquet": parquet(rows("00_english_replay")),
            "20231101.en/train-00001-of-00041.parquet": parquet([{"text": "never fetched"}]),
            "20231101.kok/train-00000-of-00001.parquet": parquet([{"text": "another language"}]),
        },
        "allenai/c4": {
            "multilingual/c4-ko.tfrecord-00000-of-01024.json.gz": shard(web[:half]),
            "multilingual/c4-ko.tfrecord-00001-of-01024.json.gz": shard(web[half:]),
            "multilingual/c4-ko-validation.tfrecord-00000-of-00001.json.gz": shard(web[:3]),
            "multilingual/c4-sr.tfrecord-00000-of-00512.json.gz": shard(web[:2]),
        },
    }


def model_files() -> dict[str, bytes | Path]:
    """A Gemma-3 in the multimodal layout of the 4B model, random weights, with files that training does not need."""
    import torch_fixtures as tf

    folder = tf.multimodal_folder()
    files: dict[str, bytes | Path] = {p.name: p for p in sorted(folder.iterdir()) if p.is_file()}
    files |= {p.name: p for p in sorted(tf.tokenizer_folder().iterdir()) if p.is_file()}
    return files | {
        "README.md": b"# MedGemma\n",
        "pytorch_model.bin": b"never fetched",
        "original/a.safetensors": b"nor this",
    }


def small_model_files() -> dict[str, bytes]:
    """The same names with hardly any content, for tests of the download alone."""
    import struct

    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    weights = struct.pack("<Q", len(header)) + header + b"\0" * 8
    index = {
        "metadata": {},
        "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"},
    }
    return {
        "config.json": b'{"model_type": "gemma3"}',
        "generation_config.json": b"{}",
        "model-00001-of-00002.safetensors": weights,
        "model-00002-of-00002.safetensors": weights,
        "model.safetensors.index.json": json.dumps(index).encode(),
        "tokenizer.json": b"{}",
        "tokenizer.model": b"pieces",
        "tokenizer_config.json": b"{}",
        "README.md": b"# MedGemma\n",
        "pytorch_model.bin": b"never fetched",
    }


def publish_all(hub: Hub, model: dict[str, bytes | Path] | None = None) -> None:
    """Everything that `download_all --model medgemma-4b` asks for."""
    for name, files in text_files().items():
        hub.add("dataset", name, files)
    hub.add("dataset", "sean0042/KorMedMCQA", exam_files())
    hub.add("model", GATED[0], model or small_model_files(), gated="auto")
    hub.serve(OPUS, pairs_zip())
    hub.tokens = {TOKEN: set(GATED)}


def environment(hub: Hub, token: str = TOKEN) -> dict[str, str]:
    """What a program needs to speak to the loopback hub and to nothing else."""
    return {
        "HF_ENDPOINT": hub.url,
        "MEDGEMMA_KOREAN_URL_MIRROR": hub.url,
        "HF_TOKEN": token,
        "HF_HUB_OFFLINE": "",
        "HF_HUB_DOWNLOAD_TIMEOUT": "2",
        "no_proxy": "127.0.0.1",
    }
