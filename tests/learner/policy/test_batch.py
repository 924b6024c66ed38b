"""Batches: the ids that were sampled, the pictures that were seen, nothing cut and nothing guessed."""

import numpy as np
import pytest
import torch
from PIL import Image

from actors.trajectory import TrajectoryBatch
from learner.policy.batch import BatchBuilder, PromptMismatch, concatenate_padded
from learner.policy.image_tensors import ImageTensors, nbytes
from tests.tiny_models import PROMPT, TEXTS, make_idefics3, picture
from tests.tiny_steps import step_rows, steps


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return make_idefics3(tmp_path_factory.mktemp("idefics3")).chat


def _responses(chat):
    # Ids that no tokenizer would give for their text: they must come through as they are.
    return [[7, 7, 9], chat.tokenizer(TEXTS[1])["input_ids"] + chat.eos_token_ids, [11]]


def test_rows_hold_prompt_and_response_ids_as_stored_and_padding_on_the_right(chat):
    prompts, pictures = [PROMPT, "Short.", PROMPT + PROMPT], [picture(n) for n in range(3)]
    trajectories = steps(chat, prompts, pictures, _responses(chat))
    order = [2, 0, 1]
    batch = BatchBuilder(chat).build(trajectories, order)
    stored_prompts = trajectories.ragged("prompt_ids", np.int64)
    logprobs = trajectories.ragged("behaviour_logprobs", np.float32)
    influence = trajectories.ragged("influence", np.float32)
    for row, index in enumerate(order):
        prompt, response = stored_prompts[index].tolist(), _responses(chat)[index]
        length = len(prompt) + len(response)
        assert batch.prompt_lengths[row] == len(prompt) and batch.response_lengths[row] == len(response)
        assert batch.model_inputs["input_ids"][row, :length].tolist() == prompt + response
        assert batch.model_inputs["attention_mask"][row].tolist() == [1] * length + [0] * (
            batch.model_inputs["input_ids"].shape[1] - length
        )
        assert batch.response_ids[row, : len(response)].tolist() == response
        assert batch.response_mask[row].sum() == len(response) and batch.response_mask[row, : len(response)].all()
        np.testing.assert_array_equal(batch.behaviour_logprobs[row, : len(response)], logprobs[index])
        np.testing.assert_array_equal(batch.influence[row, : len(response)], influence[index])
        assert not batch.behaviour_logprobs[row, len(response) :].any()
        pixels = chat.encode_prompt(prompts[index], Image.fromarray(pictures[index]))["pixel_values"]
        torch.testing.assert_close(batch.model_inputs["pixel_values"][row], pixels[0])
    assert batch.sample_weight.tolist() == [1.0, 1.0, 1.0]


def test_the_action_part_begins_where_the_chat_processor_says(chat):
    responses = _responses(chat)
    batch = BatchBuilder(chat).build(steps(chat, [PROMPT] * 3, [picture()] * 3, responses), [0, 1, 2])
    start = chat.action_start(responses[1])
    assert 0 < start < len(responses[1])
    assert batch.action_mask[1].tolist() == [start <= n < len(responses[1]) for n in range(len(responses[1]))]
    assert not batch.action_mask[0].any() and not batch.action_mask[2].any()


def test_steps_that_were_neither_sampled_nor_scored_have_zeros(chat):
    rows, images = step_rows(chat, [PROMPT], [picture()], [[7, 8]])
    rows[0]["influence"] = rows[0]["behaviour_logprobs"] = None
    batch = BatchBuilder(chat).build(TrajectoryBatch.from_rows(rows, images), [0])
    assert batch.influence.tolist() == batch.behaviour_logprobs.tolist() == [[0.0, 0.0]]


def test_final_observations_are_prompts_without_responses(chat):
    rows, images = step_rows(chat, [PROMPT, PROMPT], [picture(0), picture(1)], [[7], [8, 9]])
    rows[0].update(final_prompt="What now?", final_image=rows[1]["image"])
    trajectories = TrajectoryBatch.from_rows(rows, images)
    batch = BatchBuilder(chat).build_final(trajectories, [0])
    expected = chat.encode_prompt("What now?", Image.fromarray(picture(1)))
    assert torch.equal(batch.model_inputs["input_ids"], expected["input_ids"])
    torch.testing.assert_close(batch.model_inputs["pixel_values"], expected["pixel_values"])
    assert batch.response_ids.shape == batch.response_mask.shape == (1, 0)
    with pytest.raises(ValueError, match="step 1 .* no final observation"):
        BatchBuilder(chat).build_final(trajectories, [1])


def test_prompt_ids_of_another_model_are_refused_with_the_place(chat):
    rows, images = step_rows(chat, [PROMPT], [picture()], [[7]])
    rows[0]["prompt_ids"][3] += 1
    with pytest.raises(PromptMismatch, match="first difference at token 3"):
        BatchBuilder(chat).build(TrajectoryBatch.from_rows(rows, images), [0])


def test_the_cache_is_bounded_and_changes_nothing(chat):
    trajectories = steps(chat, [PROMPT] * 4, [picture(n) for n in range(4)], [[7]] * 4)
    small, large = BatchBuilder(chat), BatchBuilder(chat)
    one = nbytes(chat.encode_image(Image.fromarray(picture())))
    small._tensors = ImageTensors(chat, file_bytes=0, memory_bytes=2 * one)
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [0, 0, 1, 3]):
        ours, theirs = small.build(trajectories, order), large.build(trajectories, order)
        assert torch.equal(ours.model_inputs["pixel_values"], theirs.model_inputs["pixel_values"])
    assert small._tensors.encoded == 4 + 2 + 1 and large._tensors.encoded == 4


def test_moving_a_batch_moves_all_of_it(chat):
    batch = BatchBuilder(chat).build(steps(chat, [PROMPT], [picture()], [[7]]), [0])
    batch.targets = {"returns": torch.ones(1)}
    moved = batch.to("meta")
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert {t.device.type for t in [*tensors, *moved.model_inputs.values(), *moved.targets.values()]} == {"meta"}
    assert len(tensors) == 9 and list(moved.targets) == ["returns"]


def test_image_tensors_of_different_sizes_are_padded_with_zeros():
    left, right = torch.ones(1, 2, 3), torch.full((2, 1, 4), 2.0)
    joined = concatenate_padded([left, right])
    assert joined.shape == (3, 2, 4)
    assert torch.equal(joined[:1, :, :3], left) and torch.equal(joined[1:, :1], right)
    assert joined.sum() == left.sum() + right.sum()


def test_columns_are_read_once_for_all_passes_over_a_batch(chat):
    first, second = (steps(chat, [PROMPT], [picture()], [[7] * length]) for length in (1, 2))
    builder = BatchBuilder(chat)
    columns = builder.columns(first)
    builder.build(first, [0])
    assert builder.columns(first) is columns and columns.lengths.tolist() == [len(columns.prompt_ids[0]) + 1]
    assert builder.columns(second).lengths.tolist() == [len(columns.prompt_ids[0]) + 2]
