"""What --base-model takes: a plain folder of a Gemma 3, a hub id, a trained folder; and what it refuses, in words."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace

import hub_repositories as published
import pytest

from medgemma_korean import base_model, chain, evaluation, modeling, profiles, records
from medgemma_korean.cli import PipelineError
from medgemma_korean.paths import RunPaths

PATHS = ("tiny", "data/sample")
REFUSED = pytest.raises(PipelineError)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Programs that are run in this process find their siblings, and relative paths begin in the test's folder."""
    import conftest

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(conftest.REPOSITORY / "script" / "train"))
    return tmp_path


def plain(folder, source=None):
    """A copy of a raw model, to change."""
    import torch_fixtures as tf

    return shutil.copytree(source or tf.raw_folder(), folder)


def edit(file, **values):
    records.write_json(file, {**records.read_json(file), **values})


# names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["google/medgemma-4b-it", "a/b", "Org_1/Model.v2-x", "0x/1.0"])
def test_hub_ids(name):
    assert base_model.is_hub_id(name)
    folder = base_model.hub_folder(RunPaths.of(*PATHS), name)
    assert folder.name == name.replace("/", "--") and folder.parent.name == "raw"


@pytest.mark.parametrize(
    "name",
    ["", "x", "../x", "a/../b", "google/", "/google/x", "a/b/c", "a b/c", "a/b c", "a--b/c", "a/b..c", "-a/b",
     "a/b.", ".a/b", "a/b\n", "한글/모델", "a/" + "b" * 97, "https://huggingface.co/a/b", "~nobody/x"],
)  # fmt: skip
def test_what_is_neither_a_folder_nor_a_hub_id_is_refused(name, here):
    with REFUSED as error:
        chain.of_argument(RunPaths.of(*PATHS), name)
    assert "no such folder, and not a hub id" in str(error.value) and "google/medgemma-4b-it" in str(error.value)
    assert os.listdir(here) == []


def test_a_file_and_an_empty_folder_are_refused(here):
    (here / "a").mkdir()
    (here / "model.gguf").touch()
    for name, words in (("model.gguf", "that is a file"), ("a", "no model there"), (".", "no model there")):
        with REFUSED as error:
            chain.of_argument(RunPaths.of(*PATHS), name)
        assert words in str(error.value) and "it takes a folder that a train program made" in str(error.value)


# folders ------------------------------------------------------------------------------------------------


def without(*names):
    def change(folder):
        for name in names:
            (folder / name).unlink()

    return change


def with_config(**values):
    return lambda folder: edit(folder / "config.json", **values)


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def indexed(folder):
    records.write_json(folder / "model.safetensors.index.json", {"weight_map": {"a": "model-1.safetensors"}})


def adapter_alone(folder):
    without("config.json", "model.safetensors")(folder)
    (folder / "adapter_config.json").write_text("{}")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("config.json"), "config.json is missing"),
        (without("tokenizer.json"), "tokenizer.json is missing"),
        (without("model.safetensors"), "no safetensors weights"),
        (without("tokenizer.json", "model.safetensors"), "tokenizer.json is missing\n  no safetensors weights"),
        (cut, "model.safetensors is no whole safetensors file"),
        (indexed, "model-1.safetensors is missing"),
        (indexed, "are two sets of weights"),
        (adapter_alone, "holds an adapter alone; give its base"),
        (with_config(model_type="llama"), "a model of the kind llama, not Gemma 3"),
        (with_config(model_type="gemma3n"), "a model of the kind gemma3n, not Gemma 3"),
        (with_config(quantization_config={"load_in_4bit": True}), "quantised already"),
    ],
)
def test_a_folder_that_is_no_base_is_refused_at_a_glance(change, words, tmp_path):
    folder = plain(tmp_path / "x")
    change(folder)
    with REFUSED as error:
        chain.of_argument(RunPaths.of(*PATHS), str(folder))
    assert words in str(error.value)


def of_another_vocabulary(folder):
    import torch_fixtures as tf

    source = tf.home() / "many"
    if not source.is_dir():
        source.mkdir()
        tokenizer = tf.tokenizers.load(tf.tokenizer_folder())
        tokenizer.add_tokens([f"낱말{i}" for i in range(300)])
        tokenizer.save_pretrained(source)
    shutil.copyfile(source / "tokenizer.json", folder / "tokenizer.json")


