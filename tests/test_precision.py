"""The probe of a quantised base and the choice of a precision, on real bitsandbytes layers."""

from __future__ import annotations

import gc
import json
import logging
import math
import shutil
from dataclasses import replace

import pytest
import torch_fixtures as tf

from medgemma_korean import evaluation, memory, modeling, precision, records
from medgemma_korean import tokenizer as tokenizers
from medgemma_korean.cli import PipelineError

# Random weights suffer more from four bits than trained ones; this lets them pass where another fault is looked at.
LENIENT = precision.Limits(kl=0.2)
PROFILE = tf.profile(score_characters=2000)


@pytest.fixture(autouse=True)
def collected():
    """A probe gives memory back, for which every object of the libraries would be looked at, dozens of times."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def paths(tmp_path, monkeypatch):
    """A run with held-out text and the raw model's configuration."""
    monkeypatch.setenv("MEDGEMMA_KOREAN_ROOT", str(tmp_path))
    found = tf.paths()
    records.write_jsonl(found.mcq / "dev.jsonl", tf.ITEMS)
    records.write_jsonl(found.plain_text / "validation.jsonl", [{"text": text} for text in tf.KOREAN])
    records.write_jsonl(found.english_replay / "validation.jsonl", [{"text": text} for text in tf.ENGLISH])
    found.raw_model.mkdir(parents=True)
    shutil.copy(tf.raw_folder() / "config.json", found.raw_model)
    return found


def changed(folder, change):
    """A copy of the raw model after `change(tensors)`."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(tf.raw_folder(), folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def with_large_activations(folder, factor):
    """The same function, with states of one layer that are `factor` times as large."""

    def change(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"] *= factor
        tensors["model.layers.0.mlp.down_proj.weight"] /= factor

    return changed(folder, change)


def with_outliers(folder):
    """The same function but for rounding, with one huge weight a row, whose input is next to nothing: a step of eight
    or four bits is then larger than all other weights.
    """

    def change(tensors):
        for layer in (0, 1):
            for norm, names in (
                ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
                ("pre_feedforward_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
            ):
                tensors[f"model.layers.{layer}.{norm}.weight"][0] = -1 + 1e-5  # Gemma multiplies by 1 + weight
                for name in names:
                    tensors[f"model.layers.{layer}.{name}.weight"][:, 0] = 300.0

    return changed(folder, change)


def probed(folder, kind, paths, profile=PROFILE, **options):
    reference = precision.reference_of(folder, profile, paths, "cpu")
    return precision.probe(folder, kind, reference, profile, "cpu", **options)


def choose(folder, asked, paths, profile=PROFILE, device="cpu", **options):
    return precision.choose(folder, asked, profile, paths, device, measured_on="base", **options)


# the probe ----------------------------------------------------------------------------------------------


def test_a_sound_base_passes_in_eight_bits(paths):
    found = probed(tf.base_folder(), "8bit", paths)
    assert found.passed and found.reasons == found.warnings == ()
    assert 0 < found.kl < 0.01 and abs(found.bits_gap) < 0.01
    assert found.reference == "fp32" and found.compute_dtype == "float32" and not found.offloaded
    assert 0 < found.gradient_norm == pytest.approx(found.reference_gradient_norm, rel=0.1)
    four = probed(tf.base_folder(), "nf4", paths, limits=LENIENT)
    assert four.passed and four.kl > 10 * found.kl
    json.loads(json.dumps(precision.Choice("8bit", "float32", "auto", "x", "base", probes=(found,)).as_dict()))


def test_what_a_probe_measures(paths):
    """Every number by other means: transformers' own loss, hooks of our own, and the whole logits."""
    import torch

    reference = precision.reference_of(tf.base_folder(), PROFILE, paths, "cpu")
    found = precision.probe(tf.base_folder(), "nf4", reference, PROFILE, "cpu")
    texts = evaluation.held_out_texts(paths, PROFILE)
    exact, four = (modeling.load_base(tf.base_folder(), PROFILE, "cpu", kind).eval() for kind in ("fp32", "nf4"))
    largest = {}

    def hook(name):
        return lambda _, inputs, output: largest.setdefault(name, []).append(
            (inputs[0].abs().max(), output.abs().max())
        )

    for name, module in exact.named_modules():
        if name.endswith("_proj"):
            module.register_forward_hook(hook(name))
    kl = tokens = 0.0
    for language in ("korean", "english"):
        ids = [2, *tokenizers.encode(tf.tokenizer(), "".join(f"{text}\n\n" for text in texts[language]))][:512]
        assert found.tokens[language] == len(ids)
        p, q = (tf.logits(model, ids)[:-1].log_softmax(dim=-1) for model in (exact, four))
        kl += (p.exp() * (p - q)).sum().item()
        tokens += len(ids) - 1
        characters = len(tf.tokenizer().decode(ids[1:]))
        for told, scores in ((found.reference_bits, p), (found.bits, q)):
            nats = -scores[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].sum().item()
            assert told[language] == pytest.approx(nats / math.log(2) / characters, rel=1e-4)
    assert found.kl == pytest.approx(kl / tokens, rel=1e-5)  # the other way round it is 3e-4 off
    inputs, outputs = ({n: max(pair[i].item() for pair in v) for n, v in largest.items()} for i in (0, 1))
    assert len(inputs) == 14 == len(reference.look.peaks)
    assert reference.look.peaks == {name: (inputs[name], outputs[name]) for name in inputs}
    assert found.largest_input == max(inputs.values()) and found.largest_output == max(outputs.values())
    assert len(found.layers) == 5 and max(found.layers["model.layers.1.mlp.down_proj"]) == found.largest_input

    # The gradient of the mean loss to the embedded inputs, in one piece.
    total = 0.0
    for text in reference.batch.values():
        ids = torch.tensor([text])
        embedded = exact.get_input_embeddings()(ids).detach().requires_grad_()
        loss = exact(inputs_embeds=embedded, labels=ids, use_cache=False).loss * (len(text) - 1) / tokens
        total += torch.autograd.grad(loss, embedded)[0].square().sum().item()
    assert found.reference_gradient_norm == pytest.approx(math.sqrt(total), rel=1e-4)


