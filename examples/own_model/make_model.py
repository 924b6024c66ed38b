"""Make a tiny random Idefics3 model, without a download: it stands in for the model that you have.

    python examples/own_model/make_model.py models/tiny-idefics3

Idefics3 is the family of SmolVLM-256M. The folder is an ordinary Hugging Face model folder: config, weights, tokenizer,
processor and chat template. A run asks the folder for everything it needs, and knows nothing of this script.
"""

import sys
from pathlib import Path

import gymnasium
import numpy as np
from transformers import AutoModelForImageTextToText

import envs  # noqa: F401  (registers the games)
from learner.supervised.default_model import DefaultModelOptions, make_default_vlm


def main(folder: Path) -> None:
    # The tokenizer learns its words from prompts and answers of a game, so that prompts are short.
    env, rng = gymnasium.make("coso/NumberLine-v0").unwrapped, np.random.default_rng(0)
    texts, images = [], []
    for seed in range(50):
        observation, _ = env.reset(seed=seed)
        texts += [observation["prompt"], env.expert_utterance(rng)]
        images.append(observation["image"])
    # Larger than the default model. Attention heads of the text are 192 / 6 = 32 wide, which vLLM's CPU build takes.
    options = DefaultModelOptions(hidden=192, layers=3, image_size=64, heads=6, vision_hidden=96, vocabulary=600)
    make_default_vlm(folder, texts, images, options, seed=1)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    print(f"{folder}: {type(model).__name__} with {model.num_parameters():,} random weights")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/own_model/make_model.py FOLDER")
    main(Path(sys.argv[1]))
