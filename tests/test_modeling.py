"""Loading, new rows, adapters and merges on real Gemma-3, bitsandbytes and PEFT classes."""

import json
import shutil

import pytest
import torch_fixtures as tf

from medgemma_korean import modeling
from medgemma_korean.cli import PipelineError

OLD = [2, 300, 301, 302, 400, 450, 500, 9, 10, 11, 320, 333, 444, 555, 666, 600, 601, 602, 603]


def with_new() -> list[int]:
    return [*OLD, *tf.new_ids()]


def edit_weights(folder, change):
    """The weights of a checkpoint after `change(tensors)`."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def steps(model, number=3, rate=1e-2):
    """A few optimizer steps on text with new tokens; returns the losses."""
    import torch

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    ids = torch.tensor([with_new()])
    losses = []
    model.train()
    for _ in range(number):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# loading ------------------------------------------------------------------------------------------------


def test_text_checkpoint():
    import torch
    from transformers import Gemma3ForCausalLM

    model = tf.text_model(tf.raw_folder())
    plain = Gemma3ForCausalLM.from_pretrained(tf.raw_folder())
    assert torch.equal(tf.logits(model, OLD), tf.logits(plain, OLD))
    assert modeling.load_base(tf.raw_folder(), tf.profile(), "cpu", "bf16").dtype == torch.bfloat16


@pytest.mark.parametrize("original", [True, False], ids=["gemma's names", "the library's names"])
def test_multimodal_checkpoint(tmp_path, original):
    import torch
    from transformers import Gemma3ForConditionalGeneration

    whole = Gemma3ForConditionalGeneration.from_pretrained(tf.multimodal_folder())
    whole.save_pretrained(tmp_path, save_original_format=original)
    text = tf.text_model(tmp_path)
    assert type(text).__name__ == "Gemma3ForCausalLM"
    assert not any("vision" in name for name, _ in text.named_parameters())
    assert torch.equal(tf.logits(text, OLD), tf.logits(whole, OLD))


def test_missing_weights_are_an_error(tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(tf.raw_folder(), folder)
    edit_weights(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    message = "1 weights are missing, first model.layers.1.mlp.up_proj.weight"
    with pytest.raises(PipelineError, match=message):
        tf.text_model(folder)
    for precision in ("fp32", "8bit"):
        with pytest.raises(PipelineError, match=message):
            modeling.load_base(folder, tf.profile(), "cpu", precision)


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(PipelineError, match="config.json is missing"):
        modeling.load_base(tmp_path, tf.profile(), "cpu")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(PipelineError, match="config.json cannot be read"):
        tf.text_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(PipelineError, match="a model of the kind llama, not Gemma 3"):
        modeling.load_base(tmp_path, tf.profile(), "cpu")


def test_eight_bit_is_really_eight_bit_and_spares_the_head():
    import bitsandbytes
    import torch

    model = modeling.load_base(tf.base_folder(), tf.profile(), "cpu")
    layers = {n: m for n, m in model.named_modules() if n.endswith("_proj")}
    assert len(layers) == 14
    for name, module in layers.items():
        assert isinstance(module, bitsandbytes.nn.Linear8bitLt) and module.weight.dtype == torch.int8, name
        assert module.state.threshold == 6.0
    assert type(model.lm_head) is torch.nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.weight.dtype == torch.float32
    assert model.config.use_cache is False and not any(p.requires_grad for p in model.parameters())
    exact = tf.logits(modeling.load_base(tf.base_folder(), tf.profile(), "cpu", "fp32"), OLD)
    error = (tf.logits(model, OLD) - exact).norm() / exact.norm()
    assert 0 < error < 0.1  # quantised, and still the same model


def test_precisions():
    import bitsandbytes
    import torch

    assert modeling.load_base(tf.base_folder(), tf.profile(), "cpu", "fp32").dtype == torch.float32
    assert modeling.load_base(tf.base_folder(), tf.profile(), "cpu", "bf16").dtype == torch.bfloat16
    four = modeling.load_base(tf.base_folder(), tf.profile(), "cpu", "nf4")
    layers = [m for m in four.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    # Repacked weights would give silently wrong gradients.
    assert len(layers) == 14 and not any(m.support_avx512bf16_for_cpu for m in layers)
    assert type(four.lm_head) is torch.nn.Linear


def test_devices():
    import torch

    assert modeling.pick_device("cpu") == "cpu"
    assert modeling.pick_device(None) == ("cuda:0" if torch.cuda.is_available() else "cpu")
    for wrong, why in (("gpu", "not a device"), ("cuda:99", "CUDA devices"), ("meta", "cuda or cpu")):
        with pytest.raises(PipelineError, match=why):
            modeling.pick_device(wrong)


# adapters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "8bit"])
def test_fresh_adapter_reproduces_its_base_bit_for_bit(precision):
    import torch

    base = modeling.load_base(tf.base_folder(), tf.profile(), "cpu", precision)
    before = tf.logits(base, with_new())
    adapted = modeling.fresh_adapter(base, tf.profile(), second=False, new_ids=tf.new_ids(), seed=3)
    assert torch.equal(tf.logits(adapted, with_new()), before)


def test_what_a_fresh_adapter_trains():
    def fresh(second, ids):
        base = modeling.load_base(tf.base_folder(), tf.profile(), "cpu")
        return modeling.fresh_adapter(base, tf.profile(), second=second, new_ids=ids, seed=3)

    first = fresh(False, tf.new_ids())
    names = [n for n, p in first.named_parameters() if p.requires_grad]
    assert sum("lora_" in n for n in names) == 2 * 14 and len(names) == 2 * 14 + 1
    widths = {"q": (32, 32), "k": (32, 16), "v": (32, 16), "o": (32, 32), "gate": (32, 64), "up": (32, 64)}
    per_layer = sum(4 * (a + b) for a, b in [*widths.values(), (64, 32)])
    assert modeling.trainable_parameters(first) == {"lora": 2 * per_layer, "rows": 40 * 32}
    config = first.peft_config["default"]
    assert (config.r, config.lora_alpha, config.use_rslora, config.lora_dropout) == (4, 8, False, 0.0)
    scales = {m.scaling["default"] for m in first.modules() if hasattr(m, "lora_A")}
    assert scales == {2.0}
    second = fresh(True, [])
    assert second.peft_config["default"].r == 2 and second.peft_config["default"].lora_alpha == 4
    assert modeling.trainable_parameters(second) == {"lora": per_layer, "rows": 0}
    again = dict(fresh(False, tf.new_ids()).named_parameters())
    assert all((p == again[n]).all() for n, p in first.named_parameters() if p.requires_grad)  # seeded


def test_lora_on_a_vision_layer_is_refused():
    from transformers import Gemma3ForConditionalGeneration

    whole = Gemma3ForConditionalGeneration.from_pretrained(tf.multimodal_folder())
    with pytest.raises(AssertionError, match="vision"):
        modeling.fresh_adapter(whole, tf.profile(), second=True, new_ids=[], seed=3)


def test_training_in_eight_bit_moves_new_rows_and_lora_and_nothing_else():
    import torch

    model = tf.trainable_model("8bit")
    original = torch.clone(tf.text_model(tf.base_folder()).get_input_embeddings().weight)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    adapter = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    losses = steps(model, 4)
    assert losses[-1] < losses[0]
    now = dict(model.named_parameters())
    # The trained rows are written into the frozen matrix, whose other rows stay as they are, below and above.
    for name, before in frozen.items():
        same = (now[name] == before).all() if before.dim() < 2 else (now[name] == before).all(dim=1)
        if "embed_tokens" in name:
            assert not same[tf.new_ids()].any() and same[:701].all() and same[741:].all()
        else:
            assert same.all(), name
    assert all(not torch.equal(now[n], p) for n, p in adapter.items())
    merged = token_matrix(model)
    assert torch.equal(merged[:701], original[:701])
    assert (merged[tf.new_ids()] != original[tf.new_ids()]).any(dim=1).all()
    assert torch.equal(merged[741:], original[741:])


def token_matrix(model):
    """The token matrix as the model uses it, on the input and the output side."""
    import torch

    base = model.get_base_model()
    ids = torch.arange(base.config.vocab_size)
    with torch.no_grad():
        scale = base.config.hidden_size**0.5
        rows = base.get_input_embeddings()(ids) / scale
        out = base.get_output_embeddings()(torch.eye(base.config.hidden_size)).T
    torch.testing.assert_close(rows, out)
    return out


def test_a_loaded_adapter_trains_only_when_asked():
    def load(trainable):
        base = modeling.load_base(tf.base_folder(), tf.profile(), "cpu")
        return modeling.load_adapter(base, tf.adapter_folder(), trainable=trainable)

    assert modeling.trainable_parameters(load(False)) == {"lora": 0, "rows": 0}
    model = load(True)
    assert all(modeling.trainable_parameters(model).values())
    assert model.get_base_model().get_output_embeddings().bias is None  # TRL reads it


def test_adapter_is_saved_without_the_matrix_and_reloads_bit_for_bit(tmp_path):
    import torch
    from safetensors import safe_open

    model = tf.trainable_model("fp32")
    steps(model)
    modeling.save_adapter(model, tmp_path)
    with safe_open(tmp_path / tf.ADAPTER, "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    assert not any(768 in shape or 701 in shape for shape in shapes.values())
    assert [40, 32] in shapes.values()
    # A set's order is another one in each process, and the file is to be the same.
    assert (modules := tf.read(tmp_path / "adapter_config.json")["target_modules"]) == sorted(modules) and modules
    assert torch.equal(tf.logits(tf.trainable_model("fp32", tmp_path), with_new()), tf.logits(model, with_new()))
    # Into a model that has the same adapter.
    other = tf.trainable_model("fp32")
    modeling.load_adapter_weights(other, tmp_path)
    assert torch.equal(tf.logits(other, with_new()), tf.logits(model, with_new()))


def test_adapter_of_another_base_is_refused(tmp_path):
    raw = modeling.load_base(tf.raw_folder(), tf.profile(), "cpu", "fp32")
    with pytest.raises(PipelineError, match="trains token row 740, but its base has 704 rows"):
        modeling.load_adapter(raw, tf.adapter_folder(), trainable=True)
    with pytest.raises(PipelineError, match="no adapter there"):
        modeling.load_adapter(raw, tmp_path, trainable=True)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.parametrize("layers, width", [(3, 32), (1, 32), (2, 48)])
def test_adapter_of_a_base_of_another_shape_is_refused(layers, width):
    """PEFT only warns of tensors that are missing; the model would train or answer with half an adapter."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    shape = {**tf.shape(768), "num_hidden_layers": layers, "hidden_size": width}
    other = Gemma3ForCausalLM(Gemma3TextConfig(**shape | {"layer_types": ["full_attention"] * layers}))
    with pytest.raises(PipelineError, match="does not fit its base"):
        modeling.load_adapter(other, tf.adapter_folder(), trainable=True)


# generation ---------------------------------------------------------------------------------------------


def test_generation_ends_with_the_turn_and_never_takes_a_row_without_a_token():
    config = tf.text_model(tf.base_folder()).generation_config
    assert config.eos_token_id == [1, tf.tokenizer().convert_tokens_to_ids("<end_of_turn>")]
    assert config.pad_token_id == 0 and config.do_sample is False
    assert config.suppress_tokens == list(range(741, 768))


def test_base_info(tmp_path):
    assert modeling.base_info(tf.base_folder())["new_ids"] == tf.new_ids()
    modeling.write_base_info(tmp_path, deltas=["a"])
    assert json.loads((tmp_path / "base_info.json").read_text()) == {"deltas": ["a"]}
