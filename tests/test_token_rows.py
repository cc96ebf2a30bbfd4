"""Token rows that train apart from the frozen matrix: the library's numbers, without its copies."""

import pytest
import torch_fixtures as tf

from medgemma_korean import modeling, token_rows

TEXT = "고혈압은 혈압이 정상보다 높은 상태이며 뮤코쉴드는 약이다. " * 3


def model_of(precision, *, ours, dtype="float32"):
    """The model as it trains, with TRL's head; rows in the library's way or in ours."""
    from peft import PeftModel
    from trl.trainer.utils import add_fused_lm_head

    modeling.set_up_torch(17)
    base = modeling.load_base(tf.base_folder(), tf.profile(dtype=dtype), "cpu", precision)
    model = PeftModel.from_pretrained(base, tf.moved_adapter_folder(), is_trainable=True)
    base.get_output_embeddings().bias = None
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if ours:
        token_rows.apart(model)
    add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
    if ours:
        token_rows.after_head(model)
    return model.train()


def batch(masked=5):
    import torch

    ids = torch.tensor([tf.tokenizer()(TEXT)["input_ids"]])
    first, end = tf.new_ids()[0], tf.new_ids()[-1] + 1
    assert ((ids >= first) & (ids < end)).sum() > 3, "the text holds no new tokens"
    labels = ids.clone()
    labels[0, :masked] = -100
    return {"input_ids": ids, "labels": labels, "position_ids": torch.arange(ids.shape[1])[None]}


def backward(model, autocast=False, **values):
    """(loss, gradients by name)"""
    import torch

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(**batch() | values, fused_lm_head=True, use_cache=False)
    loss = -output.log_probs.sum() / output.label_mask.sum()
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def difference(a, b):
    return ((a - b).norm() / a.norm()).item()


@pytest.mark.parametrize(
    "precision, dtype, loss_apart, gradient_apart",
    [
        ("fp32", "float32", 1e-6, 1e-6),
        ("8bit", "float32", 1e-6, 1e-6),
        ("bf16", "bfloat16", 1e-6, 5e-3),  # bfloat16 holds 8 bits, and sums are taken in another order
    ],
)
def test_loss_and_gradients_are_those_of_the_library(precision, dtype, loss_apart, gradient_apart):
    autocast = dtype == "bfloat16"
    theirs = backward(model_of(precision, ours=False, dtype=dtype), autocast)
    ours = backward(model_of(precision, ours=True, dtype=dtype), autocast)
    assert ours[0] == pytest.approx(theirs[0], rel=loss_apart)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        assert gradient.abs().sum() > 0
        assert difference(gradient, ours[1][name]) < gradient_apart, name


def test_a_loss_without_the_fused_head_has_the_same_gradients():
    def plain(model):
        model(**batch(), use_cache=False).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    theirs, ours = plain(model_of("fp32", ours=False)), plain(model_of("fp32", ours=True))
    assert all(difference(gradient, ours[name]) < 1e-6 for name, gradient in theirs.items())


def test_no_gradient_and_no_copy_has_the_size_of_the_matrix():
    """What the library's way costs: the same count of large tensors shows that the test sees them."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Large(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            name = str(function)
            # A view costs nothing, and what is written in place is there already.
            fresh = not function.is_view and not name.split(".")[1].endswith("_")
            if isinstance(made, torch.Tensor) and tuple(made.shape) == shape and fresh:
                found.append(name)
            return made

    counts = {}
    for ours in (False, True):
        model = model_of("fp32", ours=ours)
        shape = tuple(model.get_base_model().get_input_embeddings().token_adapter.base_layer.weight.shape)
        found: list[str] = []
        with Large():
            backward(model)
        counts[ours] = found
    assert len(counts[False]) >= 4 and counts[True] == []


def test_rows_that_the_text_does_not_hold_are_pushed_down_by_the_head():
    model = model_of("fp32", ours=True)
    _, gradients = backward(model)
    rows = next(g for n, g in gradients.items() if "trainable_tokens" in n)
    there = set(batch()["input_ids"][0].tolist())
    absent = [i for i, token in enumerate(tf.new_ids()) if token not in there]
    assert absent and (rows[absent].abs().sum(dim=1) > 0).all()


def test_the_gradient_is_the_same_in_chunks(monkeypatch):
    whole = backward(model_of("fp32", ours=True))[1]
    monkeypatch.setattr(token_rows, "TOKENS_AT_A_TIME", 7)
    chunked = backward(model_of("fp32", ours=True))[1]
    assert all(difference(gradient, chunked[name]) < 1e-6 for name, gradient in whole.items())


def test_old_rows_stay_and_logits_are_those_of_the_library():
    import torch

    theirs, ours = model_of("fp32", ours=False).eval(), model_of("fp32", ours=True).eval()
    weight = ours.get_base_model().get_input_embeddings().token_adapter.base_layer.weight
    before = weight.clone()
    ids = batch()["input_ids"]
    with torch.inference_mode():
        assert torch.equal(theirs(input_ids=ids).logits, ours(input_ids=ids).logits)
    first, end = tf.new_ids()[0], tf.new_ids()[-1] + 1
    assert torch.equal(weight[:first], before[:first]) and torch.equal(weight[end:], before[end:])
    assert weight.requires_grad is False and weight.grad is None


def test_what_was_put_on_the_forward_passes_is_gone_afterwards():
    model = model_of("fp32", ours=True)
    hooks = len(model.get_base_model().model._forward_hooks)
    token_rows.without_head(model)
    assert "forward" not in vars(model.get_base_model()) and "forward" not in vars(model)
    assert len(model.get_base_model().model._forward_hooks) == hooks - 1
    token_rows.without_head(model)  # twice is no harm


def test_an_adapter_without_rows_is_left_alone():
    from peft import LoraConfig, get_peft_model

    base = modeling.load_base(tf.base_folder(), tf.profile(), "cpu", "fp32")
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    assert token_rows.layer_of(model) is None
    forward = model.get_base_model().forward
    token_rows.apart(model)
    token_rows.after_head(model)
    assert model.get_base_model().forward == forward
