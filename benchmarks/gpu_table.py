"""Print README's tables of GPU measurements in Markdown.

They are made from benchmarks/results/gpu-full.json, gpu-lora.json and gpu-correct.json.

    python benchmarks/gpu_table.py [FOLDER]      of the results: benchmarks/results/ by default
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
_HEAD = (
    "",
    "micro-batch",
    "tokens/s",
    "MFU",
    "memory reserved",
    "kernels a step",
    "GPU waits",
    "SM clock",
)


def main(folder: Path) -> None:
    parts = _parts(folder / "gpu-full.json") | _parts(folder / "gpu-lora.json")
    print(speed_table(parts))
    if compared := _parts(folder / "gpu-correct.json").get("compared"):
        print("\n" + differences_table(compared))


def _parts(path: Path) -> dict:
    return json.loads(path.read_text())["parts"] if path.is_file() else {}


def speed_table(parts: dict) -> str:
    """Return one row for each part that ran, in the order of the file.

    The rows are under the machines and commits that they ran on.
    """
    ran = {name: part for name, part in parts.items() if "tokens_per_second" in part}
    places = {
        f"{part['machine']['gpu']}, torch {part['machine']['torch']}, {_commit(part)}"
        for part in ran.values()
    }
    rows = [_HEAD, ("---",) * len(_HEAD), *(_row(name, part) for name, part in ran.items())]
    return "\n".join([*sorted(places), "", *(f"| {' | '.join(cells)} |" for cells in rows)])


def _commit(part: dict) -> str:
    if not part["commit"]:
        return "commit unknown"
    changed = {True: "", False: " with changes", None: " (its tree not compared)"}[part["clean"]]
    return f"commit {part['commit'][:10]}{changed}"


def _row(name: str, part: dict) -> tuple[str, ...]:
    of_peak = "" if part["precision"] in ("fp32", "bf16") else " of FP8's peak"
    mfu = f"{part['mfu']:.0%}{of_peak}" if part["mfu"] else "–"
    # Of a graph's own memory what is allocated says little after it is recorded.
    memory = f"{part['peak_reserved_gib']:.1f} GiB" if part["peak_reserved_gib"] else "–"
    kernels = "–"
    waits = "–"
    if (trace := part["trace"]) and trace.get("kernels"):
        kernels = f"{trace['kernels']:,}"
        waits = f"{max(0.0, trace['idle_ms'] / part['step_ms']):.0%}"
    clock = f"{part['sm_clock_mhz']:.0f} MHz" if part["sm_clock_mhz"] else "–"
    return (
        name,
        str(part["micro_batch_size"]),
        f"{part['tokens_per_second']:,.0f}",
        mfu,
        memory,
        kernels,
        waits,
        clock,
    )


def differences_table(compared: dict) -> str:
    """Return a table of the largest relative difference of each comparison."""
    rows = ["| largest relative difference in the loss | |", "| --- | --- |"]
    return "\n".join(
        [*rows, *(f"| {name} | {difference:.2%} |" for name, difference in compared.items())]
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "benchmarks" / "results")
