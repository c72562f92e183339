"""Test the command line: help, resolved configs and launch scripts."""

import importlib.metadata
import os
import re
import subprocess
import sys
import time

import pytest
import yaml
from conftest import run_command

from retemper.pipeline.cli import main

# A run whose data is missing: its configuration is composed first.
ONE_RANK = ["run=demo_full", "parallel=single", "init_from=null"]
VERBS = [
    "tokenize",
    "import",
    "train",
    "eval",
    "export",
    "data",
    "report",
    "demo",
    "config",
    "plan",
    "launch",
]


@pytest.mark.parametrize(
    "verb", [[], *([verb] for verb in VERBS)], ids=lambda verb: "".join(verb) or "retemper"
)
def test_help_has_examples_and_takes_under_a_second(verb):
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        result = run_command([*verb, "--help"])
        seconds.append(time.perf_counter() - started)
    assert result.returncode == 0
    assert min(seconds) < 1
    if verb:
        assert f"\n  retemper {verb[0]}" in result.stdout
    else:
        assert all(name in result.stdout for name in VERBS)


@pytest.mark.parametrize(
    "words",
    [
        ["train", *ONE_RANK],
        ["import", "nowhere/", "runs/models/x"],
        ["export", "runs/demo/full", "exported/"],
        ["report", "runs/demo"],
    ],
    ids=lambda words: words[0],
)
def test_a_slow_verb_says_what_it_loads_before_it_does(words, tmp_path):
    """Check the order of the message and the imports, which -X importtime prints on stderr."""
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "retemper.pipeline.cli", *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    before, message, _ = result.stderr.partition("\nloading ")
    assert message, result.stderr[-500:]
    imported = {line.rpartition("|")[2].strip() for line in before.splitlines()}
    assert not imported & {"torch", "megatron.core", "transformers", "matplotlib", "scipy", "numpy"}


def test_progress_without_a_terminal_is_a_line_a_minute(monkeypatch, capsys):
    from retemper.pipeline.files import progress_bar

    with progress_bar.ProgressBar(total=3, desc="fast") as bar:
        bar.update()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress_bar, "SECONDS_BETWEEN_LINES", 0)
    with progress_bar.ProgressBar(total=3, desc="slow", mininterval=0) as bar:
        bar.update()
        bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 2
    assert all(line.startswith("slow:") for line in lines)
    assert "2/3" in lines[-1]


def test_config_prints_the_resolved_config():
    result = run_command(["config", "run=demo_lora", "method.lora.rank=4", "parallel=pp2"])
    config = yaml.safe_load(result.stdout)
    assert config["method"]["lora"]["rank"] == 4
    assert config["parallel"]["pipeline_parallel_size"] == 2
    assert config["init_from"] == "runs/demo/base"


def test_invalid_input_gives_one_error_and_exit_code_1():
    result = run_command(["train", "run=demo_full", "train.lr=1"])
    assert result.returncode == 1
    assert result.stderr.startswith("error: The configuration has 1 problem:")
    assert "did you mean optimizer.lr?" in result.stderr
    assert "Traceback" not in result.stderr


def test_launch_prints_one_torchrun_command_per_node():
    result = run_command(
        [
            "launch",
            "run=demo_full",
            "--target",
            "torchrun",
            "--gpus-per-node",
            "1",
            "--host",
            "n0",
            "optimizer.lr=1e-4",
        ]
    )
    nodes = re.findall(r"^torchrun .*$", result.stdout, re.MULTILINE)
    assert len(nodes) == 2
    for index, node in enumerate(nodes):
        assert "--nnodes=2 --nproc-per-node=1 --rdzv-backend=c10d" in node
        assert "--rdzv-endpoint=n0:29500" in node
        assert f"is_host={int(index == 0)}" in node
        assert node.endswith("-m retemper.pipeline.train run=demo_full optimizer.lr=1e-4")


