"""The catalogue: complete rows, patterns that fetch what is meant and nothing else, and its listing."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from medgemma_korean import records, sources
from medgemma_korean.paths import RunPaths
from medgemma_korean.profiles import MODELS
from medgemma_korean.sources import BY_KEY, HAI_DEF, SOURCES, Source, check_columns, exact, matches, prefixes
from medgemma_korean.text import documents

MANUAL = Path(__file__).resolve().parents[1] / "MANUAL_DATA.md"
HUB = [source for source in SOURCES if source.place == "hub"]
ROWS = Source("rows", "owner/rows", "instruction", "later", "mit", files=("data/*.parquet", "only.jsonl"))


def a_row(**values):
    return dataclasses.replace(ROWS, **values)


# rows ---------------------------------------------------------------------------------------------------


def test_keys_and_folders_are_used_once():
    assert len(BY_KEY) == len(SOURCES)
    folders = [source.folder for source in SOURCES if source.folder]
    assert len(set(folders)) == len(folders)
    assert not [a for a in folders for b in folders if a.startswith(f"{b}/")]


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.key)
def test_every_row_is_complete(source):
    assert source.licence.strip() and re.fullmatch(r"[\w.-]+", source.key)
    if source.place == "hub":
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", source.id)
    assert (source.folder == "") == (source.kind == "model" or not source.files)
    if source.folder and source.kind != "model" and source.place != "manual":
        assert source.files
    if source.folder.startswith(("00_korean/", "03_korean_english/", "by_source/")):
        assert source.folder.rpartition("/")[2] == source.key  # a model card finds the licence by the folder's name
    if source.kind == "plain text":
        assert source.columns == ("text",)  # what refine_00_plain_text reads
    assert all(number > 0 for _, number in source.rows) and not source.gigabytes == 0
    assert not source.tokens or re.fullmatch(r"\d+(-\d+)?B", source.tokens)


def test_what_is_fetched_without_being_asked():
    assert {s.key for s in SOURCES if s.default} == {
        "namu_wiki", "wikipedia-korean", "c4_korean", "english_replay", "opus_tatoeba_ko_en", "kor_med_test",
        "medgemma-4b", "medgemma-27b",
    }  # fmt: skip
    assert {s.key for s in SOURCES if s.kind == "model"} == {p.name for p in MODELS.values() if p.tiny is None}
    for profile in (p for p in MODELS.values() if p.tiny is None):
        assert BY_KEY[profile.name].id == profile.source and BY_KEY[profile.name].licence == HAI_DEF


def test_the_pipeline_finds_what_it_fetches_where_it_reads(tmp_path):
    """The catalogue spells folders of its own; the readers ask `paths`."""
    paths = RunPaths("tiny", tmp_path, "run")
    for place, keys in {
        paths.raw_korean: ("namu_wiki", "wikipedia-korean", "c4_korean", "aihub", "namuwiki_extracted"),
        paths.raw_pairs: ("opus_tatoeba_ko_en", "tatoeba_sentences", "news_ko_en"),
    }.items():
        assert {(paths.raw / BY_KEY[key].folder).parent for key in keys} == {place}
    assert paths.raw / BY_KEY["kor_med_test"].folder == paths.raw_mcq
    assert paths.raw / BY_KEY["medical_dict"].folder == paths.raw_dictionary
    assert BY_KEY["english_replay"].folder == "00_english_replay"


def test_what_serves_evaluation_is_used_by_no_stage():
    found = [source for source in SOURCES if source.kind == "evaluation only"]
    assert {source.id for source in found} == {"ChuGyouk/PubMedQA-test-Ko", "seongsubae/KorMedMCQA-V"}
    assert not any(source.default or source.stage != "later" for source in found)
    assert all(source.folder.startswith("by_source/") for source in found)


@pytest.mark.parametrize(
    "values, part",
    [
        ({"kind": "replay"}, "'replay' is none of plain text"),
        ({"stage": "03"}, "'03' is none of 00"),
        ({"place": "disk"}, "none of hub"),
        ({"quality": "good"}, "none of original Korean"),
        ({"licence": ""}, "a licence"),
        ({"files": ("*/train.parquet",)}, "last part"),
        ({"place": "url"}, "an address"),
        ({"id": "https://example.org/x.zip"}, "an address"),
        ({"kind": "evaluation only", "default": True}, "evaluation only"),
        ({"kind": "evaluation only", "stage": "02"}, "evaluation only"),
        ({"place": "manual", "default": True}, "by default"),
    ],
)
def test_a_row_that_contradicts_itself_is_refused(values, part):
    with pytest.raises(ValueError, match=part):
        a_row(**values)


# files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern, name, expected",
    [
        ("*.parquet", "x.parquet", True),
        ("*.parquet", "data/x.parquet", False),  # `*` does not cross folders
        ("data/*.parquet", "data/x.parquet", True),
        ("data/*.parquet", "data/deep/x.parquet", False),
        ("data/*.parquet", "my/data/x.parquet", False),
        ("data/*.parquet", "data/x.parquet.bak", False),
        ("20231101.ko/*.parquet", "20231101.kok/x.parquet", False),
        ("20231101.ko/*.parquet", "20231101xko/x.parquet", False),  # a full stop is a full stop
        ("a.json", "a.json", True),
        ("a.json", "b/a.json", False),
        ("a[1].json", "a1.json", False),
        ("a?.json", "ab.json", False),
        ("*.json", "dataset_infos.json", False),  # the hub's tools write it; it holds no rows
        ("dataset_infos.json", "dataset_infos.json", True),
        # Held-out rows are matched only by a pattern that says so.
        ("data/*.parquet", "data/test-00000-of-00001.parquet", False),
        ("data/*.parquet", "data/validation-00000.parquet", False),
        ("*.jsonl", "medqa_test.jsonl", False),
        ("*.jsonl", "dev.jsonl", False),
        ("*.jsonl", "latest.jsonl", True),
        ("*.jsonl", "device_contest.jsonl", True),
        ("doctor/test-*.parquet", "doctor/test-0.parquet", True),
        ("doctor/test-*.parquet", "doctor/test-dev.parquet", False),
        ("medqa_test.jsonl", "medqa_test.jsonl", True),
    ],
)
def test_what_a_pattern_stands_for(pattern, name, expected):
    assert matches(a_row(files=(pattern,)), name) is expected


def test_a_set_for_evaluation_is_its_test_split():
    assert matches(a_row(kind="evaluation only", files=("data/*.parquet",)), "data/test-0.parquet")


def test_folders_to_list_and_names_that_need_no_list():
    row = a_row(files=("b.json", "*.parquet", "data/*.parquet", "data/*.jsonl", "a/x.json"))
    assert prefixes(row) == ["", "data"] and exact(row) == ["b.json", "a/x.json"]
    assert prefixes(a_row(files=("a/x.json",))) == [] and exact(a_row(files=("*.json",))) == []


@pytest.mark.parametrize("source", HUB, ids=lambda source: source.key)
def test_exact_names_match_themselves_and_prefixes_hold_the_rest(source):
    assert all(matches(source, name) for name in exact(source))
    for pattern in source.files:
        if "*" in pattern:
            assert pattern.rpartition("/")[0] in prefixes(source) and matches(source, pattern.replace("*", "0"))


def test_what_stages_read_can_be_read():
    """C4 comes as .json.gz: whatever a pattern fetches, records must know how to read."""
    for source in HUB:
        if source.kind != "model":
            assert all(pattern.endswith((*records.ROW_SUFFIXES, "*")) for pattern in source.files), source.key


def test_medqa_test_files_are_never_fetched():
    there = ("train_trans", "test_trans", "edited_train", "edited_test")
    assert [n for n in there if matches(BY_KEY["medqa_ko"], f"medqa_{n}.jsonl")] == ["train_trans"]


def test_no_training_set_takes_held_out_files():
    for source in SOURCES:
        if source.kind in ("evaluation only", "model") or source.key in ("kor_med_test", "kormedconceptsqa"):
            continue
        for folder in ("", "data/", *(f"{prefix}/" for prefix in prefixes(source))):
            for word in ("test", "dev", "validation", "val", "eval", "fewshot"):
                for suffix in (".parquet", ".jsonl", ".json"):
                    for name in (word, f"{word}-00000-of-00001", f"medqa_{word}_trans"):
                        assert not matches(source, f"{folder}{name}{suffix}"), (source.key, folder, name)


def test_exam_shards_with_and_without_a_hash_are_found():
    source = BY_KEY["kor_med_test"]
    assert prefixes(source) == ["dentist", "doctor", "nurse", "pharm"] and not exact(source)
    for name in ("train-00000-of-00001-e92541767961eccb", "dev-00000-of-00001", "test-00000-of-00001", "fewshot-0"):
        assert matches(source, f"doctor/{name}.parquet")
    assert not matches(source, "data/doctor-train.csv")  # the version of March 2024


def test_of_the_concept_sets_only_those_that_repeat_nothing():
    source = BY_KEY["kormedconceptsqa"]
    for name in ("kcd8_merged.jsonl", "kcd8_merged_test.json", "kcd8_merged/test.jsonl", "data/atc_hard_test.jsonl"):
        assert matches(source, name), name
    for name in ("kcd8_easy.jsonl", "kcd8_hard/test.jsonl", "data/kcd8_medium.jsonl", "README.md", "atc_easy/dev.json"):
        assert not matches(source, name), name


def test_c4_is_a_prefix_of_its_train_shards_in_order():
    source = BY_KEY["c4_korean"]
    assert prefixes(source) == [] and len(exact(source)) == 256 and sorted(source.files) == list(source.files)
    assert exact(source)[0] == "multilingual/c4-ko.tfrecord-00000-of-01024.json.gz"
    assert not matches(source, "multilingual/c4-ko-validation.tfrecord-00000-of-00001.json.gz")


@pytest.mark.parametrize("key", ["medgemma-4b", "medgemma-27b"])
def test_of_a_model_only_what_training_needs(key):
    source = BY_KEY[key]
    for name in (
        "model.safetensors", "model-00001-of-00012.safetensors", "model.safetensors.index.json", "config.json",
        "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "added_tokens.json",
        "special_tokens_map.json", "chat_template.jinja", "chat_template.json", "preprocessor_config.json",
        "processor_config.json",
    ):  # fmt: skip
        assert matches(source, name), name
    for name in (
        "consolidated.safetensors", "original/x.safetensors", "original/model.safetensors", "pytorch_model.bin",
        "medgemma-4b-it-IQ4_XS.gguf", "README.md", "onnx/model.onnx", "training_args.bin", "optimizer.pt",
    ):  # fmt: skip
        assert not matches(source, name), name
    assert prefixes(source) == [""]


# columns ------------------------------------------------------------------------------------------------


def test_missing_columns_are_told_and_either_name_will_do():
    source = BY_KEY["medical_o1_reasoning_ko"]
    assert check_columns(source, ["Question", "Complex_CoT", "Response", "more"]) == []
    assert check_columns(source, iter(["Response", "Question", "Complex_Cot"])) == []
    assert check_columns(source, ["Question"]) == ["no column Complex_Cot or Complex_CoT", "no column Response"]
    assert check_columns(a_row(columns=()), []) == []


# the listing --------------------------------------------------------------------------------------------


def test_the_listing_has_one_line_for_each_source():
    lines = sources.listing().splitlines()
    for source in SOURCES:
        (line,) = [line for line in lines if line.split(" ")[0] == source.key]
        assert source.id in line and source.licence in line
    assert not [line for line in lines if len(line) > 140 and "https://" not in line]
    assert max(map(len, lines)) < 150


def test_the_listing_groups_by_source_and_by_quality():
    text = sources.listing()
    for source in SOURCES:
        assert text.count(f"{source.key},") + len(re.findall(rf"{re.escape(source.key)}$", text, re.M)) >= 2, source.key
    assert re.search(r"^  ChuGyouk \(16\): asan_healthinfo, ", text, re.M)
    for quality in sources.QUALITIES:
        assert f"  {quality} ({sum(s.quality == quality for s in SOURCES)}): " in text


def test_token_estimates_and_what_is_needed():
    assert sources.token_sum(SOURCES) == "17-23B"
    assert sources.token_sum([BY_KEY["c4_korean"], BY_KEY["wikipedia-korean"]]) == "2B"
    text = sources.listing()
    for line in (
        r"namu_wiki +5-6B +yes", r"aihub +10-15B +by you", r"fetched without being asked +7-8B",
        r"all of these +17-23B", r"needed: minimum +2B", r"needed: effective +10-50B", r"needed: best +50-100B",
    ):  # fmt: skip
        assert re.search(rf"^  {line}$", text, re.M), line


def test_the_cap_is_the_profiles_own(monkeypatch):
    def capped():
        return " ".join(re.search(r"capped by its profile: (.*?)\.\n", sources.listing(), re.S)[1].split())

    both = "medgemma-4b and medgemma-27b take at most 50,000 packed sequences of 2,048 tokens, about 102M tokens"
    assert capped().startswith(both)
    small = dataclasses.replace(MODELS["medgemma-4b"].plain_text, max_rows=1_000)
    monkeypatch.setitem(MODELS, "medgemma-4b", dataclasses.replace(MODELS["medgemma-4b"], plain_text=small))
    assert "medgemma-4b take at most 1,000 packed sequences of 2,048 tokens, about 2M tokens" in capped()


def test_what_is_guessed_is_called_a_guess():
    text = " ".join(sources.listing().split())
    assert "medexpqa_ko: its columns are not known; its file names were never seen, and are guessed" in text
    assert "medqa_ko: four options " in text


def test_a_part_of_the_catalogue_can_be_listed():
    text = sources.listing([BY_KEY["pubmedqa_ko"]])
    assert "pubmedqa_ko  ChuGyouk/PubMedQA-test-Ko  mit" in text and "namu_wiki" not in text and "TOKENS" not in text


def test_sizes_are_readable():
    assert BY_KEY["namu_wiki"].size == "3.03 GB, 867,024 rows"
    assert BY_KEY["medgemma-27b"].size == "55 GB"
    assert BY_KEY["komedinstruct"].size == "~52,000 rows"
    assert BY_KEY["news_ko_en"].size == ""


# AI Hub -------------------------------------------------------------------------------------------------


def test_the_conversion_that_the_manual_shows_gives_text_that_is_read(tmp_path):
    """MANUAL_DATA.md shows how a labelled JSON of AI Hub becomes rows: run it as it stands there."""
    manual = MANUAL.read_text(encoding="utf-8")
    code = re.search(r"00_korean/aihub/\S+ <<'END'\n(.*?)\nEND\n", manual, re.S)[1]
    labelled = tmp_path / "unpacked" / "Training" / "라벨링데이터"
    labelled.mkdir(parents=True)
    rows = {"totalcount": 2, "data": [{"id": 1, "text": "간은 해독을 맡는다."}, {"id": 2, "text": ""}]}
    (labelled / "medical.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8-sig")
    target = tmp_path / BY_KEY["aihub"].folder / "books.jsonl"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "unpacked"), str(target)], check=True)
    texts = [t for task in documents.tasks_of(target.parent) for batch in documents.read(task) for t in batch.texts]
    assert texts == ["간은 해독을 맡는다."]
    assert f"data/01_raw/{BY_KEY['aihub'].folder}/" in manual and matches(BY_KEY["aihub"], target.name)
