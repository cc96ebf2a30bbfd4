"""Loading models, precision, adapters and merges: the only place that builds a LoraConfig or BitsAndBytesConfig.

torch is imported inside functions, so that `--help` stays fast.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medgemma_korean import records
from medgemma_korean import tokenizer as tokenizers
from medgemma_korean.cli import PipelineError, log
from medgemma_korean.paths import show
from medgemma_korean.profiles import ModelProfile

if TYPE_CHECKING:
    import torch

CPU_THREADS = 2  # pinned: the number of threads changes the order of sums, and with it the last bits of a result


def set_up_torch(seed: int) -> None:
    """Seed every generator and pin the threads, so that the CPU gives the same bytes every time."""
    import torch
    from transformers import set_seed
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    set_seed(seed)
    if not torch.cuda.is_available():
        torch.set_num_threads(min(CPU_THREADS, os.cpu_count() or 1))
        torch.use_deterministic_algorithms(True, warn_only=True)


def pick_device(wanted: str | None) -> str:
    """The device to use. Raises PipelineError for one that is not there."""
    import torch

    if wanted is None:
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise PipelineError(f"--device {wanted}: not a device; use cuda:0 or cpu") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise PipelineError(f"--device {wanted}: this machine has {torch.cuda.device_count()} CUDA devices")
    if device.type == "cuda" and device.index:
        raise PipelineError(f"--device {wanted}: choose the card with CUDA_VISIBLE_DEVICES={device.index} instead")
    if device.type not in ("cpu", "cuda"):
        raise PipelineError(f"--device {wanted}: 8-bit training runs on cuda or cpu")
    return wanted


# loading ------------------------------------------------------------------------------------------------


def load_text_model(folder: Path, dtype: str) -> Any:
    """The unquantised text-only `Gemma3ForCausalLM` of a checkpoint, text-only or multimodal.

    Loading a multimodal checkpoint without a key mapping gives random weights and no exception, so missing
    weights are an error here. Raises PipelineError naming them.
    """
    import torch
    from transformers import AutoConfig, Gemma3ForCausalLM

    config = _config(AutoConfig, folder)
    mapping = None
    if hasattr(config, "text_config"):
        config = config.text_config
        mapping = {"^language_model.model": "model", "^model.language_model": "model"}
    model, info = Gemma3ForCausalLM.from_pretrained(
        folder, config=config, key_mapping=mapping, dtype=getattr(torch, dtype), output_loading_info=True
    )
    _require_all_weights(folder, info)
    return model


def load_base(folder: Path, profile: ModelProfile, device: str, precision: str | None = None) -> Any:
    """A text-only base as training and scoring use it: frozen, in the profile's precision, no cache.

    Raises PipelineError when the folder is no base of ours or weights are missing.
    """
    import torch
    from transformers import AutoConfig, Gemma3ForCausalLM

    config = _config(AutoConfig, folder)
    if hasattr(config, "text_config"):
        raise PipelineError(f"{folder}: a multimodal checkpoint; `add_lora` makes the text-only base to train on")
    precision = precision or profile.precision
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}.get(precision, getattr(torch, profile.dtype))
    model, info = Gemma3ForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        quantization_config=_quantization(precision, dtype),
        device_map={"": device},
        output_loading_info=True,
    )
    _require_all_weights(folder, info)
    # With the default cache a packed row would leak attention between its documents.
    model.config.use_cache = False
    model.requires_grad_(False)
    if precision == "nf4" and device == "cpu":
        import bitsandbytes

        for module in model.modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                module.support_avx512bf16_for_cpu = False  # repacked weights give silently wrong gradients
    return model


def load_any_base(folder: Path, profile: ModelProfile, device: str, precision: str | None = None) -> Any:
    """`load_base` for scoring: of a multimodal checkpoint its text model, by way of a temporary text-only copy.

    A copy, because weights are quantised while they are read, and so the untouched model is scored in the class and
    precision of every other model of the run.
    """
    import tempfile

    from transformers import AutoConfig

    if not hasattr(_config(AutoConfig, folder), "text_config"):
        return load_base(folder, profile, device, precision)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".text-only-") as plain:
        save_model(load_text_model(folder, profile.dtype), Path(plain))
        return load_base(Path(plain), profile, device, precision)


def _quantization(precision: str, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if precision == "8bit":
        # Threshold 6.0 keeps outlier columns out of int8; at 0 large activations become NaN on the CPU.
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=6.0)
    if precision == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=True,
        )
    return None


def _config(auto_config: Any, folder: Path) -> Any:
    if not (Path(folder) / "config.json").is_file():
        raise PipelineError(f"{folder}: no model there (config.json is missing)")
    try:
        return auto_config.from_pretrained(folder)
    except (ValueError, OSError) as error:
        raise PipelineError(f"{folder}: cannot read config.json ({str(error).splitlines()[0]})") from None


def _require_all_weights(folder: Path, info: dict[str, Any]) -> None:
    missing = sorted(info["missing_keys"])
    if missing:
        raise PipelineError(
            f"{folder}: {len(missing)} weights are missing, first {missing[0]}; the model would be random"
        )
    foreign = [k for k in info["unexpected_keys"] if "vision_tower" not in k and "multi_modal_projector" not in k]
    if foreign:
        log.warning("%s: weights that the text model does not use: %s", folder, ", ".join(foreign[:3]))


def save_model(model: Any, folder: Path) -> None:
    """Save as safetensors under the names that plain `from_pretrained` reads.

    The library would undo the key mapping of a model that came from a multimodal checkpoint, and the saved model
    would reload with every tensor missing.
    """
    model.save_pretrained(folder, save_original_format=False, safe_serialization=True)


def generation_defaults(model: Any, tokenizer: Any) -> None:
    """Stop at `<eos>` and at `<end_of_turn>`; greedy."""
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(tokenizers.END_OF_TURN)]
    model.generation_config.eos_token_id = ends
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.do_sample = False
    model.generation_config.top_k = model.generation_config.top_p = None


# new rows -----------------------------------------------------------------------------------------------


def extend_rows(model: Any, base_tokenizer: Any, tokenizer: Any) -> list[int]:
    """Resize the tied matrix for the extended tokenizer and initialise every row that the base never trained.

    A new row is the mean, in float32, of the base rows of the piece's base encoding; rows beyond the last id (and
    the base's own padding rows) get the mean of all trained rows. Old rows stay bit-equal. Returns the new ids.
    Raises AssertionError when an invariant fails.
    """
    import torch

    old_ids, ids = len(base_tokenizer), len(tokenizer)
    before = model.get_input_embeddings().weight.detach().clone()
    rows = tokenizers.rows_for(ids, at_least=before.shape[0])
    if rows != before.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)
    weight = model.get_input_embeddings().weight
    pieces = {i: piece for piece, i in tokenizer.get_vocab().items()}
    with torch.no_grad():
        average = before[:old_ids].float().mean(dim=0)
        weight[old_ids:] = average.to(weight.dtype)
        for i in range(old_ids, ids):
            parts = tokenizers.encode(base_tokenizer, pieces[i].replace("▁", " "))
            weight[i] = before[parts].float().mean(dim=0).to(weight.dtype)
    model.tie_weights()
    assert torch.equal(model.get_input_embeddings().weight[:old_ids], before[:old_ids]), "old rows changed"
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight, "head untied"
    assert model.config.vocab_size == rows == weight.shape[0] and rows % tokenizers.ROW_MULTIPLE == 0
    assert torch.isfinite(weight[old_ids:]).all()
    return list(range(old_ids, ids))


# adapters -----------------------------------------------------------------------------------------------


def fresh_adapter(base: Any, profile: ModelProfile, *, second: bool, new_ids: list[int], seed: int) -> Any:
    """A PeftModel with a fresh adapter: LoRA on all linear layers, and the new token rows of the first adapter.

    `trainable_token_indices` trains the new rows on the input and the output side at once, keeps the head tied and
    every old row bit-exact; `modules_to_save` on the matrices would untie them and train all 262,144 rows.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    rank = profile.second_rank if second else profile.lora_rank
    config = LoraConfig(
        r=rank,
        lora_alpha=profile.lora_scale * rank,
        use_rslora=False,
        lora_dropout=profile.second_dropout if second else 0.0,
        target_modules=list(profile.target_modules),
        trainable_token_indices={"embed_tokens": new_ids} if new_ids else None,
        bias="none",
        task_type="CAUSAL_LM",
    )
    set_seed(seed)
    return _checked(get_peft_model(base, config))


