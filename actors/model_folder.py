"""Reading a model's folder before anything starts: what is missing or broken in it, and what the engine cannot serve.

`read_model` is what every command calls first. It loads no weights, so it takes seconds for a model of any size.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from actors.chat import ChatProcessor, NotAVisionLanguageModel
from actors.serving import engine_tables
from actors.settings import AdapterTarget

#: JSON files of a model's folder; those that exist must hold a JSON object.
JSON_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "model.safetensors.index.json",
)
#: One of these holds the vocabulary.
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
#: Kinds of numbers that a learner can train, as config.json and safetensors name them.
FLOATS = {"float32", "float16", "bfloat16", "float64", "F32", "F16", "BF16", "F64"}


def read_model(
    path: str,
    *,
    device: Literal["cpu", "cuda"] | None = None,
    trained: bool = False,
    adapters: AdapterTarget | None = None,
) -> ChatProcessor:
    """The processor of a model that has all a run needs. Raises `NotAVisionLanguageModel` with a line per problem.

    path: a folder or hub name (whose files are not looked at before they are loaded); device: where vLLM is to serve
    the model, None if it is not; trained: whether a learner will train it; adapters: which layers' adapters vLLM is to
    apply, None: none.
    """
    if problems := file_problems(path, trained):
        of_config = any("/config.json " in problem for problem in problems)
        _refuse(problems if of_config else config_problems(path) + problems)
    chat = ChatProcessor(path)
    if device is not None:
        _refuse(engine_problems(path, chat.config, device, adapters))
    return chat


def file_problems(path: str, trained: bool = False) -> list[str]:
    """What is missing or broken among the files of the folder, a line each; [] for a hub name."""
    folder = Path(path)
    if not folder.is_dir():
        return []
    contents: dict[str, dict[str, Any]] = {}
    broken: set[str] = set()
    problems = []
    for name in (name for name in JSON_FILES if (folder / name).exists()):
        try:
            contents[name] = _json_object(folder / name)
        except ValueError as error:
            broken.add(name)
            problems.append(f"{folder / name} is broken: {error}. Copy it again from where the model comes from.")
    if not (folder / "config.json").exists():
        return [f"{folder} has no config.json. Name the folder of a vision-language model, as transformers saves it."]
    if not any((folder / name).exists() for name in VOCABULARIES):
        problems.append(f"{folder} has no tokenizer ({', '.join(VOCABULARIES)}). Save the model's tokenizer there.")
    if not (folder / "preprocessor_config.json").exists() and (
        "image_processor" not in contents.get("processor_config.json", {}) and "processor_config.json" not in broken
    ):
        problems.append(
            f"{folder} has no image processor: neither preprocessor_config.json nor an image_processor in "
            "processor_config.json. Save the model's processor there. A text model has none: name a vision-language "
            "model."
        )
    if "config.json" in contents:
        problems += _dtype_problems(folder / "config.json", contents["config.json"], trained)
    return problems + list(_weight_problems(folder, contents.get("model.safetensors.index.json"), trained))


def config_problems(path: str) -> list[str]:
    """Why transformers cannot read a folder's config.json, where it is JSON, a line; [] if it can."""
    from transformers import AutoConfig

    try:
        _json_object(Path(path) / "config.json")
    except ValueError:
        return []  # one of the problems of its files
    try:
        AutoConfig.from_pretrained(path, trust_remote_code=False)  # see `ChatProcessor`
    except Exception as error:  # files of others make the libraries raise anything
        return [f"{path!r} cannot be loaded as a vision-language model: {str(error).strip().splitlines()[0]}"]
    return []


def engine_problems(
    path: str, config: Any, device: Literal["cpu", "cuda"], adapters: AdapterTarget | None = None
) -> list[str]:
    """Why the installed vLLM cannot serve a model of this config, a line each; [] where it is not known to fail."""
    import transformers

    problems = []
    known = engine_tables.architectures()
    named = list(getattr(config, "architectures", None) or [])
    # vLLM runs what it has no own code for with transformers' code.
    if known is not None and not any(name in known or hasattr(transformers, name) for name in named):
        problems.append(
            f"vLLM cannot serve {path!r}: it knows no architecture {' or '.join(named) or '(none named)'}, as "
            "architectures in config.json says. Use a model that vLLM serves, or a newer vLLM."
        )
    text = config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    widths = engine_tables.cpu_head_sizes() if device == "cpu" else None
    if widths and width not in widths and getattr(text, "kv_lora_rank", None) is None:
        problems.append(
            f"the attention heads of {path!r} are {width} wide (head_dim, else hidden_size / num_attention_heads, of "
            f"the text model), and vLLM's CPU build has kernels for {', '.join(map(str, widths))} only. Use another "
            "model, or policy_server.device cuda."
        )
    if adapters is not None:
        problems += _adapter_problems(path, named, adapters)
    return problems


