"""Vision pre-training: it teaches the features to tell the state, however a family lays its images out."""

import numpy as np
import pytest
import torch
from PIL import Image

from learner.supervised.vision_pretraining import pretrain_vision
from tests.tiny_models import FAMILIES, PROMPT


def _pictures():
    """Four pictures, told apart by their colour and by how bright it is."""
    pictures, labels = [], []
    for brightness, level in enumerate([120, 255]):
        for channel in range(2):
            image = np.zeros((64, 64, 3), np.uint8)
            image[..., channel] = level
            pictures.append(image)
            labels.append([brightness, channel])
    return pictures, np.array(labels)


@pytest.mark.parametrize("family", ["idefics3", "qwen2_5_vl"])
def test_the_labels_are_learned_and_the_words_left_alone(family, tmp_path):
    tiny = FAMILIES[family](tmp_path)
    pictures, labels = _pictures()
    labels[3, 1] = -1  # a label that does not apply is not asked for
    inputs = [tiny.chat.encode_prompt(PROMPT, Image.fromarray(image)) for image in pictures]
    embeddings = tiny.model.get_input_embeddings().weight.clone()
    losses = pretrain_vision(tiny.model, inputs, labels, [2, 2], steps=80, batch=8, learning_rate=3e-3, seed=0)
    assert len(losses) == 80
    assert np.mean(losses[:5]) > 0.9 and np.mean(losses[-5:]) < 0.3
    assert torch.equal(tiny.model.get_input_embeddings().weight, embeddings)
