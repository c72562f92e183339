"""Test that nothing which a command writes or prints contains a secret of its environment."""

import os
import shutil

import pytest
from conftest import run_command
from test_old_run import METHODS, RUN, folder  # noqa: F401  # a fixture

SECRET = "pa55word"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE",
    "AWS_SECRET_ACCESS_KEY": f"{SECRET}/aws",
    "HF_TOKEN": f"hf_{SECRET}",
    "WANDB_API_KEY": SECRET * 5,
    "HTTPS_PROXY": f"http://me:{SECRET}@127.0.0.1:9",
    "AWS_ENDPOINT_URL": f"http://me:{SECRET}@127.0.0.1:9",
}
TRAIN = [*RUN, "name=secret", *METHODS["full"], "track.wandb=offline"]
UNREACHABLE = [*RUN, "name=failing", *METHODS["full"], "data.path=s3://bucket/shards"]
PLANTED = [f"data.source.path=s3://me:{SECRET}@bucket", "data.source.path=${oc.env:HF_TOKEN}"]


@pytest.mark.slow
def test_no_secret_is_in_any_byte_that_a_command_writes(folder, tmp_path):  # noqa: F811
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    run = "runs/old/secret"
    commands = [
        (["config", *TRAIN], 0),
        (["plan", *TRAIN], 0),
        (["launch", *TRAIN, "--target=slurm"], 0),
        (["train", *TRAIN], 0),
        (["report", "runs/old"], 0),
        (["export", run, "export"], 0),
        (["train", *UNREACHABLE], 1),
        *((["train", *TRAIN, planted], 1) for planted in PLANTED),
        *((["tokenize", *TRAIN, planted], 1) for planted in PLANTED),
    ]
    for command, code in commands:
        done = run_command(command, cwd=tmp_path, env=os.environ | ENVIRONMENT)
        assert done.returncode == code, (command, done.stderr)
        assert SECRET not in done.stdout + done.stderr, command
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {tmp_path / run / "config.json", tmp_path / "runs/old/report.html"} <= {*written}
    assert any(path.suffix == ".wandb" for path in written)
    assert [path for path in written if SECRET.encode() in path.read_bytes()] == []