def with_weights(**changes):
    """Another shape under a name, or none (None)."""

    def change(folder):
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        for name, size in changes.items():
            stored = name.replace("__", ".")
            tensors.pop(stored) if size is None else tensors.update({stored: tensors[stored][:size].clone()})
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def without_turns(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text(encoding="utf-8")
        (folder / name).write_text(text.replace("<end_of_turn>", "<other>"), encoding="utf-8")
    (folder / "chat_template.jinja").unlink()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (of_another_vocabulary, "rows; bring its own tokenizer"),
        (with_weights(model__norm__weight=None), "1 weights are missing, first model.norm.weight"),
        (with_weights(model__norm__weight=8), "1 weights do not fit config.json, first model.norm.weight"),
        (without_turns, "its tokenizer lacks <end_of_turn>, a chat template"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer.json"),
    ],
)
def test_a_base_is_whole_or_refused(change, words, tmp_path):
    folder = plain(tmp_path / "x")
    base_model.require_whole(folder)
    change(folder)
    chain.of_argument(RunPaths.of(*PATHS), str(folder))
    with REFUSED as error:
        base_model.require_whole(folder)
    assert words in str(error.value)


def test_only_what_a_training_depends_on_counts(tmp_path):
    folder = plain(tmp_path / "x")
    (folder / "README.md").write_text("# A model")
    entries = base_model.described(folder)
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= set(entries) and "README.md" not in entries
    assert [item.role for item in base_model.inputs(folder)] == [f"base model {name}" for name in entries]
    (folder / "README.md").write_text("# Another text")
    os.utime(folder / "config.json")
    assert base_model.changed(folder, entries, thorough=True) == []
    moved = shutil.copytree(folder, tmp_path / "y")
    assert base_model.fingerprint(base_model.described(moved)) == base_model.fingerprint(entries)


@pytest.mark.parametrize(
    ("name", "thorough"), [("config.json", False), ("model.safetensors", True), ("base_info.json", False)]
)
def test_a_changed_base_is_noticed(name, thorough, tmp_path, monkeypatch):
    folder = plain(tmp_path / "x")
    entries = base_model.described(folder)
    file = folder / name
    if thorough:  # another byte, and the old time
        was, content = file.stat(), bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))
        monkeypatch.setattr(records, "_known", {})  # as in another process
        assert base_model.changed(folder, entries) == []
    else:
        file.write_text('{"new_ids": [1]}')
    (line,) = base_model.changed(folder, entries, thorough)
    assert name in line


def test_new_rows_are_those_that_the_base_names(tmp_path):
    import torch_fixtures as tf

    assert base_model.new_ids(tf.raw_folder()) == [] and base_model.new_ids(tf.base_folder()) == tf.new_ids()


# the hub ------------------------------------------------------------------------------------------------

GEMMA, GATED = "someone/gemma-3-nano", published.GATED[0]
TRAIN = ("train_02_kor_med_test", "--base-model")


def publish(hub, name=GEMMA, **changes):
    files = published.small_model_files() | changes
    hub.add("model", name, files, gated="auto" if name in published.GATED else False)
    return {"config.json", "generation_config.json", *(n for n in files if n.startswith(("model", "tokenizer")))}


def test_a_hub_id_is_fetched_once_and_used_offline(hub, get_here, tmp_path, monkeypatch):
    wanted = publish(hub)
    assert get_here("download_model", "--hub-id", GEMMA).code == 0
    folder = tmp_path / "model/raw/someone--gemma-3-nano"
    assert {p.name for p in folder.iterdir()} == wanted | {"stage.json"}
    record = records.read_json(folder / "stage.json")
    assert record["origins"]["someone--gemma-3-nano"]["id"] == GEMMA
    assert not (tmp_path / "model/raw/medgemma-4b").exists()
    hub.reset_counts()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    paths = RunPaths.of("medgemma-4b", "data")
    assert base_model.of_hub(paths, GEMMA) == folder and hub.requests == []
    link = chain.of_argument(paths, GEMMA)
    assert link.untouched and link.base == folder and not link.warnings
    assert base_model.terms(folder, tmp_path).startswith(f"The base model is {GEMMA}")
    (folder / "tokenizer.model").unlink()
    with pytest.raises(PipelineError, match=f"is not what was fetched[^$]*--hub-id {GEMMA} --force"):
        base_model.of_hub(paths, GEMMA)