def load_adapter(base: Any, folder: Path, *, trainable: bool) -> Any:
    """An adapter on its base. Raises PipelineError when the base has too few rows or is another one."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    if not (folder / "adapter_config.json").is_file() or not (folder / "adapter_model.safetensors").is_file():
        raise PipelineError(f"{folder}: no adapter there (adapter_config.json and adapter_model.safetensors)")
    ids = (json.loads((folder / "adapter_config.json").read_text())["trainable_token_indices"] or {}).get(
        "embed_tokens"
    )
    rows = base.get_input_embeddings().weight.shape[0]
    if ids and max(ids) >= rows:
        raise PipelineError(
            f"{folder}: trains token row {max(ids)}, but its base has {rows} rows; this is another base"
        )
    try:
        # Without is_trainable nothing would train, and no library says so.
        model = PeftModel.from_pretrained(base, folder, is_trainable=trainable)
    except (RuntimeError, ValueError) as error:
        raise PipelineError(f"{folder}: does not fit its base ({str(error).splitlines()[0]})") from None
    # PEFT only warns of tensors that are missing, and says nothing of those that found no place.
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        unmatched = sorted(set(file.keys()) ^ get_peft_model_state_dict(model, save_embedding_layers=False).keys())
    if unmatched:
        raise PipelineError(f"{folder}: does not fit its base ({len(unmatched)} tensors, first {unmatched[0]})")
    return _checked(model) if trainable else model


def _checked(model: Any) -> Any:
    """Assert that LoRA touched only text layers and that something trains; prepare for TRL."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert names, "nothing would train"
    assert not any("vision" in name for name in names), "an adapter sits on a vision layer"
    head = model.get_base_model().get_output_embeddings()
    if not hasattr(head, "bias"):
        head.bias = None  # TRL reads it, and PEFT's wrapper of a tied head lacks it
    return model


