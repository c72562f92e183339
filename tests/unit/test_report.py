"""The report reads run folders and says what was measured, whichever way it fell."""

import html
import json
import shutil

import pytest
from conftest import overrides, run_command

from retemper.pipeline import eval_folder, run_folder
from retemper.pipeline.config import load_config
from retemper.pipeline.errors import UserError
from retemper.pipeline.report.results import comparison, format_table, read_study, table


def record(workspace, tmp_path, name, method, end):
    """A run folder whose held-out scores go from (code 3, math 2) to `end`."""
    start = ["init_from=base"] if name != "base" else []
    config = load_config(
        [*overrides(workspace, name, *start, *method, corpus="math" if name == "base" else "code"), f"runs_dir={tmp_path}"]
    )
    run_folder.claim(config, 0)
    for step, (code, math) in ((0, (3.0, 2.0)), (10, end)):
        scores = {"code": {"bits_per_byte": code}, "math": {"bits_per_byte": math}}
        run_folder.replace_file(eval_folder.scores_path(config.run_dir, step), json.dumps(scores))
    run_folder.append_line(
        config.run_dir / run_folder.METRICS,
        {"step": 10, "tokens": 5120, "loss": 2.5, "grad_norm": 1.0, "lr": 0.0, "tokens_per_second": 1234.0},
    )
    return config


@pytest.mark.parametrize(
    ("lora_end", "said"),
    [
        ((2.8, 2.1), 'lora (LoRA) beside full (full), after 5,120 tokens: learned less, +0.200 against +1.000 bits/byte on code; forgot less, +0.100 against +0.500 on math. As "LoRA Learns Less and Forgets Less" found.'),
        ((1.5, 2.7), 'lora (LoRA) beside full (full), after 5,120 tokens: learned no less, +1.500 against +1.000 bits/byte on code; forgot no less, +0.700 against +0.500 on math. Not as "LoRA Learns Less and Forgets Less" found.'),
    ],
)  # fmt: skip
def test_the_finding_follows_the_numbers(workspace, tmp_path, lora_end, said):
    record(workspace, tmp_path, "base", [], (3.0, 2.0))
    record(workspace, tmp_path, "full", [], (2.0, 2.5))
    config = record(workspace, tmp_path, "lora", ["method=lora"], lora_end)
    runs = read_study(config.run_dir.parent)
    assert [run.config.name for run in runs] == ["base", "full", "lora"]
    assert comparison(runs) == [said]
    assert "1,234" in format_table(table(runs))
    result = run_command(["report", str(config.run_dir.parent)])
    assert result.returncode == 0, result.stderr
    page = (config.run_dir.parent / "report.html").read_text()
    assert (
        html.escape(said) in page
        and page.count("<svg") == 2
        and "http"
        not in page.replace("http://www.w3.org", "")
        .replace("http://purl.org", "")
        .replace("https://matplotlib.org", "")
        .replace("http://creativecommons.org", "")
    )


def test_runs_are_compared_at_equal_tokens_and_gaps_stay_gaps(workspace, tmp_path):
    record(workspace, tmp_path, "base", [], (3.0, 2.0))
    full = record(workspace, tmp_path, "full", [], (2.0, 2.5))
    lora = record(workspace, tmp_path, "lora", ["method=lora"], (2.8, 2.1))
    shutil.rmtree(eval_folder.scores_path(lora.run_dir, 10).parent)
    (sentence,) = comparison(read_study(full.run_dir.parent))
    assert sentence == "lora (LoRA) beside full (full): no milestone that both have reached yet."
    run_folder.replace_file(eval_folder.scores_path(full.run_dir, 0), json.dumps({"code": {"bits_per_byte": 3.0}}))
    runs = read_study(full.run_dir.parent)
    assert runs[1].gains() == {}
    row = next(row for row in table(runs) if row[0] == "full" and row[2] == "0")
    assert row[3:7] == ["3.0000", "", "", ""]


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        read_study(tmp_path)
    assert run_command(["report", str(tmp_path)]).returncode == 1


def test_metrics_after_the_resumed_step_are_dropped_and_a_cut_line_ignored(workspace, tmp_path):
    config = record(workspace, tmp_path, "base", [], (3.0, 2.0))
    with open(config.run_dir / "metrics.jsonl", "a") as file:
        file.write('{"step": 11, "lo')
    assert [record["step"] for record in run_folder.read_metrics(config.run_dir)] == [10]
    run_folder.claim(config, 9)
    assert (config.run_dir / "metrics.jsonl").read_text() == ""
