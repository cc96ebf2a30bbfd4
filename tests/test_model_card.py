"""The model card: metadata that the hub reads, the numbers of the JSON, licences, and code that runs."""

import dataclasses
import os
import re
import shutil

import pytest
import torch_fixtures as tf
from report_fixtures import evaluation_of, whole_run

from medgemma_korean import mcq, model_card, page, records
from medgemma_korean.profiles import MODELS
from medgemma_korean.stage import RECORD_NAME

INFO = {
    "steps": 40,
    "train_samples": 1234,
    "learning_rate": 5e-4,
    "lora_scale": 2.0,
    "trainable_parameters": {"lora": 1000, "rows": 234},
    "best_step": 30,
}


@pytest.fixture
def paths():
    return whole_run()


def real_run(paths, *sources):
    """The same run on a data folder of its own, with the raw folders of published sources."""
    found = dataclasses.replace(paths, data=paths.data.parent / "mine")
    for source in sources:
        (found.raw / source).mkdir(parents=True)
    return found


def card_of(paths, profile, evaluation=None, first=None, upstream=None, base=None):
    evaluation = evaluation or records.read_json(paths.trained_02 / "evaluation.json")
    base = base or paths.raw_lora_added / "base"
    return model_card.model_card(
        paths, profile, "train_02_kor_med_test", INFO, evaluation, base, paths.trained_02, upstream, first
    )


def front_of(text):
    from huggingface_hub import ModelCard

    card = ModelCard(text, ignore_metadata_errors=False)
    return card.data


@pytest.fixture
def card(paths):
    """A trained folder with its card, beside the base that it needs."""
    base = paths.raw_lora_added / "base"
    folder = paths.trained_02
    shutil.copytree(tf.base_folder(), base)
    shutil.copytree(tf.moved_adapter_folder(), folder / "final")
    tf.tokenizer().save_pretrained(folder / "final")
    evaluation = records.read_json(folder / "evaluation.json")
    text = card_of(paths, tf.profile(), evaluation)
    records.write_text(folder / "README.md", text)
    return folder, text, evaluation


def test_the_card_says_what_the_json_says(card):
    _, text, evaluation = card
    score = evaluation["mcq"]
    assert f"{score['correct']} of {score['n']} = {score['accuracy']:.1%}" in text
    assert f"{score['lower']:.1%} to {score['upper']:.1%}" in text
    assert all(f"{value:.3f}" in text for value in evaluation["bits_per_character"].values())
    for exam, found in score["exams"].items():
        assert f"| {exam} | {found['correct']}/{found['n']} | {found['accuracy']:.1%} ({found['lower']:.1%}" in text
    assert "40 steps over 1,234 rows, learning rate 0.0005 at LoRA scale" in text
    assert "1,234 parameters trained" in text and re.search(r"checkpoint of step\s+30", text)
    assert page.NOT_A_DEVICE in text and "within chance" not in text
    assert "5 questions gained, 1 lost, p = 0.055" in text


def test_the_base_stands_beside_it(paths):
    first = records.read_json(paths.scores("base"))
    text = card_of(paths, tf.profile(), first=first)
    rows = re.findall(r"^\| (base|this model) \| (.*) \|$", text, re.MULTILINE)
    assert [row[0] for row in rows] == ["base", "this model"]
    for (_, cells), scores in zip(rows, (first, records.read_json(paths.trained_02 / "evaluation.json")), strict=True):
        score, bits = scores["mcq"], scores["bits_per_character"]
        interval = f"{score['accuracy']:.1%} ({score['lower']:.1%} to {score['upper']:.1%})"
        assert cells.split(" | ") == [interval, *(f"{bits[k]:.3f}" for k in ("korean", "medical", "english"))]


def test_a_card_without_exams_or_a_comparison_has_whole_tables(paths):
    evaluation = evaluation_of("02", right=42)
    del evaluation["mcq"]["exams"]
    text = card_of(paths, tf.profile(), evaluation)
    assert "McNemar" not in text and "| exam |" not in text
    for table in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1
    assert "\n\n\n" not in text