def save_adapter(model: Any, folder: Path) -> None:
    """LoRA and token rows only: the resized matrix is in the base, and no checkpoint carries it again."""
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's template; our card is beside `final`


def load_adapter_weights(model: Any, folder: Path) -> None:
    """Put the adapter weights of a folder into a PeftModel that has the same adapter."""
    from peft import load_peft_weights, set_peft_model_state_dict

    result = set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
    assert not result.unexpected_keys, f"{folder} is another adapter: {result.unexpected_keys[:2]}"


def trainable_parameters(model: Any) -> dict[str, int]:
    """How many parameters train, by kind: LoRA and new token rows."""
    counts = {"lora": 0, "rows": 0}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts["rows" if "trainable_tokens" in name else "lora"] += parameter.numel()
    return counts


def merge(base_folder: Path, adapter: Path, profile: ModelProfile) -> Any:
    """The base with the adapter merged into it, unquantised. Checks the merged logits against the unmerged ones.

    Raises AssertionError when they differ by more than float32 rounding (relative 1e-4; bfloat16 2e-2).
    """
    import torch

    peft_model = load_adapter(load_text_model(base_folder, profile.dtype), adapter, trainable=False).eval()
    ids = torch.arange(5, 5 + 64).unsqueeze(0)
    with torch.no_grad():
        before = peft_model(input_ids=ids, use_cache=False).logits.float()
        merged = peft_model.merge_and_unload()
        after = merged(input_ids=ids, use_cache=False).logits.float()
    error = ((after - before).norm() / before.norm()).item()
    limit = 1e-4 if profile.dtype == "float32" else 2e-2
    assert error < limit, f"merged logits differ by {error:.2g} (relative), more than {limit}"
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight, "the merge untied the head"
    log.info("merged %s; logits differ by %.1e (relative)", show(adapter), error)
    return merged


def write_base_info(folder: Path, **values: Any) -> None:
    """`base_info.json` beside a base: what it was made of, so that no delta is merged twice."""
    records.write_json(folder / "base_info.json", values)


def base_info(folder: Path) -> dict[str, Any]:
    return records.read_json(folder / "base_info.json")
