"""A checkpoint of the learner on disk: what it is of, written aside and renamed, refused where it does not fit.

    checkpoint/
      learner.json             what it is of (`Signature`) and how far it had come
      model/                   a complete Hugging Face model folder (adapters merged), processor included
      adapter/                 with LoRA: the adapters alone, as peft saves them
      value_head.safetensors   the value head, and its optimizer's state as `optimizer.…`
      deepspeed/state/         parameters, optimizer state and counters, one file per rank and kind

Random numbers need no file: everything random in an update is drawn from (seed, update, …), see `learner.rank`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SCHEMA_VERSION = 2
RECORD_FILE = "learner.json"
#: Weights are written in files of at most about this size, so that no rank holds a whole large model in host memory.
SHARD_BYTES = 4 << 30


class CheckpointMismatch(ValueError):
    """The checkpoint is of another model, another number of ranks, another ZeRO stage or another schema."""


class CheckpointWriteFailed(OSError):
    """The checkpoint could not be written; the former one is still whole."""


@dataclass(frozen=True)
class Signature:
    """What a checkpoint has to agree on with the learner that loads it."""

    architecture: str  # class name of the Hugging Face model
    parameters: str  # digest of names, shapes and which are trained, and of the frozen ones' values
    dtype: str
    world_size: int
    zero_stage: int


@dataclass(frozen=True)
class Record:
    """Contents of learner.json."""

    signature: Signature
    update: int  # updates made
    version: int  # of the weights
    algorithm: dict[str, float]  # `Algorithm.state`


def parameter_digest(*modules: torch.nn.Module) -> str:
    """Digest (32 hex digits) of names, shapes and trainability of all parameters, and of up to 16 values of each
    frozen one: those are not in the checkpoint, so they have to be the same already. Take it of whole parameters,
    before a ZeRO-3 engine has partitioned them."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in [pair for module in modules for pair in sorted(module.named_parameters())]:
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.requires_grad};".encode())
        if not parameter.requires_grad:
            flat = parameter.detach().reshape(-1)
            digest.update(flat[:: max(1, len(flat) // 16)][:16].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def read_record(folder: Path) -> Record:
    """What the checkpoint in `folder` is of. Raises `CheckpointMismatch` where there is none that can be read."""
    try:
        stored = json.loads((folder / RECORD_FILE).read_text())
        schema = stored["schema_version"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointMismatch(
            f"{folder} is no learner checkpoint: {RECORD_FILE} cannot be read ({error}). Name a whole checkpoint."
        ) from error
    if schema != SCHEMA_VERSION:
        raise CheckpointMismatch(
            f"the checkpoint in {folder} was written under schema {schema}; this program reads {SCHEMA_VERSION}. "
            "Load it with the version of coso-rl that wrote it."
        )
    return Record(Signature(**stored["signature"]), stored["update"], stored["version"], stored["algorithm"])


def check_signature(folder: Path, stored: Signature, expected: Signature) -> None:
    """Raises `CheckpointMismatch`, naming every difference with both sides."""
    differences = [
        f"{field.name.replace('_', ' ')} {getattr(stored, field.name)} (checkpoint) against "
        f"{getattr(expected, field.name)} (this learner)"
        for field in fields(Signature)
        if getattr(stored, field.name) != getattr(expected, field.name)
    ]
    if differences:
        raise CheckpointMismatch(
            f"the checkpoint in {folder} is of another learner: {'; '.join(differences)}. Use the settings and the "
            "model it was made with, or start a new run from its model/ folder (model.path)."
        )


def aside_of(folder: Path) -> Path:
    """Where a checkpoint is written until it is whole."""
    return folder.with_name(f".{folder.name}.partial")


def write_record(folder: Path, record: Record) -> None:
    stored = {"schema_version": SCHEMA_VERSION, **asdict(record)}
    (folder / RECORD_FILE).write_text(json.dumps(stored, indent=2) + "\n")


def put_in_place(aside: Path, folder: Path) -> None:
    """Rename a whole checkpoint to its place; one that is there is removed, but not before the new one is there."""
    former = folder.with_name(f".{folder.name}.former")
    shutil.rmtree(former, ignore_errors=True)
    if folder.exists():
        folder.rename(former)
    aside.rename(folder)
    shutil.rmtree(former, ignore_errors=True)


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file. Raises `OSError`, also where the library has an error of its own for it."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error


def save_weights(folder: Path | None, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write (name, tensor) pairs as Hugging Face does: model.safetensors, or several files and their index.

    folder: None on ranks that only take part in the gathering. The pairs are always exhausted, since other
    ranks are exhausting theirs; an `OSError` is raised after that.
    """
    failure: OSError | None = None
    pending: dict[str, torch.Tensor] = {}
    file_of: dict[str, str] = {}
    total = pending_bytes = 0

    def flush() -> None:
        nonlocal pending_bytes, failure
        if folder is not None and failure is None:
            name = f"model-{len(set(file_of.values())) + 1:05d}.safetensors"
            try:
                save_tensors(folder / name, pending)
            except OSError as error:
                failure = error
            file_of.update(dict.fromkeys(pending, name))
        pending.clear()
        pending_bytes = 0

    for name, tensor in weights:
        if folder is None or failure is not None:
            continue
        if pending and pending_bytes + tensor.nbytes > SHARD_BYTES:
            flush()
        pending[name] = tensor.cpu()
        pending_bytes += tensor.nbytes
        total += tensor.nbytes
    flush()
    if failure is not None:
        raise failure
    if folder is None:
        return
    files = sorted(set(file_of.values()))
    if len(files) == 1:
        (folder / files[0]).rename(folder / "model.safetensors")
    else:
        index = {"metadata": {"total_size": total}, "weight_map": file_of}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def save_description(folder: Path, model: Any, processor: Any) -> None:
    """Config, generation config and processor: what a model folder holds beside weights."""
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    processor.save_pretrained(folder)


def save_adapter(folder: Path, model: Any, state: Mapping[str, torch.Tensor]) -> None:
    """The adapters of a peft model as peft itself saves and loads them; `state`: its whole adapter parameters by
    name."""
    from peft import get_peft_model_state_dict

    folder.mkdir(exist_ok=True)
    tensors = get_peft_model_state_dict(model, state_dict=dict(state), save_embedding_layers=False)
    save_tensors(folder / "adapter_model.safetensors", tensors)
    model.active_peft_config.save_pretrained(folder)
