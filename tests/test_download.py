"""The download programs without a network: check in place, list all that is missing, one message without the hub."""

import json
import os
import re

import pytest

from medgemma_korean import hub, records
from medgemma_korean.cli import PipelineError
from medgemma_korean.sources import BY_KEY, SOURCES

# A port that nothing listens on; the connection is refused at once.
AWAY = {
    "HF_ENDPOINT": "http://127.0.0.1:9",
    "HF_HUB_OFFLINE": "",
    "HF_HUB_DOWNLOAD_TIMEOUT": "2",
    "HF_HUB_ETAG_TIMEOUT": "2",
    "HF_TOKEN": "hf_abcdefghijklmnop",
}
OFFLINE = {**AWAY, "HF_HUB_OFFLINE": "1"}


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


def test_everything_wrong_with_the_dictionary_is_said_at_once(root, run_program):
    folder = raw_of(root) / "01_medical_dict"
    (folder / "bilingual_medical_dict.json").unlink()
    (folder / "korean_animal_medical_dict.jsonl").unlink()
    (folder / "bilingual_medical_dict_ko_en.json").write_text('{"간": 3}', encoding="utf-8")
    (folder / "korean_medical_dict.jsonl").write_text('{"term": "간", "definition": "Liver"}\n{', encoding="utf-8")
    (folder / "bilingual_medical_dict_categorized.json").write_text("{}")
    outcome = run_program("download_01_medical_dict")
    assert outcome.code == 2 and "Traceback" not in outcome.text
    for part in (
        "bilingual_medical_dict.json is missing",
        "korean_animal_medical_dict.jsonl is missing",
        "bilingual_medical_dict_ko_en.json, '간': expected a text, found int",
        "korean_medical_dict.jsonl, line 2: not valid JSON",
        "bilingual_medical_dict_categorized.json has no entries",
        "MANUAL_DATA.md",
        "--skip-01",
    ):
        assert part in outcome.text, part
    assert not (raw_of(root) / ".stages/download_01_medical_dict.json").exists()


def test_download_all_stops_at_the_dictionary_before_any_download(tmp_path, run_program):
    """A person who lacks the files learns it first, not after hours."""
    (tmp_path / "data").mkdir()
    outcome = run_program("download_all", "--model", "medgemma-4b", env=AWAY)
    assert outcome.code == 2 and outcome.text.count("is missing") == 5 and "--skip-01" in outcome.text
    assert "hub" not in outcome.text


# the hub is away ----------------------------------------------------------------------------------------

FROM_HUB = {
    "download_00_plain_text": "heegyu/namuwiki",
    "download_01_english_korean": "sentence-transformers/parallel-sentences-tatoeba",
    "download_02_kor_med_test": "sean0042/KorMedMCQA",
    "download_model": "google/medgemma-4b-it",
}


@pytest.mark.parametrize("program", FROM_HUB)
def test_an_unreachable_hub_is_one_message_with_the_next_command(program, tmp_path, run_program):
    (tmp_path / "data").mkdir()
    outcome = run_program(program, "--model", "medgemma-4b", env=AWAY, timeout=30)
    assert outcome.code == 2, outcome.text
    (line,) = outcome.text.strip().splitlines()
    assert line.startswith(f"error: {FROM_HUB[program]}: the hub cannot be reached (")
    assert re.search(rf"then run: python script/download/{program}\.py --model medgemma-4b$", line)
    logs = "".join(p.read_text(encoding="utf-8") for p in (tmp_path / "logs").iterdir())
    assert "hub cannot be reached" in logs and "hf_abc" not in logs + outcome.text
    assert records.row_files(tmp_path / "data") == []


def test_the_next_command_names_the_same_data_and_run(tmp_path, run_program):
    (tmp_path / "my data").mkdir()
    outcome = run_program(
        "download_02_kor_med_test", "--model", "medgemma-4b", "--data-dir", "my data", "--name", "trial", env=AWAY
    )
    assert outcome.text.strip().endswith("--model medgemma-4b --data-dir 'my data' --name trial")


def test_offline_mode_is_named(tmp_path, run_program):
    (tmp_path / "data").mkdir()
    outcome = run_program("download_00_plain_text", "--model", "medgemma-4b", env=OFFLINE, timeout=30)
    (line,) = outcome.text.strip().splitlines()
    assert outcome.code == 2 and "HF_HUB_OFFLINE" in line and "then run: python script/download/" in line


