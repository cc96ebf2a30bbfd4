"""Checkpoints as streams of tensors, one file of weights open at a time: 54 GB pass through a few GB of memory.

    extend(raw, base, dtype, rows)                # the text-only base, its tied matrix grown
    merge(base, adapter, merged)                  # LoRA and token rows added to the weights, unquantised
    fresh_adapter(base, adapter, profile, ...)    # an adapter that changes nothing yet, the layers never loaded

Tensors go by the names of the text-only model (`model.layers.0...`), whatever the checkpoint calls them. Nothing here
needs a GPU. torch is imported inside functions.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medgemma_korean import modeling, records
from medgemma_korean.cli import PipelineError, log
from medgemma_korean.paths import show
from medgemma_korean.profiles import ModelProfile

if TYPE_CHECKING:
    import torch

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# Bytes of a file. Writing one copies it in memory once; the largest tensor, the matrix of the 27B, has 2.9 GB.
SHARD_BYTES = 2_000_000_000
MATRIX = "model.embed_tokens.weight"
HEAD = "lm_head.weight"  # tied to the matrix
_TEXT_PREFIX = re.compile(r"^(?:language_model\.model\.|model\.language_model\.)")
_NOT_TEXT = re.compile(r"^(?:model\.)?(?:vision_tower|multi_modal_projector)\.")
# Rows of the matrix that are turned into float32 at a time.
_ROWS = 1024
_SAMPLED_ROWS = 16_384


class Checkpoint:
    """The tensors of a safetensors checkpoint, text-only or multimodal, by the names of the text-only model.

    Raises PipelineError when there is none, a file is missing or damaged, or its weights are not those of the model
    that its config.json describes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = modeling.text_config(folder)
        self.files: dict[str, dict[str, str]] = {}  # file -> {name: name in the file}
        for stored, file in self._stored():
            if not _NOT_TEXT.match(stored):
                name = HEAD if stored.endswith(HEAD) else _TEXT_PREFIX.sub("model.", stored)
                self.files.setdefault(file, {})[name] = stored
        names = {name for of_file in self.files.values() for name in of_file}
        expected = shapes_of(self.config).keys()
        modeling.require_weights(folder, expected - names, names - expected - {HEAD})

    def _stored(self) -> Iterator[tuple[str, str]]:
        index = self.folder / INDEX
        if index.is_file():
            yield from weight_map(self.folder).items()
            return
        if not (self.folder / SINGLE).is_file():
            raise PipelineError(f"{show(self.folder)}: no weights there ({SINGLE} or {INDEX})")
        with self._opened(SINGLE) as file:
            yield from ((name, SINGLE) for name in file.keys())  # noqa: SIM118 - not a mapping

    def _opened(self, name: str) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(self.folder / name, "pt")
        except (SafetensorError, OSError) as error:
            raise PipelineError(f"{show(self.folder / name)}: missing or damaged ({error})") from None

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of all weights but a tied head; tensors are mapped, not read, until they are used."""
        for file, names in self.files.items():
            with self._opened(file) as opened:
                for name, stored in names.items():
                    if name != HEAD:
                        yield name, opened.get_tensor(stored)

    def tensor(self, name: str) -> torch.Tensor:
        """One weight."""
        for file, names in self.files.items():
            if name in names:
                with self._opened(file) as opened:
                    return opened.get_tensor(names[name])
        raise KeyError(name)


def shapes_of(config: Any) -> dict[str, torch.Size]:
    """{name: shape} of the weights of a text model of that configuration, without the tied head."""
    import torch
    from transformers import Gemma3ForCausalLM

    with torch.device("meta"):
        tensors = Gemma3ForCausalLM(config).state_dict()
    return {name: tensor.shape for name, tensor in tensors.items() if name != HEAD}


def weight_map(folder: Path) -> dict[str, str]:
    """Tensor -> file beside the index. Raises PipelineError for a file elsewhere, KeyError and so on for no index."""
    found = records.read_json(folder / INDEX)["weight_map"]
    for name in set(found.values()):
        records.require_inside(name, show(folder / INDEX))
    return found


def write(folder: Path, config: Any, tensors: Iterator[tuple[str, torch.Tensor]], dtype: str) -> None:
    """Write a text-only checkpoint that plain `from_pretrained` reads: files of about SHARD_BYTES, and an index."""
    import torch
    from safetensors.torch import save_file

    kind = getattr(torch, dtype)
    config.architectures, config.dtype = ["Gemma3ForCausalLM"], kind
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    files: list[list[str]] = []
    held: dict[str, torch.Tensor] = {}
    total = size = 0

    def flush() -> None:
        save_file(held, folder / f"part-{len(files)}", metadata={"format": "pt"})
        records.share(folder / f"part-{len(files)}")
        files.append(list(held))
        held.clear()

    for name, tensor in tensors:
        tensor = tensor.to(kind).contiguous()
        if held and size + tensor.nbytes > SHARD_BYTES:
            flush()
            size = 0
        held[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(files) == 1:
        (folder / "part-0").rename(folder / SINGLE)
        return
    weight_map = {}
    for number, names in enumerate(files):
        file = f"model-{number + 1:05}-of-{len(files):05}.safetensors"
        (folder / f"part-{number}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    records.write_json(folder / INDEX, index)


# new rows -----------------------------------------------------------------------------------------------


def average_row(matrix: torch.Tensor) -> torch.Tensor:
    """The mean of all rows, float32 [hidden], a block of rows at a time."""
    import torch

    total = torch.zeros(matrix.shape[1], dtype=torch.float64)
    for low in range(0, len(matrix), _ROWS):
        total += matrix[low : low + _ROWS].double().sum(dim=0)
    return (total / len(matrix)).float()


def mean_rows(matrix: torch.Tensor, parts: Sequence[Sequence[int]], shift: torch.Tensor | None = None) -> torch.Tensor:
    """Rows for new pieces, float32 [pieces, hidden]: the mean of the rows of a piece's base encoding, minus `shift`.

    A shift along the mean final hidden state h lowers the logits of the new rows: s h / |h|^2 lowers them by about s.
    """
    import torch

    rows = torch.empty((len(parts), matrix.shape[1]))
    for row, of_piece in zip(rows, parts, strict=True):
        row[:] = matrix[list(of_piece)].float().mean(dim=0)
    return rows if shift is None else rows - shift


def library_rows(matrix: torch.Tensor, number: int) -> torch.Tensor:
    """What `resize_token_embeddings` of transformers puts into new rows, float32 [number, hidden]: draws from a normal
    distribution around the mean of the old rows with 1e-9 of their covariance. For comparison only.
    """
    import torch

    mean = average_row(matrix)
    # A sample of the rows will do for what counts 1e-9, and the covariance of all takes minutes at 5,376 columns.
    sample = matrix[:: max(len(matrix) // _SAMPLED_ROWS, 1)].float() - mean
    covariance = 1e-9 * (sample.T @ sample) / len(sample)
    normal = torch.distributions.MultivariateNormal(mean, covariance + 1e-20 * torch.eye(len(mean)))
    return normal.sample((number,))


def grown(matrix: torch.Tensor, ids: int, rows: int, new: torch.Tensor) -> torch.Tensor:
    """The matrix [rows, hidden] in its own type: `ids` old rows bit for bit, the new ones, and then, up to the end,
    rows that no token uses, which get the mean of all old ones. Raises AssertionError when an invariant fails.
    """
    import torch

    assert rows >= max(matrix.shape[0], ids + len(new)), "rows would be lost"
    result = torch.empty((rows, matrix.shape[1]), dtype=matrix.dtype)
    result[:ids] = matrix[:ids]
    result[ids : ids + len(new)] = new
    result[ids + len(new) :] = average_row(matrix[:ids])
    assert torch.equal(result[:ids], matrix[:ids]), "old rows changed"
    assert torch.isfinite(result[ids:]).all(), "a new row is not finite"
    return result


def extend(raw: Checkpoint, target: Path, dtype: str, matrix: torch.Tensor) -> None:
    """Write the text-only base of a raw checkpoint with another matrix."""
    raw.config.vocab_size, raw.config.tie_word_embeddings = len(matrix), True
    write(target, raw.config, ((name, matrix if name == MATRIX else tensor) for name, tensor in raw), dtype)


# adapters -----------------------------------------------------------------------------------------------


def fresh_adapter(
    base: Path, target: Path, profile: ModelProfile, *, second: bool, new_ids: list[int], seed: int
) -> dict[str, int]:
    """Write a fresh adapter for a base; returns how many parameters of which kind train.

    PEFT makes it on a model whose weights, but for the matrix, take no memory. The result is that of the whole model,
    byte for byte. At step 0 it changes nothing: B is zero and the token rows are those of the base, which is checked.
    """
    import torch
    from transformers import Gemma3ForCausalLM

    checkpoint = Checkpoint(base)
    with torch.device("meta"):
        model = Gemma3ForCausalLM(checkpoint.config)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            empty = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            module._parameters[name] = torch.nn.Parameter(empty, requires_grad=False)
    matrix = checkpoint.tensor(MATRIX)
    model.model.embed_tokens.weight = torch.nn.Parameter(matrix, requires_grad=False)
    model.tie_weights()
    adapted = modeling.fresh_adapter(model, profile, second=second, new_ids=new_ids, seed=seed)
    # The published base, seen from the adapter: not the temporary neighbour that both are made in.
    adapted.peft_config["default"].base_model_name_or_path = "../base"
    modeling.save_adapter(adapted, target)
    adapter = Adapter(target)
    assert not any(b.any() for _, b in adapter.pairs.values()), "a fresh adapter changes its base"
    assert adapter.rows is None or torch.equal(adapter.rows, matrix[new_ids].to(adapter.rows.dtype)), "rows moved"
    return modeling.trainable_parameters(adapted)


class Adapter:
    """A LoRA adapter's tensors: pairs {weight name: (A [r, in], B [out, r])}, scale, and token rows by id.

    Raises PipelineError when there is none, or one of a kind that this pipeline does not write.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors.torch import load_file

        config = modeling.adapter_config(folder)
        foreign = {
            "use_dora": False, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None,
            "fan_in_fan_out": False, "bias": "none",
        }  # fmt: skip
        odd = [key for key, value in foreign.items() if config.get(key, value) != value]
        if odd:
            raise PipelineError(f"{show(folder)}: an adapter with {', '.join(odd)}, which cannot be merged here")
        self.scale = config["lora_alpha"] / config["r"]
        self.ids: list[int] = (config.get("trainable_token_indices") or {}).get("embed_tokens", [])
        self.rows: torch.Tensor | None = None
        self.pairs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        tensors = load_file(folder / "adapter_model.safetensors")
        for name, tensor in tensors.items():
            bare = name.removeprefix("base_model.model.")
            if bare.endswith(".lora_A.weight"):
                stem = bare.removesuffix(".lora_A.weight")
                self.pairs[f"{stem}.weight"] = tensor, tensors[name.replace(".lora_A.", ".lora_B.")]
            elif bare == "model.embed_tokens.token_adapter.trainable_tokens_delta":
                self.rows = tensor
            elif not bare.endswith(".lora_B.weight"):
                raise PipelineError(f"{show(folder)}: holds {name}, which cannot be merged here")
        if bool(self.ids) != (self.rows is not None):
            raise PipelineError(f"{show(folder)}: its token rows and its adapter_config.json do not fit together")

    def onto(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The weight with this adapter merged into it: summed in float32 and rounded once.

        W + (alpha / r) B A (E. Hu et al., LoRA, 2021, section 4.1); trained token rows take the place of theirs.
        """
        if name in self.pairs:
            a, b = self.pairs[name]
            return (weight.float() + (b.float() @ a.float()) * self.scale).to(weight.dtype)
        if name == MATRIX and self.rows is not None:
            import torch

            ids = torch.tensor(self.ids)
            return weight.index_copy(0, ids, self.rows.to(weight.dtype))
        return weight


def merge(base: Path, adapter: Path, target: Path, dtype: str, ids: list[int]) -> float:
    """Write the base with the adapter merged into it, unquantised; returns the relative difference of the logits.

    Both models answer to `ids`, a layer in memory at a time: the merged one as it was written, the other with the
    adapter beside its weights. Raises PipelineError when the adapter does not fit the base, AssertionError when the
    logits differ by more than rounding (1e-4 in float32, 2e-2 in bfloat16).
    """
    checkpoint, delta = Checkpoint(base), Adapter(adapter)
    shapes = shapes_of(checkpoint.config)
    wrong = [
        name
        for name, (a, b) in delta.pairs.items()
        if name not in shapes or (b.shape[0], a.shape[1]) != tuple(shapes[name])
    ]
    if wrong or (delta.ids and max(delta.ids) >= shapes[MATRIX][0]):
        raise PipelineError(f"{show(adapter)}: does not fit its base {show(base)} ({wrong[0] if wrong else MATRIX})")
    write(target, checkpoint.config, ((name, delta.onto(name, tensor)) for name, tensor in checkpoint), dtype)
    before, after = _logits(base, ids, dtype, delta), _logits(target, ids, dtype)
    error = ((after - before).norm() / before.norm()).item()
    limit = 1e-4 if dtype == "float32" else 2e-2
    assert error < limit, f"merged logits differ by {error:.2g} (relative), more than {limit}"
    log.info("merged %s; logits differ by %.1e (relative)", show(adapter), error)
    return error


def _logits(folder: Path, ids: list[int], dtype: str, adapter: Adapter | None = None) -> torch.Tensor:
    """Logits float32 [len(ids), rows] of a text-only checkpoint whose layers are read as they are needed."""
    import tempfile

    import torch
    from transformers import Gemma3ForCausalLM

    layers = modeling.text_config(folder).num_hidden_layers
    places = dict.fromkeys(("model.embed_tokens", "lm_head", "model.norm", "model.rotary_emb"), "cpu")
    places |= {f"model.layers.{i}": "disk" for i in range(layers)}
    with tempfile.TemporaryDirectory() as unused, torch.inference_mode():
        model = Gemma3ForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), device_map=places, offload_folder=unused, use_safetensors=True
        ).eval()
        if adapter:
            _attach(model, adapter)
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
        del model
        gc.collect()  # hooks and modules hold each other, and another model follows
        return logits


def _attach(model: Any, adapter: Adapter) -> None:
    """Put an adapter beside the weights of a model whose layers are on the disk, which PEFT cannot do."""
    import torch

    def beside(a: torch.Tensor, b: torch.Tensor) -> Callable[..., torch.Tensor]:
        def hook(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            return output + ((inputs[0].float() @ a.T.float()) @ b.T.float() * adapter.scale).to(output.dtype)

        return hook

    modules = dict(model.named_modules())
    for name, (a, b) in adapter.pairs.items():
        modules[name.removesuffix(".weight")].register_forward_hook(beside(a, b))
    if adapter.rows is not None:
        matrix = model.get_input_embeddings().weight
        matrix.index_copy_(0, torch.tensor(adapter.ids), adapter.rows.to(matrix.dtype))
