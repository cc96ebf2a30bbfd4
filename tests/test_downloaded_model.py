"""A model in the multimodal layout of MedGemma 4B, from the hub through download, refinement, add_lora and train_00."""

import json
import shutil

import hub_repositories as published
import pytest
from loopback_hub import Hub

from medgemma_korean import records

pytestmark = pytest.mark.slow

PROGRAMS = (
    ("download_all",),
    ("refine_all",),
    ("prepare_tokenizer",),
    ("add_lora",),
    ("train_00_plain_text", "--max-samples", 60, "--max-length", 128, "--micro-batch", 8),
)


def test_the_published_layout_is_loaded_adapted_and_trained(tmp_path, run_program):
    import torch_fixtures as tf
    from safetensors import safe_open

    shutil.copytree(published.SAMPLE_RAW / "01_medical_dict", tmp_path / "data/01_raw/01_medical_dict")
    with Hub() as hub:
        published.publish_all(hub, published.model_files())
        for program, *options in PROGRAMS:
            outcome = run_program(program, "--model", "medgemma-4b", *options, env=published.environment(hub))
            assert outcome.code == 0, f"{program}: {outcome.text}"

    models = tmp_path / "model"
    raw = models / "raw/medgemma-4b"
    assert not (raw / "pytorch_model.bin").exists() and not (raw / "original").exists()
    assert json.loads((raw / "config.json").read_text())["architectures"] == ["Gemma3ForConditionalGeneration"]

    base = models / "raw_lora_added/medgemma-4b/base"
    assert json.loads((base / "config.json").read_text())["architectures"] == ["Gemma3ForCausalLM"]
    with safe_open(raw / "model.safetensors", "pt") as old, safe_open(base / "model.safetensors", "pt") as new:
        # The text tower's weights are the published ones: a wrong key mapping would load random ones and say nothing.
        inner = [name for name in new.keys() if "layers" in name]
        for name in inner:
            theirs = next(n for n in old.keys() if n.endswith(name.removeprefix("model.")) and "vision" not in n)
            assert (old.get_tensor(theirs).float() - new.get_tensor(name).float()).abs().max() < 1e-2, name
        assert len(inner) == 2 * 13 and not [n for n in new.keys() if "vision" in n or "projector" in n]
        rows = new.get_tensor("model.embed_tokens.weight")
        assert rows.shape[0] > len(tf.base_tokenizer())

    trained = models / "00_trained/medgemma-4b"
    record = records.read_json(trained / "stage.json")
    assert record["steps"] == 16
    with safe_open(trained / "final/adapter_model.safetensors", "pt") as adapter:
        assert not [name for name in adapter.keys() if "vision" in name]
        moved = [n for n in adapter.keys() if "lora_B" in n and adapter.get_tensor(n).abs().max() > 0]
    assert len(moved) == 2 * 7  # seven projections in each of two layers
    scores = records.read_json(models / "report/medgemma-4b/scores/extended.json")
    after = records.read_json(trained / "evaluation.json")
    assert after["bits_per_character"]["korean"] < scores["bits_per_character"]["korean"]
