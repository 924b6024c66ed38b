"""What was run on a GPU, as the table of `docs/gpu.md`: a row per script, from the committed results alone.

python -m benchmarks.gpu.report      # print it; with --write, put it into the page
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu.card import RESULTS

PAGE = Path("docs/gpu.md")
BEGIN, END = "<!-- gpu: begin -->", "<!-- gpu: end -->"
NOT_RUN = "not run: no GPU"


def learner(result: dict[str, Any]) -> str:
    cases = result["cases"]
    kinds = {}
    for dtype in ("float32", "bfloat16"):
        kinds[dtype] = max(case["moved_apart"] for case in cases if case["case"].startswith(dtype))
    resumed = max(case["after_resume"] for case in cases)
    return (
        f"{len(cases)} cases. By an update, log-probabilities move by up to {max(case['moved'] for case in cases):.2g} "
        f"nats; GPU and CPU differ in this by up to {kinds['float32']:.1g} in float32 and {kinds['bfloat16']:.1g} in "
        f"bfloat16. After a resume they differ by {resumed:g}"
    )


def token_head(result: dict[str, Any]) -> str:
    naive, ours = (next(way for way in result["ways"] if way["way"] == name) for name in ("naive", "chunks of 1024"))
    return (
        f"{result['tokens']:,} tokens at a vocabulary of {result['vocabulary']:,}, `learner.token_chunk` 1,024: "
        f"{ours['rise_gib']:.1f} GiB instead of {naive['rise_gib']:.1f} ({ours['share_of_naive']:.2f}), in "
        f"{ours['ms']:.0f} ms instead of {naive['ms']:.0f}"
    )


def scorer(result: dict[str, Any]) -> str:
    ways = {way["way"]: way for way in result["ways"]}
    ours = ways["pool's scorer, CUDA, float32, 100,000 tokens"]
    one_thread, on_card = ways["pool's scorer, CPU, 1 threads, 1,536 tokens"], ways["published, CUDA"]
    return (
        f"{ours['tokens_per_s']:,.0f} tokens/s in float32 with the default `scoring.batch_tokens`: "
        f"{one_thread['seconds'] / ours['seconds']:.0f} times one CPU thread, "
        f"{on_card['seconds'] / ours['seconds']:.1f} times the published procedure on the "
        f"same card; influence differs from the CPU's by {ours['apart']:.0e}"
    )


def server(result: dict[str, Any]) -> str:
    return (
        f"{result['dtype']}: log-probabilities differ from float32 by {result['after_swap']['mean']:.1g} on average "
        f"after a swap in flight (stale weights: {result['stale_would_be']['mean']:.1g}); "
        f"{result['answers_split_by_the_swap']} of {result['answers_in_flight']} answers split; "
        f"{result['tokens_per_s']:,.0f} tokens/s, {result['share_of_bare']:.2f} of the bare engine"
    )


def nccl(result: dict[str, Any]) -> str:
    return f"{result['gpus']} GPUs: {result['mib']} MiB in {result['send_s']:.2f} s, {result['gib_per_s']:.1f} GiB/s"


def one_gpu(result: dict[str, Any]) -> str:
    return (
        f"{result['updates']} updates of {result['update_s']:.1f} s, success {result['success_before']:.2f} to "
        f"{result['success_after']:.2f}, largest mean difference in a sync check "
        f"{result['sync_check_mean_difference']:.1g}"
    )


def large_learner(result: dict[str, Any]) -> str:
    return (
        f"{result['steps']} steps of {result['prompt_tokens'] + 128:,} tokens in {result['update_s']:.1f} s, peak "
        f"{result['peak_gib']:.0f} GiB, model FLOPs use {result['model_flops_use']:.2f}, "
        f"{result['images_per_s']:.0f} images/s processed, {result['published_gib']:.1f} GiB published in "
        f"{result['publish_s']:.1f} s"
    )


def large_engine(result: dict[str, Any]) -> str:
    return (
        f"{result['tokens_per_s']:,.0f} tokens/s, {result['new_images_per_s']:.0f} new images/s, swap of "
        f"{result['published_gib']:.1f} GiB in {result['swap_s']:.1f} s ({result['swap_over_copy']:.1f} × a copy to "
        "the card)"
    )


SCRIPTS: dict[str, Callable[[dict[str, Any]], str]] = {
    each.__name__: each for each in (learner, token_head, scorer, server, nccl, one_gpu, large_learner, large_engine)
}


def table() -> str:
    """Markdown."""
    lines = ["| script | card | commit | result |", "|---|---|---|---|"]
    for name, says in SCRIPTS.items():
        path = RESULTS / f"{name}.json"
        if not path.exists():
            lines.append(f"| `benchmarks.gpu.{name}` | | | {NOT_RUN} |")
            continue
        result = json.loads(path.read_text(encoding="utf-8"))
        card = f"{result['card']}, torch {result['torch']}"
        lines.append(f"| [`benchmarks.gpu.{name}`](../{path}) | {card} | {result['commit']} | {says(result)} |")
    return "\n".join(lines)


def in_page(page: str) -> str:
    """The page with the present table."""
    return re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n{table()}\n{END}", page, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE}")
    if parser.parse_args().write:
        PAGE.write_text(in_page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(table())


if __name__ == "__main__":
    main()
