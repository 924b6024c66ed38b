"""Self-attention of many short sequences of one length, by torch's fused kernel, with keys padded on a CPU.

On a CPU the kernel computes the softmax of a row sixteen keys at a time, and the remaining keys one by one: 47 keys
took twice the time of 48. So the keys are padded to a multiple of sixteen, and a mask leaves the padding out.
"""

import torch
from torch import Tensor
from torch.nn import functional

_LANES = 16
#: With fewer remaining keys, or in longer sequences, padding costs more than it saves.
_WORTH_PADDING = 4
_PADDED_BELOW = 256


def self_attention(projected: Tensor, sequences: int, heads: int) -> Tensor:
    """Return softmax(Q K^T / sqrt(d)) V of each sequence and head, (sequences * n, heads * d).

    projected: (sequences * n, 3 * heads * d), the sequences one after the other. A row holds queries, keys and values,
    and each of these holds its heads.
    """
    length, hidden = len(projected) // sequences, projected.shape[1] // 3
    query = projected[:, :hidden].view(sequences, length, heads, -1)
    others = projected[:, hidden:].view(sequences, length, 2, heads, -1)
    mask = None
    if projected.device.type == "cpu" and length < _PADDED_BELOW and length % _LANES >= _WORTH_PADDING:
        whole = length + _LANES - length % _LANES
        padded = others.new_zeros(sequences, whole, *others.shape[2:])
        padded[:, :length] = others
        others = padded
        mask = projected.new_zeros(whole)
        mask[length:] = -torch.inf
        mask = mask.expand(length, whole)
    key, value = others.unbind(2)
    mixed = functional.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask
    )
    return mixed.transpose(1, 2).reshape(sequences * length, hidden)