def test_a_base_that_does_not_fit_is_measured_from_its_files(paths, monkeypatch):
    whole = precision.reference_of(tf.base_folder(), PROFILE, paths, "cpu")
    case = memory.case(PROFILE, paths, PROFILE.plain_text, precision="fp32", dtype="float32")
    weights = memory.predict(case)["base weights"]
    there = memory.probe_bytes(case, precision.TOKENS, precision.STATES) - weights / 2
    real, placed = modeling.load_base, []
    monkeypatch.setattr(modeling, "load_base", lambda *args: placed.append(args[-1]) or real(*args))
    offloaded = precision.reference_of(tf.base_folder(), PROFILE, paths, "cpu", available=there)
    assert placed == [{"cpu": pytest.approx(weights / 2, abs=1)}]
    assert offloaded.offloaded and not whole.offloaded
    assert offloaded.look.nats == whole.look.nats and offloaded.look.peaks == whole.look.peaks
    assert all((a == b).all() for a, b in zip(offloaded.look.log_probs, whole.look.log_probs, strict=True))
    assert offloaded.look.gradient_norm is None and offloaded.broken() is None
    found = precision.probe(tf.base_folder(), "8bit", offloaded, PROFILE, "cpu")
    assert (
        placed[1] == "8bit"
        and found.passed
        and found.offloaded
        and found.gradient_norm
        and found.reference_gradient_norm is None
    )


