"""Test the whole demo as `make demo` runs it, twice, with the real components.

It must stay within its time and memory.
"""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from retemper.pipeline.report.results import read_study
from retemper.pipeline.runs import run_folder

pytestmark = pytest.mark.slow

MINUTES, GIB = 6, 6


def run_watched(command: list[str], cwd: Path) -> tuple[str, float, float]:
    """Run `command` in `cwd` and measure it.

    Returns:
        Its output, seconds, and the peak of the proportional memory of the process and its
        children, in GiB.
    """
    started, peak = time.monotonic(), 0
    with open(cwd / "output.txt", "w+") as output:
        process = psutil.Popen(command, cwd=cwd, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            peak = max(peak, proportional_memory(process))
            time.sleep(1)
        seconds = time.monotonic() - started
        output.seek(0)
        text = output.read()
    assert process.returncode == 0, text[-5000:]
    return text, seconds, peak / 2**30


def proportional_memory(process: psutil.Process) -> int:
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += one.memory_full_info().pss
        except psutil.Error:
            continue
    return total


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    text, seconds, gib = run_watched(
        [str(Path(sys.executable).parent / "retemper"), "demo"], folder
    )
    print(f"\ndemo: {seconds:.0f} s, {gib:.2f} GiB")
    return folder, text, seconds, gib


def test_the_demo_stays_within_its_time_and_memory(demo):
    _, _, seconds, gib = demo
    assert seconds < MINUTES * 60
    assert gib < GIB


def test_the_demo_has_results_of_every_stage(demo):
    study = demo[0] / "runs" / "demo"
    for corpus in ("code", "math"):
        manifest = json.loads((study / "data" / corpus / "manifest.json").read_text())
        assert (
            manifest["splits"]["train"]["samples"] > 1000
            and manifest["splits"]["heldout"]["samples"] > 64
        )
        assert (
            json.loads((study / "data" / corpus / "train" / "index.json").read_text())["shards"][0][
                "format"
            ]
            == "mds"
        )
    for run in ("base", "full", "lora"):
        assert list((study / run / "wandb").glob("offline-run-*/run-*.wandb"))
        assert list((study / run / "checkpoints").glob("step-*/meta.json"))
    page = (study / "report.html").read_text()
    assert page.count("<svg") == 2 and "src=" not in page and "Resolved configs" in page
    assert {path.name for path in (study / "figures").iterdir()} == {
        "learning_forgetting.png",
        "training_loss.png",
    }


def test_scoring_costs_a_tenth_of_training_at_most(demo):
    study, training = demo[0] / "runs" / "demo", 0.0
    for run in ("base", "full", "lora"):
        before = 0
        for record in run_folder.read_metrics(study / run):
            training += (record["tokens"] - before) / record["tokens_per_second"]
            before = record["tokens"]
    scoring = sum(map(float, re.findall(r"held-out .* \(([\d.]+) s\)", demo[1])))
    print(f"\nscoring {scoring:.1f} s, training {training:.1f} s: {scoring / training:.1%}")
    assert 0 < scoring < 0.1 * training


def test_the_demo_reports_what_it_measured(demo):
    folder, text, _, _ = demo
    runs = {run.config.name: run for run in read_study(folder / "runs" / "demo")}
    full, lora = runs["full"], runs["lora"]
    assert len(full.curves["code"]) == len(lora.curves["math"]) == 4
    (learned, forgotten), (full_learned, full_forgotten) = (
        list(run.gains().values())[-1] for run in (lora, full)
    )
    for what, value, of_full in (
        ("learned", learned, full_learned),
        ("forgot", forgotten, full_forgotten),
    ):
        said = re.search(rf"{what}(: no difference measured| less| more)", text)
        assert said[1] in (": no difference measured", " less" if value < of_full else " more")


def test_a_second_demo_repeats_nothing(demo):
    text, seconds, _ = run_watched([str(Path(sys.executable).parent / "retemper"), "demo"], demo[0])
    assert seconds < 20
    assert text.count("finished before") == 3
