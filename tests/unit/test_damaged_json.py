"""Damage to every JSON file of a run, of its shards and of an export.

Either one message names the file and the exit code is 1, or the command continues from what is
sound; there is never a traceback.
"""

import copy
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import overrides
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retemper.pipeline.checkpoint import commit
from retemper.pipeline.checkpoint.state import newest_state
from retemper.pipeline.cli import main
from retemper.pipeline.config.compose import load_config
from retemper.pipeline.corpus.manifest import find_manifest
from retemper.pipeline.entry.preflight import preflight
from retemper.pipeline.errors import UserError
from retemper.pipeline.evals.hook import unscored
from retemper.pipeline.evals.uncertainty import Estimate
from retemper.pipeline.files.jsonl import append_line, read_lines, sound_lines
from retemper.pipeline.huggingface.source_config import config_of, model_of, read_config
from retemper.pipeline.runs import eval_folder, run_folder
from retemper.tokenize.publish import find_damaged

WHOLE = [b"", b"[]", b"null", b"{}", b"7", b'"text"', b'{"caf\xe9": 1}', b"[" * 10**5, b"\n\n"]
WHOLE += [b'{"a":' * 10**5, b'{"step": ' + b"9" * 5000 + b"}", "\ufeff{}".encode(), b"\x00" * 64]
VALUES = [None, [], {}, "", "text", -1, 2**70, 1e308, float("nan"), True, [[]], {"step": None}]


def cut(content: bytes, at: float) -> bytes:
    return content[: int(at * len(content))]


def replaced(content: bytes, at: float, value: object) -> bytes:
    """Return JSON or JSON lines in which one value, at any depth, is another or missing."""
    lines = content.rstrip(b"\n").split(b"\n") if content.startswith(b'{"') else [content]
    number = int(at * len(lines))
    tree = copy.deepcopy(json.loads(lines[number]))
    places = list(places_in(tree))
    container, key = places[int(at * 7919) % len(places)]
    if value == "missing":
        del container[key]
    else:
        container[key] = value
    lines[number] = json.dumps(tree).encode()
    return b"\n".join(lines) + b"\n"


def places_in(tree):
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        yield tree, key
        yield from places_in(tree[key])


FRACTION = st.floats(0, 1, exclude_max=True)
DAMAGE = st.one_of(
    st.sampled_from(WHOLE).map(lambda content: lambda _: content),
    FRACTION.map(lambda at: lambda content: cut(content, at)),
    st.tuples(FRACTION, st.integers(1, 255)).map(
        lambda flip: (
            lambda content: bytes(
                byte ^ flip[1] if index == int(flip[0] * len(content)) else byte
                for index, byte in enumerate(content)
            )
        )
    ),
    st.tuples(FRACTION, st.sampled_from([*VALUES, "missing"])).map(
        lambda change: lambda content: replaced(content, *change)
    ),
)


@pytest.fixture(scope="module")
def run(workspace, tmp_path_factory):
    """Write the folder of a run with every kind of JSON file, and copies of its corpora."""
    folder = tmp_path_factory.mktemp("damaged")
    shutil.copytree(workspace / "data", folder / "data")
    config = load_config(overrides(folder, "run", "evals.tasks.gsm8k.shots=0"))
    run_folder.start_or_resume(config, 0)
    temporary = commit.begin(config.run_dir, 2)
    (temporary / "__0_0.distcp").write_bytes(b"weights")
    state = {"step": 2, "consumed_samples": 16, "seconds": 1.0, "recent_losses": [2.5]}
    state |= {"recent_grad_norms": [1.0], "data_changes": []}
    meta = {"train_state": state, "config": config.model_dump(mode="json")}
    commit.commit(config.run_dir, 2, meta | {"fingerprints": preflight(config)})
    for step in (1, 2):
        line = {"step": step, "tokens": 512 * step, "loss": 2.5, "tokens_per_second": 9.5}
        append_line(config.run_dir / run_folder.METRICS, line)
        ids = {"data_parallel_rank": 0, "data_parallel_size": 1, "ids": [*range(8)]}
        append_line(config.run_dir / run_folder.LEDGER / "rank-00000.jsonl", {"step": step} | ids)
    skipped = {"step": 7, "rollback": 7, "reason": "nan"}
    append_line(config.run_dir / run_folder.SKIPPED_BATCHES, skipped)
    found = Estimate(2.5, 0.1, 2.3, 2.7, 2)
    for step in (0, 2):
        scores = {"code": found.headline("bits_per_byte") | {"bits_per_byte": 2.5}}
        samples = [{"sample": number, "bits": 20.0, "bytes": 8.0} for number in range(2)]
        eval_folder.write_heldout(config.run_dir, step, scores, {"code": samples})
    task = found.headline("acc") | {"metrics": {"acc": {"value": 0.5}}, "decontaminated": {}}
    task["settings"] = config.evals.tasks["gsm8k"].settings
    eval_folder.write_result(config.run_dir, 2, "gsm8k", task, [])
    export = folder / "export"
    export.mkdir()
    (export / "config.json").write_text(json.dumps(config_of(config.model, "float32", {})))
    return folder, commands(folder, config)


