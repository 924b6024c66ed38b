"""Self-attention of many short sequences of one length: torch's fused kernel, spared what it is slow at on a CPU.

There it takes the softmax of a row sixteen keys at a time, and what is left over one by one: 47 keys took twice the
time of 48. So the keys are filled up to a whole number of sixteens, with ones that a mask leaves out.
"""

import torch
from torch import Tensor
from torch.nn import functional

_LANES = 16
#: Fewer keys left over, or longer sequences, cost less than the filling.
_WORTH_FILLING = 4
_FILLED_BELOW = 256


def self_attention(projected: Tensor, sequences: int, heads: int) -> Tensor:
    """Return softmax(Q K^T / sqrt(d)) V of each sequence and head by itself, (sequences * n, heads * d).

    projected: (sequences * n, 3 * heads * d), the sequences end to end; queries, keys, values side by side, each with
    its heads side by side.
    """
    length, hidden = len(projected) // sequences, projected.shape[1] // 3
    query = projected[:, :hidden].view(sequences, length, heads, -1)
    others = projected[:, hidden:].view(sequences, length, 2, heads, -1)
    mask = None
    if projected.device.type == "cpu" and length < _FILLED_BELOW and length % _LANES >= _WORTH_FILLING:
        whole = length + _LANES - length % _LANES
        filled = others.new_zeros(sequences, whole, *others.shape[2:])
        filled[:, :length] = others
        others = filled
        mask = projected.new_zeros(whole)
        mask[length:] = -torch.inf
        mask = mask.expand(length, whole)
    key, value = others.unbind(2)
    mixed = functional.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask
    )
    return mixed.transpose(1, 2).reshape(sequences * length, hidden)
