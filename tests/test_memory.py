"""Predictions of memory, by hand for one small shape and against the sizes that are asked for, and check_gpu_memory."""

from __future__ import annotations

from dataclasses import replace

import pytest

from medgemma_korean import cli, memory, modeling, profiles, records, shapes
from medgemma_korean.cli import PipelineError

SHAPE_4B = shapes.SHAPES["google/medgemma-4b-it"]
SHAPE_27B = shapes.SHAPES["google/medgemma-27b-text-it"]
SMALL = shapes.Shape(layers=2, hidden=8, ffn=16, heads=2, kv_heads=1, head_dim=4, rows=64, ids=60)
SETTINGS = profiles.StageSettings(
    epochs=1, max_length=4, batch=8, micro_batch=2, learning_rate=1e-4, row_learning_rate=1e-4
)


def small(**changes) -> memory.Case:
    values = {"precision": "8bit", "dtype": "bfloat16", "rank": 2, "new_tokens": 10, "checkpointing": True}
    return memory.Case(SMALL, SETTINGS, **values | changes)


def published(name: str, **changes) -> memory.Case:
    """Stage 00 of a published model with 10,000 new tokens, 2 rows of 512 tokens a forward pass."""
    profile = profiles.MODELS[name]
    shape = replace(shapes.SHAPES[profile.source], rows=272_192)
    settings = replace(profile.plain_text, micro_batch=2, max_length=512)
    values = {"precision": "8bit", "dtype": "bfloat16", "rank": profile.lora_rank, "new_tokens": 10_000}
    return memory.Case(shape, settings, **values | {"checkpointing": True} | changes)


@pytest.fixture
def program(load_program):
    return load_program("check_gpu_memory")


# predictions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected", "tolerance"),
    [
        (memory.weight_bytes(SHAPE_4B, "bf16", "bfloat16") / 1e9, 7.8, 0.01),
        (memory.weight_bytes(SHAPE_4B, "8bit", "bfloat16") / 1e9, 4.6, 0.02),
        (memory.weight_bytes(SHAPE_27B, "bf16", "bfloat16") / 1e9, 54, 0.01),
        (memory.weight_bytes(SHAPE_27B, "8bit", "bfloat16") / 1e9, 28.5, 0.01),
        (memory.weight_bytes(SHAPE_27B, "nf4", "bfloat16") / 1e9, 17, 0.07),  # "about 17"
        (memory.lora_parameters(SHAPE_4B, 64) / 1e6, 119, 0.005),
        (memory.lora_parameters(SHAPE_27B, 32) / 1e6, 227, 0.005),
        (10_000 * SHAPE_4B.hidden / 1e6, 25.6, 0.001),
        (10_000 * SHAPE_4B.hidden * memory.TRAINED_BYTES / 1e9, 0.41, 0.01),
        # Two copies and two dense gradients in bfloat16, and TRL's fp32 sum of the head's.
        (memory.library_rows_bytes(replace(SHAPE_4B, rows=272_192), 2) / 1e9, 5.6, 0.01),
        (memory.library_rows_bytes(replace(SHAPE_27B, rows=272_192), 2) / 1e9, 11.7, 0.01),
    ],
)
def test_reference_numbers(value, expected, tolerance):
    assert value == pytest.approx(expected, rel=tolerance)


def test_a_small_shape_by_hand():
    # Linear layers of one decoder layer: q 8x8, k and v 8x4, o 8x8, gate, up and down 8x16: 576 weights, and
    # inputs + outputs are 16 + 12 + 12 + 16 + 3 x 24 = 128. A pass has 2 rows of 4 = 8 tokens.
    assert memory.predict(small()) == {
        "base weights": 2 * 576 + 64 * 8 * 2,
        "LoRA, gradient, Adam": 16 * (2 * 2 * 128),
        "trained rows, gradient, Adam": 16 * 10 * 8,
        "their logits and their gradient": (4 + 2) * (8 * 10 + 10 * 8),
        "activations": 8 * 2 * 8 * 2 + 8 * (28 * 8 + 9 * 16 + 15 * 8 + 5 * 4),
        "logits tile, gradient of states": 8 * 64 * 2 + 8 * 8 * 4,
        "a linear layer, dequantised": 8 * 16 * 2,
        "context, libraries, fragments": 1e9,
    }
    whole = memory.predict(small(precision="fp32", dtype="float32", new_tokens=0, checkpointing=False))
    assert whole["base weights"] == (2 * 576 + 64 * 8) * 4
    assert whole["trained rows, gradient, Adam"] == whole["their logits and their gradient"] == 0
    assert whole["activations"] == 2 * 8 * (24 * 8 + 16 * 16 + 20 * 8 + 4 * 4)
    assert whole["a linear layer, dequantised"] == 0
    # An 8-bit base on a card without bfloat16: the matrix and every activation in float32.
    assert memory.predict(small(dtype="float32"))["base weights"] == 2 * 576 + 64 * 8 * 4
    assert memory.total(small()) == sum(memory.predict(small()).values())


