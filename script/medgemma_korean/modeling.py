"""Loading models, precision, adapters and merges: the only place that builds a LoraConfig or BitsAndBytesConfig.

torch is imported inside functions, so that `--help` stays fast.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medgemma_korean import processes, records, token_rows
from medgemma_korean import tokenizer as tokenizers
from medgemma_korean.cli import PipelineError, log
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
        raise PipelineError(
            f"--device {wanted}: this machine has {torch.cuda.device_count()} CUDA devices; use cpu, or leave it out"
        )
    if device.type == "cuda" and device.index:
        raise PipelineError(f"--device {wanted}: choose the card with CUDA_VISIBLE_DEVICES={device.index} instead")
    if device.type not in ("cpu", "cuda"):
        raise PipelineError(f"--device {wanted}: 8-bit training runs on cuda or cpu")
    return wanted


# loading ------------------------------------------------------------------------------------------------


# Names of the text model's weights in a multimodal checkpoint: Gemma's own, and the library's.
TEXT_OF_MULTIMODAL = {
    "^language_model.model": "model",
    "^language_model.lm_head": "lm_head",
    "^model.language_model": "model",
}


def text_config(folder: Path) -> Any:
    """The configuration of a checkpoint's text model. Raises PipelineError where there is none or it is not Gemma 3."""
    from transformers import AutoConfig, Gemma3TextConfig

    if not (Path(folder) / "config.json").is_file():
        raise PipelineError(f"{folder}: no model there (config.json is missing)")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # of every kind: the file may hold anything
        reason = " ".join(str(error).split())[:300]
        raise PipelineError(f"{folder}: config.json cannot be read ({reason}); bring the model's own") from None
    config = getattr(config, "text_config", config)
    if not isinstance(config, Gemma3TextConfig):
        raise PipelineError(f"{folder}: a model of the kind {config.model_type}, not Gemma 3")
    return config