def test_the_metadata_is_what_the_hub_reads(paths):
    evaluation = records.read_json(paths.trained_02 / "evaluation.json")
    run = real_run(paths, "00_korean/namu_wiki", "02_kor_med_test")
    data = front_of(card_of(run, MODELS["medgemma-4b"], evaluation))
    assert data.language == ["ko", "en"] and data.library_name == "peft" and data.pipeline_tag == "text-generation"
    assert data.base_model == "google/medgemma-4b-it"
    assert (data.license, data.license_name) == ("other", "hai-def-non-commercial")
    assert data.license_link.startswith("https://")
    assert "sean0042/KorMedMCQA" in data.datasets and {"medical", "korean"} <= set(data.tags)
    results = data.eval_results
    accuracy = next(result for result in results if result.dataset_name == "KorMedMCQA")
    score = evaluation["mcq"]
    assert (accuracy.metric_type, accuracy.metric_value) == ("accuracy", score["accuracy"])
    assert accuracy.dataset_type == "sean0042/KorMedMCQA" and accuracy.dataset_split == "dev"
    for key in ("lower", "upper", "n", "correct", "majority_accuracy"):
        assert accuracy.metric_args[key] == score[key]
    exams = {result.dataset_config: result.metric_value for result in results if result.dataset_config}
    assert exams == {exam: found["accuracy"] for exam, found in score["exams"].items()}
    bits = {r.dataset_type: r.metric_value for r in results if r.metric_type == "bits_per_character"}
    assert bits == {f"held-out-{k}": value for k, value in evaluation["bits_per_character"].items()}


def test_licences_pass_on(paths):
    run = real_run(paths, "00_korean/namu_wiki", "02_kor_med_test")
    text = card_of(run, MODELS["medgemma-4b"])
    assert re.search(r"\| namu_wiki \| CC.BY-NC-SA", text, re.IGNORECASE)
    assert re.search(r"\| kor_med_test \| CC.BY-NC", text, re.IGNORECASE)
    assert "Health AI Developer Foundations" in text and "non-commercial" in text


def test_a_model_of_the_sample_alone_is_free(paths):
    text = card_of(paths, MODELS["tiny"])
    data = front_of(text)
    assert data.license == "apache-2.0" and data.base_model is None and data.datasets is None
    assert "non-commercial" not in text and data.eval_results[0].dataset_type == "sample"


def test_a_base_from_the_hub_is_named(paths, tmp_path):
    base = tmp_path / "base"
    records.write_json(base / RECORD_NAME, {"origins": {"x": {"id": "google/gemma-3-1b-it"}}})
    data = front_of(card_of(paths, MODELS["tiny"], upstream="The base model is google/gemma-3-1b-it.", base=base))
    assert data.base_model == "google/gemma-3-1b-it" and data.license == "other"


def test_a_name_in_hangul_and_with_signs_is_valid_metadata(paths):
    odd = dataclasses.replace(paths, name='한글: "이름" #1')
    data = front_of(card_of(odd, MODELS["tiny"], records.read_json(paths.trained_02 / "evaluation.json")))
    assert data.model_name == '한글: "이름" #1-train_02_kor_med_test'


def test_the_cards_code_finds_its_files_and_runs(card, monkeypatch, capsys):
    folder, text, _ = card
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (relative,) = re.findall(r'base = folder / "(.*)"', code)
    assert not os.path.isabs(relative) and (folder / relative / "config.json").is_file()
    monkeypatch.chdir(folder)
    # The shipped code generates 64 tokens; two show as much.
    exec(compile(code.replace("max_new_tokens=64", "max_new_tokens=2"), "README.md", "exec"), {})
    assert capsys.readouterr().out


def test_the_card_of_a_model_within_chance(paths):
    evaluation = evaluation_of("02", right=12)
    assert mcq.within_chance(evaluation["mcq"])
    assert "so this is within chance" in card_of(paths, tf.profile(), evaluation)