def test_a_weight_that_is_no_number_is_named(paths, tmp_path):
    def change(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = math.nan

    folder = changed(tmp_path / "nan", change)
    where = r"unquantised base \(fp32\) are not finite; the first layer with such an output is model.layers.1.mlp.up_p"
    found = probed(folder, "8bit", paths)
    assert not found.passed and found.kl is None and found.largest_output is None
    assert "logits in 8bit are not finite" in found.reasons and "gradients in 8bit are not finite" in found.reasons
    assert "NaN" not in json.dumps(precision.Choice("8bit", "", "", "", "", probes=(found,)).as_dict())
    for asked in ("auto", "8bit"):  # no other precision would be better
        with pytest.raises(PipelineError, match=where):
            choose(folder, asked, paths)


def test_activations_beyond_float16(paths, tmp_path):
    peak = probed(tf.raw_folder(), "8bit", paths).layers["model.layers.0.mlp.down_proj"][0]
    folder = with_large_activations(tmp_path / "large", 1e5)
    found = probed(folder, "8bit", paths)
    reason = (
        f"an activation of model.layers.0.mlp.down_proj is as large as {found.largest_input:,.0f}; the int8 kernels"
    )
    assert len(found.reasons) == 1 and found.reasons[0].startswith(reason)  # nothing else is wrong with it on a CPU
    assert found.largest_input == pytest.approx(peak * 1e5, rel=0.01)
    # Four bits are computed in the compute type, which holds them.
    four = probed(folder, "nf4", paths, limits=LENIENT)
    assert four.passed and "model.layers.0.mlp.down_proj" in four.warnings[0]
    warned = probed(with_large_activations(tmp_path / "less", 40_000 / peak), "8bit", paths)
    assert warned.passed and len(warned.warnings) == 1 and "as large as 40,0" in warned.warnings[0]
    quiet = probed(with_large_activations(tmp_path / "small", 31_000 / peak), "8bit", paths)
    assert quiet.passed and not quiet.warnings


def test_a_loss_of_meaning(paths, tmp_path):
    folder = with_outliers(tmp_path / "outliers")
    for kind in ("8bit", "nf4"):
        found = probed(folder, kind, paths)
        assert not found.passed and found.kl > 0.05
        assert any(reason.startswith(f"KL(fp32 || {kind}) is ") for reason in found.reasons)
        assert f"KL {found.kl:.2g} nats a token (at most 0.05)" in found.numbers
    # Every limit alone, on a base that is sound.
    sound = probed(tf.base_folder(), "8bit", paths)
    strict = {"kl": sound.kl / 2, "bits": abs(sound.bits_gap) / 2, "activation": sound.largest_input - 1}
    for name, reason in (
        ("kl", "KL(fp32 || 8bit)"),
        ("bits", "bits per character change by"),
        ("activation", "an act"),
    ):
        limits = replace(precision.Limits(), warning=1.0, **{name: strict[name]})
        found = probed(tf.base_folder(), "8bit", paths, limits=limits)
        assert [text[: len(reason)] for text in found.reasons] == [reason]


def test_a_batch_is_as_long_as_asked_for(paths):
    texts = {"korean": tf.texts(200, 4, tf.KOREAN), "english": tf.texts(3, 4, tf.ENGLISH)}
    found = precision.batch_of(tf.tokenizer(), texts)
    assert len(found["korean"]) == 512 > len(found["english"]) > 10
    for language, ids in found.items():
        assert ids[0] == 2 and 2 not in ids[1:]
        assert tf.tokenizer().decode(ids[1:20]).strip()[:10] == texts[language][0][:10]
    with pytest.raises(PipelineError, match="no held-out english text"):
        precision.batch_of(tf.tokenizer(), texts | {"english": []})


# the choice ---------------------------------------------------------------------------------------------


def test_the_profile_s_precision_is_taken_where_it_passes(paths, caplog):
    caplog.set_level(logging.INFO, "medgemma_korean")
    found = choose(tf.base_folder(), "auto", paths)
    assert (found.precision, found.compute_dtype, found.asked, found.refused) == ("8bit", "float32", "auto", {})
    assert found.reason.startswith("its probe passed: KL ") and len(found.probes) == 1
    assert [r.getMessage() for r in caplog.records if r.name == "medgemma_korean"] == [
        f"precision: 8bit, computing in float32: {found.reason}"
    ]
    again = choose(tf.base_folder(), "auto", paths)
    assert again == found  # the same bytes in every file that holds it


@pytest.mark.parametrize(("dtype", "whole"), [("float32", "fp32"), ("bfloat16", "bf16")])
def test_it_falls_back_and_says_why(paths, tmp_path, dtype, whole):
    profile = replace(PROFILE, dtype=dtype)
    large = with_large_activations(tmp_path / "large", 1e5)
    found = choose(large, "auto", paths, profile, limits=LENIENT)
    assert (found.precision, found.compute_dtype) == ("nf4", dtype)
    assert [probe.passed for probe in found.probes] == [False, True]
    assert "the int8 kernels compute in float16" in found.refused["8bit"] and found.refused["8bit"] in found.reason
    assert "as large as" in found.warnings[0]
    found = choose(with_outliers(tmp_path / "outliers"), "auto", paths, profile)
    assert found.precision == whole and list(found.refused) == ["8bit", "nf4"] and len(found.probes) == 2
    assert f"not 8bit: its probe failed: KL({whole} || 8bit) is " in found.reason
    assert f"not nf4: its probe failed: KL({whole} || nf4) is " in found.reason


def test_a_precision_that_was_asked_for_is_never_replaced(paths, tmp_path):
    folder = with_outliers(tmp_path / "outliers")
    for asked in ("8bit", "nf4"):
        with pytest.raises(PipelineError, match=rf"--precision {asked}: its probe failed: KL.*nats a token") as error:
            choose(folder, asked, paths)
        assert error.value.exit_code == 2 and "--precision auto" in str(error.value)
    assert choose(tf.base_folder(), "8bit", paths).precision == "8bit"
    for asked in ("fp32", "bf16"):  # nothing to probe, so that no model is needed
        found = choose(tmp_path / "nowhere", asked, paths)
        assert found.precision == asked and found.probes == () and "no probe is needed" in found.reason
    assert choose(folder, "auto", paths, preferred="fp32").precision == "fp32"


def test_memory_decides_too(paths, monkeypatch):
    sizes = {}
    for kind in ("8bit", "nf4", "fp32"):
        cases = memory.cases(PROFILE, paths, precision=kind, dtype="float32").values()
        sizes[kind] = max(memory.total(memory.least(case)) for case in cases)
    assert sizes["nf4"] < sizes["8bit"] < sizes["fp32"]
    monkeypatch.setattr(memory, "free_ram", lambda: sizes["nf4"])
    found = choose(tf.base_folder(), "auto", paths, limits=LENIENT)
    assert found.precision == "nf4" and list(found.refused) == ["8bit"] and found.probes[0].offloaded
    assert "stage 00 needs about 1.0 GB (predicted) even with forward passes of 1 row" in found.refused["8bit"]
    assert any("predicted to fit only with --micro-batch 1" in warning for warning in found.warnings)
    # Asked for by name it is tried where it can be scored: shorter rows may be planned.
    wide = replace(PROFILE, lora_rank=2048)
    case = memory.case(wide, paths, wide.mcq, precision="8bit", dtype="float32")
    monkeypatch.setattr(memory, "free_ram", lambda: memory.probe_bytes(case, precision.TOKENS, precision.STATES))
    assert choose(tf.base_folder(), "8bit", paths, wide).warnings[0].startswith("stage 00 needs about 1.1 GB")
    monkeypatch.setattr(memory, "free_ram", lambda: 0.5e9)
    with pytest.raises(PipelineError) as error:
        choose(tf.base_folder(), "auto", paths)
    lines = str(error.value).splitlines()
    assert "no precision will do" in lines[0]
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["8bit", "nf4", "fp32"]
    assert all("0.5 GB are there (main memory); a card of 16 GB would do" in line for line in lines[1:])
    with pytest.raises(PipelineError, match="--precision 8bit: scoring needs about 1.0 GB"):
        choose(tf.base_folder(), "8bit", paths)


@pytest.fixture
def older_card(monkeypatch):
    """older_card(gigabytes): the CUDA device of this test has no bfloat16."""
    import torch

    def make(gigabytes):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "an older card")
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (int(gigabytes * 1e9),) * 2)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)

    return make


