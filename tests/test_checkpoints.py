"""Checkpoints as streams: bases that are grown and merged, and adapters made, without a model in memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch_fixtures as tf

from medgemma_korean import checkpoints, modeling
from medgemma_korean import tokenizer as tokenizers
from medgemma_korean.cli import PipelineError

OLD = [2, 300, 301, 302, 400, 450, 500, 9, 10, 11, 320, 333]


def with_new() -> list[int]:
    return [*OLD, *tf.new_ids()]


def sharded(folder: Path, target: Path, size: str = "60KB") -> Path:
    """The same checkpoint in several files, as large models are published."""
    from transformers import AutoModelForCausalLM, Gemma3ForConditionalGeneration

    whole = Gemma3ForConditionalGeneration if folder == tf.multimodal_folder() else AutoModelForCausalLM
    whole.from_pretrained(folder).save_pretrained(target, max_shard_size=size)
    tokenizers.copy(tf.tokenizer_folder(), target)
    assert len(list(target.glob("*.safetensors"))) > 2
    return target


# reading and writing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("files", ["one file", "several files"])
@pytest.mark.parametrize("source", ["text-only", "multimodal"])
def test_a_checkpoint_passes_through_unchanged(tmp_path, source, files, monkeypatch):
    import torch
    from transformers import Gemma3ForCausalLM

    folder = {"text-only": tf.raw_folder, "multimodal": tf.multimodal_folder}[source]()
    expected = tf.logits(tf.text_model(folder), OLD)
    if files == "several files":
        folder = sharded(folder, tmp_path / "sharded")
        monkeypatch.setattr(checkpoints, "SHARD_BYTES", 30_000)
    checkpoint = checkpoints.Checkpoint(folder)
    checkpoints.write(tmp_path / "out", checkpoint.config, iter(checkpoint), "float32")
    again, info = Gemma3ForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(tf.logits(again, OLD), expected)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    written = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    if files == "one file":
        assert written == ["model.safetensors"]
    else:
        index = json.loads((tmp_path / "out" / checkpoints.INDEX).read_text())
        assert len(written) > 2 and sorted(set(index["weight_map"].values())) == written
        assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in again.parameters())


def test_the_type_of_the_weights_is_the_profiles(tmp_path):
    import torch
    from transformers import Gemma3ForCausalLM

    checkpoint = checkpoints.Checkpoint(tf.raw_folder())
    checkpoints.write(tmp_path, checkpoint.config, iter(checkpoint), "bfloat16")
    model = Gemma3ForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    expected = tf.text_model(tf.raw_folder()).model.norm.weight.to(torch.bfloat16)
    assert torch.equal(model.model.norm.weight, expected)


def test_what_is_wrong_with_a_checkpoint_is_one_message(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "a"
    shutil.copytree(tf.raw_folder(), folder)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(PipelineError, match="1 weights are missing, first model.layers.1.mlp.up_proj.weight"):
        checkpoints.Checkpoint(folder)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(PipelineError, match=r"model\.safetensors: missing or damaged"):
        checkpoints.Checkpoint(folder)
    weights.unlink()
    with pytest.raises(PipelineError, match="no weights there"):
        checkpoints.Checkpoint(folder)
    many = sharded(tf.raw_folder(), tmp_path / "b")
    next(many.glob("*.safetensors")).unlink()
    with pytest.raises(PipelineError, match="missing or damaged"):
        list(checkpoints.Checkpoint(many))


# new rows -----------------------------------------------------------------------------------------------


def test_extended_rows():
    import torch

    before = tf.text_model(tf.raw_folder()).get_input_embeddings().weight
    model = tf.text_model(tf.base_folder())
    weight = model.get_input_embeddings().weight
    assert tf.new_ids() == list(range(701, 741)) and weight.shape[0] == 768 == model.config.vocab_size
    assert torch.equal(weight[:701], before[:701])
    for i, parts in zip(tf.new_ids(), tf.parts(), strict=True):
        assert len(parts) > 1
        torch.testing.assert_close(weight[i], torch.stack([before[p] for p in parts]).mean(dim=0))
    # The spare rows of the base were never trained, and no token uses the last ones.
    torch.testing.assert_close(weight[741:], before[:701].mean(dim=0).expand(27, -1))


def test_a_few_new_tokens_never_shrink_the_matrix_and_none_is_possible():
    """`resize(len(tokenizer))` would cut the spare rows off."""
    import torch

    old = checkpoints.Checkpoint(tf.raw_folder()).tensor(checkpoints.MATRIX)
    assert len(old) == 704
    grown = checkpoints.grown(old, 701, 704, checkpoints.mean_rows(old, tf.parts()[:2]))
    assert len(grown) == 704 and torch.equal(grown[:701], old[:701]) and not torch.equal(grown[701:], old[701:])
    none = checkpoints.grown(old, 701, 704, checkpoints.mean_rows(old, []))
    assert torch.equal(none[:701], old[:701])
    torch.testing.assert_close(none[701:], old[:701].mean(dim=0).expand(3, -1))
    with pytest.raises(AssertionError, match="rows would be lost"):
        checkpoints.grown(old, 701, 640, checkpoints.mean_rows(old, []))


def test_a_shift_lowers_the_logits_of_new_rows_by_about_itself():
    import torch

    old = checkpoints.Checkpoint(tf.raw_folder()).tensor(checkpoints.MATRIX)
    states = torch.randn(200, 32, generator=torch.Generator().manual_seed(1)) * 0.2 + 1.0
    state = states.mean(dim=0)
    plain, shifted = (checkpoints.mean_rows(old, tf.parts(), s) for s in (None, 2 * state / state.square().sum()))
    lowered = (states @ plain.T - states @ shifted.T).mean()
    assert lowered.item() == pytest.approx(2.0, rel=1e-4)


def test_library_rows_are_those_of_the_library():
    """A draw around the mean of the old rows, so near to it that all are almost equal."""
    import torch

    model = tf.text_model(tf.raw_folder())
    old = model.get_input_embeddings().weight.detach().clone()
    torch.manual_seed(3)
    mine = checkpoints.library_rows(old, 64)
    model.resize_token_embeddings(704 + 64, mean_resizing=True)
    theirs = model.get_input_embeddings().weight[704:]
    torch.testing.assert_close(mine.mean(dim=0), theirs.mean(dim=0), atol=1e-4, rtol=0)
    assert 0.5 < (mine.std(dim=0) / theirs.std(dim=0)).median() < 2


# adapters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", [False, True], ids=["first", "second"])
def test_an_adapter_made_without_the_model_is_that_of_the_model(tmp_path, second):
    ids = [] if second else tf.new_ids()
    whole = modeling.fresh_adapter(tf.text_model(tf.base_folder()), tf.profile(), second=second, new_ids=ids, seed=4)
    whole.peft_config["default"].base_model_name_or_path = "../base"
    modeling.save_adapter(whole, tmp_path / "whole")
    made = checkpoints.fresh_adapter(
        tf.base_folder(), tmp_path / "made", tf.profile(), second=second, new_ids=ids, seed=4
    )
    assert made == modeling.trainable_parameters(whole)
    assert (tmp_path / "made" / tf.ADAPTER).read_bytes() == (tmp_path / "whole" / tf.ADAPTER).read_bytes()
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("made", "whole")]
    for config in configs:
        config["target_modules"].sort()
    assert configs[0] == configs[1]


# merging ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("files", ["one file", "several files"])
def test_a_merge_is_that_of_peft_bit_for_bit(tmp_path, files, monkeypatch):
    import torch
    from transformers import AutoModelForCausalLM

    base = tf.base_folder()
    unmerged = modeling.load_adapter(tf.text_model(base), tf.moved_adapter_folder(), trainable=False)
    before = tf.logits(unmerged, with_new())
    if files == "several files":
        base = sharded(base, tmp_path / "sharded")
        monkeypatch.setattr(checkpoints, "SHARD_BYTES", 30_000)
    error = checkpoints.merge(base, tf.moved_adapter_folder(), tmp_path / "out", "float32", with_new())
    assert error < 1e-5
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(tf.logits(merged, with_new()), before, rtol=1e-4, atol=1e-4)
    untouched = tf.text_model(tf.base_folder())
    assert (tf.logits(untouched, with_new()) - before).abs().max() > 0.1  # the adapter does something
    theirs = unmerged.merge_and_unload().state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in merged.state_dict().items())
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert torch.equal(merged.get_input_embeddings().weight[:701], untouched.get_input_embeddings().weight[:701])


def test_a_wrong_merge_is_noticed(tmp_path, monkeypatch):
    """The check reads what was written: a merge that forgets the rows, or a layer, does not pass."""
    whole = checkpoints.Adapter.onto

    def forgetful(self, name, weight):
        return weight if name == forgotten else whole(self, name, weight)

    monkeypatch.setattr(checkpoints.Adapter, "onto", forgetful)
    for forgotten in (checkpoints.MATRIX, "model.layers.1.mlp.down_proj.weight"):
        with pytest.raises(AssertionError, match="merged logits differ by"):
            checkpoints.merge(tf.base_folder(), tf.moved_adapter_folder(), tmp_path / forgotten, "float32", with_new())


def test_a_bfloat16_merge_rounds_once(tmp_path):
    import torch

    source = checkpoints.Checkpoint(tf.base_folder())
    checkpoints.write(tmp_path / "base", source.config, iter(source), "bfloat16")
    checkpoints.merge(tmp_path / "base", tf.moved_adapter_folder(), tmp_path / "out", "bfloat16", with_new())
    name = "model.layers.0.self_attn.q_proj.weight"
    adapter = checkpoints.Adapter(tf.moved_adapter_folder())
    a, b = adapter.pairs[name]
    weight = checkpoints.Checkpoint(tmp_path / "base").tensor(name)
    expected = (weight.float() + adapter.scale * (b @ a)).to(torch.bfloat16)
    assert torch.equal(checkpoints.Checkpoint(tmp_path / "out").tensor(name), expected)


def test_an_adapter_that_does_not_fit_is_one_message(tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tf.moved_adapter_folder(), other)
    config = json.loads((other / "adapter_config.json").read_text())
    for change, message in (
        ({"use_dora": True}, "an adapter with use_dora, which cannot be merged"),
        ({"rank_pattern": {"q_proj": 2}}, "an adapter with rank_pattern"),
        ({"trainable_token_indices": None}, "token rows and its adapter_config.json do not fit"),
    ):
        (other / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(PipelineError, match=message):
            checkpoints.Adapter(other)
    with pytest.raises(PipelineError, match="does not fit its base"):
        checkpoints.merge(tf.raw_folder(), tf.moved_adapter_folder(), tmp_path / "out", "float32", OLD)
    with pytest.raises(PipelineError, match="no adapter there"):
        checkpoints.Adapter(tf.raw_folder())


# memory -------------------------------------------------------------------------------------------------

CHILD = """
import json, sys, threading, time
from pathlib import Path
import torch
from medgemma_korean import checkpoints, modeling, profiles
import torch_fixtures as tf