def test_tiles_are_bounded_where_tokens_and_rows_are_not():
    shape = replace(SMALL, rows=1_000_000)
    one, ten = (memory.head_bytes(shape, tokens, 2) for tokens in (4096, 40_960))
    assert one == 4096 * 32_768 * 2 + 4096 * 8 * 4 and ten - one == 9 * 4096 * 8 * 4
    assert memory.new_row_bytes(shape, 4096, 100, 2) == memory.new_row_bytes(shape, 40_960, 100, 2)


def test_the_sizes_that_are_asked_for():
    four, large = published("medgemma-4b"), published("medgemma-27b")
    assert (four.rank, large.rank) == (64, 32)
    assert memory.total(four) <= 12e9
    assert memory.total(large) <= 40e9  # 44 asked for, 40 the aim
    assert memory.total(published("medgemma-27b", new_tokens=0)) < memory.total(large)
    # A card of 24 GiB with its driver at work, stage 00 of the 27B as the profile has it: 4 bits, a row a pass.
    there, stage = 25.2e9, replace(large, settings=profiles.MODELS["medgemma-27b"].plain_text)
    assert memory.micro_batch(stage, there) is None
    assert memory.micro_batch(replace(stage, precision="nf4"), there) == 1


def test_shared_weights():
    whole, four = small(precision="bf16"), small(precision="bf16", shards=4)
    weights = (2 * 576 + 64 * 8) * 2
    assert memory.predict(whole)["base weights"] == weights and "weights gathered for use" not in memory.predict(whole)
    assert memory.predict(four)["base weights"] == weights / 4
    # In use the matrix and two of the decoder layers are whole.
    assert memory.predict(four)["weights gathered for use"] == (64 * 8 + 2 * 576) * 2
    large = published("medgemma-27b", precision="bf16")
    assert memory.total(large) > 48e9 > memory.total(replace(large, shards=4))
    for precision in ("8bit", "nf4"):
        with pytest.raises(PipelineError, match=f"{precision} weights cannot be shared between cards; .*bf16"):
            small(precision=precision, shards=2)


def test_rows_a_pass_that_fit():
    case = replace(small(), settings=replace(SETTINGS, batch=6, micro_batch=6))

    def size(rows):
        return memory.total(replace(case, settings=replace(case.settings, micro_batch=rows)))

    assert memory.micro_batch(case, size(6)) == 6
    assert memory.micro_batch(case, size(6) - 1) == 3  # 5 and 4 do not divide the batch
    assert memory.micro_batch(case, size(1)) == 1 and memory.micro_batch(case, size(1) - 1) is None
    assert memory.total(memory.least(case)) == size(1)


def test_require_names_needed_there_and_what_would_fit():
    case = published("medgemma-27b")
    memory.require(case, memory.total(case), "cuda:0, some card", "train_00_plain_text")
    with pytest.raises(PipelineError) as error:
        memory.require(case, 25e9, "cuda:0, some card", "train_00_plain_text")
    text = str(error.value)
    assert error.value.exit_code == 2 and text.startswith("train_00_plain_text does not fit: a step of 2 x 512 tokens")
    assert f"needs about {memory.total(case) / 1e9:.1f} GB" in text
    assert "25.0 GB are there (cuda:0, some card)" in text
    assert "--precision nf4" in text and text.endswith("a card of 40 GB")


def test_every_remedy_is_predicted_to_fit():
    case = published("medgemma-27b", precision="bf16")
    found = memory.remedies(case, 36e9)
    assert [text.rsplit(", ", 1)[0] for text in found] == [
        "8-bit weights (--precision 8bit)",
        "4-bit weights (--precision nf4)",
        "4-bit weights and a forward pass of 1 row",
        "4-bit weights and a forward pass of 1 row of 256 tokens",
        "a card of 80 GB",
    ]
    assert all(float(text.rsplit(", ", 1)[1].removesuffix(" GB")) <= 36 for text in found[:-1])
    assert memory.remedies(case, 1e9) == [memory.hardware(case)]  # nothing that would not fit is named
    four = published("medgemma-4b")
    assert memory.remedies(four, memory.total(memory.least(four)))[0].startswith("a forward pass of 1 row")
    assert memory.hardware(four) == "a card of 16 GB"
    huge = replace(published("medgemma-27b"), shape=replace(SHAPE_27B, layers=500))
    assert memory.hardware(huge).startswith("bf16 weights shared by 8 cards of 96 GB")
    assert memory.hardware(replace(huge, shape=replace(SHAPE_27B, layers=9000))).startswith("no card of up to 141 GB")


# the program --------------------------------------------------------------------------------------------