def test_launch_prints_a_working_sbatch_script(tmp_path):
    result = run_command(
        [
            "launch",
            "run=demo_full",
            "--target",
            "slurm",
            "--gpus-per-node",
            "1",
            "checkpoint.milestones=[32768, 65536]",
        ]
    )
    script = tmp_path / "run.sbatch"
    script.write_text(result.stdout)
    assert subprocess.run(["bash", "-n", script], capture_output=True).returncode == 0
    assert "#SBATCH --nodes=2" in result.stdout
    assert "#SBATCH --requeue" in result.stdout
    # Run the script with stubs of the commands that it calls, and check the torchrun arguments.
    for name, body in {
        "scontrol": "printf 'n0\\nn1\\n'",
        "srun": 'shift; export SLURM_NODEID=1; exec "$@"',
        "torchrun": 'printf "%s\\n" "$@"',
    }.items():
        tool = tmp_path / name
        tool.write_text(f"#!/bin/bash\n{body}\n")
        tool.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "n[0-1]",
        "SLURM_JOB_ID": "7",
    }
    arguments = subprocess.run(
        ["bash", script], capture_output=True, text=True, env=environment, check=True
    ).stdout.splitlines()
    assert {
        "--nnodes=2",
        "--nproc-per-node=1",
        "--rdzv-id=7-0",
        "--rdzv-endpoint=n0:29500",
        "--rdzv-conf=is_host=0",
    } <= set(arguments)
    assert arguments[-2:] == ["run=demo_full", "checkpoint.milestones=[32768, 65536]"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [
                "--target",
                "slurm",
                "--gpus-per-node",
                "3",
                "parallel.data_parallel_size=4",
                "train.global_batch_size=16",
                "train.micro_batch_size=1",
            ],
            "do not fill nodes of 3 GPUs",
        ),
    ],
)
def test_launch_refuses_ranks_that_do_not_fill_the_nodes(arguments, message):
    result = run_command(["launch", "run=demo_full", *arguments])
    assert result.returncode == 1
    assert message in result.stderr


@pytest.mark.parametrize(
    ("arguments", "correct"),
    [
        (["evals", "worker", "runs/a/b", "--once"], "retemper eval worker runs/a/b --once"),
        (["evals", "show", "runs/a/b"], "retemper eval show runs/a/b"),
        (["eval", "runs/a/b", "parallel=dp2"], "retemper eval run runs/a/b parallel=dp2"),
        (["launch", "run=demo_full", "target=slurm"], "launch run=demo_full --target slurm"),
        (["data", "show", "runs/a/b", "step=3"], "retemper data show runs/a/b --step 3"),
        (["data", "verify", "run=demo_full"], "retemper data verify runs_dir/study/name"),
        (["train", "--lr", "3"], "written without dashes: optimizer.lr=3"),
        (["train", "run=demo_full", "--micro-batch-size=4"], "train.micro_batch_size=4"),
        (["plan", "--method.lora.rank", "8"], "method.lora.rank=8"),
    ],
)
def test_wrong_spellings_are_refused_with_the_correct_one(arguments, correct, capsys):
    assert main(arguments) == 1
    assert correct in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--learning-rate", "3"], "retemper config --docs"),
        (["export", "runs/a/b", "out", "--lr", "3"], "unrecognized arguments: --lr 3"),
        (["data", "show", "runs/a/b"], "--step"),
        (["data", "show", "runs/a/b", "--step", "x"], "--step"),
        (["launch", "run=demo_full", "--target", "k8s"], "'torchrun', 'slurm'"),
        (["launch", "run=demo_full"], "--target"),
        (["eval"], "VERB"),
    ],
)
def test_unknown_and_missing_options_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as exited:
        main(arguments)
    assert exited.value.code == 2
    assert message in capsys.readouterr().err


def test_version_is_that_of_the_installed_package(capsys):
    with pytest.raises(SystemExit) as exited:
        main(["--version"])
    assert exited.value.code == 0
    assert capsys.readouterr().out == f"retemper {importlib.metadata.version('retemper')}\n"


def test_config_docs_has_the_meaning_type_and_default_of_every_key(capsys):
    assert main(["config", "--docs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    keys = {line.partition(":")[0] for line in lines if not line.startswith(" ")}
    assert {"optimizer.lr", "evals.tasks.NAME.shots", "data.mixture.NAME.path"} <= keys
    assert all(len(line) <= 100 for line in lines)
    # The line after a key describes it.
    assert all(
        following.startswith("    ")
        for line, following in zip(lines, [*lines[1:], ""], strict=True)
        if not line.startswith(" ")
    )
    assert main(["config", "--docs", "train.cuda_graph"]) == 0
    assert capsys.readouterr().out.startswith('train.cuda_graph: auto | on | off, default "auto"')
    assert main(["config", "--docs", "method.lora"]) == 0
    assert capsys.readouterr().out.count("\nmethod.lora.") == 8
    assert main(["config", "--docs", "train.lr"]) == 1
    assert "did you mean optimizer.lr?" in capsys.readouterr().err
