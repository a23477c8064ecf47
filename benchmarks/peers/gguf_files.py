"""What llama.cpp reads of a LLaVA-1.5 checkpoint, in GGUF. Its own converter takes the language model of a published
vocabulary only, and no CLIP tower; names and layouts are those of ``llama.cpp`` (``src/llama-arch.cpp``,
``tools/mtmd/clip-impl.h``).
"""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from cyllama.llama import llama_cpp
from gguf import GGUFWriter, LlamaFileType, TokenType
from numpy.typing import NDArray
from safetensors import safe_open
from serving import Task

VISION_FILE = "mmproj-f16.gguf"
_TYPES = {
    "f16": LlamaFileType.MOSTLY_F16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q4_0": LlamaFileType.MOSTLY_Q4_0,
}

_LANGUAGE = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_TOWER = {
    "embeddings.class_embedding": "v.class_embd",
    "embeddings.patch_embedding.weight": "v.patch_embd.weight",
    "embeddings.position_embedding.weight": "v.position_embd.weight",
    "pre_layrnorm": "v.pre_ln",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
_LAYER = re.compile(r"(?:encoder\.)?layers\.(\d+)\.(.+)\.(weight|bias)")


def language_file(task: Task) -> Path:
    """Return the file of the language model in the task's precision."""
    return task.folder / f"language-{task.variant}.gguf"


def convert(task: Task) -> None:
    """Write the language model in ``task.variant`` (f16, q8_0, q4_0) and the tower in f16, unless that was done before.

    Raises:
        RuntimeError: llama.cpp does not round it.
    """
    if task.folder.is_dir():
        return
    half = task.folder.with_name(f"{task.folder.name}.part")
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    config = json.loads((task.checkpoint / "config.json").read_text())
    weights = dict(_read(task.checkpoint))
    whole, rounded = half / "language-f16.gguf", half / f"language-{task.variant}.gguf"
    _write_language(whole, config, weights)
    _write_tower(half / VISION_FILE, task.checkpoint, config, weights)
    if rounded != whole:
        options = llama_cpp.LlamaModelQuantizeParams()
        options.ftype, options.nthread = int(_TYPES[task.variant]), task.threads
        llama_cpp.model_quantize(str(whole), str(rounded), options)
        whole.unlink()
    half.rename(task.folder)


def _read(checkpoint: Path) -> Iterator[tuple[str, NDArray[Any]]]:
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dictionary
                yield name, file.get_tensor(name)


def _write_language(path: Path, config: Mapping[str, Any], weights: Mapping[str, NDArray[Any]]) -> None:
    text = config["text_config"]
    heads, kv_heads = text["num_attention_heads"], text["num_key_value_heads"]
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(text["max_position_embeddings"])
    writer.add_embedding_length(text["hidden_size"])
    writer.add_block_count(text["num_hidden_layers"])
    writer.add_feed_forward_length(text["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(text["head_dim"])
    writer.add_rope_freq_base(text["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(text["rms_norm_eps"])
    writer.add_vocab_size(text["vocab_size"])
    writer.add_file_type(_TYPES["f16"])
    _add_words(writer, text["vocab_size"])
    for name, weight in weights.items():
        if not name.startswith("language_model."):
            continue
        found = _LAYER.fullmatch(name.removeprefix("language_model.model."))
        if found:
            layer, part, kind = found.groups()
            if part.endswith(("q_proj", "k_proj")):
                weight = _interleaved(weight, heads if part.endswith("q_proj") else kv_heads)
            _add(writer, f"blk.{layer}.{_LANGUAGE[part]}.{kind}", weight)
        else:
            _, _, part = name.removesuffix(".weight").rpartition(".")
            _add(writer, f"{_LANGUAGE.get(part, 'output')}.weight", weight)
    _close(writer)


def _write_tower(path: Path, checkpoint: Path, config: Mapping[str, Any], weights: Mapping[str, NDArray[Any]]) -> None:
    vision = config["vision_config"]
    image = json.loads((checkpoint / "processor_config.json").read_text())["image_processor"]
    writer = GGUFWriter(path, "clip")
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_projection_dim(vision["projection_dim"])
    writer.add_vision_image_size(vision["image_size"])
    writer.add_vision_patch_size(vision["patch_size"])
    writer.add_vision_embedding_length(vision["hidden_size"])
    writer.add_vision_feed_forward_length(vision["intermediate_size"])
    writer.add_vision_block_count(vision["num_hidden_layers"])
    writer.add_vision_head_count(vision["num_attention_heads"])
    writer.add_vision_attention_layernorm_eps(vision["layer_norm_eps"])
    writer.add_vision_image_mean(image["image_mean"])
    writer.add_vision_image_std(image["image_std"])
    writer.add_file_type(_TYPES["f16"])
    for name, weight in weights.items():
        if name.startswith("multi_modal_projector."):
            _, part, kind = name.split(".")
            _add(writer, f"mm.{0 if part == 'linear_1' else 2}.{kind}", weight)
        elif name.startswith("vision_tower.") and "post_layernorm" not in name:
            part = name.removeprefix("vision_tower.vision_model.")
            found = _LAYER.fullmatch(part)
            if found:
                layer, part, kind = found.groups()
                _add(writer, f"v.blk.{layer}.{_TOWER[part]}.{kind}", weight)
            elif part in _TOWER:
                _add(writer, _TOWER[part], weight)
            else:
                part, _, kind = part.rpartition(".")
                _add(writer, f"{_TOWER[part]}.{kind}", weight)
    _close(writer)


def _interleaved(weight: NDArray[Any], num_heads: int) -> NDArray[Any]:
    """Return a projection with the two halves of each head interleaved, as llama.cpp turns pairs of neighbours."""
    rows, columns = weight.shape
    halves = weight.reshape(num_heads, 2, rows // num_heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))


def _add_words(writer: GGUFWriter, size: int) -> None:
    """Add a vocabulary of the right size; prompts are given as numbers, so what the words say is never asked."""
    special = ["<unk>", "<s>", "</s>"]
    raw = [f"<0x{byte:02X}>" for byte in range(256)]
    words = (special + raw + [f"<{number}>" for number in range(size)])[:size]
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * size)
    writer.add_token_types((types + [TokenType.NORMAL] * size)[:size])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _add(writer: GGUFWriter, name: str, weight: NDArray[Any]) -> None:
    is_matrix = weight.ndim > 1 and "position_embd" not in name
    writer.add_tensor(name, weight.astype(np.float16 if is_matrix else np.float32, copy=False))


def _close(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