def test_a_hub_that_comes_back_is_asked_for_the_rest(tmp_path, monkeypatch, load_program):
    """A run that broke off after one of four sources must not pass for a folder that a person filled."""
    fetched = []

    def fetch(source, target, *, repo_type, what):
        if len(fetched) == 1 and not again:
            raise PipelineError(f"{source.id}: the hub cannot be reached; {what}")
        fetched.append(source.key)
        records.write_jsonl(target / "train.jsonl", [{"text": "가나다"}])
        return {"id": source.id, "revision": "abc", "licence": source.licence, "files": 1}

    monkeypatch.setattr(hub, "fetch", fetch)
    (tmp_path / "data").mkdir()
    main, again = load_program("download_00_plain_text").main, False
    with pytest.raises(PipelineError, match="cannot be reached"):
        main(["--model", "medgemma-4b"])
    assert fetched == ["namu_wiki"]
    again = True
    assert main(["--model", "medgemma-4b"]) == 0
    assert fetched == ["namu_wiki", "wikipedia-korean", "c4_korean", "english_replay"]
    record = records.read_json(tmp_path / "data/01_raw/.stages/download_00_plain_text.json")
    assert set(record["origins"]) == set(fetched) and not list(tmp_path.rglob("*.begun"))
    assert main(["--model", "medgemma-4b"]) == 0 and len(fetched) == 4


def test_the_exam_questions_are_converted_or_not_there_at_all(tmp_path, monkeypatch, load_program):
    program = load_program("download_02_kor_med_test")
    monkeypatch.setattr(program, "EXPECTED", {"train": 4, "dev": 4, "test": 4, "fewshot": 4})

    def fetch(source, target, *, repo_type, what):
        import pyarrow
        import pyarrow.parquet

        for exam in program.EXAMS:
            for split in program.EXPECTED:
                row = {"subject": exam, "year": 2020, "period": 1, "q_number": 1, "question": f"{exam} {split}?"}
                row |= {x: f"{exam} {x}" for x in "ABCDE"} | {"answer": 2, "cot": ""}
                (target / exam).mkdir(parents=True, exist_ok=True)
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), target / exam / f"{split}-0000.parquet")
        return {"id": source.id}

    monkeypatch.setattr(hub, "fetch", fetch)
    folder = tmp_path / "data/01_raw/02_kor_med_test"
    (tmp_path / "data").mkdir()
    real = program.records.write_jsonl

    def killed(path, rows):
        if path.name == "dev.jsonl":
            raise KeyboardInterrupt
        return real(path, rows)

    monkeypatch.setattr(program.records, "write_jsonl", killed)
    with pytest.raises(KeyboardInterrupt):
        program.main(["--model", "medgemma-4b"])
    assert not folder.exists()
    monkeypatch.setattr(program.records, "write_jsonl", real)
    assert program.main(["--model", "medgemma-4b"]) == 0
    assert {p.name for p in folder.iterdir()} == {"train.jsonl", "dev.jsonl", "test.jsonl", "fewshot.jsonl"}
    row = json.loads((folder / "dev.jsonl").read_text().split("\n")[1])
    assert (row["exam_type"], row["question"], row["answer"]) == ("nurse", "nurse dev?", 2)


def test_another_number_of_questions_is_refused(tmp_path, load_program):
    with pytest.raises(PipelineError, match="expected .*3401.*the data set has changed"):
        load_program("download_02_kor_med_test").convert(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# what the check refuses ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "program, name, content, part",
    [
        (
            "download_00_plain_text",
            "00_korean/namu_wiki/train.jsonl",
            '{"body": "x"}\n',
            'no column "text"; found body',
        ),
        ("download_00_plain_text", "00_korean/namu_wiki/train.jsonl", "", "no rows"),
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
    with pytest.raises(PipelineError, match="extra: no row files"):
        load_program("download_00_plain_text").main([])


# the catalogue ------------------------------------------------------------------------------------------


def test_every_source_has_a_licence_and_a_place():
    assert len(BY_KEY) == len(SOURCES)
    for source in SOURCES:
        assert source.licence and source.stage and source.kind
        if source.kind not in ("model", "dictionary"):
            assert source.folder and source.files, source.key
    for key in ("medgemma-4b", "medgemma-27b"):
        assert BY_KEY[key].gated and BY_KEY[key].licence.startswith("Health AI Developer Foundations")
    assert BY_KEY["medgemma-27b"].id == "google/medgemma-27b-text-it"  # -27b-it is another, multimodal model


def test_files_that_the_catalogue_fetches_can_be_read():
    """C4 comes as .json.gz: whatever a pattern fetches, records must know how to read."""
    for source in SOURCES:
        if source.kind in ("plain text", "replay", "translation", "MCQ"):
            for pattern in source.files:
                assert pattern.endswith(records.ROW_SUFFIXES), f"{source.key}: {pattern}"