def test_a_train_program_fetches_a_hub_id_and_says_what_is_wrong_with_it(hub, get_here, tmp_path, here):
    publish(hub)
    outcome = get_here(*TRAIN, GEMMA)
    assert outcome.code == 2 and "it is taken for a hub id" in outcome.text, outcome.text
    assert (tmp_path / "model/raw/someone--gemma-3-nano/stage.json").is_file()
    assert "exam questions: " in outcome.text  # the model is here, and the run has no data yet


def test_the_runs_own_raw_model_is_used(hub, get_here, tmp_path, here):
    publish(hub, GATED)
    assert get_here("download_model").code == 0
    hub.reset_counts()
    paths = RunPaths.of("medgemma-4b", "data")
    assert chain.of_argument(paths, GATED).base == tmp_path / "model/raw/medgemma-4b" and hub.requests == []


def test_terms_that_are_not_accepted_are_named_with_their_page(hub, get_here, tmp_path, here):
    publish(hub, GATED)
    hub.tokens = {published.TOKEN: set()}
    outcome = get_here(*TRAIN, GATED)
    assert outcome.code == 2 and outcome.text.count("error:") == 1, outcome.text
    assert f"needs its terms accepted: open {hub.url}/{GATED} with your account" in outcome.text
    assert f"download_model.py --model medgemma-4b --hub-id {GATED}" in outcome.text
    assert not (tmp_path / "model/raw/google--medgemma-4b-it").exists() and not hub.sent


def test_offline_a_hub_id_that_is_not_here_is_one_error(hub, get_here, tmp_path, here):
    publish(hub)
    outcome = get_here(*TRAIN, GEMMA, HF_HUB_OFFLINE="1")
    assert outcome.code == 2 and f"{GEMMA}: is not here yet, and HF_HUB_OFFLINE is set" in outcome.text, outcome.text
    assert hub.requests == [] and not list((tmp_path / "model").rglob("*.json"))


def test_offline_files_that_somebody_brought_are_used(hub, get_here, tmp_path, here):
    folder = tmp_path / "model/raw/someone--gemma-3-nano"
    folder.mkdir(parents=True)
    for name in publish(hub):
        (folder / name).write_bytes(published.small_model_files()[name])
    outcome = get_here(*TRAIN, GEMMA, HF_HUB_OFFLINE="1")
    assert "was brought by hand" in outcome.text and hub.requests == [], outcome.text
    assert (folder / "stage.json").is_file()


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"config.json": b'{"model_type": "llama"}'}, "a model of the kind llama, not Gemma 3"),
        ({"config.json": None}, "an adapter alone is no base"),
    ],
)
def test_of_another_kind_of_model_no_weights_are_fetched(files, words, hub, get_here, tmp_path, here):
    content = {k: v for k, v in (published.small_model_files() | files).items() if v is not None}
    hub.add("model", GEMMA, content)
    outcome = get_here(*TRAIN, GEMMA)
    assert outcome.code == 2 and words in outcome.text and f"{hub.url}/{GEMMA}" in outcome.text, outcome.text
    assert set(hub.sent) <= {"config.json"}
    assert not list((tmp_path / "model").rglob("*.json")), "something is left behind"


def test_an_unknown_hub_id_is_one_error(hub, get_here, here):
    outcome = get_here(*TRAIN, "model/00_trained")
    assert outcome.code == 2 and "model/00_trained: no such folder here; it is taken for a hub id" in outcome.text
    assert "model/00_trained: not found; renamed, or not visible" in outcome.text


def test_several_processes_fetch_nothing(monkeypatch, here):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(PipelineError, match=f"several processes cannot fetch it; first run: .* --hub-id {GEMMA}"):
        chain.of_argument(RunPaths.of(*PATHS), GEMMA)


# training -----------------------------------------------------------------------------------------------

STEPS = ("--max-steps", "2", "--max-samples", "12", "--allow-regression")


@pytest.fixture
def run_here(here, refined_root, load_program, monkeypatch):
    """run_here(program, *args): with the sample's refined data, and a profile for the models of torch_fixtures."""
    import torch_fixtures as tf

    shutil.copytree(refined_root / "data", here / "data")
    small = tf.profile(precision="fp32")
    settings = replace(small.plain_text, evaluations=1)
    small = replace(
        small, plain_text=replace(settings, max_rows=16, rows_only_steps=0.5), mcq=replace(settings, max_length=640)
    )
    monkeypatch.setitem(profiles.MODELS, "tiny", small)

    def run(program, *args):
        return load_program(program).main(["--model", "tiny", *map(str, args)])

    return run