def test_a_card_without_bfloat16_computes_in_float32(paths, tmp_path, older_card):
    import torch

    older_card(32)
    bfloat, large = replace(PROFILE, dtype="bfloat16", precision="bf16"), tf.profile()
    assert modeling.compute_dtype(bfloat, "cuda:0") == modeling.compute_dtype(large, "cuda:0") == torch.float32
    assert modeling.compute_dtype(bfloat, "cpu") == torch.bfloat16
    found = choose(tmp_path, "auto", paths, bfloat, "cuda:0")
    assert (found.precision, found.compute_dtype) == ("fp32", "float32")
    assert "computing in float32, because cuda:0, an older card has no bfloat16" in found.reason
    with pytest.raises(PipelineError, match="--precision bf16: cuda:0, an older card has no bfloat16; use"):
        choose(tmp_path, "bf16", paths, bfloat, "cuda:0")
    with pytest.raises(PipelineError, match="bf16: an older card cannot compute in it; use --precision fp32"):
        modeling.load_base(tf.base_folder(), bfloat, "cuda:0", "bf16")


@pytest.mark.parametrize(
    ("asked", "there", "needs"), [("auto", 16, "8bit needs a card of 40"), ("nf4", 24, "nf4 needs a card of 32")]
)
def test_a_card_without_bfloat16_that_is_too_small(tmp_path, older_card, asked, there, needs):
    from medgemma_korean import profiles
    from medgemma_korean.paths import RunPaths

    older_card(there)
    run = RunPaths.of("medgemma-27b", "data")
    with pytest.raises(PipelineError) as error:
        choose(tmp_path, asked, run, profiles.MODELS["medgemma-27b"], "cuda:0")
    text = str(error.value)
    assert error.value.exit_code == 2 and f"{there}.0 GB are there (cuda:0, an older card)" in text
    assert f"{'8bit' if asked == 'auto' else '--precision nf4'}: stage 00 needs" in text
    assert text.endswith(f"with bfloat16 (Ampere and later) {needs} GB")
    assert ("fp32: stage 00 needs" in text) == (asked == "auto") and "bf16:" not in text


