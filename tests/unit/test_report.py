"""The report reads run folders and says what was measured, whichever way it fell."""

import json

import pytest
from conftest import overrides, run_command

from retemper.pipeline import run_folder
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
        run_folder.replace_file(run_folder.scores_path(config.run_dir, step), json.dumps(scores))
    run_folder.append_metrics(
        config.run_dir, {"step": 10, "tokens": 5120, "loss": 2.5, "grad_norm": 1.0, "lr": 0.0, "tokens_per_second": 1234.0}
    )
    return config


@pytest.mark.parametrize(
    ("lora_end", "said"),
    [
        ((2.8, 2.1), "LoRA learned less: +0.200 bits/byte on code against +1.000 in full, and forgot less: +0.100 bits/byte on math against +0.500. As the paper found."),
        ((1.5, 2.7), "LoRA learned no less: +1.500 bits/byte on code against +1.000 in full, and forgot no less: +0.700 bits/byte on math against +0.500. The paper found less of both; this run did not."),
    ],
)  # fmt: skip
def test_the_finding_follows_the_numbers(workspace, tmp_path, lora_end, said):
    record(workspace, tmp_path, "base", [], (3.0, 2.0))
    record(workspace, tmp_path, "full", [], (2.0, 2.5))
    config = record(workspace, tmp_path, "lora", ["method=lora"], lora_end)
    runs = read_study(config.run_dir.parent)
    assert [run.config.name for run in runs] == ["base", "full", "lora"]
    assert comparison(runs) == said
    assert "1,234" in format_table(table(runs))
    result = run_command(["report", str(config.run_dir.parent)])
    assert result.returncode == 0, result.stderr
    page = (config.run_dir.parent / "report.html").read_text()
    assert (
        said in page
        and page.count("<svg") == 2
        and "http"
        not in page.replace("http://www.w3.org", "")
        .replace("http://purl.org", "")
        .replace("https://matplotlib.org", "")
        .replace("http://creativecommons.org", "")
    )


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
