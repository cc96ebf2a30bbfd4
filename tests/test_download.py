"""What each download program makes of its source: checked in place, converted, refused in words; hub.py has the rest.

Every run here also asserts that no token and no signed address is printed or written (`get` in conftest.py).
"""

import io
import json
import os
import re
import struct
import tarfile

import hub_repositories as repositories
import pytest
from huggingface_hub import constants

from medgemma_korean import records
from medgemma_korean.cli import PipelineError
from medgemma_korean.sources import BY_KEY, SOURCES


def raw_of(root):
    return root / "data/sample/01_raw"


def tree(folder):
    return {str(p.relative_to(folder)): (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.rglob("*")}


# verify in place ----------------------------------------------------------------------------------------

IN_PLACE = {
    "download_00_plain_text": ("00_korean", {"c4_korean": 1, "namu_wiki": 1, "wikipedia-korean": 1}),
    "download_01_medical_dict": (
        "01_medical_dict",
        {"korean_medical_dict.jsonl": 100, "bilingual_medical_dict.json": 50},
    ),
    "download_01_english_korean": ("03_korean_english", {"sample_ko_en": 1}),
    "download_02_kor_med_test": ("02_kor_med_test", {"train": 100, "dev": 30, "test": 30}),
}


@pytest.mark.parametrize("program", IN_PLACE)
def test_files_that_are_there_are_checked_and_left_alone(program, root, load_program):
    folder, counts = IN_PLACE[program]
    before = tree(raw_of(root) / folder)
    main = load_program(program).main
    assert main([]) == 0
    record = records.read_json(raw_of(root) / f".stages/{program}.json")
    assert record["counts"].items() >= counts.items()
    assert all(name.startswith(f"01_raw/{folder}/") for name in record["outputs"])
    assert main([]) == 0 and tree(raw_of(root) / folder) == before


def test_a_file_that_changed_since_is_noticed(root, load_program):
    main = load_program("download_01_medical_dict").main
    assert main([]) == 0
    with open(raw_of(root) / "01_medical_dict/korean_medical_dict.jsonl", "a", encoding="utf-8") as file:
        file.write('{"term": "맥박", "definition": "Pulse"}\n')
    with pytest.raises(PipelineError, match="input changed: dictionary files"):
        main([])
    assert main(["--force"]) == 0
    assert (
        records.read_json(raw_of(root) / ".stages/download_01_medical_dict.json")["counts"]["korean_medical_dict.jsonl"]
        == 101
    )


def test_download_all_lists_the_catalogue(run_program):
    outcome = run_program("download_all", "--list")
    assert outcome.code == 0
    for source in SOURCES:
        (line,) = [x for x in outcome.stdout.splitlines() if x.split(" ")[0] == source.key]
        assert source.id in line and source.licence in line


# the dictionary -----------------------------------------------------------------------------------------


def test_download_all_stops_at_the_dictionary_before_any_download(hub, get):
    """A person who lacks the files learns it first, not after hours."""
    outcome = get("download_all")
    assert outcome.code == 2 and outcome.text.count("is missing") == 5 and "--skip-01" in outcome.text
    assert "hub" not in outcome.text and hub.requests == []


# the hub is away ----------------------------------------------------------------------------------------

FROM_HUB = {
    "download_00_plain_text": "heegyu/namuwiki: the hub",
    "download_01_english_korean": "OPUS-Tatoeba/v2023-04-12/moses/en-ko.txt.zip: 127.0.0.1:9",
    "download_02_kor_med_test": "sean0042/KorMedMCQA: the hub",
    "download_model": "google/medgemma-4b-it: the hub",
}


@pytest.mark.parametrize("program", FROM_HUB)
def test_an_unreachable_hub_is_one_message_with_the_next_command(program, tmp_path, get_here, monkeypatch):
    # A port that nothing listens on; the connection is refused at once.
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("MEDGEMMA_KOREAN_URL_MIRROR", "http://127.0.0.1:9")
    outcome = get_here(program)
    assert outcome.code == 2 and outcome.stderr == "", outcome.text
    *waits, line = outcome.text.strip().splitlines()
    assert len(waits) == 3 and all("trying again in" in wait for wait in waits)
    assert line.startswith("error: ") and f"{FROM_HUB[program]} cannot be reached (" in line
    assert re.search(rf"then run: python script/download/{program}\.py --model medgemma-4b$", line)
    logs = "".join(p.read_text(encoding="utf-8") for p in (tmp_path / "logs").iterdir())
    assert "cannot be reached" in logs and records.row_files(tmp_path / "data") == []


def test_the_next_command_names_the_same_data_and_run(tmp_path, get):
    (tmp_path / "my data").mkdir()
    outcome = get("download_02_kor_med_test", "--data-dir", "my data", "--name", "trial", HF_HUB_OFFLINE="1")
    assert outcome.text.strip().endswith("--model medgemma-4b --data-dir 'my data' --name trial")


@pytest.mark.parametrize("program", FROM_HUB)
def test_offline_mode_is_named(program, get_here):
    outcome = get_here(program, HF_HUB_OFFLINE="1")
    (line,) = outcome.text.strip().splitlines()
    assert outcome.code == 2 and "HF_HUB_OFFLINE" in line and "then run: python script/download/" in line


def test_a_hub_that_comes_back_is_asked_for_the_rest(hub, get_here, tmp_path):
    """A run that broke off after one of four sources must not pass for a folder that a person filled."""
    repositories.publish_all(hub)
    hub.fault("cut", "20231101.ko", None, where="cdn")
    outcome = get_here("download_00_plain_text")
    assert outcome.code == 2 and "wikimedia/wikipedia: the hub cannot be reached" in outcome.text
    assert [p.name for p in records.row_files(tmp_path / "data")] == ["namuwiki_20210301.parquet"]
    hub.clear_faults()
    hub.reset_counts()
    assert get_here("download_00_plain_text").code == 0
    assert len(hub.sent) == 5 and "namuwiki_20210301.parquet" not in hub.sent
    record = records.read_json(tmp_path / "data/01_raw/.stages/download_00_plain_text.json")
    assert set(record["origins"]) == {"namu_wiki", "wikipedia-korean", "c4_korean", "english_replay"}
    hub.reset_counts()
    assert get_here("download_00_plain_text").code == 0 and hub.requests == []


# the exam -----------------------------------------------------------------------------------------------

EXAM = "download_02_kor_med_test"


def exam_folder(tmp_path):
    return tmp_path / "data/01_raw/02_kor_med_test"


def not_taken(tmp_path, program=EXAM):
    """Neither questions nor a record."""
    return not exam_folder(tmp_path).exists() and not (tmp_path / f"data/01_raw/.stages/{program}.json").exists()


def test_the_exam_questions_have_their_published_numbers_and_their_exam(hub, get, tmp_path):
    hub.add("dataset", "sean0042/KorMedMCQA", repositories.exam_files())
    assert get(EXAM).code == 0
    splits = {p.stem: list(records.read_jsonl(p)) for p in exam_folder(tmp_path).iterdir()}
    assert {name: len(rows) for name, rows in splits.items()} == {
        "train": 3401,
        "dev": 1059,
        "test": 3009,
        "fewshot": 20,
    }
    exams = {exam: sum(row["exam_type"] == exam for row in splits["dev"]) for exam in repositories.SIZES}
    assert exams == {exam: sizes["dev"] for exam, sizes in repositories.SIZES.items()}
    first = repositories.exam_rows("nurse", "dev", 1)[0] | {"exam_type": "nurse"}
    assert next(row for row in splits["dev"] if row["exam_type"] == "nurse") == first


def test_the_exam_questions_are_converted_or_not_there_at_all(hub, get_here, tmp_path, monkeypatch):
    hub.add("dataset", "sean0042/KorMedMCQA", repositories.exam_files())
    real = records.write_jsonl

    def killed(path, rows):
        if path.name == "dev.jsonl":
            raise KeyboardInterrupt
        return real(path, rows)

    monkeypatch.setattr(records, "write_jsonl", killed)
    assert get_here(EXAM).code == 130 and not_taken(tmp_path)
    monkeypatch.setattr(records, "write_jsonl", real)
    hub.reset_counts()
    assert get_here(EXAM).code == 0 and hub.requests == []  # its files are there
    assert {p.name for p in exam_folder(tmp_path).iterdir()} == {
        "train.jsonl",
        "dev.jsonl",
        "test.jsonl",
        "fewshot.jsonl",
    }


def test_exam_questions_that_are_there_twice_are_refused_with_the_numbers(hub, get, tmp_path):
    """So one revision was published: doctor's train split in two equal shards."""
    files = dict(repositories.exam_files())
    shard = files.pop("doctor/train-00000-of-00001.parquet")
    twice = {f"doctor/train-0000{i}-of-00002.parquet": shard for i in (0, 1)}
    hub.add("dataset", "sean0042/KorMedMCQA", files | twice)
    for _ in range(2):  # nor does it pass the second time
        outcome = get(EXAM)
        assert outcome.code == 2 and outcome.text.count("error:") == 1, outcome.text
        rows = "doctor train: 3,780 rows, expected 1,890 (in doctor/train-00000-of-00002.parquet, doctor/train-00001"
        assert rows in outcome.text
        assert "train: 1,890 questions more than once, first exam_type doctor, year 2015" in outcome.text
        assert f"{hub.url}/datasets/sean0042/KorMedMCQA" in outcome.text
        assert outcome.text.strip().endswith("download_02_kor_med_test.py --model medgemma-4b --update")
        assert not_taken(tmp_path)


def test_all_splits_of_another_size_are_named_at_once(hub, get_here, tmp_path):
    files = repositories.exam_files() | {
        "nurse/dev-00000-of-00001.parquet": repositories.parquet(repositories.exam_rows("nurse", "dev", 290)),
        "pharm/fewshot-00000-of-00001.parquet": repositories.parquet(repositories.exam_rows("pharm", "fewshot", 6)),
    }
    del files["dentist/test-00000-of-00001.parquet"]
    hub.add("dataset", "sean0042/KorMedMCQA", files)
    outcome = get_here(EXAM)
    assert outcome.code == 2 and not_taken(tmp_path)
    for words in (
        "nurse dev: 290 rows, expected 291",
        "pharm fewshot: 6 rows, expected 5",
        "dentist test: 0 rows, expected 811 (in no file)",
    ):
        assert words in outcome.text
    assert "doctor" not in outcome.text


def test_a_missing_column_of_the_exam_is_named(hub, get_here, tmp_path):
    rows = [{k: v for k, v in row.items() if k != "E"} for row in repositories.exam_rows("pharm", "test", 885)]
    files = repositories.exam_files() | {"pharm/test-00000-of-00001.parquet": repositories.parquet(rows)}
    hub.add("dataset", "sean0042/KorMedMCQA", files)
    outcome = get_here(EXAM)
    assert outcome.code == 2 and "pharm/test-00000-of-00001.parquet: no column E" in outcome.text
    assert not_taken(tmp_path)


# sentence pairs -----------------------------------------------------------------------------------------

PAIRS = "download_01_english_korean"
OLDER = "/OPUS-Tatoeba/v2022-03-03/moses/en-ko.txt.zip"
NEWS = "/jungyeul/korean-parallel-corpora/raw/master/korean-english-news-v1/korean-english-park.train.tar.gz"


def pairs_of(tmp_path, key="opus_tatoeba_ko_en"):
    return list(records.read_jsonl(tmp_path / f"data/01_raw/03_korean_english/{key}/train.jsonl"))


def test_pairs_are_unpacked_and_their_archive_is_kept_out_of_sight(hub, get, tmp_path):
    pairs = [
        ("A fever.", "열이 난다."),
        ("", "빈 줄"),
        ("Form\x0cfeed and \u2028 line.", "쪽 넘김"),
        (" Pain. ", "통증 "),
    ]
    hub.serve(repositories.OPUS, repositories.pairs_zip(pairs))
    assert get(PAIRS).code == 0
    assert pairs_of(tmp_path) == [{"en": en.strip(), "ko": ko.strip()} for en, ko in pairs if en]
    assert not any(r["authorized"] for r in hub.requests)
    hub.reset_counts()
    assert get(PAIRS).code == 0 and hub.requests == []


def test_an_older_version_is_taken_where_the_newest_is_gone(hub, get_here, tmp_path):
    hub.serve(OLDER, repositories.pairs_zip())
    assert get_here(PAIRS).code == 0 and len(pairs_of(tmp_path)) == 59
    pin = records.read_json(tmp_path / "data/01_raw/.stages/origins/opus_tatoeba_ko_en.json")
    assert OLDER in json.dumps(pin["files"])


def test_where_no_version_is_left_a_person_can_bring_the_file(hub, get_here, tmp_path):
    outcome = get_here(PAIRS)
    assert outcome.code == 2 and "not found (404)" in outcome.text
    assert repositories.OPUS in outcome.text and OLDER in outcome.text
    assert outcome.text.strip().endswith("python script/download/download_01_english_korean.py --model medgemma-4b")
    place = "data/01_raw/.published/opus_tatoeba_ko_en"
    assert f"put the file in {place}" in outcome.text
    (tmp_path / place).mkdir(parents=True)
    assert get_here(PAIRS).text == outcome.text  # an empty folder is none
    (tmp_path / place / "en-ko.txt.zip").write_bytes(repositories.pairs_zip())
    assert get_here(PAIRS).code == 0 and len(pairs_of(tmp_path)) == 59


def test_the_news_pairs_come_when_they_are_named(hub, get_here, tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, text in (("en", "Doctors met.\nPrices fell.\n"), ("ko", "의사들이 만났다.\n값이 내렸다.\n")):
            member = tarfile.TarInfo(f"korean-english-park.train.{name}")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    hub.serve(NEWS, buffer.getvalue())
    outcome = get_here(PAIRS, "--source", "news_ko_en")
    assert outcome.code == 0, outcome.text
    assert pairs_of(tmp_path, "news_ko_en")[1] == {"en": "Prices fell.", "ko": "값이 내렸다."}


def test_the_same_pairs_from_the_hub(hub, get_here, tmp_path):
    rows = [{"english": "A fever.", "non_english": "열."}]
    hub.add(
        "dataset",
        "sentence-transformers/parallel-sentences-tatoeba",
        {"en-ko/train-00000-of-00001.parquet": repositories.parquet(rows), "en-de/x.parquet": b"another language"},
    )
    assert get_here(PAIRS, "--source", "tatoeba_sentences").code == 0
    assert set(hub.sent) == {"en-ko/train-00000-of-00001.parquet"}


@pytest.mark.parametrize(
    "archive, words",
    [
        (repositories.pairs_zip(**{"Tatoeba.en-ko.ko": "하나\n".encode()}), "59 English and 1 Korean lines"),
        (repositories.pairs_zip(other__en=b"Two\n"), "two files end in .en; expected one"),
        (repositories.pairs_zip()[:-200], "needs a file ending in .en|damaged archive"),
        (repositories.pairs_zip().replace(b"Tatoeba.en-ko.ko", b"Tatoeba.en-ko.de"), "it holds README, LICENSE"),
        (b"<html>moved</html>", "damaged archive"),
        (
            repositories.pairs_zip(**{"Tatoeba.en-ko.ko": "하나\n둘\n".encode("cp949")}),
            "Tatoeba.en-ko.ko, line 1: not UTF-8",
        ),
    ],
)
def test_an_archive_that_is_not_as_expected_is_refused(archive, words, hub, get_here, tmp_path):
    hub.serve(repositories.OPUS, archive)
    outcome = get_here(PAIRS)
    assert outcome.code == 2 and outcome.text.count("error:") == 1 and "Traceback" not in outcome.text, outcome.text
    assert re.search(words, outcome.text) and "en-ko.txt.zip" in outcome.text
    assert records.row_files(tmp_path / "data") == [] and not list(tmp_path.rglob("download_01_english_korean.json"))


def test_an_archive_that_was_damaged_on_its_way_is_fetched_again_when_it_is_deleted(hub, get_here, tmp_path):
    """No hash was announced for it, so that nothing but its content can tell."""
    archive = repositories.pairs_zip()
    hub.serve(repositories.OPUS, archive)
    hub.fault("altered", "en-ko.txt.zip", at=archive.index(b"Tatoeba.en-ko.ko") + 60)
    outcome = get_here(PAIRS)
    assert outcome.code == 2 and "damaged archive" in outcome.text and "delete it" in outcome.text, outcome.text
    (tmp_path / "data/01_raw/.published/opus_tatoeba_ko_en/en-ko.txt.zip").unlink()
    assert get_here(PAIRS).code == 0 and len(pairs_of(tmp_path)) == 59


# instruction sets ---------------------------------------------------------------------------------------

SETS = "download_instruction"
O1 = {"Question": "두통?", "Response": "쉬세요."}


def add_set(hub, key, rows, name="data/train-00000-of-00001.parquet", **options):
    content = repositories.parquet(rows) if name.endswith(".parquet") else "\n".join(map(json.dumps, rows)).encode()
    hub.add("dataset", BY_KEY[key].id, {name: content, "README.md": b"#"}, **options)


def set_record(tmp_path, key):
    return records.read_json(tmp_path / f"data/01_raw/.stages/{SETS}.{key}.json")


@pytest.mark.parametrize("column", ["Complex_Cot", "Complex_CoT"])
def test_a_column_is_known_by_either_name(column, hub, get_here, tmp_path):
    add_set(hub, "medical_o1_reasoning_ko", [O1 | {column: "먼저"}] * 3)
    outcome = get_here(SETS, "--key", "medical_o1_reasoning_ko")
    assert outcome.code == 0 and "3 rows, licence apache-2.0" in outcome.stdout, outcome.text
    record = set_record(tmp_path, "medical_o1_reasoning_ko")
    assert record["counts"] == {"data/train-00000-of-00001.parquet": 3}
    (warning,) = record["warnings"]
    assert warning in outcome.stdout and "3 rows; 25,682 were published" in warning


def test_a_column_that_was_seen_and_is_gone_is_refused(hub, get_here, tmp_path):
    add_set(hub, "medical_o1_reasoning_ko", [O1])
    outcome = get_here(SETS, "--key", "medical_o1_reasoning_ko")
    assert outcome.code == 2 and "no column Complex_Cot or Complex_CoT" in outcome.text
    assert not list((tmp_path / "data/01_raw/.stages").glob("*.json"))


def test_a_column_that_was_only_read_about_is_a_warning(hub, get_here, tmp_path):
    add_set(hub, "kormedlawqa", [{"question": "법?", "choices": "가"}], "data/train.jsonl")
    outcome = get_here(SETS, "--key", "kormedlawqa")
    assert outcome.code == 0 and "no column options; no column answer" in outcome.stdout
    assert any("no column options" in warning for warning in set_record(tmp_path, "kormedlawqa")["warnings"])


def test_a_kind_is_all_its_sets_and_the_gated_one_is_asked_for_first(hub, get_here, tmp_path):
    reasoning = [s for s in SOURCES if s.kind == "reasoning"]
    for source in reasoning:
        row = {column.split("|")[0]: "글" for column in source.columns} or {"text": "글"}
        add_set(hub, source.key, [row], gated="auto" if source.gated else False)
    gated = [s for s in reasoning if s.gated]
    assert gated and gated[0] is not reasoning[0]
    outcome = get_here(SETS, "--kind", "reasoning")
    assert outcome.code == 2 and hub.sent_total == 0, outcome.text
    for source in gated:
        assert f"{source.id} needs its terms accepted: open {hub.url}/datasets/{source.id}" in outcome.text
    assert outcome.text.strip().endswith(f"--model medgemma-4b --key {gated[-1].key}")
    hub.tokens[repositories.TOKEN] |= {s.id for s in gated}
    assert get_here(SETS, "--kind", "reasoning").code == 0
    folders = {p.name for p in (tmp_path / "data/01_raw/by_source").iterdir()}
    assert folders == {s.key for s in reasoning}
    assert "terms accepted" in (tmp_path / "logs/pipeline_medgemma-4b.log").read_text(encoding="utf-8")


def test_what_serves_evaluation_is_fetched_only_when_it_is_named(hub, get_here, tmp_path, load_program):
    program = load_program(SETS)
    named = {s.key for s in program.chosen(program.make_parser().parse_args(["--all"]))}
    assert named and not named & {s.key for s in SOURCES if s.kind == "evaluation only"}
    add_set(hub, "pubmedqa_ko", [{"QUESTION": "?", "CONTEXTS": "", "LONG_ANSWER": "예"}], "data/test.parquet")
    assert get_here(SETS, "--key", "pubmedqa_ko").code == 0 and set(hub.sent) == {"data/test.parquet"}


@pytest.mark.parametrize("options, words", [((), "--key KEY"), (("--key", "nothing"), "known are asan_healthinfo")])
def test_a_choice_is_needed(options, words, get):
    outcome = get(SETS, *options)
    assert outcome.code == 2 and words in outcome.text and len(outcome.text.splitlines()) == 1


# the model ----------------------------------------------------------------------------------------------

MODEL = "download_model"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
UNWANTED = ("pytorch_model.bin", "README.md")


def model_files(**changes):
    """What is published; changes by name, with "__" for ".", None removes one."""
    files = repositories.small_model_files() | {k.replace("__", "."): v for k, v in changes.items()}
    return {name: data for name, data in files.items() if data is not None}


def weights(number):
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    return struct.pack("<Q", len(header)) + header + struct.pack("<2f", number, number)


@pytest.fixture
def published(hub):
    files = model_files() | {ONE: weights(1), TWO: weights(2)}
    hub.add("model", "google/medgemma-4b-it", files, gated="manual")
    return files


@pytest.fixture
def bring(tmp_path, published):
    """bring(name=bytes) puts the published files there by hand, changed or left out (None)."""

    def bring(changes):
        folder = tmp_path / "model/raw/medgemma-4b"
        folder.mkdir(parents=True)
        for name, data in (published | changes).items():
            if name not in UNWANTED and data is not None:
                (folder / name).write_bytes(data)
        return folder

    return bring


def model_record(tmp_path):
    return records.read_json(tmp_path / "model/raw/medgemma-4b/stage.json")


def test_a_model_that_was_brought_is_used_offline(hub, get, bring, tmp_path):
    folder = bring({})
    before = (folder / ONE).stat().st_ino
    outcome = get(MODEL, HF_HUB_OFFLINE="1")
    assert outcome.code == 0 and "was brought by hand" in outcome.stdout, outcome.text
    assert hub.requests == [] and (folder / ONE).stat().st_ino == before
    record = model_record(tmp_path)
    assert record["origins"]["medgemma-4b"]["origin"] == "brought by hand"
    assert record["warnings"] == ["brought by hand, not compared with the published model"]
    again = get(MODEL, HF_HUB_OFFLINE="1")
    assert again.code == 0 and "already complete" in again.stdout, again.text


def test_of_a_model_that_was_brought_only_what_differs_is_fetched(hub, get_here, bring, tmp_path, published):
    folder = bring({TWO: weights(3), "tokenizer.json": None})
    before = (folder / ONE).stat().st_ino
    assert get_here(MODEL).code == 0
    assert set(hub.sent) == {TWO, "tokenizer.json"}
    assert (folder / ONE).stat().st_ino == before and (folder / TWO).read_bytes() == published[TWO]
    hub.reset_counts()
    assert get_here(MODEL).code == 0 and hub.requests == []


@pytest.mark.parametrize(
    "changes, words",
    [
        ({TWO: weights(2)[:-1]}, f"{TWO} is no whole safetensors file"),
        ({TWO: b""}, f"{TWO} is no whole safetensors file"),
        ({TWO: None}, f"{TWO} is missing, and model.safetensors.index.json names it"),
        ({ONE: None, TWO: None, "model.safetensors.index.json": None}, "no safetensors weights"),
        ({"config.json": None}, "config.json is missing"),
        ({"tokenizer.json": None, ONE: b"\xff" * 200}, "tokenizer.json is missing"),
    ],
)
def test_a_model_that_was_brought_and_is_not_whole_is_refused_offline(changes, words, get_here, bring, tmp_path):
    folder = bring(changes)
    before = tree(folder)
    outcome = get_here(MODEL, HF_HUB_OFFLINE="1")
    assert outcome.code == 2 and outcome.text.count("error:") == 1, outcome.text
    assert "is not a whole model" in outcome.text and words in outcome.text
    assert tree(folder) == before


def test_a_published_index_that_names_a_missing_shard_is_refused(hub, get, tmp_path, published):
    hub.add("model", "google/medgemma-4b-it", {k: v for k, v in published.items() if k != TWO}, gated="manual")
    outcome = get(MODEL)
    assert outcome.code == 2 and f"{TWO} is missing, and model.safetensors.index.json names it" in outcome.text
    assert not (tmp_path / "model/raw/medgemma-4b").exists()


def test_a_newer_model_leaves_the_old_one_aside(hub, get_here, tmp_path, published):
    assert get_here(MODEL).code == 0
    folder = tmp_path / "model/raw/medgemma-4b"
    before = (folder / ONE).stat().st_ino
    hub.add("model", "google/medgemma-4b-it", published | {TWO: weights(5)}, gated="manual")
    hub.reset_counts()
    assert get_here(MODEL).code == 0 and hub.requests == []
    outcome = get_here(MODEL, "--update")
    assert outcome.code == 0 and set(hub.sent) == {TWO}, outcome.text
    assert (folder / TWO).read_bytes() == weights(5) and (folder / ONE).stat().st_ino == before
    assert (tmp_path / "model/raw/medgemma-4b.previous" / TWO).read_bytes() == weights(2)
    assert get_here(MODEL).code == 0


def test_a_deleted_file_of_the_model_is_fetched_again_with_force(hub, get_here, tmp_path, published):
    assert get_here(MODEL).code == 0
    (tmp_path / "model/raw/medgemma-4b" / TWO).unlink()
    hub.reset_counts()
    outcome = get_here(MODEL)
    assert outcome.code == 2 and f"{TWO} is missing" in outcome.text and "--force" in outcome.text
    assert get_here(MODEL, "--force").code == 0 and set(hub.sent) == {TWO}


# what the check refuses ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "program, name, content, part",
    [
        (
            "download_00_plain_text",
            "00_korean/namu_wiki/train.jsonl",
            '{"body": "x"}\n',
            'no "text" column; found body',
        ),
        ("download_00_plain_text", "00_korean/namu_wiki/train.jsonl", "", "an empty file"),
        ("download_00_plain_text", "00_english_replay/train.jsonl", "{\n", "line 1"),
        (
            "download_01_english_korean",
            "03_korean_english/sample_ko_en/train.jsonl",
            '{"de": "x", "ko": "y"}',
            "found de",
        ),
        ("download_02_kor_med_test", "02_kor_med_test/dev.jsonl", "", "no usable questions"),
        ("download_02_kor_med_test", "02_kor_med_test/test.jsonl", '{"question": "x"}', "missing column"),
    ],
)
def test_unreadable_data_are_named(root, load_program, program, name, content, part):
    (raw_of(root) / name).write_text(content, encoding="utf-8")
    with pytest.raises(PipelineError) as error:
        load_program(program).main([])
    assert os.path.basename(name) in str(error.value) and part in str(error.value)
    assert not (raw_of(root) / f".stages/{program}.json").exists()


def test_a_missing_split_is_named(root, load_program):
    (raw_of(root) / "02_kor_med_test/test.jsonl").unlink()
    with pytest.raises(PipelineError, match=r"missing: .*02_kor_med_test/test\.jsonl"):
        load_program("download_02_kor_med_test").main([])


def test_an_empty_source_folder_is_named(root, load_program):
    (raw_of(root) / "00_korean/extra").mkdir()
    with pytest.raises(PipelineError, match="extra: no text files"):
        load_program("download_00_plain_text").main([])


# made here of what was fetched --------------------------------------------------------------------------


def exam_with_a_question_less() -> dict[str, bytes]:
    shard = repositories.parquet(repositories.exam_rows("nurse", "dev", 290))
    return repositories.exam_files() | {"nurse/dev-00000-of-00001.parquet": shard}


def test_a_deleted_split_is_made_again(hub, get_here, tmp_path):
    hub.add("dataset", "sean0042/KorMedMCQA", repositories.exam_files())
    assert get_here(EXAM).code == 0
    file = tmp_path / "data/01_raw/02_kor_med_test/dev.jsonl"
    before = file.read_bytes()
    file.unlink()
    hub.reset_counts()
    assert get_here(EXAM).code == 0 and file.read_bytes() == before and hub.requests == []


def test_an_altered_split_is_made_again_with_force(hub, get_here, tmp_path):
    hub.add("dataset", "sean0042/KorMedMCQA", repositories.exam_files())
    assert get_here(EXAM).code == 0
    file = tmp_path / "data/01_raw/02_kor_med_test/dev.jsonl"
    before = file.read_bytes()
    file.write_bytes(before.replace(b"mmHg", b"cmHg", 1))
    assert get_here(EXAM).code == 2
    assert get_here(EXAM, "--force").code == 0 and file.read_bytes() == before
    assert get_here(EXAM, "--force").code == 0 and len(list((tmp_path / "data/01_raw").glob(".02_*"))) == 1


def test_an_update_that_is_refused_stays_refused(hub, get_here):
    hub.add("dataset", "sean0042/KorMedMCQA", repositories.exam_files())
    assert get_here(EXAM).code == 0
    hub.add("dataset", "sean0042/KorMedMCQA", exam_with_a_question_less())
    assert get_here(EXAM, "--update").code == 2
    outcome = get_here(EXAM)
    assert outcome.code == 2 and "nurse dev: 290 rows, expected 291" in outcome.text
    hub.add("dataset", "sean0042/KorMedMCQA", repositories.exam_files())
    assert get_here(EXAM, "--update").code == 0 and get_here(EXAM).code == 0


def test_pairs_follow_their_archive(hub, get_here, tmp_path):
    hub.serve(repositories.OPUS, repositories.pairs_zip())
    assert get_here(PAIRS).code == 0
    file = tmp_path / "data/01_raw/03_korean_english/opus_tatoeba_ko_en/train.jsonl"
    before = file.read_bytes()
    file.write_bytes(before.replace(b"fever", b"favor"))
    assert get_here(PAIRS).code == 2
    assert get_here(PAIRS, "--force").code == 0 and file.read_bytes() == before
    hub.serve(repositories.OPUS, repositories.pairs_zip(other__en=b"x\n"))
    assert get_here(PAIRS, "--update").code == 2 and get_here(PAIRS).code == 2
    hub.serve(repositories.OPUS, repositories.pairs_zip([("a", "가")]))
    assert get_here(PAIRS, "--update").code == 0 and len(file.read_text(encoding="utf-8").splitlines()) == 1
    assert get_here(PAIRS).code == 0