@pytest.mark.slow
def test_from_a_multimodal_base_through_two_stages(run_here, here, monkeypatch):
    import torch_fixtures as tf

    base, first, second = plain(here / "base of others", tf.multimodal_folder()), here / "out/first", here / "out/two"
    arguments = ("train_00_plain_text", "--base-model", base, "--output", first, *STEPS)
    assert run_here(*arguments) == 0
    record, before, after = (records.read_json(first / n) for n in ("stage.json", "evaluation_before.json", "evaluation.json"))  # fmt: skip  # noqa: E501
    assert record["steps"] == 2 and record["base_folder"] == "../../base of others"
    assert set(record["base_files"]) == set(base_model.described(base)) and record["trainable"]["rows"] == 0
    assert before["which"] == "base" and after["against_base"] == after["against_before"]
    assert records.read_json(first / "precision.json")["precision"] == before["precision"] == "fp32"
    config = records.read_json(first / "final/adapter_config.json")
    assert config["base_model_name_or_path"] == "../../../base of others" and config["r"] == tf.profile().lora_rank
    assert not list(first.glob(".fresh*")) and not list(first.glob(".best*"))
    assert sorted(os.listdir(base)) == sorted(os.listdir(tf.multimodal_folder()))
    # Without new rows no step is theirs alone.
    steps = [e for e in records.read_json(first / "checkpoint-2/trainer_state.json")["log_history"] if "loss" in e]
    assert len(steps) == 2 and all(step["grad_norm"] > 0 for step in steps)
    # The base without an adapter, in the same harness, has these very scores.
    alone, tokenizer = evaluation._load(evaluation.Candidate("x", base, None), profiles.MODELS["tiny"], "cpu", "fp32")
    profile = profiles.MODELS["tiny"]
    scores = evaluation.evaluate(alone, tokenizer, RunPaths.of(*PATHS), profile, which="base", precision="fp32")
    assert records.read_back(scores) == before
    # The code of the card loads the same model as the harness.
    card = (first / "README.md").read_text(encoding="utf-8")
    assert "The base model is `base of others`" in card and "Gemma3ForCausalLM" in card
    code = card.partition("```python\n")[2].partition("```")[0].partition("turns =")[0]
    environment: dict = {}
    exec(code.replace('Path(".")', f"Path({str(first)!r})"), environment)
    found = evaluation.Candidate("y", base, first / "final")
    model, tokenizer = evaluation._load(found, profiles.MODELS["tiny"], "cpu", "fp32")
    ids = tf.tokenizers.encode(tokenizer, tf.KOREAN[0])
    assert (tf.logits(environment["model"], ids) - tf.logits(model, ids)).abs().max() < 1e-4

    assert run_here(*arguments) == 0  # complete, as the same command
    assert run_here("validation_kor_med_test", "--models", first, base, "--limit", "8") == 0
    assert run_here("train_02_kor_med_test", "--base-model", first, "--output", second, *STEPS) == 0
    after = records.read_json(second / "evaluation.json")
    assert records.read_json(second / "evaluation_before.json") == before
    assert after["against_base"]["before"] == "base" and after["against_before"]["before"] == "train_00"
    assert evaluation.candidates(RunPaths.of(*PATHS), [str(second)])[0].base == base.resolve()

    # Scores of other held-out texts are known before anything trains.
    arguments = ("train_01_medical_dict", "--base-model", first, "--output", here / "out/three", *STEPS)
    with monkeypatch.context() as other:
        other.setitem(profiles.MODELS, "tiny", replace(profile, score_characters=profile.score_characters // 2))
        other.setattr(modeling, "load_base", None)
        with pytest.raises(
            PipelineError, match=r"base was scored on other held-out texts \(medical\).*make that folder"
        ):
            run_here(*arguments)
    # An adapter of another base or tokenizer is refused.
    tokenizer_file = first / "final/tokenizer.json"
    tokenizer_file.write_text(tokenizer_file.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    with pytest.raises(PipelineError, match="is not what train_00_plain_text made"):
        run_here(*arguments)
    edit(base / "config.json", note="another one")
    with pytest.raises(PipelineError, match=r"its base .* is another one now[^$]*config\.json has"):
        run_here(*arguments)
    shutil.rmtree(base)
    with pytest.raises(PipelineError, match="its base .* is gone"):
        run_here(*arguments)


@pytest.mark.slow
def test_an_interrupted_training_scores_and_probes_its_base_once(run_here, here, monkeypatch):
    """One of our own bases, alone: its new rows train, in eight bits that are probed here."""
    import torch_fixtures as tf

    from medgemma_korean import cli, precision, training

    base, target = plain(here / "base", tf.base_folder()), here / "out"
    arguments = ("train_00_plain_text", "--base-model", base, "--output", target, "--precision", "8bit", *STEPS)
    seen = []
    evaluate, choose, train = evaluation.evaluate, precision.choose, training.train
    monkeypatch.setattr(evaluation, "evaluate", lambda *a, **o: (seen.append(o["which"]), evaluate(*a, **o))[1])
    monkeypatch.setattr(precision, "choose", lambda *a, **o: (seen.append("choose"), choose(*a, limits=LAX, **o))[1])
    LAX = precision.Limits(kl=10.0, bits=10.0)

    def stopped(*_args, **_options):
        raise cli.Interrupted("SIGTERM")

    monkeypatch.setattr(training, "train", stopped)
    with pytest.raises(cli.Interrupted):
        run_here(*arguments)
    work = here / ".out.partial"
    fresh = (work / ".fresh/adapter_model.safetensors").read_bytes()
    assert seen == ["choose", "base"] and (work / "evaluation_before.json").is_file()
    monkeypatch.setattr(training, "train", train)
    shutil.copytree(work, here / "kept")
    assert run_here(*arguments) == 0 and seen == ["choose", "base", "train_00"]
    record = records.read_json(target / "stage.json")
    assert record["settings"]["precision"] == "8bit" and record["trainable"]["rows"] == 32 * len(tf.new_ids())
    assert records.read_json(target / "precision.json")["probes"][0]["passed"]
    assert (here / "kept/.fresh/adapter_model.safetensors").read_bytes() == fresh
    # Neither the scoring nor the interruption leaves a trace in the weights.
    whole = here / "whole"
    shutil.copyfile(target / "precision.json", base / "precision.json")
    assert run_here(*arguments[:4], whole, *arguments[5:]) == 0
    trained = [folder / "final/adapter_model.safetensors" for folder in (target, whole)]
    assert trained[0].read_bytes() == trained[1].read_bytes() != fresh and seen.count("choose") == 1


def test_the_second_rank_and_the_seed_make_the_fresh_adapter(here):
    import torch_fixtures as tf

    from medgemma_korean import checkpoints, trained

    profile, made = tf.profile(), {}
    for name, second, seed in (("a", True, 1), ("b", True, 1), ("c", True, 2), ("d", False, 1)):
        (here / name).mkdir()
        made[name] = trained._fresh_adapter(here / name, tf.base_folder(), profile, second, seed)
    content = {name: (folder / tf.ADAPTER).read_bytes() for name, folder in made.items()}
    assert content["a"] == content["b"] != content["c"]
    ranks = {name: records.read_json(folder / "adapter_config.json")["r"] for name, folder in made.items()}
    assert ranks == dict.fromkeys("abc", profile.second_rank) | {"d": profile.lora_rank}
    assert checkpoints.Adapter(made["a"]).ids == [] and checkpoints.Adapter(made["d"]).ids == tf.new_ids()


def test_a_probe_that_failed_is_an_error_and_leaves_nothing(run_here, here, monkeypatch):
    import torch_fixtures as tf

    from medgemma_korean import precision

    choose = precision.choose
    monkeypatch.setattr(precision, "choose", lambda *a, **o: choose(*a, limits=precision.Limits(kl=0.0), **o))
    options = ("--base-model", tf.raw_folder(), "--output", here / "out", *STEPS)
    with pytest.raises(PipelineError, match="--precision nf4: its probe failed"):
        run_here("train_00_plain_text", *options, "--precision", "nf4")
    assert not list(here.glob("*out*"))


def test_what_is_trained_on_is_never_written_over(run_here, here):
    base = plain(here / "x/base")
    for target in (base, base.parent, base / "inside"):
        with pytest.raises(PipelineError, match="holds what is trained on"):
            run_here("train_00_plain_text", "--base-model", base, "--output", target, *STEPS)
    assert base_model.missing(base) == []


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_that_comes_with_a_base_is_never_executed(file, tmp_path, monkeypatch):
    folder, mark = plain(tmp_path / "x"), tmp_path / "executed"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil:\n    pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("nobody is asked whether to run it"))
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    edit(folder / file, auto_map={name: "evil.Evil" for name in names} | {"AutoTokenizer": ["evil.Evil", None]})
    base_model.require_folder(folder)
    base_model.require_whole(folder)
    assert not mark.exists()
