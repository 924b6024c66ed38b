"""Make a tiny random LLaVA model, without a download: it stands in for the model that you have.

    python examples/own_model/make_model.py models/tiny-llava

The folder is an ordinary Hugging Face model folder: config, weights, tokenizer, processor and chat template. LLaVA is
another family than the small default model of this project (Idefics3), and nothing here or in the project is told so:
a run asks the folder.
"""

import sys
from pathlib import Path

import gymnasium
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import envs  # noqa: F401  (registers the games)

START, END, PAD, IMAGE = "<s>", "</s>", "<pad>", "<image>"
IMAGE_SIZE, PATCH_SIZE = 64, 16  # pixels; a picture becomes (64 / 16)² = 16 tokens
CHAT_TEMPLATE = (
    "{% for message in messages %}" + START + "{{ message['role'] }}: "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}" + IMAGE + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}" + END + "\n"
    "{% endfor %}{% if add_generation_prompt %}" + START + "assistant: {% endif %}"
)


def sample_texts(env_id: str = "coso/NumberLine-v0", episodes: int = 50) -> list[str]:
    """Prompts and answers of a game. The tokenizer learns its words from them."""
    env, rng = gymnasium.make(env_id).unwrapped, np.random.default_rng(0)
    texts = []
    for seed in range(episodes):
        observation, _ = env.reset(seed=seed)
        texts += [observation["prompt"], env.expert_utterance(rng)]
    return texts


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that any text has an encoding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=[START, END, PAD, IMAGE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens={"image_token": IMAGE},
        clean_up_tokenization_spaces=False,
    )


def make_config(tokenizer: PreTrainedTokenizerFast) -> LlavaConfig:
    """The shape of LLaVA 1.5: a CLIP vision tower, a projector, a Llama; here with about half a million weights."""
    return LlavaConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH_SIZE,
            "projection_dim": 64,
        },
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        vision_feature_select_strategy="default",
    )


def main(folder: Path) -> None:
    tokenizer = make_tokenizer(sample_texts())
    torch.manual_seed(1)
    model = LlavaForConditionalGeneration(make_config(tokenizer)).float()
    model.save_pretrained(folder)
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        ),
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    print(f"{folder}: LLaVA with {sum(weights.numel() for weights in model.parameters()):,} random weights")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/own_model/make_model.py FOLDER")
    main(Path(sys.argv[1]))