def test_memory_verdict(program, capsys):
    assert program.main(["--model", "medgemma-4b", "--available", "80"]) == 0
    text = capsys.readouterr().out
    assert "predictions, not measurements" in text and "verdict: fits" in text and "stage 02" in text
    assert "the library's way of training rows would add 5.3 GB" in text
    with pytest.raises(PipelineError, match="4-bit weights .*27.2 GB") as error:
        program.main(["--model", "medgemma-27b", "--stage", "00", "--available", "32"])
    assert error.value.exit_code == 2 and "a card of 40 GB" in str(error.value)
    capsys.readouterr()
    assert program.main(["--model", "medgemma-27b", "--stage", "02", "--available", "48"]) == 0
    assert "the library's way" not in capsys.readouterr().out  # no rows train there


def test_options_of_the_program(program, capsys):
    shared = ["--model", "medgemma-27b", "--precision", "bf16", "--shards", "4", "--available", "40"]
    assert program.main(shared) == 0
    assert "weights gathered for use" in capsys.readouterr().out
    with pytest.raises(PipelineError, match="on each of 4 cards"):
        program.main([*shared[:-1], "20"])
    with pytest.raises(PipelineError, match="cannot be shared"):
        program.main(["--model", "medgemma-27b", "--shards", "2", "--available", "80"])
    for argv in (["--stage", "03"], ["--micro-batch", "0"]):
        with pytest.raises(SystemExit) as error:
            program.make_parser().parse_args(argv)
        assert error.value.code == 2


def test_without_a_given_size_the_machine_is_asked(program, capsys, monkeypatch):
    import torch

    assert program.main(["--device", "cpu"]) == 0
    assert "computing in float32" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "an older card")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (47_000_000_000, 48_000_000_000))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert memory.available_bytes(None) == (47e9, "cuda:0, an older card")
    assert program.main(["--model", "medgemma-4b"]) == 0
    text = capsys.readouterr().out
    assert "there: cuda:0, an older card" in text and "computing in float32" in text


def test_cases_of_a_run(tmp_path, program):
    args = program.make_parser().parse_args(["--model", "medgemma-4b"])
    profile, paths = cli.resolve(args)
    found = memory.cases(profile, paths, precision="8bit", dtype="bfloat16", micro_batch=None, max_length=700)
    assert list(found) == ["00", "01", "02"] and {case.settings.max_length for case in found.values()} == {700}
    assert found["00"].settings.micro_batch == profile.plain_text.micro_batch
    assert found["00"].shape.rows == 272_192 and found["00"].new_tokens == 10_000 and found["02"].new_tokens == 0
    assert (found["00"].rank, found["02"].rank) == (profile.lora_rank, profile.second_rank)
    # A second adapter trains no rows, whatever the settings say.
    second = memory.case(profile, paths, profile.plain_text, precision="8bit", dtype="bfloat16", second=True)
    assert (second.rank, second.new_tokens) == (profile.second_rank, 0)
    # The raw model's own configuration wins over the table.
    config = {"text_config": {"num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 16}}
    records.write_json(paths.raw_model / "config.json", config)
    assert shapes.read_shape(profile, paths) == shapes.Shape(2, 8, 16, 8, 4, 256, 262_208, 262_208)
    again = memory.case(profile, paths, profile.plain_text, precision="8bit", dtype="bfloat16")
    assert (again.shape.layers, again.shape.rows) == (2, 272_256)  # 262,208 ids of that file and 10,000 new ones


def test_the_head_s_tile_is_the_library_s():
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    assert memory.TILE_TOKENS == chunked_logprob.TOKEN_CHUNK_SIZE
    assert memory.TILE_ROWS == utils._CHUNKED_LOGPROB_CHUNK_SIZE


# what the prediction counts on --------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["MatMul8bitFpBackward", "MatMul8bitLtBackward"], ids=["of a CPU", "of a card"])
def test_eight_bit_layers_keep_no_inputs_for_the_backward_pass(path):
    """Or gradient checkpointing would save nothing: all inputs of all layers would stay."""
    import torch
    import torch_fixtures as tf

    model = modeling.load_base(tf.base_folder(), tf.profile(), "cpu", "8bit")
    layers = [module for name, module in model.named_modules() if name.endswith("_proj")]
    model.train()
    for layer in layers:
        layer.train(path == "MatMul8bitFpBackward")  # outside of training the CPU takes the way of a card
    nodes = []
    for layer in layers:
        layer.register_forward_hook(lambda _, inputs, output: nodes.append(output.grad_fn))
    embedded = model.get_input_embeddings()(torch.tensor([tf.new_ids()])).requires_grad_()
    model(inputs_embeds=embedded, use_cache=False).logits.sum().backward(retain_graph=True)
    assert len(nodes) == 14 and {type(node).__name__ for node in nodes} == {path}
    for node in nodes:
        kept = [*getattr(node, "tensors", ()), getattr(node, "A", None)]
        assert not any(isinstance(value, torch.Tensor) for value in kept)
    # And the gradient is that of the layer's weights, as they were rounded.
    layer, inputs = layers[0], torch.randn(5, 32, requires_grad=True)
    sums = torch.randn(5, 32)
    layer(inputs).backward(sums)
    weight = layer.state.CB.float() * layer.state.SCB.unsqueeze(1) / 127
    torch.testing.assert_close(inputs.grad, sums @ weight)
