"""What models need of memory and disk: counted against models that were built. tests/learner/test_engine.py counts what
ranks hold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.config.files import validate
from cluster.config.run_config import RunConfig
from cluster.errors import CosoError
from cluster.launch.model_shape import ModelShape, read_shape
from cluster.launch.sizing import (
    GIB,
    activations,
    engine_memory,
    host_memory,
    kv_bytes_per_token,
    learner_memory,
    learner_states,
    shortages,
    token_head,
)
from learner.policy.model import build_policy
from learner.settings import LoraSettings
from tests.tiny_models import FAMILIES, TinyVlm

#: Of a model with a million weights.
SHAPE = ModelShape(
    name="Million",
    parameters=1_000_000,
    layers=2,
    hidden=64,
    key_value_heads=2,
    head_dim=16,
    vocabulary=1000,
    tied=True,
    text_width=2000,
    vision_layers=2,
    vision_hidden=32,
    vision_width=1000,
    patches_per_token=4,
)


def config(**sections: Any) -> RunConfig:
    return validate(sections)


def write_config(folder: Path, model_type: str, text: dict[str, Any], vision: dict[str, Any]) -> Path:
    """A folder with nothing but the config.json of a model."""
    tied = text["tie_word_embeddings"]
    contents = {"model_type": model_type, "text_config": text, "vision_config": vision, "tie_word_embeddings": tied}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(contents))
    return folder


def qwen2_vl_2b(folder: Path) -> Path:
    text = {"hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2}
    text |= {"intermediate_size": 8960, "vocab_size": 151936, "tie_word_embeddings": True}
    vision = {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16}
    return write_config(folder, "qwen2_vl", text, vision)


def qwen2_5_vl_7b(folder: Path) -> Path:
    text = {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
    text |= {"intermediate_size": 18944, "vocab_size": 152064, "tie_word_embeddings": False}
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584, "num_heads": 16}
    return write_config(folder, "qwen2_5_vl", text, vision)


@pytest.fixture(scope="module", params=["idefics3", "qwen2_5_vl"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyVlm:
    return FAMILIES[request.param](tmp_path_factory.mktemp(request.param))


def test_weights_of_published_models_are_counted_from_their_configs_alone(tmp_path: Path) -> None:
    small, large = read_shape(qwen2_vl_2b(tmp_path / "2b")), read_shape(qwen2_5_vl_7b(tmp_path / "7b"))
    assert (small.parameters, small.tied) == (2_208_985_600, True)
    assert (large.parameters, large.tied) == (8_292_166_656, False)
    assert kv_bytes_per_token(config(model={"dtype": "bfloat16"}), large) == 2 * 28 * 4 * 128 * 2


def test_weights_are_those_of_the_model_and_of_its_files(tiny: TinyVlm) -> None:
    from safetensors import safe_open

    shape = read_shape(Path(tiny.chat.path))
    assert shape.parameters == sum(parameter.numel() for parameter in tiny.model.parameters())
    with safe_open(Path(tiny.chat.path) / "model.safetensors", framework="pt") as file:
        on_disk = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    engine = engine_memory(config(policy_server={"kv_cache_bytes": 1000}), shape)
    assert engine.parts == {"weights": on_disk, "KV cache": 1000}


@pytest.mark.parametrize("target", ["language_model", "all-linear"])
def test_adapters_are_counted_as_peft_makes_them(tiny: TinyVlm, target: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    policy = build_policy(
        AutoModelForImageTextToText.from_pretrained(tiny.chat.path),
        lora=LoraSettings(rank=3, target=target),
        value_hidden=(4,),
        gradient_checkpointing=False,
        value_gradient=False,
        seed=0,
    )
    trained = sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)
    lora = config(learner={"lora": {"rank": 3, "target": target}})
    states = learner_states(lora, shape := read_shape(Path(tiny.chat.path)))
    assert states == {"weights": 4 * (shape.parameters + trained), "gradients": 4 * trained, "optimizer": 8 * trained}


def test_activations_are_about_those_that_a_forward_pass_keeps(tiny: TinyVlm) -> None:
    """Of the text: pictures of the tiny models have a dozen patches."""
    shape = read_shape(Path(tiny.chat.path))
    weights = {parameter.untyped_storage().data_ptr() for parameter in tiny.model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    length = 64
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states = tiny.model.get_decoder()(input_ids=torch.full((1, length), 5))
    assert states.last_hidden_state.requires_grad
    said = activations(config(policy_server={"max_model_len": length}, rollout={"max_new_tokens": length}), shape)
    assert 0.5 < sum(kept.values()) / said < 2, (sum(kept.values()), said)


@pytest.mark.parametrize(("chunk", "measured_gib"), [(4096, 12.187), (1024, 3.508), (256, 1.409)])
def test_the_token_head_needs_what_was_measured_on_an_h100(chunk: int, measured_gib: float) -> None:
    """`python -m benchmarks.gpu.token_head`: 8,192 tokens, hidden states 2,048 wide, a vocabulary of 151,936."""
    shape = replace(SHAPE, vocabulary=151_936, hidden=2048)
    learner = {"token_chunk": chunk, "micro_batch": 32}
    said = token_head(config(model={"dtype": "bfloat16"}, learner=learner), shape)
    assert said / GIB == pytest.approx(measured_gib, rel=0.08)


def test_checkpointing_stages_adapters_and_precision_change_what_is_needed() -> None:
    def needed(stage: int = 0, ranks: int = 1, dtype: str = "bfloat16", **learner: Any) -> dict[str, int]:
        settings = {"device": "cuda", "zero_stage": stage, "ranks": ranks, **learner}
        return dict(learner_memory(config(model={"dtype": dtype}, learner=settings), SHAPE).parts)

    whole, cut = needed(), needed(gradient_checkpointing=True)
    assert cut["activations"] < whole["activations"] and cut | {"activations": 0} == whole | {"activations": 0}
    assert needed(3, ranks=4)["weights"] == whole["weights"] / 4 and needed(3, ranks=4)["gathered"] == 2_000_000
    assert needed(lora={"rank": 1})["optimizer"] == 12 * 2000
    assert needed(dtype="float32")["weights"] == 2 * whole["weights"]
    assert needed(micro_batch=4)["activations"] == 4 * whole["activations"]


def test_what_is_too_much_is_said_with_what_would_help(tmp_path: Path) -> None:
    shape = read_shape(qwen2_5_vl_7b(tmp_path / "7b"))
    learner = {"device": "cuda", "ranks": 4, "zero_stage": 2, "micro_batch": 8}
    server = {"device": "cuda"}
    of = config(model={"dtype": "bfloat16"}, learner=learner, policy_server=server)
    (line,) = shortages(of, shape, 80 * GIB)
    assert "too much for 80.0 GiB of a GPU of 80.0 GiB: learner rank" in line and "learner.micro_batch=1" in line
    assert list(shortages(of, shape, 1000 * GIB)) == []
    _, of_server = shortages(of, shape, 16 * GIB)
    assert "policy server: " in of_server and "policy_server.tensor_parallel=2" in of_server
    shared = config(policy_server=server | {"gpu_memory_utilization": 0.4}, model={"dtype": "bfloat16"})
    (line,) = shortages(shared, shape, 48 * GIB)
    assert line.startswith("a policy server's KV cache holds") and "19.2 GiB of a GPU of 48.0 GiB" in line


def test_a_stated_kv_cache_counts_as_it_is_and_the_share_is_its_limit() -> None:
    server = {"device": "cuda", "gpu_share": 0.5, "gpu_memory_utilization": 0.4, "max_model_len": 4096}
    shape = replace(SHAPE, parameters=1_000_000_000)

    def lines(cache: int) -> list[str]:
        sections = {"model": {"dtype": "bfloat16"}, "policy_server": {**server, "kv_cache_bytes": cache}}
        return list(shortages(config(**sections), shape, 16 * GIB))

    wanted = 64 * 4096 * kv_bytes_per_token(config(model={"dtype": "bfloat16"}), shape)
    assert lines(wanted) == []
    (line,) = lines(wanted // 2)
    assert "holds 32 of 64 requests" in line
    (line,) = lines(4 * GIB)
    assert line.startswith("too much for 8.0 GiB of a GPU of 16.0 GiB") and "KV cache 4.0" in line


def test_a_learner_and_a_server_in_turns_have_the_whole_gpu_each() -> None:
    shape = replace(SHAPE, parameters=2_200_000_000)
    server = {"device": "cuda", "gpu_share": 0.5, "gpu_memory_utilization": 0.8, "sleep": True}
    learner = {"device": "cuda", "gpu_share": 0.5, "gradient_checkpointing": True}
    sections = {"mode": "sync", "model": {"dtype": "bfloat16"}, "policy_server": server}
    (line,) = shortages(config(**sections, learner=learner), shape, 80 * GIB)
    assert (
        "a policy server that is awake, and the resting learner: " in line and "learner.offload_optimizer=true" in line
    )
    offloaded = config(**sections, learner={**learner, "zero_stage": 2, "offload_optimizer": True})
    assert list(shortages(offloaded, shape, 80 * GIB)) == []
    host = host_memory(offloaded, shape, {"learner rank": 1, "policy server": 1}, "shared_memory").parts
    weights = 2 * shape.parameters
    assert host["optimizer"] == 6 * weights and host["sleeping servers"] == weights
    assert host["published weights"] == 2 * weights


def test_a_bound_on_tokens_bounds_activations() -> None:
    of = {"policy_server": {"max_model_len": 100}, "rollout": {"max_new_tokens": 100}}
    whole, bounded, least = (
        activations(config(**of, learner={"micro_batch": 8, "micro_tokens": tokens}), SHAPE)
        for tokens in (None, 400, 50)
    )
    assert whole == 2 * bounded == 8 * least


def test_a_folder_without_a_usable_config_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CosoError, match=r"has no config\.json, so its size is not known"):
        read_shape(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CosoError, match=r"cannot be told from its config\.json") as error:
        read_shape(tmp_path)
    assert "\n" not in str(error.value)