def restart(config) -> int:
    preflight(config)
    step = newest_state(config.run_dir).step
    commit.read_meta(commit.newest(config.run_dir))
    run_folder.start_or_resume(config, step)
    run_folder.read_skipped_batches(config.run_dir)
    unscored(config, step)
    eval_folder.check_settings(config, config.evals.inline_tasks)
    eval_folder.scores_missing_in_wandb(config.run_dir)
    return 0


def commands(folder: Path, config) -> dict[str, Callable[[], int]]:
    """Return what reads each file; the commands that start ranks without their ranks."""
    run = str(config.run_dir)
    corpus = config.data.path
    show = ["data", "show", run, "--step", "1", "--samples", "1"]
    return {
        "eval show": lambda: main(["eval", "show", run]),
        "data show": lambda: main(show),
        "data verify": lambda: main(["data", "verify", run]),
        "config": lambda: restart(load_config(overrides(folder, "run"))),
        "train": lambda: restart(config),
        "tokenize": lambda: find_damaged(corpus, find_manifest(corpus)) and 0,
        "import": lambda: model_of(read_config(folder / "export"), folder / "export") and 0,
    }


READ_BY = {
    "runs/test/run/config.json": ["eval show", "config"],
    "runs/test/run/metrics.jsonl": ["train"],
    "runs/test/run/skipped_batches.jsonl": ["train"],
    "runs/test/run/ledger/rank-00000.jsonl": ["data verify", "train"],
    "runs/test/run/checkpoints/step-00000002/meta.json": ["train", "data show"],
    "runs/test/run/evals/00000000/heldout.json": ["eval show", "train"],
    "runs/test/run/evals/00000002/heldout.json": ["eval show", "train"],
    "runs/test/run/evals/00000002/gsm8k.json": ["eval show", "train"],
    "data/math/manifest.json": ["train", "data show", "tokenize"],
    "data/math/train/index.json": ["data show", "tokenize"],
    "data/math/sources.jsonl": ["data show", "tokenize"],
    "export/config.json": ["import"],
}


@pytest.mark.parametrize("name", READ_BY)
@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(damage=DAMAGE)
def test_damage_is_one_message_with_the_name_of_the_file_or_harmless(run, name, damage, capsys):
    folder, known = run
    before = {path: path.read_bytes() for path in folder.rglob("*.json*") if path.is_file()}
    for command in READ_BY[name]:
        (folder / name).write_bytes(damage(before[folder / name]))
        try:
            code = known[command]()
        except UserError as error:
            code = 1
            print(error, file=sys.stderr)
        finally:
            for path, content in before.items():
                path.write_bytes(content)
        message = capsys.readouterr().err
        expected = "ledger" if command == "data verify" else Path(name).name
        assert not code or expected in message  # 0 or None where the run goes on


@pytest.mark.parametrize(
    ("content", "sound", "damaged"),
    [
        ('{"step": 1}\n{"st', [1], None),
        ('{"step": 1}\n{"step": 2}', [1, 2], None),
        ('{"step": 1}\r\n\r\n{"step": 2}\r\n', [1, 2], None),
        ('{"step": 1, "text": "a\u2028b\x85c"}\n{"step": 2}\n', [1, 2], None),
        ('{"step": 1}\n' + "\0" * 20, [1], None),
        ('{"step": 1}\n{"step": 2, "lo{"step": 3}\n{"step": 4}\n', [1, 4], "line 2 is damaged"),
        ('null\n{"step": 4}\n', [4], "line 1 is damaged"),
    ],
)
def test_a_half_last_line_is_repaired_and_other_damaged_lines_are_told(
    content, sound, damaged, tmp_path, capsys
):
    path = tmp_path / "records.jsonl"
    path.write_bytes(content.encode())
    for _ in range(2):
        assert [record["step"] for record in sound_lines(path, run_folder.OfStep)] == sound
        assert ("1 damaged lines are left out" in capsys.readouterr().err) == bool(damaged)
        if damaged:
            with pytest.raises(UserError, match=f"{path}, {damaged}"):
                list(read_lines(path, run_folder.OfStep))
        sound = [*sound, 99]
        append_line(path, {"step": 99})
