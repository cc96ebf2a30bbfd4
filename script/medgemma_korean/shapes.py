"""Sizes of a Gemma 3 text model, from its shape alone: parameters, bytes of weights, and what memory there is.

    shape = read_shape(profile, paths)      # of the model on the disk, else of the published one
    weight_bytes(shape, "8bit", "bfloat16")

Numbers are predictions from shapes. Bytes; GB elsewhere are 10^9 of them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from medgemma_korean import records
from medgemma_korean import tokenizer as tokenizers
from medgemma_korean.cli import PipelineError
from medgemma_korean.paths import RunPaths
from medgemma_korean.profiles import ModelProfile

# Bits a weight of a quantised linear layer. nf4: 4, one 8-bit scale in 64 weights, one fp32 scale in 64 x 256
# (double quantisation; T. Dettmers et al., QLoRA, 2023, section 3).
BITS = {"8bit": 8.0, "nf4": 4 + 8 / 64 + 32 / (64 * 256), "bf16": 16.0, "fp32": 32.0}
TRAINED_BYTES = 16  # a trained parameter: fp32 value, gradient and the two moments of Adam
DTYPE_BYTES = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Shape:
    """What the memory of a Gemma 3 text model depends on. rows: embedding rows; ids: token ids of its tokenizer."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    rows: int
    ids: int

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of the linear layers of one decoder layer: q, k, v, o, gate, up, down."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        h, f = self.hidden, self.ffn
        return ((h, q), (h, kv), (h, kv), (q, h), (h, f), (h, f), (f, h))


# For a model that is not downloaded yet; the same values stand in its config.json.
SHAPES = {
    "google/medgemma-4b-it": Shape(34, 2560, 10_240, 8, 4, 256, rows=262_208, ids=262_145),
    "google/medgemma-27b-text-it": Shape(62, 5376, 21_504, 32, 16, 128, rows=262_208, ids=262_145),
}


def read_shape(profile: ModelProfile, paths: RunPaths) -> Shape:
    """From config.json where the raw model is, else from the profile or the table. Raises PipelineError."""
    file = paths.raw_model / "config.json"
    if file.is_file():
        try:
            config = records.read_object(file, repair="bring the model's own")
            config = config.get("text_config", config)
            rows = config.get("vocab_size", 262_208)
            return Shape(
                config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"],
                config.get("num_attention_heads", 8), config.get("num_key_value_heads", 4),
                config.get("head_dim", 256), rows=rows, ids=rows,
            )  # fmt: skip
        except (KeyError, TypeError, AttributeError) as error:
            raise PipelineError(f"{file}: not the configuration of a Gemma 3 model ({error}); bring its own") from None
    if profile.tiny:
        tiny = profile.tiny
        return Shape(
            tiny.layers, tiny.hidden, tiny.intermediate, tiny.heads, tiny.kv_heads, tiny.head_dim,
            rows=tokenizers.rows_for(tiny.base_vocab), ids=tiny.base_vocab,
        )  # fmt: skip
    return SHAPES[profile.source]


def linear_parameters(shape: Shape) -> int:
    """Weights of all linear layers: the sum of inputs x outputs; what quantisation shrinks."""
    return shape.layers * sum(i * o for i, o in shape.linears)


def lora_parameters(shape: Shape, rank: int) -> int:
    """LoRA on all linear layers: rank x (inputs + outputs) each (E. Hu et al., LoRA, 2021, section 4.2)."""
    return shape.layers * rank * sum(i + o for i, o in shape.linears)


def weight_bytes(shape: Shape, precision: str, dtype: str) -> float:
    """The frozen base: linear layers in the precision, the tied matrix in the compute type; norms are below 1 MB."""
    embedding = 4 if precision == "fp32" else 2 if precision == "bf16" else DTYPE_BYTES[dtype]
    return linear_parameters(shape) * BITS[precision] / 8 + shape.rows * shape.hidden * embedding


def checkpoint_bytes(shape: Shape, dtype: str) -> float:
    """An unquantised text-only base on the disk."""
    return (linear_parameters(shape) + shape.rows * shape.hidden) * DTYPE_BYTES[dtype]


def extended_rows(profile: ModelProfile, paths: RunPaths, shape: Shape) -> tuple[int, int]:
    """(new tokens, embedding rows): of the tokenizer that is there, else the most that the profile allows."""
    info = paths.tokenizer / "tokenizer_info.json"
    if info.is_file():
        known = records.read_object(info, "new_tokens", "rows")
        return known["new_tokens"], max(known["rows"], shape.rows)
    return profile.new_tokens, tokenizers.rows_for(shape.ids + profile.new_tokens, at_least=shape.rows)


def free_ram(meminfo: Path = Path("/proc/meminfo")) -> float:
    """Bytes that programs can still get: MemAvailable where the system tells it, else the free pages."""
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024.0
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"))
