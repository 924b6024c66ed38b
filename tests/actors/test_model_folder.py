"""A model's folder is read before anything starts; each thing that is wrong is one line: what, where, what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from actors.chat import NotAVisionLanguageModel
from actors.model_folder import file_problems, read_model
from actors.serving import engine_tables
from learner.supervised.default_model import make_default_vlm
from tests.tiny_models import SMALL, TEXTS, make_idefics3, picture

Break = Callable[[Path], Any]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    make_idefics3(folder)
    return folder


@pytest.fixture()
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def changed(name: str, **values: Any) -> Break:
    """Set keys of a JSON file; None takes a key out."""

    def change(folder: Path) -> None:
        content = {**json.loads((folder / name).read_text()), **values}
        (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return change


def in_shards(folder: Path) -> list[str]:
    """Two shards and an index; returns the names of the tensors in the second."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    where = {name: "a.safetensors" if number < 3 else "b.safetensors" for number, name in enumerate(names)}
    for file in ("a.safetensors", "b.safetensors"):
        save_file({name: weights[name] for name in names if where[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return names[3:]


def without_second_shard(folder: Path) -> None:
    in_shards(folder)
    (folder / "b.safetensors").unlink()


def first_shard_twice(folder: Path) -> None:
    in_shards(folder)
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")


def with_integers(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor.to(torch.int8) for name, tensor in weights.items()}, folder / "model.safetensors")


def cut_off(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def write(name: str, content: bytes) -> Break:
    return lambda folder: (folder / name).write_bytes(content)


def remove(name: str) -> Break:
    return lambda folder: (folder / name).unlink()


BROKEN: dict[str, tuple[Break, str]] = {
    "no config": (remove("config.json"), "has no config.json.*vision-language model"),
    "no weights": (remove("model.safetensors"), "has no weights"),
    "no processor": (remove("processor_config.json"), "has no image processor.*preprocessor_config.json"),
    "no tokenizer": (remove("tokenizer.json"), "has no tokenizer"),
    "weights cut off": (cut_off, r"model\.safetensors is broken or cut off.*Copy it again"),
    "weights are noise": (write("model.safetensors", b"\xff" * 64), r"model\.safetensors is broken or cut off"),
    "weights are empty": (write("model.safetensors", b""), r"model\.safetensors is broken or cut off"),
    "a shard is missing": (without_second_shard, r"lacks b\.safetensors, which model\.safetensors\.index\.json names"),
    "the wrong shard": (first_shard_twice, r"b\.safetensors lacks \d+ tensors that model\.safetensors\.index\.json"),
    "index leaves the folder": (
        write("model.safetensors.index.json", b'{"weight_map": {"a": "../b.safetensors"}}'),
        "index.json is broken: its weight_map",
    ),
    "quantised weights": (with_integers, "holds weights as I8, which cannot be trained"),
    "said to be quantised": (changed("config.json", quantization_config={"bits": 4}), "weights are quantised"),
    "a kind of number that there is not": (changed("config.json", dtype="float7"), "dtype 'float7'.*bfloat16"),
    "integers": (changed("config.json", dtype="int8"), "dtype 'int8'"),
    "an architecture that there is not": (
        changed("config.json", architectures=["FooForBar"]),
        "vLLM cannot serve .*it knows no architecture FooForBar",
    ),
    "another image token": (
        changed("config.json", image_token_id=50),
        "token 50 stands for images.*In the tokenizer it is 'M'",
    ),
    "an image token that the tokenizer has not": (changed("config.json", image_token_id=319), "stands for images"),
    **{
        f"{name} is {kind}": (write(name, content), rf"{name} is broken: .*Copy it again")
        for name in ("config.json", "generation_config.json", "tokenizer.json", "processor_config.json")
        for kind, content in {"no JSON": b"{ no", "a list": b"[]", "no text": b"\xff\xfe\x00"}.items()
    },
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_is_said(folder: Path, case: str) -> None:
    break_it, words = BROKEN[case]
    break_it(folder)
    with pytest.raises(NotAVisionLanguageModel, match=words) as raised:
        read_model(str(folder), device="cuda", trained=True)
    assert str(folder) in str(raised.value) and len(str(raised.value).splitlines()) == 1


def test_a_whole_folder_passes_also_in_shards_and_without_optional_files(folder: Path) -> None:
    in_shards(folder)
    (folder / "generation_config.json").unlink()
    chat = read_model(str(folder), device="cuda", trained=True)
    assert chat.eos_token_ids == [chat.tokenizer.eos_token_id]


def test_every_problem_has_its_line(folder: Path) -> None:
    remove("model.safetensors")(folder)
    remove("processor_config.json")(folder)
    with pytest.raises(NotAVisionLanguageModel, match="no image processor.*\n.*no weights"):
        read_model(str(folder))


@pytest.mark.parametrize("broken_too", [False, True])
def test_nobody_is_asked_whether_to_run_a_folders_code(
    folder: Path, broken_too: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("builtins.input", lambda *question: asked.append(question) or "y")
    changed("config.json", model_type="own", auto_map={"AutoConfig": "own.Config"})(folder)
    (folder / "own.py").write_text("raise SystemExit('the folder's code was run')")
    if broken_too:
        (folder / "tokenizer.json").write_text("{")
    with pytest.raises(NotAVisionLanguageModel, match="cannot be loaded as a vision-language model"):
        read_model(str(folder))
    assert asked == []


def test_a_model_that_is_not_trained_may_be_quantised(folder: Path) -> None:
    with_integers(folder)
    changed("config.json", quantization_config={"bits": 4})(folder)
    assert file_problems(str(folder)) == [] != file_problems(str(folder), trained=True)


def test_the_files_of_a_hub_name_are_not_looked_at() -> None:
    assert file_problems("organisation/model") == []


@pytest.mark.parametrize(("hidden", "device", "works"), [(96, "cpu", False), (96, "cuda", True), (128, "cpu", True)])
def test_head_widths_without_a_kernel_of_the_cpu_engine(tmp_path: Path, hidden: int, device: Any, works: bool) -> None:
    make_default_vlm(tmp_path, TEXTS, [picture()], replace(SMALL, hidden=hidden), seed=0)
    if works:
        read_model(str(tmp_path), device=device)
        return
    with pytest.raises(NotAVisionLanguageModel, match="are 24 wide.*kernels for 32, 64.*policy_server.device cuda"):
        read_model(str(tmp_path), device=device)


@pytest.mark.parametrize(
    ("architecture", "target", "complaint"),
    [
        ("Idefics3ForConditionalGeneration", "all-linear", None),
        ("Emu3ForConditionalGeneration", "language_model", None),
        ("Emu3ForConditionalGeneration", "all-linear", "Emu3.* to the language model only.*target language_model"),
        ("AriaForConditionalGeneration", "language_model", "no adapters to Aria.*Set learner.lora.serving merged"),
    ],
)
def test_adapters_that_vllm_does_not_apply_are_refused(
    folder: Path, architecture: str, target: Any, complaint: str | None
) -> None:
    changed("config.json", architectures=[architecture])(folder)
    if complaint is None:
        read_model(str(folder), device="cuda", adapters=target)
        return
    read_model(str(folder), device="cuda")
    with pytest.raises(NotAVisionLanguageModel, match=complaint):
        read_model(str(folder), device="cuda", adapters=target)


def test_tables_that_are_not_found_refuse_nothing(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(engine_tables, "_source", lambda name: None)
    assert engine_tables.architectures() is None and engine_tables.cpu_head_sizes() is None
    assert engine_tables.adapter_targets("Idefics3ForConditionalGeneration") is None
    read_model(str(folder), device="cpu", adapters="all-linear")  # its heads are 8 wide