def compute_dtype(profile: ModelProfile, device: str) -> torch.dtype:
    """The type that a model computes in: the profile's, but float32 on a CUDA card without native bfloat16.

    Never float16: activations of Gemma 3 overflow it. Emulated bfloat16 is slower than float32 and no smaller in use.
    """
    import torch

    dtype = getattr(torch, profile.dtype)
    lacks = dtype == torch.bfloat16 and device.startswith("cuda")
    return torch.float32 if lacks and not torch.cuda.is_bf16_supported(including_emulation=False) else dtype


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` of `torch.float32`: as profiles and JSON files spell a type."""
    return str(dtype).removeprefix("torch.")


def load_base(
    folder: Path,
    profile: ModelProfile,
    device: str,
    precision: str | None = None,
    max_memory: dict[int | str, int] | None = None,
) -> Any:
    """The text-only model of a checkpoint as training and scoring use it: frozen, in the profile's precision, no cache.

    Of a multimodal checkpoint the text model: it is scored in the class and precision of every other model of a run.
    Loading one without a key mapping gives random weights and no exception, so missing weights are an error here.
    max_memory: bytes of weights by device (0, "cpu"), for an unquantised model that does not fit on `device`: what
    does not fit into them stays in the checkpoint's files, and every layer computes on the first of them.
    Raises PipelineError naming missing weights, when the folder is no model, or for bf16 on a card without it.
    """
    import torch
    from transformers import Gemma3ForCausalLM

    precision = precision or profile.precision
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}.get(precision) or compute_dtype(profile, device)
    if dtype == torch.bfloat16 and device.startswith("cuda") and not torch.cuda.is_bf16_supported(False):
        raise PipelineError(f"bf16: {torch.cuda.get_device_name(device)} cannot compute in it; use --precision fp32")
    model, info = Gemma3ForCausalLM.from_pretrained(
        folder,
        config=text_config(folder),
        key_mapping=TEXT_OF_MULTIMODAL,
        dtype=dtype,
        quantization_config=_quantization(precision, dtype),
        device_map="auto" if max_memory else {"": device},
        max_memory=max_memory,
        use_safetensors=True,  # never a pickle
        output_loading_info=True,
    )
    foreign = [k for k in info["unexpected_keys"] if "vision_tower" not in k and "multi_modal_projector" not in k]
    require_weights(folder, info["missing_keys"], foreign)
    # With the default cache a packed row would leak attention between its documents.
    model.config.use_cache = False
    model.requires_grad_(False)
    if precision == "8bit":
        _forget_inputs()
    if precision == "nf4" and device == "cpu":
        import bitsandbytes

        for module in model.modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                module.support_avx512bf16_for_cpu = False  # repacked weights give silently wrong gradients
    return model


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


def _forget_inputs() -> None:
    """Make 8-bit layers drop their inputs once the forward pass is over: a frozen weight's backward pass needs none.

    bitsandbytes 0.50 keeps them as attributes, where gradient checkpointing cannot take them away: all inputs of all
    layers stay until the backward pass, 4.5 MB a token on the 27B, 18 GB at 4,096 tokens.
    """
    from bitsandbytes.autograd import _functions

    def without(kind: Any, kept: dict[str, Any]) -> None:
        forward = kind.forward

        def forgetful(ctx: Any, *args: Any) -> Any:
            output = forward(ctx, *args)
            if not ctx.needs_input_grad[1]:  # the weight's
                vars(ctx).update(kept)
            return output

        if not hasattr(kind, "forgets_inputs"):
            kind.forward, kind.forgets_inputs = staticmethod(forgetful), True

    without(_functions.MatMul8bitLt, {"tensors": (None, None, None)})
    without(_functions.MatMul8bitFp, {"A": None})  # the same on a CPU


def require_weights(folder: Path, missing: Iterable[str], foreign: Iterable[str]) -> None:
    """Raise PipelineError for weights that a checkpoint lacks; warn of those that the text model does not use."""
    missing, foreign = sorted(missing), sorted(foreign)
    if missing:
        raise PipelineError(
            f"{folder}: {len(missing)} weights are missing, first {missing[0]}; the model would be random"
        )
    if foreign:
        log.warning("%s: weights that the text model does not use: %s", folder, ", ".join(foreign[:3]))


def save_model(model: Any, folder: Path) -> None:
    """Save as safetensors under the names that plain `from_pretrained` reads.

    The library would undo the key mapping of a model that came from a multimodal checkpoint, and the saved model
    would reload with every tensor missing.
    """
    model.save_pretrained(folder, save_original_format=False, safe_serialization=True)
    records.share(folder)


def generation_config(tokenizer: Any, rows: int) -> Any:
    """How a model of that many rows generates: greedy, up to `<eos>` or `<end_of_turn>`, and never a row that is no
    token's: such a row is part of the softmax like any other.
    """
    from transformers import GenerationConfig

    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(tokenizers.END_OF_TURN)],
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        suppress_tokens=list(range(len(tokenizer), rows)) or None,
    )


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


def adapter_config(folder: Path) -> dict[str, Any]:
    """What PEFT wrote of an adapter. Raises PipelineError where there is none."""
    if not (folder / "adapter_config.json").is_file() or not (folder / "adapter_model.safetensors").is_file():
        raise PipelineError(
            f"{folder}: no adapter there (adapter_config.json and adapter_model.safetensors); train again"
        )
    return records.read_object(folder / "adapter_config.json", "peft_type", repair="bring the adapter anew")


def load_adapter(base: Any, folder: Path, *, trainable: bool) -> Any:
    """An adapter on its base. Raises PipelineError when the base has too few rows or is another one."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    ids = (adapter_config(folder).get("trainable_token_indices") or {}).get("embed_tokens")
    rows = base.get_input_embeddings().weight.shape[0]
    if ids and max(ids) >= rows:
        raise PipelineError(
            f"{folder}: trains token row {max(ids)}, but its base has {rows} rows; this is another base"
        )
    try:
        # Without is_trainable nothing would train, and no library says so.
        model = PeftModel.from_pretrained(base, folder, is_trainable=trainable)
    except (RuntimeError, ValueError, KeyError, TypeError, OSError) as error:
        reason = ("no " if isinstance(error, KeyError) else "") + " ".join(str(error).split())[:200]
        raise PipelineError(
            f"{folder}: does not fit its base ({reason}); bring the right one, or train again"
        ) from None
    # PEFT only warns of tensors that are missing, and says nothing of those that found no place.
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        unmatched = sorted(set(file.keys()) ^ get_peft_model_state_dict(model, save_embedding_layers=False).keys())
    if unmatched:
        raise PipelineError(
            f"{folder}: does not fit its base ({len(unmatched)} tensors, first {unmatched[0]}); train again"
        )
    token_rows.apart(model)
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
    """LoRA and token rows only: the resized matrix is in the base, and no checkpoint carries it again.

    Called by every process where several train; the first one writes.
    """
    state = None
    if processes.is_sharded(model):
        state = {name: processes.whole(p.detach()) for name, p in model.named_parameters() if p.requires_grad}
    if processes.is_main():
        for config in model.peft_config.values():
            if isinstance(config.target_modules, set):  # which Python orders anew in each process
                config.target_modules = sorted(config.target_modules)
        model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's template; our card is beside `final`
        records.share(folder)


def load_adapter_weights(model: Any, folder: Path) -> None:
    """Put the adapter weights of a folder into a PeftModel that has the same adapter, trainable ones. Exact."""
    from safetensors.torch import load_file

    saved = load_file(folder / "adapter_model.safetensors")
    # PEFT leaves the adapter's name out of what it writes.
    own = {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}
    assert saved.keys() == own.keys(), f"{folder} is another adapter: {sorted(saved.keys() ^ own.keys())[:2]}"
    for name, parameter in own.items():
        processes.put(parameter, saved[name])


def free_memory() -> None:
    """Give back what nothing refers to any more, on the GPU too."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def trainable_parameters(model: Any) -> dict[str, int]:
    """How many parameters train, by kind: LoRA and new token rows."""
    counts = {"lora": 0, "rows": 0}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts["rows" if "trainable_tokens" in name else "lora"] += parameter.numel()
    return counts


def write_base_info(folder: Path, **values: Any) -> None:
    """`base_info.json` beside a base: what it was made of, so that no delta is merged twice."""
    records.write_json(folder / "base_info.json", values)


def base_info(folder: Path) -> dict[str, Any]:
    return records.read_object(folder / "base_info.json")
