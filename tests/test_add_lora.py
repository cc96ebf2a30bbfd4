"""add_lora's own parts: which tokenizer belongs to which base, the look at new rows, and the whole verdict."""

from __future__ import annotations

import functools
import json
import shutil

import pytest
import torch_fixtures as tf

from medgemma_korean import chain, cli, evaluation, modeling, precision, profiles, records, verdict
from medgemma_korean import tokenizer as tokenizers
from medgemma_korean.cli import PipelineError

TEXTS = {"korean": list(tf.KOREAN[:6]), "medical": list(tf.KOREAN[6:9]), "english": list(tf.ENGLISH)}
LOOK = {"window": 32, "batch": 4}


@pytest.fixture
def add_lora(load_program):
    return load_program("add_lora")


@pytest.fixture
def paths(tmp_path, monkeypatch):
    """A run with a raw model and an extended tokenizer that was made from it."""
    monkeypatch.setenv("MEDGEMMA_KOREAN_ROOT", str(tmp_path))
    found = tf.paths()
    tokenizers.copy(tf.tokenizer_folder(), found.raw_model)
    tokenizers.copy(tf.extended_folder(), found.tokenizer)
    lines = [verdict.Line("compression, medical", True, "20 % fewer"), verdict.Line("init gate", None, "not run")]
    info = {
        "verdict": "extend",
        "reason": "x",
        "lines": [line.as_dict() for line in lines],
        "hashes": {"base": tokenizers.fingerprint(found.raw_model)},
    }
    records.write_json(found.tokenizer / "tokenizer_info.json", info)
    return found


# whose tokenizer ----------------------------------------------------------------------------------------


def test_a_tokenizer_of_another_base_is_refused(add_lora, paths, tmp_path):
    base, extended = tf.base_tokenizer(), tf.tokenizer()
    add_lora.require_own_tokenizer(paths, base, extended)
    tokenizers.build_base(tmp_path / "other", [*tf.ENGLISH, *tf.KOREAN[::-1]], 690)
    other = tokenizers.load(tmp_path / "other")
    with pytest.raises(PipelineError, match=r"[\d,]+ tokens have other ids; run: python .*prepare_tokenizer.* --force"):
        add_lora.require_own_tokenizer(paths, other, extended)
    tokenizers.copy(tmp_path / "other", paths.raw_model)
    with pytest.raises(
        PipelineError, match="does not belong to model/raw/tiny: it was made from another tokenizer; run"
    ):
        add_lora.require_own_tokenizer(paths, base, extended)


