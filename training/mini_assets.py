"""Makes the configuration, tokenizer and processor of the bundled mini model.

Run ``python -m tokexport.training.mini_assets`` to write them again; the result is the same every time.
"""

from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CLIPImageProcessorPil, LlavaConfig, LlavaProcessor, PreTrainedTokenizerFast

import tokexport.recipes
from tokexport.dialogues.generate import corpus

VOCABULARY = 576
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'].upper() + ':' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ ' <image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ ' ' + part['text'] | trim }}{% endfor %}"
    "{{ '</s>' if message['role'] == 'assistant' else '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

_NUM_SCENES = 3000
# What the chat template says, as often as it is said.
_LAYOUT = "USER:\nASSISTANT:"


def sentences() -> Iterator[str]:
    """Yield what the tokenizer learns its merges from."""
    for sentence in corpus(_NUM_SCENES):
        yield f" {sentence}"
        yield _LAYOUT


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE, so that any text can be encoded and decoded without loss."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )


def make_config() -> LlavaConfig:
    """Return LLaVA-1.5's architecture with 5.9 million parameters."""
    return LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 160,
            "intermediate_size": 640,
            "num_hidden_layers": 6,
            "num_attention_heads": 5,
            "image_size": 336,
            "patch_size": 14,
            "projection_dim": 128,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": VOCABULARY,
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 8,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "head_dim": 64,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            # Slow waves, so that likeness counts over the hundreds of tokens between a word and what it names.
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 3,
        },
        image_token_index=SPECIAL_TOKENS.index("<image>"),
        image_seq_length=576,
    )


def write(folder: Path) -> None:
    """Write everything but the weights to ``folder``."""
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
        tokenizer=make_tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    make_config().save_pretrained(folder)


if __name__ == "__main__":
    write(Path(tokexport.recipes.__path__[0]) / "models" / "mini")
