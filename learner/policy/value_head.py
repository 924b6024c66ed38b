"""The value head: the value of the state before an answer, from the trunk's hidden states of the prompt."""

from __future__ import annotations

import torch
from torch import Tensor, nn

#: Heads of the attention over the prompt; `model.value_attention` is a multiple of it.
ATTENTION_HEADS = 4


class ValueHead(nn.Module):
    """An MLP with ReLU on the hidden state of the last prompt token (as in RL4VLM), float32.

    That state says which word comes next, and the trunk needs no more of it. So what a value depends on, as the numbers
    of a picture, may never reach it. With `attention`, it also asks all hidden states of the prompt, in one layer of
    attention of that width, and the MLP reads both.
    """

    def __init__(self, width: int, hidden: tuple[int, ...], attention: int | None = None) -> None:
        """width: of the trunk's hidden states; hidden: widths of the MLP; attention: a multiple of 4."""
        super().__init__()
        self.attention: nn.MultiheadAttention | None = None
        size = width
        if attention is not None:
            self.norm = nn.LayerNorm(width)
            self.query = nn.Linear(width, attention)
            self.attention = nn.MultiheadAttention(attention, ATTENTION_HEADS, kdim=width, vdim=width, batch_first=True)
            size += attention
        layers: list[nn.Module] = []
        for each in hidden:
            layers += [nn.Linear(size, each), nn.ReLU()]
            size = each
        last = nn.Linear(size, 1)
        nn.init.zeros_(last.weight)  # values start at zero, not at noise
        nn.init.zeros_(last.bias)
        self.mlp = nn.Sequential(*layers, last)

    def forward(self, hidden: Tensor, prompt_lengths: Tensor) -> Tensor:
        """hidden: (B, L, width), prompts first; prompt_lengths: int64 (B,), from 1 to L. Returns float32 (B,)."""
        rows = torch.arange(len(hidden), device=hidden.device)
        if self.attention is None:
            return self.mlp(hidden[rows, prompt_lengths - 1].float())[:, 0]
        states = self.norm(hidden.float())
        last = states[rows, prompt_lengths - 1]
        beyond = torch.arange(hidden.shape[1], device=hidden.device) >= prompt_lengths[:, None]
        query = self.query(last)[:, None]
        seen, _ = self.attention(query, states, states, key_padding_mask=beyond, need_weights=False)
        return self.mlp(torch.cat([last, seen[:, 0]], dim=-1))[:, 0]

    @torch.no_grad()
    def rescale(self, gain: float, shift: float) -> None:
        """Make the head say gain · v + shift where it said v (PopArt, arXiv 1602.07714)."""
        weight, bias = self.mlp[-1].parameters()
        weight.mul_(gain)
        bias.mul_(gain).add_(shift)
