"""What `--verify` finds wrong; test_end_to_end does it with the models of a whole run."""

from __future__ import annotations

import random

import pytest

from medgemma_korean import cli, page, profiles, records, shapes
from medgemma_korean.cli import PipelineError
from medgemma_korean.paths import RunPaths
from medgemma_korean.stage import Stage, check_outputs, read_record, record_beside, vouch


@pytest.fixture
def verify(load_program):
    return load_program("verify")


@pytest.fixture
def said(verify, capsys):
    """said(*options) -> (exit code, everything that is printed)."""

    def said(*options):
        log_handlers = cli.log.handlers[:]
        cli.log.handlers.clear()
        try:
            code = cli.run(lambda: verify.main(list(options)))
        finally:
            cli.log.handlers[:] = log_handlers
        return code, "".join(capsys.readouterr())

    return said


def test_what_is_sound(said, refined):
    code, text = said()
    assert code == 0 and text.endswith("4 complete stages, all sound\n"), text
    assert "models: not loaded (--quick)" in said("--quick")[1]


def test_a_flipped_bit_anywhere_in_what_is_refined_is_named(said, refined):
    rng = random.Random(7)
    files = sorted(p for p in refined.refined.rglob("*") if p.is_file() and p.stat().st_size)
    assert len(files) > 15
    for file in files:
        content = file.read_bytes()
        at = rng.randrange(len(content))
        file.write_bytes(content[:at] + bytes([content[at] ^ 1 << rng.randrange(5)]) + content[at + 1 :])
        code, text = said()
        assert code == 2 and file.name in text and "Traceback" not in text, (file, text)
        assert "models: not loaded, for the files are not sound" in text
        file.write_bytes(content)
    assert said()[0] == 0


# the record's seal --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record["counts"].update(read=7),
        lambda record: record.update(seconds=1.5),
        lambda record: record["versions"].update(python="2.7"),
        lambda record: record.update(gate={"passed": True, "reasons": []}),
        lambda record: record.pop("warnings"),
        lambda record: record.update(sha256="0" * 64),
        lambda record: record.update(sha256=None),
    ],
)
def test_a_record_that_is_not_as_it_was_written_is_no_record(change, said, refined):
    path = refined.record("refine_01_medical_dict")
    record = records.read_json(path)
    change(record)
    records.write_json(path, record)
    with pytest.raises(PipelineError, match="other content than when it was written"):
        read_record(path)
    assert said()[1].count("other content than when it was written") >= 1
    later = Stage("refine_02_kor_med_test", refined, [refined.mcq, refined.characters], [], {})
    later.record_path = path
    with pytest.raises(PipelineError, match="other content than when it was written"):
        later.already_complete()


def test_a_record_of_an_earlier_version_has_no_seal(said, refined):
    path = refined.record("refine_01_medical_dict")
    record = records.read_json(path)
    del record[records.SEAL]
    records.write_json(path, record)
    assert read_record(path) == record and said()[0] == 0


def test_the_seal_is_that_of_what_json_keeps(tmp_path):
    records.write_sealed(
        tmp_path / "stage.json", {"a": (1, 2), "b": {2: "x", 10: "y"}, "c": 0.1 + 0.2, "d": 1e-05, "e": "한"}
    )
    assert read_record(tmp_path / "stage.json")["b"] == {"2": "x", "10": "y"}


def test_no_stage_starts_from_an_altered_input(refined):
    """Before anything is loaded, and also from scores that lie beside a model's folder."""
    scores = refined.scores("base")
    first = Stage(
        "add_lora", refined, [refined.raw_lora_added], [], {}, record_inside=True, beside=[scores, refined.scores("no")]
    )
    with first.work() as folder:
        records.write_text(folder / "base" / "config.json", "{}")
        records.write_json(scores, {"accuracy": 0.5})
        first.complete()
    record = refined.raw_lora_added / "stage.json"
    assert set(read_record(record)["outputs"]) == {"base/config.json", "../../report/tiny/scores/base.json"}
    assert check_outputs(record, thorough=True) == []

    def start():
        from medgemma_korean.stage import Input

        inputs = [Input("raw_lora_added", refined.raw_lora_added, record, "model/add_lora")]
        return Stage("train_00", refined, [refined.trained_00], inputs, {}, record_inside=True).already_complete()

    assert start() is None
    for file in (scores, refined.raw_lora_added / "base" / "config.json"):
        content = file.read_bytes()
        file.write_bytes(content.replace(b"{", b"["))
        with pytest.raises(PipelineError, match=f"raw_lora_added is not what add_lora made:\n.*{file.name}"):
            start()
        file.write_bytes(content)
    scores.unlink()  # the folder alone was brought from another machine
    assert start() is None
    assert any("base.json is missing" in line for line in check_outputs(record))


# pages --------------------------------------------------------------------------------------------------


