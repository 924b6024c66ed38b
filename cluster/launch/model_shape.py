"""What a model's config.json says of its size. No weights are loaded: the model is built without memory for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import CosoError


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a vision-language model.

    parameters: numbers in its weights, tied ones once. text_width, vision_width: inputs plus outputs of the linear
    layers of the text decoder and of everything beside it, the output head left out; a LoRA of rank r on a layer has
    r · (inputs + outputs) numbers.
    """

    name: str  # of its class
    parameters: int
    layers: int  # of the text decoder
    hidden: int  # width of the text decoder's states
    key_value_heads: int
    head_dim: int
    vocabulary: int
    tied: bool  # whether the output head is the table of embeddings
    text_width: int
    vision_layers: int
    vision_hidden: int
    vision_width: int
    patches_per_token: int  # patches of a picture that become one token

    def adapter_parameters(self, rank: int, everywhere: bool) -> int:
        """Numbers in LoRA adapters. everywhere: also on the vision tower and the connector."""
        return rank * (self.text_width + self.vision_width * everywhere)


def read_shape(folder: Path) -> ModelShape:
    """The shape of the model in a folder, of which config.json alone is read. Raises `CosoError`."""
    if not (folder / "config.json").is_file():
        raise CosoError(
            f"{folder} has no config.json, so its size is not known; download the model, and name its folder"
        )
    from transformers import AutoConfig

    try:
        return shape_of(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    except Exception as error:  # files of others make the library raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CosoError(f"{folder}: the model's size cannot be told from its config.json: {reason}") from error


def shape_of(config: Any) -> ModelShape:
    """The shape that a config of transformers gives its model."""
    import torch
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model: Any = AutoModelForImageTextToText.from_config(config)
    text, vision = config.get_text_config(), getattr(config, "vision_config", None)
    head = model.get_output_embeddings()
    decoder = {id(module) for module in model.get_decoder().modules()}
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]
    widths = [(layer.in_features + layer.out_features, id(layer) in decoder) for layer in linear]
    return ModelShape(
        name=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        key_value_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        vocabulary=head.out_features,
        tied=head.weight is model.get_input_embeddings().weight,
        text_width=sum(width for width, of_text in widths if of_text),
        vision_layers=_first(vision, "num_hidden_layers", "depth") or 1,
        vision_hidden=_first(vision, "embed_dim", "hidden_size") or 0,
        vision_width=sum(width for width, of_text in widths if not of_text),
        patches_per_token=(_first(vision, "spatial_merge_size") or _first(config, "scale_factor") or 1) ** 2,
    )


def _first(config: Any, *names: str) -> Any:
    """The first of these that the config has."""
    return next((getattr(config, name) for name in names if getattr(config, name, None)), None)