peak, before = [0], []

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

def watch():
    while True:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.005)

raw, out = Path(sys.argv[1]), Path(sys.argv[2])
checkpoints.SHARD_BYTES = int(sys.argv[3])
modeling.set_up_torch(1)
# Once on something small, so that what the libraries themselves take is not counted.
checkpoints.merge(tf.base_folder(), tf.moved_adapter_folder(), out / "small", "float32", [5, 6, 7])
start = anonymous()
threading.Thread(target=watch, daemon=True).start()
source = checkpoints.Checkpoint(raw)
old = source.tensor(checkpoints.MATRIX)
ids = list(range(len(old), len(old) + 640))
matrix = checkpoints.grown(old, len(old), len(old) + 640, checkpoints.mean_rows(old, [[5, 6]] * 640))
checkpoints.extend(source, out / "base", "bfloat16", matrix)
del matrix, old
profile = tf.profile(dtype="bfloat16")
checkpoints.fresh_adapter(out / "base", out / "adapter", profile, second=False, new_ids=ids, seed=1)
checkpoints.merge(out / "base", out / "adapter", out / "merged", "bfloat16", list(range(64)))
print(json.dumps({"peak": peak[0] - start}))
"""


@pytest.mark.slow
def test_a_large_checkpoint_needs_a_fraction_of_its_size_in_memory(tmp_path):
    """A random Gemma-3 of 0.54 GB with the proportions of the 27B (the matrix a twentieth of it), in files of 20 MB.

    Extending, adapter and merge stay below half its size (a fifth to a third was seen, the libraries' own share among
    it), where each of them would take more than all of it with the model in memory. At the true width: bench/README.
    """
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    shape = tf.shape(16_384) | {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 29, "num_attention_heads": 6,
        "num_key_value_heads": 3, "head_dim": 128, "layer_types": ["full_attention"] * 29,
    }  # fmt: skip
    torch.manual_seed(1)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = Gemma3ForCausalLM(Gemma3TextConfig(**shape))
    finally:
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(tmp_path / "raw", max_shard_size="50MB")
    size = sum(p.numel() for p in model.parameters()) * 2
    del model
    assert 0.5e9 < size < 0.6e9 and len(list((tmp_path / "raw").glob("*.safetensors"))) > 8
    command = [sys.executable, "-c", CHILD, str(tmp_path / "raw"), str(tmp_path), "20000000"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    peak = json.loads(done.stdout.strip().splitlines()[-1])["peak"]
    assert peak < size / 2, f"{peak / 1e6:.0f} MB for {size / 1e6:.0f} MB"
