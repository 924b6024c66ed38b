"""What policy servers are told of the adapters that a run trains, found before anything starts."""

from __future__ import annotations

from actors.chat import ChatProcessor
from actors.serving.adapters.served import ServedAdapters
from cluster.config.run_config import RunConfig
from cluster.errors import CosoError


def served_adapters(config: RunConfig, chat: ChatProcessor) -> ServedAdapters | None:
    """None where the engines are sent all weights. Raises `CosoError` for layers whose adapters cannot be named."""
    lora = config.learner.served_adapters
    if lora is None:
        return None
    import torch
    from transformers import AutoModelForImageTextToText

    from learner.policy.model import adapted_layers
    from learner.policy.weight_export import UnservableAdapter, layers_on_disk

    with torch.device("meta"):  # names and shapes alone
        model = AutoModelForImageTextToText.from_config(chat.config)
    layers = adapted_layers(model, lora.target)
    decoder = set(adapted_layers(model, "language_model"))
    try:
        names = layers_on_disk(model, layers)
    except UnservableAdapter as error:
        raise CosoError(str(error)) from None
    return ServedAdapters(
        rank=lora.rank,
        alpha=lora.alpha,
        layers=tuple(sorted({name.rpartition(".")[2] for name in names.values()})),
        beyond_language_model=not decoder.issuperset(layers),
    )