def _adapter_problems(path: str, architectures: list[str], wanted: AdapterTarget) -> Iterator[str]:
    """Why vLLM's own code for the first of the architectures does not apply the adapters, a line at most."""
    applied = engine_tables.adapter_targets(architectures[0]) if architectures else None
    if applied is None or wanted in applied:
        return
    if wanted == "all-linear" and "language_model" in applied:
        yield (
            f"vLLM applies adapters of {architectures[0]} ({path!r}) to the language model only. Set "
            "learner.lora.target language_model, or learner.lora.serving merged."
        )
    else:
        yield f"vLLM applies no adapters to {architectures[0]} ({path!r}). Set learner.lora.serving merged."


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the folder's weights: those that the index names, else model.safetensors.
    Raises `ValueError` for a broken index."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"] if (folder / "model.safetensors").exists() else []
    return sorted({folder / name for name in _weight_map(_json_object(index)).values()})


def _weight_problems(folder: Path, index: dict[str, Any] | None, trained: bool) -> Iterator[str]:
    from safetensors import SafetensorError, safe_open

    try:
        files = weight_files(folder)
        named = {} if index is None else _weight_map(index)
    except ValueError as error:
        yield f"{folder / 'model.safetensors.index.json'} is broken: {error}. Copy it again."
        return
    if not files and not any(folder.glob("*.bin")):
        yield f"{folder} has no weights (model.safetensors, or model.safetensors.index.json and its files)."
    for file in files:
        if not file.exists():
            yield f"{folder} lacks {file.name}, which model.safetensors.index.json names. Copy it there."
            continue
        try:
            with safe_open(file, framework="np") as opened:
                names = set(opened.keys())
                kinds = {opened.get_slice(name).get_dtype() for name in names} if trained else set()
        except (SafetensorError, OSError) as error:
            yield f"{file} is broken or cut off: {error}. Copy it again."
            continue
        if lacking := sorted(name for name, where in named.items() if where == file.name and name not in names):
            yield (
                f"{file} lacks {len(lacking)} tensors that model.safetensors.index.json places there, for instance "
                f"{lacking[0]}. Copy file and index from the same model."
            )
        if kinds and not kinds <= FLOATS:
            yield (
                f"{file} holds weights as {', '.join(sorted(kinds - FLOATS))}, which cannot be trained. Use the model "
                "before it was quantised, in float32, float16 or bfloat16."
            )


def _dtype_problems(file: Path, config: dict[str, Any], trained: bool) -> Iterator[str]:
    for section in (config, config.get("text_config"), config.get("vision_config")):
        if isinstance(section, dict):
            dtype = section.get("dtype") or section.get("torch_dtype")
            if dtype is not None and dtype not in FLOATS:
                yield f"{file} says dtype {dtype!r}, which no model runs in. Set float32, float16 or bfloat16."
    if trained and "quantization_config" in config:
        yield f"{file} says that the weights are quantised, so they cannot be trained. Use the model before that."


def _weight_map(index: dict[str, Any]) -> dict[str, str]:
    found = index.get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(name, str) and "/" not in name for name in found.values()):
        raise ValueError("its weight_map does not give a file's name for each tensor")
    return found


def _json_object(file: Path) -> dict[str, Any]:
    """Raises `ValueError` that says what is wrong."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(str(error)) from None
    if not isinstance(content, dict):
        raise ValueError(f"it holds a JSON {type(content).__name__}, not an object")
    return content


def _refuse(problems: list[str]) -> None:
    if problems:
        raise NotAVisionLanguageModel("\n".join(f"model.path: {problem}" for problem in problems))
