"""The folder contract: where things lie, and that two runs never share an output."""

from pathlib import Path

import pytest

from medgemma_korean import paths, profiles
from medgemma_korean.paths import DRIVER_STAGES, REPOSITORY, RunPaths, project_root, show

OUTPUT_FOLDERS = (
    "tokenizer",
    "raw_lora_added",
    "trained_00",
    "trained_01",
    "another_lora_added",
    "trained_02",
    "loop",
    "report",
)


def of(model="tiny", default="data/sample", data_dir=None, name=None):
    return RunPaths.of(model, default, data_dir, name)


def test_root_is_the_repository_or_the_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("MEDGEMMA_KOREAN_ROOT", str(tmp_path))
    assert project_root() == tmp_path.resolve()
    monkeypatch.setenv("MEDGEMMA_KOREAN_ROOT", "")
    assert project_root() == REPOSITORY
    monkeypatch.delenv("MEDGEMMA_KOREAN_ROOT")
    assert project_root() == REPOSITORY
    assert (REPOSITORY / "script" / "medgemma_korean").is_dir()


def test_folders_as_designed(tmp_path):
    p = of()
    relative = {
        "raw": "data/sample/01_raw",
        "raw_korean": "data/sample/01_raw/00_korean",
        "raw_dictionary": "data/sample/01_raw/01_medical_dict",
        "raw_mcq": "data/sample/01_raw/02_kor_med_test",
        "raw_pairs": "data/sample/01_raw/03_korean_english",
        "plain_text": "data/sample/02_refined/00_plain_text",
        "english_replay": "data/sample/02_refined/00_english_replay",
        "dictionary": "data/sample/02_refined/01_medical_dict.json",
        "pairs": "data/sample/02_refined/01_english_korean",
        "mcq": "data/sample/02_refined/02_kor_med_test",
        "characters": "data/sample/02_refined/02_char_dict.json",
        "raw_model": "model/raw/tiny",
        "tokenizer": "model/tokenizer/tiny",
        "raw_lora_added": "model/raw_lora_added/tiny",
        "trained_00": "model/00_trained/tiny",
        "trained_01": "model/01_trained/tiny",
        "another_lora_added": "model/01_another_lora_added/tiny",
        "trained_02": "model/02_trained/tiny",
        "loop": "model/01_02_loop/tiny",
        "report": "model/report/tiny",
        "log": "logs/pipeline_tiny.log",
        "pid": "logs/pipeline_tiny.pid",
        "holder": "logs/pipeline_tiny.lock.json",
        "progress": "logs/progress_tiny.txt",
        "metrics": "logs/metrics_tiny.jsonl",
    }
    assert {k: str(getattr(p, k).relative_to(tmp_path)) for k in relative} == relative
    assert p.scores("base") == tmp_path / "model/report/tiny/scores/base.json"


def test_records_lie_with_the_data_they_vouch_for(tmp_path):
    p = of()
    assert p.record("download_00_plain_text") == tmp_path / "data/sample/01_raw/.stages/download_00_plain_text.json"
    assert p.record("refine_01_medical_dict") == tmp_path / "data/sample/02_refined/.stages/refine_01_medical_dict.json"


def test_another_data_folder_is_another_run(tmp_path):
    own, other = of(), of(data_dir=str(tmp_path / "hospital"))
    assert (own.name, other.name) == ("tiny", "tiny-hospital")
    assert other.plain_text == tmp_path / "hospital/02_refined/00_plain_text"
    assert own.raw_model == other.raw_model  # what came from the hub is shared
    for folder in (*OUTPUT_FOLDERS, "log", "pid", "holder", "progress", "progress_state", "metrics"):
        assert getattr(own, folder) != getattr(other, folder), folder


def test_the_models_own_folder_given_by_hand_is_the_same_run(tmp_path):
    assert of(data_dir=str(tmp_path / "data" / "sample")).name == "tiny"
    assert of(data_dir=str(tmp_path / "data" / "x" / ".." / "sample")).name == "tiny"


def test_a_given_name_wins(tmp_path):
    p = of(data_dir=str(tmp_path / "hospital"), name="trial-3")
    assert p.name == "trial-3" and p.trained_02 == tmp_path / "model/02_trained/trial-3"


def test_english_replay_falls_back_to_the_sample(root):
    p = of(data_dir=str(root / "hospital"))
    assert p.raw_english == paths.SAMPLE_DATA / "01_raw" / "00_english_replay"
    (root / "hospital/01_raw/00_english_replay").mkdir(parents=True)
    assert p.raw_english == root / "hospital/01_raw/00_english_replay"


def test_show_is_relative_where_that_is_shorter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert show(tmp_path / "model" / "x") == "model/x"
    assert show(Path("/somewhere/else")) == "/somewhere/else"


def test_driver_stages_and_data_folders_are_the_documented_ones():
    assert DRIVER_STAGES == (
        "download", "refine", "prepare_tokenizer", "add_lora", "train_00", "train_01", "add_lora_second", "train_02",
        "report",
    )  # fmt: skip
    assert {p.name: p.data for p in profiles.MODELS.values()} == {
        "tiny": "data/sample", "medgemma-4b": "data", "medgemma-27b": "data",
    }  # fmt: skip


def test_folder_names_are_spelled_in_paths_only():
    """A folder name spelled twice drifts; docstrings and help texts may name them."""
    import ast

    names = {"00_korean", "00_english_replay", "02_kor_med_test", "00_trained", "01_trained", "02_trained"}
    for file in (REPOSITORY / "script" / "medgemma_korean").glob("*.py"):
        if file.name in ("paths.py", "chain.py", "sources.py"):  # chain names its links, sources its targets
            continue
        found = {n.value for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Constant)} & names
        assert not found, f"{file.name}: {found}"


@pytest.mark.parametrize("bad", ["../x", "a/b", "", "a b", ".hidden", "-x"])
def test_run_names_are_one_plain_folder_name(bad, tmp_path):
    import argparse

    from medgemma_korean import cli

    with pytest.raises(cli.PipelineError, match="--name"):
        cli.resolve(argparse.Namespace(model="tiny", data_dir=None, name=bad))
