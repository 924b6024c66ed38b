"""Weights and state of a learner to disk and back, all ranks together. The format is `learner.checkpoints.format`'s."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from learner.checkpoints.format import (
    CheckpointWriteFailed,
    Record,
    Signature,
    aside_of,
    check_signature,
    parameter_digest,
    put_in_place,
    read_record,
    save_adapter,
    save_description,
    save_tensors,
    save_weights,
    write_record,
)
from learner.engine import DeepSpeedEngine
from learner.finite import finite_weights

if TYPE_CHECKING:
    from learner.policy.model import PolicyModel

STATE_FOLDER, STATE_TAG = "deepspeed", "state"
HEAD_FILE, OPTIMIZER = "value_head.safetensors", "optimizer."


class LearnerStorage:
    """Every method is a collective: all ranks call it, rank 0 writes what is whole, each writes its own state."""

    def __init__(self, engine: DeepSpeedEngine, model: PolicyModel, processor: Any) -> None:
        """To be made before `engine.initialize`, while the model's parameters are whole on every rank."""
        self._engine = engine
        self._model = model
        self._processor = processor
        self.signature = Signature(
            architecture=type(model.hf_model).__name__,
            parameters=parameter_digest(model, model.value_head),
            dtype=engine.dtype,
            world_size=engine.place.world_size,
            zero_stage=engine.settings.zero_stage,
        )

    def save_checkpoint(self, folder: Path, update: int, version: int, algorithm: dict[str, float]) -> None:
        """Write aside, then rename; a checkpoint already in `folder` is replaced. With several nodes the folder has to
        be shared. Raises `CheckpointWriteFailed` on every rank, with what was there before still whole."""

        def write(aside: Path) -> None:
            self._engine.save(aside / STATE_FOLDER, STATE_TAG)
            self._write_model(aside / "model")
            self._write_small_parts(aside)
            record = Record(self.signature, update, version, algorithm)
            self._on_writer("writing the record", lambda: write_record(aside, record))

        self._write_aside(folder, write)

    def save_model(self, folder: Path) -> None:
        """Write a complete Hugging Face model folder (adapters merged, processor included) and nothing else, in the
        same way."""
        self._write_aside(folder, self._write_model)

    def load_checkpoint(self, folder: Path) -> Record:
        """Restore parameters and optimizer. Raises `CheckpointMismatch` before anything is changed."""
        record = read_record(folder)
        check_signature(folder, record.signature, self.signature)
        self._engine.load(folder / STATE_FOLDER, STATE_TAG)
        self._load_head(folder / HEAD_FILE)
        return record

    def _write_aside(self, folder: Path, write: Callable[[Path], None]) -> None:
        aside = aside_of(folder)

        def make_room() -> None:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)

        try:
            self._on_writer("making the folder", make_room)
            write(aside)
            self._on_writer("putting it in place", lambda: put_in_place(aside, folder))
        except OSError as error:
            if self._engine.place.rank == 0:
                with suppress(OSError):
                    shutil.rmtree(aside)
            raise CheckpointWriteFailed(
                f"{folder} could not be written ({error}). Make room on that disk; what was saved before is whole."
            ) from error

    def _write_model(self, folder: Path) -> None:
        on_writer = self._engine.place.rank == 0
        self._on_writer("making the model folder", lambda: folder.mkdir(exist_ok=True))
        self._engine.together(
            "writing the model's weights",
            lambda: save_weights(
                folder if on_writer else None, finite_weights(self._model.checkpoint_weights(self._engine.gather))
            ),
        )
        self._on_writer(
            "writing the model's description",
            lambda: save_description(folder, self._model.hf_model, self._processor),
        )

    def _write_small_parts(self, folder: Path) -> None:
        """Value head, and adapters where there are any: small enough to be gathered whole."""
        head = {name: tensor.cpu() for name, tensor in self._model.value_head.state_dict().items()}
        head |= {f"{OPTIMIZER}{name}": tensor for name, tensor in self._engine.head_state().items()}
        adapters = self._whole({name: p for name, p in self._model.vlm.named_parameters() if ".lora_" in name})

        def write() -> None:
            save_tensors(folder / HEAD_FILE, head)
            if adapters:
                save_adapter(folder / "adapter", self._model.vlm, adapters)

        self._on_writer("writing value head and adapters", write)

    def _load_head(self, path: Path) -> None:
        from safetensors.torch import load_file

        tensors = load_file(path)
        state = {name: tensors.pop(name) for name in list(tensors) if name.startswith(OPTIMIZER)}
        self._model.value_head.load_state_dict(tensors)
        self._engine.load_head_state({name.removeprefix(OPTIMIZER): tensor for name, tensor in state.items()})

    def _whole(self, parameters: dict[str, Any]) -> dict[str, Any]:
        with self._engine.gather(parameters.values()):
            return {name: parameter.detach().cpu().clone() for name, parameter in parameters.items()}

    def _on_writer(self, what: str, action: Callable[[], None]) -> None:
        """Rank 0 acts, all ranks learn of its failure."""
        self._engine.together(what, action if self._engine.place.rank == 0 else lambda: None)