# what is kept -------------------------------------------------------------------------------------------


def test_what_is_stored_is_found_again(paths, tmp_path):
    base = paths.another_lora_added / "base"
    shutil.copytree(with_large_activations(tmp_path / "large", 1e5), base)
    assert precision.stored(base) is None and precision.chosen(base, PROFILE) == "8bit"
    command = "add_lora.py --model tiny --second --precision 8bit --force"
    with pytest.raises(PipelineError, match=f"no probe of 8bit was made of this base; run: python .*{command}"):
        precision.require_passing(base, "8bit", paths)
    with pytest.raises(PipelineError, match="run: add_lora.py --second --precision nf4 --force"):
        precision.require_passing(base, "nf4")
    precision.require_passing(base, "bf16", paths)  # nothing to probe
    made = choose(base, "auto", paths, limits=LENIENT)
    precision.store(made, base)
    assert precision.stored(base) == made.as_dict() and precision.chosen(base, PROFILE) == "nf4"
    precision.require_passing(base, "nf4", paths)
    with pytest.raises(PipelineError, match="its probe of 8bit failed: an activation of model.layers.0.mlp.down_proj"):
        precision.require_passing(base, "8bit", paths)
    found = tf.read(base / "precision.json")["probes"][0]
    assert found["passed"] is False and found["limits"]["activation"] == 65504 and found["largest_input"] > 65504
    for other in ("[]", '{"precision": "8bit"}'):
        (base / "precision.json").write_text(other)
        with pytest.raises(PipelineError, match="precision.json: not a choice of precision"):
            precision.stored(base)