def test_an_adapter_of_another_tokenizer_and_a_base_with_another_one_are_refused(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "final"
    shutil.copytree(tf.base_folder(), base)
    shutil.copytree(tf.moved_adapter_folder(), adapter)
    chain.check_tokenizer(base, adapter)  # a checkpoint has no tokenizer of its own
    tokenizers.copy(base, adapter)
    chain.check_tokenizer(base, adapter)
    # As many tokens, so that every shape fits, and other ones.
    spec = json.loads((adapter / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = spec["model"]["vocab"]
    first, second = tf.extension().pieces[:2]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    records.write_text(adapter / "tokenizer.json", json.dumps(spec, ensure_ascii=False))
    with pytest.raises(PipelineError, match="final: was trained with another tokenizer than that of its base"):
        chain.check_tokenizer(base, adapter)
    tokenizers.copy(adapter, base)
    with pytest.raises(PipelineError, match=r"base: its tokenizer\.json is not the one that its rows were made for"):
        chain.check_tokenizer(base, adapter)


# new rows -----------------------------------------------------------------------------------------------


def test_the_look_at_new_rows_leaves_the_model_as_it_was(add_lora):
    import torch

    model = modeling.load_base(tf.base_folder(), tf.profile(), "cpu")
    before = model.get_input_embeddings().weight.clone()
    bits = {name: evaluation.bits_per_character(model, tf.tokenizer(), TEXTS[name], **LOOK) for name in TEXTS}
    found = add_lora.rows_look(model, tf.tokenizer(), TEXTS, bits, tf.new_ids(), before[:701], 17, **LOOK)
    assert torch.equal(model.get_input_embeddings().weight, before)
    assert list(found) == ["mean of constituents", "library default"]
    for seen in found.values():
        assert list(seen) == ["korean", "medical", "english", "english_mass"]
        assert 0 < seen["english_mass"] < 1 and all(value > 0 for value in seen.values())
    assert found["mean of constituents"]["korean"] != found["library default"]["korean"]
    # The probability of 40 of 768 rows, summed over the softmax by hand.
    ids = torch.tensor([[2, *tokenizers.encode(tf.tokenizer(), TEXTS["english"][0])]])[:, :31]
    with torch.no_grad():
        shares = model(input_ids=ids).logits[0, :-1].softmax(dim=-1)[:, tf.new_ids()].sum(dim=-1)
    text = tf.tokenizer().decode(ids[0, 1:])
    mass = evaluation.token_mass(model, tf.tokenizer(), [text], tf.new_ids(), **LOOK)
    assert mass == pytest.approx(shares.mean().item(), rel=1e-3)
    assert add_lora.rows_look(model, tf.tokenizer(), TEXTS, bits, [], before, 17, **LOOK) == {}


@pytest.mark.parametrize(
    ("mass", "english", "word", "part"),
    [
        (0.01, 3.02, "extend", ""),
        (0.20, 3.02, "do not extend", "0.20"),
        (0.01, 3.40, "do not extend", "+13"),
    ],
)
def test_the_rows_have_the_last_word(add_lora, paths, capsys, mass, english, word, part):
    bits = {"korean": 6.0, "medical": 7.0, "english": 3.0}
    seen = bits | {"english": english, "english_mass": mass}
    rows = {"mean of constituents": seen, "library default": seen | {"korean": 9.0}}
    before, after = ({"bits_per_character": b} for b in (bits, bits | {"english": english}))
    judged = add_lora.judge(paths, before, after, rows, 0.0)
    assert judged["verdict"] == word and part in judged["reason"]
    names = [line["name"] for line in judged["lines"]]
    assert names[0] == "compression, medical" and len(names) > 1
    assert not any(line["text"] == "not run" for line in judged["lines"])
    assert judged["rows"] == rows and judged["base"] == bits
    # Without new tokens there are no rows to judge, and the tokenizer's own word stands.
    assert add_lora.judge(paths, before, before, {}, 0.0)["verdict"] == "extend"


def test_a_shift_is_for_the_first_base(add_lora, paths):
    with pytest.raises(PipelineError, match="--shift is for new rows, of which --second makes none"):
        add_lora.main(["--second", "--shift", "2"])


# the precision ------------------------------------------------------------------------------------------


@pytest.fixture
def run(add_lora, paths, monkeypatch):
    """run(*options) -> exit code of the program, in a run whose inputs are complete."""
    monkeypatch.setitem(profiles.MODELS, "tiny", tf.profile(score_characters=1200))
    shutil.rmtree(paths.raw_model)
    shutil.copytree(tf.raw_folder(), paths.raw_model)
    info = records.read_json(paths.tokenizer / "tokenizer_info.json") | {"new_tokens": 40, "rows": 768}
    records.write_json(paths.tokenizer / "tokenizer_info.json", info)
    records.write_jsonl(paths.mcq / "dev.jsonl", tf.ITEMS)
    records.write_jsonl(paths.plain_text / "validation.jsonl", [{"text": text} for text in tf.KOREAN])
    records.write_jsonl(paths.english_replay / "validation.jsonl", [{"text": text} for text in tf.ENGLISH])
    held_out = [paths.record("refine_00_plain_text"), paths.record("refine_02_kor_med_test")]
    for file in (paths.raw_model / "stage.json", paths.tokenizer / "stage.json", *held_out):
        records.write_json(file, {"program": "x", "fingerprint": file.parent.name, "outputs": {}, "home": "."})
    return lambda *options: cli.run(lambda: add_lora.main(list(options)))


def limit(monkeypatch, **limits):
    """Another limit for every probe from here on."""
    monkeypatch.setattr(precision, "Limits", functools.partial(precision.Limits, **limits))


def test_the_choice_is_recorded_and_everything_is_scored_in_it(run, paths, capsys, monkeypatch):
    assert run() == 0
    assert capsys.readouterr().out.count("precision: 8bit, computing in float32: its probe passed: KL ") == 1
    base = paths.raw_lora_added / "base"
    record = records.read_json(paths.raw_lora_added / "stage.json")
    assert (
        record["precision"] == records.read_json(base / "precision.json") and "base/precision.json" in record["outputs"]
    )
    assert record["precision"]["precision"] == "8bit" and record["precision"]["probes"][0]["passed"] is True
    assert record["precision"]["measured_on"] == "base" and record["settings"]["precision"] == "auto"
    assert {records.read_json(paths.scores(which))["precision"] for which in ("base", "extended")} == {"8bit"}
    precision.require_passing(base, precision.chosen(base, tf.profile()), paths)
    # The same command again loads no model: not even one that is no longer there.
    with monkeypatch.context() as patch:
        patch.setattr(modeling, "load_base", None)
        assert run() == 0
    assert "already complete" in capsys.readouterr().out
    assert run("--precision", "8bit") == 2  # other settings: what was chosen may not be what is asked for
    assert "settings.precision: 'auto' -> '8bit'" in capsys.readouterr().out


def test_the_second_base_is_probed_anew_and_compared_in_its_own_precision(run, paths, capsys, monkeypatch):
    assert run() == 0
    plain = records.read_json(paths.scores("base"))
    limit(monkeypatch, kl=1e-9)
    assert run("--second") == 0
    text = capsys.readouterr().out
    assert "not 8bit: its probe failed: KL(fp32 || 8bit) is " in text
    assert "the base was scored in 8bit, and is scored again in fp32" in text
    found = records.read_json(paths.another_lora_added / "base" / "precision.json")
    assert (found["precision"], found["measured_on"], list(found["refused"])) == ("fp32", "merged", ["8bit", "nf4"])
    again = records.read_json(paths.scores("base-fp32"))
    assert (again["which"], again["precision"], records.read_json(paths.scores("merged"))["precision"]) == (
        "base", "fp32", "fp32",
    )  # fmt: skip
    assert records.read_json(paths.scores("base")) == plain and plain["precision"] == "8bit"
    gate = records.read_json(paths.another_lora_added / "stage.json")["gate"]
    merged = records.read_json(paths.scores("merged"))
    ratio = merged["bits_per_character"]["english"] / again["bits_per_character"]["english"]
    assert gate["passed"] and gate["english_ratio"] == pytest.approx(ratio)


def test_the_second_base_prefers_the_first_one_s_precision(run, paths):
    assert run("--precision", "fp32") == 0 and run("--second") == 0
    found = records.read_json(paths.another_lora_added / "base" / "precision.json")
    assert found["precision"] == "fp32" and found["asked"] == "auto" and found["probes"] == []
    assert not paths.scores("base-fp32").exists()


def test_a_precision_asked_for_that_fails_ends_the_program(run, paths, capsys, monkeypatch):
    limit(monkeypatch, kl=1e-9)
    assert run("--precision", "8bit") == 2
    text = capsys.readouterr().out
    assert "--precision 8bit: its probe failed: KL(fp32 || 8bit) is " in text and "nats a token (at most 1e-09)" in text
    assert not paths.raw_lora_added.exists() and not paths.scores("base").exists()
