"""The README's tables, generated from the results stored in benchmarks/results.

python -m benchmarks.readme_tables            # rewrite README.md
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.readme_gpu import gpu_table
from kore.bench import init as bench_init
from kore.bench import init_cases
from kore.bench.lora_peers import FROZEN, OURS
from kore.bench.lora_peers import PEERS as LORA_PEERS

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
PEERS = ("C.addmm_(x.T, x)", "SciPy ssyrk", "C += x.T @ x", "official hook", "PEFT CorDA hook")


def _load(name: str) -> dict[str, Any]:
    return dict(json.loads((HERE / "results" / name).read_text(encoding="utf-8")))


def demo() -> str:
    """The comparison of `kore demo`."""
    result = _load("demo.json")
    columns = ("K.A", "K.R", "Avg", "HARS")
    lines = [
        "| method | trained parameters | learning rate | " + " | ".join(columns) + " |",
        "|---|--:|--:|" + "--:|" * len(columns),
    ]
    for row in result["table"]:
        cells = [_mean(row[column]) for column in columns]
        trained = f"{row['trained_parameters'] / 1000:.0f} k" if row["trained_parameters"] else "–"
        rate = "–" if row["learning_rate"] is None else f"{row['learning_rate']:g}"
        lines.append(f"| {row['method']} | {trained} | {rate} | {' | '.join(cells)} |")
    where = f"Mean ± standard deviation over {result['seeds']} seeds, {_where(result['environment'])}."
    return "\n".join(lines) + f"\n\n{where}"


def protection() -> str:
    """The study of `python -m benchmarks.protection`."""
    return protection_table(_load("protection.json"))


def protection_table(stored: dict[str, Any]) -> str:
    """A row for each variant of a stored study."""
    from benchmarks.protection import BASELINE, COLUMNS, plus_minus, summary
    from benchmarks.protection_cells import VARIANTS

    lines = [
        f"| variant | trained | rate | λ | worlds | {' | '.join(COLUMNS)} | lead in Avg |",
        "|---|--:|--:|--:|--:|" + "--:|" * (len(COLUMNS) + 1),
    ]
    for row in summary(stored):
        means = [plus_minus(row[column], "spread", ".1f") for column in COLUMNS]
        penalty = "–" if row["penalty"] is None else f"{row['penalty']:g}"
        trained = f"{row['trained_parameters'] / 1000:.0f} k"
        lead = plus_minus(row.get("Avg lead"), "half", "+.1f")
        setting = f"{trained} | {row['learning_rate']:g} | {penalty} | {row['worlds']}"
        lines.append(f"| {row['label']} | {setting} | {' | '.join(means)} | {lead} |")
    return "\n".join(lines) + (
        "\n\nMean ± standard deviation over test worlds of `kore demo`; the lead over "
        f"“{VARIANTS[BASELINE].label}” is paired by world, ± the 95 % interval of Student's t. "
        f"{_where(stored['environment'])}."
    )


def _mean(value: dict[str, float | None] | None) -> str:
    if value is None:
        return "–"
    spread = "" if value["spread"] is None else f" ± {value['spread']:.1f}"
    return f"{value['mean']:.1f}{spread}"


def augmentation() -> str:
    """The round trip of `python -m benchmarks.augmentation_round_trip`."""
    stored = _load("augmentation_round_trip.json")
    columns = {"K.A": "ka", "K.R": "kr", "Avg": "avg"}
    lines = [f"| trained on | {' | '.join(columns)} |", "|---|" + "--:|" * len(columns)]
    for row in stored["table"]:
        lines.append(f"| {row['row']} | {' | '.join(_mean(row[key]) for key in columns.values())} |")
    worlds = len(stored["worlds"])
    return "\n".join(lines) + (
        f"\n\nMean ± standard deviation over {worlds} worlds of `kore demo`, {stored['budget']['steps']} steps each, "
        f"{_where(stored['environment'])}."
    )


def kernels() -> str:
    """The CPU ratios of `python -m benchmarks.cpu_suite`."""
    stored = _load("cpu.json")
    updates = stored["covariance"]
    names = [peer for peer in PEERS if any(peer in case["contenders"] for case in updates["cases"])]
    heads = ["covariance update, beside", *(f"`{peer}`" if "x.T" in peer else peer for peer in names)]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "--:|" * len(names)]
    for case in updates["cases"]:
        cells = [_ratio(case["contenders"].get(peer, {}).get("ours_is_faster")) for peer in names]
        lines.append(f"| {case['dtype']} x ({case['n']}, {case['d']}) | {' | '.join(cells)} |")
    lines += ["", "| operation | beside | speed-up |", "|---|---|--:|"]
    for name, share in stored["capture"]["overhead_of_official"].items():
        faster = f"{1 / share['of_medians']:.2f} × (best times: {1 / share['of_best']:.2f} ×)"
        lines.append(f"| {name}: time added to a forward pass of a small LLaVA | official hooks | {faster} |")
    rounds, threads = updates["cases"][0]["rounds"], updates["machine"]["threads"]
    return "\n".join(lines) + (
        f"\n\nThe time of the other over ours: median (smallest–largest) of {rounds} rounds in turn, caches cold, "
        f"{threads} threads, {_where(updates['environment'])}. `addmm_` gets float32 x in every row, converted before "
        f"the clock starts; the LLaVA has 4 layers, d = 1024, f = 2752. {_memory(stored['memory'])}"
    )


def gpu() -> str:
    """What `python -m benchmarks.gpu_suite` found."""
    return gpu_table(_load("gpu.json"))


def lora() -> str:
    """The frozen-A layers and training steps of `python -m benchmarks.cpu_suite`."""
    stored = _load("cpu.json")
    layers, steps = stored["lora"], stored["step"]
    timed = {name for case in layers["cases"] for name in case["contenders"]} - {FROZEN}
    names = [peer.name for peer in LORA_PEERS if peer.name in timed]
    lines = [f"| layers | flop floor | {' | '.join(names)} |", "|---|--:|" + "--:|" * len(names)]
    for case in layers["cases"]:
        rows = case["contenders"]
        cells = [f"{rows[name]['over_frozen']['median']:.3f}" if name in rows else "–" for name in names]
        lines.append(f"| {case['shape']} | {rows[OURS]['floor']:.3f} | {' | '.join(cells)} |")
    first = layers["cases"][0]
    lines += [
        "",
        "Forward and backward over those of the frozen layers alone: medians of interleaved rounds, caches cold, "
        f"{first['tokens']} tokens, r = {first['rank']}, {first['dtype']}, {layers['machine']['threads']} threads, "
        f"{_where(layers['environment'])}. ×3 and ×2: so many layers that read one input.",
        "",
        "| training step | over frozen | tokens/s | kept for backward | trained parameters |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, row in steps["contenders"].items():
        trained = f"{row['trained_parameters'] / 1e6:.1f} M" if row["trained_parameters"] else "–"
        lines.append(
            f"| {name} | {row['over_frozen']['median']:.2f} × | {row['tokens_per_second']:.0f} "
            f"| {row['saved_bytes'] / 2**20:.1f} MiB | {trained} |"
        )
    return "\n".join(lines) + (
        f"\n\nA step is forward, backward and AdamW; the frozen model stops at the gradient of its inputs. "
        f"{steps['layers']} Llama layers, d = {steps['d']}, f = {steps['f']}, {steps['tokens']} tokens, "
        f"r = {steps['rank']}, {steps['dtype']}, medians of interleaved rounds, {_where(steps['environment'])}."
    )


def init() -> str:
    """The initialisation of `python -m benchmarks.cpu_suite`."""
    stored = _load("cpu.json")["init"]
    layer, covariance, model = stored["layer"], stored["covariance"], stored["model"]
    names = {
        "layer": f"decoder layer, d = {layer['width']}, f = {layer['inner']}, r = {layer['rank']}",
        "covariance": f"one covariance, d = {covariance['width']}, r = {covariance['rank']}",
        "model": f"LLaVA of {model['layers']} such layers, capture of {model['tokens']} tokens included",
    }
    columns = (bench_init.OURS, bench_init.EIGH, init_cases.EIGH_FLOAT32, bench_init.OFFICIAL)
    lines = [
        f"| initialisation, s | {' | '.join(columns)} | official over ours | energy ratio | of the official |",
        "|---|" + "--:|" * (len(columns) + 3),
    ]
    for name, label in names.items():
        case = stored[name]
        cells = [f"{case['median_s'][way]:.2f}" if way in case["median_s"] else "–" for way in columns]
        ratios = [
            max(space["energy_ratio"][way] for space in case["null_spaces"].values())
            for way in (bench_init.OURS, bench_init.OFFICIAL)
        ]
        cells += [_ratio(case["ours_is_faster"][bench_init.OFFICIAL]), f"{ratios[0]:.4f}", f"{ratios[1]:.4g}"]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + (
        f"\n\nMedians of {layer['rounds']}, {covariance['rounds']} and {model['rounds']} rounds in turn, "
        f"{stored['machine']['threads']} threads, {_where(stored['environment'])}; float32. Energy ratio: what the r "
        "directions hold over the least that r can hold, in float64, the worst of the inputs. The first two covariances"
        f" are synthetic, of condition {layer['condition']:g} with outlier channels; the model is random. The official "
        "recipe: two full SVDs for each of the 7 linears of a layer, and hooks on each."
    )


def reproduction() -> str:
    """The methods of `kore reproduce --scale mini` on both families."""
    return reproduction_tables(_load("reproduction.json"))


def reproduction_tables(stored: dict[str, Any]) -> str:
    """A row a method: means with half their intervals, LLaVA's before Qwen2.5-VL's; ranks and verdicts below."""
    columns = ("K.A", "K.R", "Avg", "HARS")
    other = {line["label"]: line for line in stored["tables"]["architecture"]}
    heads = [f"{family} {column}" for family in ("LLaVA", "Qwen") for column in columns]
    lines = [f"| method | {' | '.join(heads)} |", "|---|" + "--:|" * len(heads)]
    for line in stored["tables"]["main"]:
        # On Qwen2.5-VL every baseline has the augmented data.
        twin = None if line["row"].endswith("-plain") else other[line["label"].removesuffix(", same data")]
        cells = [_interval(each["values"].get(column)) if each else "–" for each in (line, twin) for column in columns]
        mark = "" if line["tuned"] and (twin is None or twin["tuned"]) else " †"
        lines.append(f"| {line['label']}{mark} | {' | '.join(cells)} |")
    worlds = len(stored["worlds"])
    return "\n".join(lines) + (
        f"\n\nMeans over {worlds} pre-trained worlds ± half the 95 % interval of Student's t, "
        f"{stored['budget']['steps']} steps of {stored['budget']['batch_size']} conversations each, "
        f"{_where(stored['environment'])}; “same data”: on KORE's augmented data, as all of Qwen2.5-VL are.\n\n"
        f"{_ranks(stored)}\n\n{_verdicts(stored['observations'])}"
    )


def _interval(value: list[float | None] | None) -> str:
    if value is None or value[0] is None:
        return "–"
    mean, low, high = value
    return f"{mean:.1f}" if low is None or high is None else f"{mean:.1f} ± {(high - low) / 2:.1f}"


def _ranks(stored: dict[str, Any]) -> str:
    """Where KORE and its balanced and protected forms stand."""
    parts = []
    for table, family in (("main", "LLaVA"), ("architecture", "Qwen2.5-VL")):
        labels = {line["row"]: line["label"] for line in stored["tables"][table]}
        ranks = stored["ranks"][table]
        own = [row for row in labels if row.endswith(("/kore", "/kore-balanced", "/kore-two-sided"))]
        places = [
            f"{labels[row]} {ranks['Avg'].index(row) + 1} and {ranks['HARS'].index(row) + 1}"
            for row in sorted(own, key=ranks["Avg"].index)
        ]
        parts.append(f"{family}, of {len(ranks['Avg'])} rows: {'; '.join(places)}")
    return f"Rank by mean Avg and by mean HARS. {'. '.join(parts)}."


def _verdicts(observations: list[dict[str, Any]]) -> str:
    """A line for each verdict."""
    found: dict[str, list[str]] = {}
    for one in observations:
        counts = ", ".join(f"{number} {verdict}" for verdict, number in sorted(one["parts"].items()))
        if "like_for_like" in one:
            counts += f"; on the same data: {one['like_for_like']['verdict']}"
        found.setdefault(one["verdict"], []).append(f"{one['name']} ({counts or 'not measured'})")
    return "\n".join(
        f"* Of the paper's observations and findings **{verdict}**: {', '.join(names)}."
        for verdict, names in found.items()
    )


def _memory(stored: dict[str, Any]) -> str:
    """What one update takes beside C and x."""
    sizes = {
        dtype: [ways[way] / 2**20 for way in ("covariance_update_", "C += x.T @ x")]
        for dtype, ways in stored["bytes"].items()
    }
    extra = ", ".join(f"{dtype} {ours:.1f} MiB (`C += x.T @ x`: {plain:.0f})" for dtype, (ours, plain) in sizes.items())
    return f"Peak extra memory of one update at d = {stored['d']}, N = {stored['n']}: {extra}."


def _ratio(value: dict[str, float] | None) -> str:
    return "–" if value is None else f"{value['median']:.2f} × ({value['least']:.2f}–{value['most']:.2f})"


def _where(environment: dict[str, Any]) -> str:
    return f"{environment['processor']}, torch {environment['torch']}, commit {str(environment['commit'])[:7]}"


TABLES = {
    "demo": demo,
    "kernels": kernels,
    "lora": lora,
    "init": init,
    "gpu": gpu,
    "protection": protection,
    "augmentation": augmentation,
    "reproduction": reproduction,
}


def rewritten(text: str) -> str:
    """``text`` with every table between its markers made anew."""
    for name in re.findall(r"<!-- table:(\w+) -->", text):
        if name not in TABLES:
            raise SystemExit(f"README.md: expected table:{', table:'.join(TABLES)}, got table:{name}")
        pattern = rf"(<!-- table:{name} -->\n).*?(<!-- /table -->)"
        made = TABLES[name]()
        text, count = re.subn(pattern, lambda match, t=made: f"{match[1]}{t}\n{match[2]}", text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"README.md: expected one block between <!-- table:{name} --> and <!-- /table -->")
    return text


if __name__ == "__main__":
    README.write_text(rewritten(README.read_text(encoding="utf-8")), encoding="utf-8")