def test_a_page_is_vouched_for_and_written_anew_where_it_is_damaged(said, refined):
    made = page.Page("<p>1</p>", {"bits.png": b"\x89PNG"}, {"a": 1})
    file, cited = refined.report / "index.html", refined.report / "summary.json"
    assert page.write(made, file, cited) and not page.write(made, file, cited)
    assert "report index                  sound" in said()[1]
    for damaged in (file, cited, refined.report / "bits.png", record_beside(file)):
        content = damaged.read_bytes()
        damaged.write_bytes(content.replace(content[1:2], bytes([content[1] ^ 1]), 1))
        code, text = said()
        assert code == 2 and damaged.name in text
        assert page.write(made, file, cited) and said()[0] == 0
    record_beside(file).unlink()  # a report of an earlier version
    assert page.write(made, file, cited)


def test_what_a_record_vouches_for_has_no_inputs(tmp_path, verify):
    (tmp_path / "a.txt").write_text("x")
    vouch("report", [tmp_path / "a.txt"], 1.0)
    assert verify.problems_of(tmp_path / ".stages" / "a.json", RunPaths.of("tiny", "data/sample")) == []


# numbers ------------------------------------------------------------------------------------------------


def answer(predicted="A", **log_probs):
    return {"id": "q", "predicted": predicted, "log_probs": log_probs}


@pytest.mark.parametrize(
    ("then", "now", "problem"),
    [
        (answer(A=-1.0, B=-2.0), answer(A=-1.05, B=-1.95), None),
        (answer(A=-1.0, B=-2.0), answer(A=-1.0, B=-2.2), "0.200 nats from the recorded one, more than 0.1"),
        (answer(A=-1.0, B=-20.0), answer(A=-1.0, B=-20.3), None),  # an unlikely letter
        (answer(A=-1.0, B=-20.0), answer(A=-1.0, B=-20.5), "of B is 0.500 nats from the recorded one, more than 0.4"),
        (answer(A=-1.0, B=-2.0), answer(A=float("nan"), B=-2.0), "nats from the recorded one"),
        (answer(A=-1.0, B=-1.01), answer("B", A=-1.03, B=-1.0), None),  # as likely: another device may choose the other
        (answer("B", A=-1.0, B=-2.0), answer(A=-1.0, B=-2.0), "the recorded letter B is not that of"),
        (answer("Z", A=-1.0, B=-2.0), answer(A=-1.0, B=-2.0), "the recorded letter Z is not that of"),
        (answer(A=-1.0, B=-2.0), answer(A=-1.0, B=-2.0, C=-3.0), "log-probabilities of A, B, C now, of A, B then"),
        (answer(None), answer(None), None),
        (None, answer(A=-1.0), "no answer to the dev question q was recorded"),
    ],
)
def test_when_an_answer_is_another_one(then, now, problem, verify):
    found = verify.differing(then, now, 0.1)
    assert found == [] if problem is None else problem in found[0] and len(found) == 1


@pytest.mark.parametrize("digest, problems", [("as scored", 1), ("since then", 0)])
def test_bits_of_a_text_that_is_another_one_by_now_are_no_problem_of_the_model(
    verify, tmp_path, monkeypatch, digest, problems
):
    from medgemma_korean import evaluation

    candidate = evaluation.Candidate("02", tmp_path / "base", None)
    records.write_json(candidate.base / "config.json", {"dtype": "float32"})
    scores = {"precision": "fp32", "predictions": [], "texts": {"medical": "as scored"}}
    records.write_json(tmp_path / "e.json", scores | {"bits_per_character": {"medical": 3.0}})
    for name, value in {
        "loaded": [(None, None, None)],
        "dev_items": [],
        "score_letters": [],
        "held_out_texts": {"medical": ["글"]},
        "text_digests": {"medical": digest},
        "bits_per_character": 2.0,
    }.items():
        monkeypatch.setattr(evaluation, name, lambda *_, value=value: value)
    found, done = verify.check_model(candidate, tmp_path / "e.json", profiles.get("tiny"), None)
    assert len(found) == problems and ("another one by now" in done) == (not problems)


def test_a_model_that_does_not_fit_is_not_loaded(verify, tmp_path, monkeypatch, said):
    from medgemma_korean.evaluation import Candidate

    base = tmp_path / "base"
    records.write_json(base / "config.json", {"dtype": "bfloat16"})
    (base / "model.safetensors").write_bytes(b"0" * 5_000_000)
    assert verify.weight_bytes(base, "8bit") == 5e6 and verify.weight_bytes(base, "fp32") == 1e7
    records.write_json(base / "config.json", {"dtype": "float32"})
    assert verify.weight_bytes(base, "fp32") == 5e6
    records.write_json(tmp_path / "evaluation.json", {"precision": "8bit"})
    monkeypatch.setattr(shapes, "free_ram", lambda: 9e8)
    candidate = Candidate("02", base, None)
    found = verify.check_model(candidate, tmp_path / "evaluation.json", None, None)
    assert found == ([], "not loaded: up to 1.0 GB of main memory, 0.9 GB are free")
