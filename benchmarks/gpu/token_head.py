"""Memory and time of log-probabilities and entropies, forward and backward, at a language model's vocabulary.

    python -m benchmarks.gpu.token_head

The learner's head, a chunk of tokens at a time, beside `log_softmax` over all logits (float32). Both get the same
hidden states and weights in bf16; their log-probabilities and gradients are compared. Memory is what rises above
hidden states, weights and the weights' gradient, which both need.
"""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.card import arguments, finish, forget_peak, in_process, peak_gib, print_table, seconds

VOCABULARY, TOKENS, WIDTH = 151_936, 8_192, 2_048
SMALL = 4_000, 64, 64  # of a rehearsal
REPEATS = 5


def measured(device: str, chunk: int) -> dict[str, Any]:
    """chunk: tokens at once; 0: the naive way."""
    import statistics

    import torch

    from learner.policy.token_logprobs import LogitTransform, SamplingDistribution, TokenHead

    vocabulary, tokens, width = (VOCABULARY, TOKENS, WIDTH) if device == "cuda" else SMALL
    torch.manual_seed(0)
    linear = torch.nn.Linear(width, vocabulary, bias=False, device=device, dtype=torch.bfloat16)
    head = TokenHead.adopt(linear, LogitTransform())
    hidden = torch.randn(tokens, width, device=device, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,), device=device)
    head.weight.grad = torch.zeros_like(head.weight)
    found: dict[str, Any] = {}

    def work() -> None:
        hidden.grad = None
        if chunk:
            logprobs, entropy = head(hidden, targets, SamplingDistribution(1.0, [], chunk))
        else:
            every = torch.nn.functional.linear(hidden, head.weight).float().log_softmax(-1)
            logprobs, entropy = every.gather(-1, targets[:, None])[:, 0], -(every.exp() * every).sum(-1)
        (logprobs.sum() + 0.1 * entropy.sum()).backward()
        found["logprobs"] = logprobs.detach()

    work()
    found.clear()
    hidden.grad = None
    forget_peak(device)
    held = peak_gib(device)
    times = [seconds(device, work) for _ in range(REPEATS)]
    peak = peak_gib(device)
    return {
        "logprobs": found["logprobs"].cpu().numpy(),
        "gradient": hidden.grad.float().cpu().numpy(),
        "seconds": statistics.median(times),
        "rise_gib": None if peak is None else peak - held,
    }


def main() -> None:
    import numpy as np

    settings = arguments(__doc__)
    naive = in_process(measured, settings.device, 0)
    rows = []
    for chunk in (0, 4096, 1024, 256) if settings.device == "cuda" else (0, 16):
        ours = in_process(measured, settings.device, chunk) if chunk else naive
        apart = np.linalg.norm(ours["gradient"] - naive["gradient"]) / np.linalg.norm(naive["gradient"])
        rows.append(
            {
                "way": f"chunks of {chunk}" if chunk else "naive",
                "ms": 1e3 * ours["seconds"],
                "rise_gib": ours["rise_gib"],
                "share_of_naive": ours["rise_gib"] / naive["rise_gib"] if naive["rise_gib"] else None,
                "logprobs_apart": float(np.abs(ours["logprobs"] - naive["logprobs"]).max()),
                "gradient_apart": float(apart),
            }
        )
    print_table("token head, forward and backward", rows)
    vocabulary, tokens, width = (VOCABULARY, TOKENS, WIDTH) if settings.device == "cuda" else SMALL
    finish("token_head", settings, {"vocabulary": vocabulary, "tokens": tokens, "width": width, "ways": rows})


if __name__ == "__main__":
    main()
