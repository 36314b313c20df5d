"""The README's table of what the GPU suite found, from benchmarks/results/gpu.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.gpu_covariance import FULL_PRODUCTS
from kore.bench import peers
from kore.bench.capture import CAPTURE
from kore.bench.lora_peers import FROZEN, GROUP, MERGED, OFFICIAL, OURS, PEFT

UPDATES = ("C += x.T @ x", *FULL_PRODUCTS)
LAYERS = (OURS, MERGED, GROUP, PEFT, OFFICIAL)
TOKENS, RANKS, DIMS = 8192, (256, 235), (1024, 4096, 11008)


def gpu_table(stored: Mapping[str, Any]) -> str:
    """Updates beside full products, layers beside their peers, and what the suite found wrong."""
    return "\n".join([*_updates(stored), "", *_layers(stored), "", _about(stored)])


def _updates(stored: Mapping[str, Any]) -> Iterator[str]:
    yield f"| covariance update | µs | of the roofline | {' | '.join(f'`{name}`' for name in UPDATES)} |"
    yield "|---|--:|--:|" + "--:|" * len(UPDATES)
    for case in stored["covariance"]["cases"]:
        rows = case["contenders"]
        if case["d"] not in DIMS:
            continue
        ours = rows[peers.OURS]
        ratios = [f"{rows[name]['ours_is_faster']['median']:.2f} ×" if name in rows else "–" for name in UPDATES]
        yield (
            f"| {case['dtype']} x ({case['n']}, {case['d']}) | {1e3 * ours['median_ms']:.0f} "
            f"| {100 * ours['of_roofline']:.0f} % | {' | '.join(ratios)} |"
        )


def _layers(stored: Mapping[str, Any]) -> Iterator[str]:
    yield f"| layers | rank | flop floor | {' | '.join(LAYERS)} |"
    yield "|---|--:|--:|" + "--:|" * len(LAYERS)
    seen = set()
    for case in stored["lora"]["cases"]:
        key, rows = (case["shape"], case["rank"]), case["contenders"]
        if case["tokens"] == TOKENS and case["rank"] in RANKS and key not in seen:
            seen.add(key)
            cells = [f"{rows[name]['over_frozen']['median']:.2f}" if name in rows else "–" for name in LAYERS]
            yield f"| {case['shape']} | {case['rank']} | {rows[OURS]['floor']:.2f} | {' | '.join(cells)} |"


def _about(stored: Mapping[str, Any]) -> str:
    facts, rates = stored["environment"], stored["roofline"]
    capture = stored["model"]["batches of 4"]["over_plain"][CAPTURE]["median"]
    checked = sum(len(rows) for rows in stored["correctness"].values()) + len(stored["lora correctness"]["checks"])
    checked += len(stored["init correctness"]["null spaces"])
    return (
        f"{facts['GPU']}, torch {facts['torch']}, Triton {facts['triton']}, commit {facts['commit'][:7]}; medians of "
        "interleaved rounds, caches cold. Updates: the other's time over ours; the roofline counts half the product, "
        f"{rates['flops_per_second']['bfloat16'] / 1e12:.0f} TFLOP/s in bfloat16 and "
        f"{rates['bytes_per_second'] / 1e12:.1f} TB/s, both measured in the run. Layers: forward and backward over "
        f"{FROZEN}'s, {TOKENS} tokens, bfloat16. Capture of a random LLaVA-1.5-7B, in batches of 4, took "
        f"{capture:.2f} times as long as a plain forward pass. {checked} checks against float64 were run, "
        f"{len(stored['wrong'])} lines of the suite say that something is wrong, {len(stored['missed'])} that "
        "something was not reached."
    )
