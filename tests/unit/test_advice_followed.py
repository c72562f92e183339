"""Follow the advice of messages: each is provoked, and what it says is done and works.

The commands and settings are taken out of the printed message, so that a changed message is
followed as it is. The advice of the rules between keys is followed by test_rules.py.
"""

import contextlib
import fcntl
import gzip
import importlib
import io
import json
import os
import re
import shlex
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, SEQ_LENGTH, overrides
from messages import messages

from retemper.launch import local
from retemper.pipeline.cli import main
from retemper.pipeline.config.compose import load_config
from retemper.pipeline.config.existing_run import load_run
from retemper.pipeline.data.domains import measures
from retemper.pipeline.distributed import topology
from retemper.pipeline.entry.preflight import preflight
from retemper.pipeline.errors import UserError
from retemper.pipeline.evals.sandbox import layers
from retemper.pipeline.runs.run_folder import start_or_resume

topology.prepare_megatron()  # before anything imports megatron-core

STEP = 8 * SEQ_LENGTH  # tokens


@pytest.fixture(scope="module", autouse=True)
def one_rank_here() -> Iterator[None]:
    """Let every launch run its only rank in this process, which has imported what ranks need.

    It has one thread, because threads that wait for others on a busy machine take its time.
    """
    import torch

    environment = dict(os.environ)
    handler = signal.getsignal(signal.SIGINT)
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "cpu_count", lambda: 1)
        patch.setattr(local, "run_here", rank_here)
        yield
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, handler)
    torch.set_num_threads(threads)


def rank_here(module: str, arguments: list[str], world_size: int) -> int:
    import torch

    assert world_size == 1
    try:
        return importlib.import_module(f"{module}.__main__").main(*arguments)
    finally:
        if torch.distributed.is_initialized():
            topology.stop()


def retemper(*words: str) -> tuple[int, str]:
    """Run a command, and return its exit code and what it printed."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as printed,
        contextlib.redirect_stderr(printed),
    ):
        try:
            code = main(list(words))
        except SystemExit as exited:
            code = exited.code
    return code, printed.getvalue()


def works(*words: str) -> str:
    code, printed = retemper(*words)
    assert code == 0, printed
    return printed


def refused(*words: str) -> str:
    code, printed = retemper(*words)
    assert code, printed
    assert "Traceback" not in printed
    return printed


FOLLOWED: list[str] = []  # distinctive words of the messages that the tests below follow


def follows(*words: str):
    """Name the messages whose advice a test follows, by distinctive words."""

    def register(test):
        FOLLOWED.extend(words)
        return test

    return register


def setting(printed: str, key: str) -> str:
    """Return the last key=value that a message has of a key."""
    return re.findall(rf"(?<![\w.]){re.escape(key)}=\S*[^\s.,:;)]", printed)[-1]


def commands(printed: str) -> list[list[str]]:
    """Return the arguments of the commands that a message has in backticks."""
    return [shlex.split(words) for words in re.findall(r"`retemper ([^`]+)`", printed)]


def run_of(workspace: Path, name: str, *changes: str, steps: int = 2) -> list[str]:
    """Return the overrides of a run of a few steps, which is not scored."""
    length = [f"train.tokens={steps * STEP}", "schedule.warmup_tokens=0", "evals.heldout={}"]
    return overrides(workspace, name, *length, "study=advice", *changes)


@pytest.fixture(scope="module")
def base(workspace) -> Path:
    """Return the folder of a trained run."""
    works("train", *run_of(workspace, "base"))
    return workspace / "runs" / "advice" / "base"


@pytest.fixture(scope="module")
def adapted(workspace, base) -> list[str]:
    """Return the overrides of a run that has trained adapters of the base."""
    run = run_of(workspace, "adapted", "method=lora", f"init_from={base}")
    works("train", *run)
    return run


def check(run: list[str]) -> None:
    """Check a run as `retemper train` does before it starts ranks."""
    preflight(load_config(run))


def corpus_of(workspace: Path, source: Path, path: Path, *changes: str) -> list[str]:
    """Return the keys of a corpus."""
    return [
        "data=local",
        "data.name=small",
        f"data.source.path={source}",
        f"data.tokenizer={workspace / 'data' / 'tokenizer'}",
        f"data.path={path}",
        f"data.seq_length={SEQ_LENGTH}",
        "data.heldout_fraction=0",
        *changes,
    ]


def write_rows(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def rows(tmp_path) -> Path:
    """Return a file of twenty documents, each longer than two samples."""
    write_rows(
        tmp_path / "rows.jsonl", [{"text": f"number {n} " * 90, "ask": "one"} for n in range(20)]
    )
    return tmp_path / "rows.jsonl"


@follows("set data.tokens=null to take all", "takes whole: set data.tokens=")
@follows("or set data.heldout_fraction=0 for")
@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("data.tokens", ["data.tokens=1B"]),
        ("data.tokens", ["data.tokens=64", "data.packing=best_fit"]),
        ("data.heldout_fraction", ["data.heldout_fraction=1e-9"]),
    ],
)
def test_a_refused_corpus_is_made_with_the_advised_setting(workspace, rows, tmp_path, key, changes):
    keys = corpus_of(workspace, rows, tmp_path / "corpus", *changes)
    works("tokenize", *keys, setting(refused("tokenize", *keys), key))


@follows("what could be read of them with data.allow_broken_files=true")
def test_damaged_files_are_left_out_on_request(workspace, rows, tmp_path):
    source = tmp_path / "docs"
    source.mkdir()
    shutil.copy(rows, source)
    (source / "cut.jsonl.gz").write_bytes(gzip.compress(rows.read_bytes())[:-20])
    keys = corpus_of(workspace, source, tmp_path / "corpus")
    advised = setting(refused("tokenize", *keys), "data.allow_broken_files")
    assert re.search("damaged: .*/cut.jsonl.gz", works("tokenize", *keys, advised))


CORRECTED = {
    "does not exist; name a folder or file": (["data.source.path=none"], []),
    "no installed package has that name; install it or name a folder": (
        ["data.source.path=package:none"],
        ["data.source.path=package:json", "data.source.kind=docstrings"],
    ),
    "is inside data.source.path=7: choose a folder outside of it": (["data.path=docs/corpus"], []),
    "overlap: choose another work_dir": (["data.work_dir=corpus"], ["data.work_dir=work"]),
    "exists and is not a token corpus": (["data.path=taken"], ["data.path=corpus"]),
    "its documents fill no sample of": (["data.seq_length=99999"], []),
    "no record has text": (["data.source.text_key=body"], []),
    "and {…} of data.source.prompt=7 other columns": (
        ["data.source.text_key=body", "data.source.prompt='{ask}'"],
        ["data.source.text_key=text"],
    ),
}


@follows(*CORRECTED)
@pytest.mark.parametrize("words", CORRECTED)
def test_a_refused_corpus_is_made_with_a_corrected_setting(
    workspace, rows, tmp_path, monkeypatch, words
):
    monkeypatch.chdir(tmp_path)
    wrong, right = CORRECTED[words]
    (tmp_path / "docs").mkdir()
    (tmp_path / "taken").mkdir()
    rows.rename(tmp_path / "docs" / "rows.jsonl")
    keys = corpus_of(workspace, Path("docs"), Path("corpus"))
    printed = refused("tokenize", *keys, *wrong)
    assert re.search(re.escape(words).replace("=7", "=.*"), printed)
    works("tokenize", *keys, *(right or []))


@follows("is a dangling link; correct the link or remove it")
def test_a_corpus_is_made_without_the_named_link(workspace, rows, tmp_path):
    source = tmp_path / "docs"
    source.mkdir()
    rows.rename(source / "rows.jsonl")
    (source / "gone.jsonl").symlink_to(rows)
    keys = corpus_of(workspace, source, tmp_path / "corpus")
    [link] = re.findall(r"(\S+) is a dangling link", refused("tokenize", *keys))
    Path(link).unlink()
    works("tokenize", *keys)


@follows("or set data.source.kind=text for a tree of text files")
def test_text_files_are_read_as_text(workspace, tmp_path):
    source = tmp_path / "docs"
    source.mkdir()
    (source / "a.txt").write_text("number one " * 200)
    keys = corpus_of(workspace, source, tmp_path / "corpus")
    works("tokenize", *keys, setting(refused("tokenize", *keys), "data.source.kind"))


@follows("is being written by another `retemper tokenize`")
def test_a_corpus_that_is_being_written_is_waited_for_or_written_elsewhere(
    workspace, rows, tmp_path
):
    keys = corpus_of(workspace, rows, tmp_path / "corpus")
    with open(tmp_path / "corpus.partial.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        printed = refused("tokenize", *keys)
        [[verb]] = commands(printed)
        [other] = re.findall(r"choose another (data\.\S+)", printed)
        works(verb, *keys, f"{other}={tmp_path / 'elsewhere'}")
    works(verb, *keys)


@follows("data.near_duplicates=count with another data.path does", "leaves them out")
def test_near_duplicates_are_counted_and_left_out_in_another_folder(workspace, tmp_path):
    text = " ".join(f"number {n} of many" for n in range(80))
    rows = [{"text": f"{text} {n}."} for n in range(20)]
    rows += [{"text": f"{n} times something else " * 20} for n in range(20)]
    write_rows(tmp_path / "rows.jsonl", rows)
    keys = [*corpus_of(workspace, tmp_path / "rows.jsonl", tmp_path), "data.heldout_fraction=0.5"]
    printed = works(
        "tokenize", *keys, f"data.path={tmp_path / 'keep'}", "data.near_duplicates=keep"
    )
    for action, described in (("count", "training documents"), ("drop", "left out of training")):
        assert "with another data.path" in printed
        advised = setting(printed, "data.near_duplicates")
        assert advised == f"data.near_duplicates={action}"
        printed = works("tokenize", *keys, advised, f"data.path={tmp_path / action}")
        assert re.search(rf"held-out documents: [1-9]\d* .*{described}", printed)


@pytest.fixture
def own(workspace, rows, tmp_path) -> list[str]:
    """Return the overrides of a run on a corpus of its own, which is not made yet."""
    corpus = corpus_of(workspace, rows, tmp_path / "corpus", "data.heldout_fraction=0.3")
    return run_of(workspace, tmp_path.name, *corpus)


@follows("make one with `retemper tokenize`")
def test_a_missing_corpus_is_made_by_the_advised_command(own):
    [[verb]] = commands(refused("train", *own))
    works(verb, *own)
    check(own)


@follows("/7 is damaged: run the `retemper tokenize` command")
def test_a_damaged_index_is_made_again_by_the_advised_command(own, tmp_path):
    works("tokenize", *own)
    index = tmp_path / "corpus" / "train" / "index.json"
    index.write_text(index.read_text().replace("2", "3", 1))
    [[verb]] = commands(refused("train", *own))
    works(verb, *own)
    check(own)


def flip_bit(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)


@follows("is missing or damaged: remove it, create it again with the `retemper tokenize` command")
@follows("or skip its samples with data.bad_shards=skip")
def test_a_damaged_shard_is_skipped_or_made_again_as_advised(own, tmp_path):
    works("tokenize", *own)
    [shard] = (tmp_path / "corpus" / "train").rglob("*.mds*")
    flip_bit(shard)
    printed = refused("train", *own)
    skipping = works("train", *own, "name=skips", setting(printed, "data.bad_shards"))
    assert f"skips a shard: {shard}" in skipping
    # The warning that no sample of the batch has a label.
    [show] = [words for words in commands(skipping) if words[0] == "data"]
    assert f"skipped: {shard} is missing or damaged" in works(*show)
    [named] = re.findall(r"^error: (\S+) is missing or damaged: remove it", printed, re.MULTILINE)
    Path(named).unlink()
    [[verb]] = commands(printed)
    works(verb, *own)
    works("train", *own)


def test_a_damaged_held_out_shard_is_not_advised_to_be_skipped(own, tmp_path):
    works("tokenize", *own)
    [shard] = (tmp_path / "corpus" / "heldout").rglob("*.mds*")
    flip_bit(shard)
    own += [f"evals.heldout.own={tmp_path / 'corpus'}", "data.bad_shards=skip"]
    assert "bad_shards" not in refused("train", *own)


@follows("has passed without one labelled token", "warning: step 7 has no labelled token")
def test_samples_without_labels_are_shown_by_the_advised_command(workspace, tmp_path):
    write_rows(tmp_path / "rows.jsonl", [{"ask": "number " * 600, "text": "one"}])
    source = ["data.source.prompt='{ask}'", "data.packing=concat"]
    corpus = corpus_of(workspace, tmp_path / "rows.jsonl", tmp_path / "corpus", *source)
    run = run_of(workspace, tmp_path.name, *corpus, steps=20)
    works("tokenize", *run)
    shown = commands(refused("train", *run))
    assert len(shown) == 2
    for words in shown:
        assert " 0 of 64 tokens with loss" in works(*words)


@follows("Name the folder that this base was moved to, or init_from=7")
def test_a_run_continues_with_the_advised_base(base, adapted):
    printed = refused("train", *adapted, f"init_from={base}-typo")
    check([*adapted, setting(printed, "init_from")])


@follows("has no checkpoint: train or import that model first, correct the path")
@follows(": leave out @7, or choose another name for a run from another checkpoint")
@follows("has no checkpoint after step 7; it has those after the steps 7")
def test_a_base_is_named_as_advised(workspace, base, adapted):
    run = run_of(workspace, "corrected-base")
    assert "correct the path" in refused("train", *run, f"init_from={base}-typo")
    check([*run, f"init_from={base}"])
    [step] = re.findall(r"after the steps (\d+)", refused("train", *run, f"init_from={base}@9"))
    check([*run, f"init_from={base}@{step}"])
    [removed] = re.findall(r"leave out (@\d+)", refused("train", *adapted, f"init_from={base}@9"))
    check([*adapted, f"init_from={base}@9".removesuffix(removed)])


@follows("holds another model (7): set these keys to its values, which are listed first")
def test_a_run_has_the_model_that_its_base_is_said_to_have(workspace, base, tmp_path):
    moved = shutil.copytree(base, tmp_path / "base")
    (moved / "config.json").unlink()
    run = run_of(workspace, "same-model", f"init_from={moved}", "model.num_layers=4")
    works("train", *run, *first_values(refused("train", *run)))


def first_values(printed: str) -> list[str]:
    """Return key=value for each `key: value -> other` in a message."""
    return [f"{key}={value}" for key, value in re.findall(r"([\w.]+): (\S+) -> ", printed)]


@pytest.mark.slow
@follows("was trained with another tokenizer than", "set that one, or tokenize again to another")
def test_a_run_has_the_tokenizer_of_its_base_and_of_its_corpus(workspace, base, own, tmp_path):
    other = f"data.tokenizer={another_tokenizer(workspace, tmp_path)}"
    works("tokenize", *own, other)
    based = [*own, other, f"init_from={base}"]
    assert "to another data.path" in refused("train", *based)
    assert "set that one" in refused("train", *own)
    check([*own, other])
    own += [f"data.path={tmp_path / 'again'}"]
    works("tokenize", *own)
    works("train", *own, f"init_from={base}")


def another_tokenizer(workspace: Path, folder: Path) -> Path:
    """Return a copy of the tokenizer that counts as another one."""
    copy = shutil.copytree(workspace / "data" / "tokenizer", folder / "another-tokenizer")
    (copy / "tokenizer.json").write_text((copy / "tokenizer.json").read_text() + " ")
    return copy


@pytest.mark.slow
@follows("which the model was trained on: set data.tokenizer to that one")
@follows("has no end-of-text token: set eos_token in its tokenizer_config.json")
def test_a_worker_has_the_tokenizer_that_is_advised(workspace, tmp_path):
    write_rows(tmp_path / "humaneval.jsonl", [PROBLEM])
    other = another_tokenizer(workspace, tmp_path)
    config = load_config(run_of(workspace, "retokenized", f"data.tokenizer={other}"))
    start_or_resume(config, 0)
    worker = ["eval", "worker", str(config.run_dir), "--once", "--only", "generate"]
    worker += [f"evals.tasks_dir={tmp_path}", "evals.tasks.humaneval.where=worker"]
    [key] = re.findall(r"set (data\.\w+) to that one", refused(*worker))
    works(*worker, f"{key}={workspace / 'data' / 'tokenizer'}")
    # The tokenizer of the corpus, but without an end-of-text token.
    shutil.copy(workspace / "data" / "tokenizer" / "tokenizer.json", other)
    (other / "special_tokens_map.json").unlink()
    settings = other / "tokenizer_config.json"
    whole = settings.read_text()
    settings.write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    [key] = re.findall(r"set (\w+) in its tokenizer_config.json", refused(*worker))
    assert key in json.loads(whole)
    settings.write_text(whole)
    works(*worker)


@follows("add text or set a smaller batch")
def test_a_run_has_a_batch_that_its_corpus_fills(workspace):
    run = run_of(workspace, "large-batch", "train.tokens=1B")
    printed = refused("train", *run, "train.global_batch_size=80000")
    assert "set a smaller batch" in printed
    check(run)


@follows("Where the base was moved, `retemper train` and `retemper eval run` take its new folder")
def test_a_moved_base_is_named_to_the_advised_commands(workspace, base, adapted):
    moved = base.rename(base.with_name("moved"))
    try:
        train, evaluate = commands(refused("train", *adapted))
        works(*train, *adapted, f"init_from={moved}")
        heldout = f"evals.heldout.math={workspace / 'data' / 'math'}"
        works(*evaluate, str(base.with_name("adapted")), heldout, f"init_from={moved}")
    finally:
        moved.rename(base)


@follows("holds adapters, not a model; name a run with method=full")
def test_a_run_of_the_advised_method_is_a_base(workspace, base, adapted):
    run = run_of(workspace, "on-adapters", "method=lora")
    folders = [base.with_name("adapted"), base]
    printed = refused("train", *run, f"init_from={folders[0]}")
    method = setting(printed, "method").partition("=")[2]
    [advised] = [folder for folder in folders if load_run(folder, []).method.name == method]
    works("train", *run, f"init_from={advised}")


@follows("goes on with the new data")
def test_a_run_goes_on_with_the_content_of_other_shards_on_request(workspace):
    run = run_of(workspace, "other-shards")
    works("train", *run)
    run += [f"data.path={workspace / 'data' / 'code'}"]
    advised = setting(refused("train", *run), "data.allow_change")
    assert "complete" in works("train", *run, advised)


@follows("continues it with the new data")
def test_a_run_goes_on_with_other_settings_of_its_data_on_request(workspace):
    run = run_of(workspace, "other-seed")
    start_or_resume(load_config(run), 0)
    run += ["data.seed=5"]
    check([*run, setting(refused("train", *run), "data.allow_change")])


@follows("`train` needs 7=7", "`train` needs init_from=7 (it has: 7)")
def test_a_launch_names_the_folder_that_training_needs(workspace, base):
    run = run_of(workspace, "later", f"init_from={base.with_name('missing')}")
    launch = ["launch", "--target", "torchrun", *run]
    [needed] = re.findall("`train` needs init_from=(.*)", works(*launch))
    shutil.copytree(base, needed)
    assert "not here" not in works(*launch)
    check(run)
    [step] = re.findall(r"it has: (\d+)", works(*launch, f"init_from={base}@9"))
    assert "not here" not in works(*launch, f"init_from={base}@{step}")


@follows("(`retemper config --docs` lists the config keys")
def test_the_advised_command_lists_the_config_keys():
    [words] = commands(refused("train", "--learning-rate", "3"))
    assert "optimizer.lr: " in works(*words)


@follows("remove model=… and model.…")
def test_a_run_has_the_model_of_its_base_without_the_keys_to_remove(workspace, base):
    run = run_of(workspace, "own-model", f"init_from={base}", "model.num_layers=4")
    removed = tuple(re.findall(r"(model[=.])…", refused("train", *run)))
    assert len(removed) == 2
    check([key for key in run if not key.startswith(removed)])


# A run whose corpus and base are not here.
PLANNED = ["study=a", "name=b", "data=local", "data.path=none", "data.source.path=none"]
PLANNED += ["data.tokenizer=none", "train.tokens=1M", "train.global_batch_size=8"]
PLANNED += ["train.micro_batch_size=1", "optimizer.lr=1e-3", "init_from=none"]


@follows("specify its shape, as model=llama2_7b", "a shorter data.seq_length, or method=lora")
@pytest.mark.parametrize(
    ("changes", "gpu_memory", "key"),
    [([], "200", "model"), (["model=llama2_7b"], "40", "method")],
)
def test_a_run_is_planned_with_the_advised_setting(changes, gpu_memory, key):
    run = [*PLANNED, *changes, "--gpu-memory", gpu_memory]
    works("plan", *run, setting(refused("plan", *run), key))


@follows("Set evals.heldout.7=7, or name such domains in evals.learned=[…]")
@follows("Set evals.heldout.NAME=FOLDER to token shards of text that the base knew")
def test_missing_measurements_are_added_by_the_advised_settings(workspace, base):
    def measured(*changes: str) -> str:
        run = run_of(workspace, "measured", f"init_from={base}", *changes)
        return "\n".join(measures(load_config(run)))

    described = measured()
    learned = setting(described, "evals.heldout.math")
    assert "what it learns is measured on held-out math" in measured(learned)
    old = setting(described, "evals.heldout.NAME").replace("NAME", "old")
    old = old.replace("FOLDER", str(workspace / "data" / "code"))
    assert "what it forgets is measured on held-out old" in measured(old)
    named = setting(described, "evals.learned").replace("…", "old")
    assert "what it learns is measured on held-out old" in measured(old, named)


@follows("train with data.ledger=true from the start, then verify")
def test_a_run_with_the_advised_ledger_is_verified(workspace, base):
    advised = setting(refused("data", "verify", str(base)), "data.ledger")
    works("train", *run_of(workspace, "ledger", advised))
    assert "nothing skipped" in works("data", "verify", str(base.with_name("ledger")))


@follows("Train 7 with train.branches=[7]", "there is no run (no config.json); train that run")
@follows("these differ:\n7\nSet them to the trunk's values, which are listed first")
def test_a_branch_starts_from_a_trunk_with_the_advised_branches(workspace):
    def branch_of(trunk: str, steps: int) -> list[str]:
        folder = workspace / "runs" / "advice" / trunk
        return run_of(workspace, f"branch-{steps}", f"branch_of={folder}", steps=steps)

    trunk = run_of(workspace, "trunk", steps=5)
    start_or_resume(load_config(trunk), 0)
    printed = refused("train", *branch_of("trunk", 3))
    assert "Train the trunk with" in printed
    trunk += [setting(printed, "train.branches")]
    works("train", *trunk)
    assert "correct the path" in refused("train", *branch_of("typo", 3))
    check(branch_of("trunk", 3))
    differs = [*branch_of("trunk", 3), "seed=5"]
    printed = refused("train", *differs)
    check([*differs, *first_values(printed)])
    assert "leave out branch_of" in printed
    check([key for key in differs if not key.startswith("branch_of=")])
    # The trunk has now passed the start of another branch.
    printed = refused("train", *branch_of("trunk", 5))
    assert "Train another trunk, under another name, with" in printed
    advised = setting(printed, "train.branches")
    assert "train another trunk with it, under another name" in refused("train", *trunk, advised)
    works("train", *trunk, "name=another", advised)
    check(branch_of("another", 5))


@follows("Set anomaly.policy=rollback to continue from the newest checkpoint")
def test_a_run_goes_on_after_an_anomaly_as_advised(workspace):
    import cases

    run = run_of(workspace, "anomaly", "anomaly.spike_deviations=40", "optimizer.lr=1e-3", steps=22)
    run += ["checkpoint.save_every_steps=20"]
    with cases.FAULTS["garbage_batch"]():
        advised = setting(refused("train", *run), "anomaly.policy")
        printed = works("train", *run, advised)
    assert "restarting from the newest checkpoint" in printed


@follows("set precision=bf16, which runs everywhere", "set train.cuda_graph=auto, which runs")
@pytest.mark.parametrize("change", ["precision=fp8_delayed", "train.cuda_graph=on"])
def test_a_run_without_a_gpu_has_the_advised_setting(workspace, change):
    key = change.partition("=")[0]
    run = run_of(workspace, key)
    works("train", *run, setting(refused("train", *run, change), key))


@follows("evaluates the checkpoints that have no scores yet")
@follows("evals.heldout.NAME=FOLDER`, ", "`retemper eval run 7`")
def test_a_run_without_scores_gets_them_by_the_advised_command(workspace, base):
    show = ["eval", "show", str(base)]
    [words] = commands(refused(*show))
    math = workspace / "data" / "math"
    works(*(word.replace("NAME", "math").replace("FOLDER", str(math)) for word in words))
    assert "bits_per_byte" in works(*show)
    scored = run_of(workspace, "base", f"evals.heldout.math={math}")
    [words] = commands(works("train", *scored))
    assert "already have scores" in works(*words)
    shutil.rmtree(base / "evals")
    assert commands(refused(*show)) == [words]
    works(*words)
    assert "bits_per_byte" in works(*show)


@follows("has no tasks for workers: set evals=paper, or evals.tasks.humaneval.where=worker")
@follows("has no file 7*.jsonl; put it there")
@pytest.mark.parametrize("key", ["evals", "evals.tasks.humaneval.where"])
def test_a_worker_has_the_tasks_that_are_advised(base, tmp_path, key):
    worker = ["eval", "worker", str(base), "--once", "--only", "score"]
    worker += [f"evals.tasks_dir={tmp_path}"]
    advised = setting(refused(*worker), key)
    assert f"{tmp_path} has no file humaneval*.jsonl; put it there" in refused(*worker, advised)
    write_rows(tmp_path / "humaneval.jsonl", [PROBLEM])
    works(*worker, advised)


PROBLEM = {
    "task_id": "HumanEval/0",
    "prompt": "def one():\n",
    "entry_point": "one",
    "canonical_solution": "    return 1\n",
    "test": "def check(candidate):\n    assert candidate() == 1\n",
}


@follows("or set evals.unsafe_code=true to run them")
def test_programs_are_run_without_a_sandbox_on_request(base, monkeypatch):
    layers.find_layers.cache_clear()
    monkeypatch.setattr(layers.seccomp, "available", lambda: False)
    with pytest.raises(UserError) as refusal:
        layers.find_layers()
    config = load_run(base, [setting(str(refusal.value), "evals.unsafe_code")])
    assert not layers.find_layers(config.evals.unsafe_code).seccomp
    layers.find_layers.cache_clear()


@pytest.mark.slow
@follows("`retemper import 7 runs/models/NAME`")
@follows("only parallel=… and parallel.… are allowed here")
@follows("is not that of a training run; an imported model is named in init_from")
def test_a_transformers_folder_is_imported_by_the_advised_command(
    workspace, base, tmp_path, monkeypatch
):
    works("export", str(base), str(tmp_path / "exported"))
    monkeypatch.chdir(tmp_path)
    run = run_of(workspace, "imported", "method=lora")
    printed = refused("train", *run, f"init_from={tmp_path / 'exported'}")
    [words] = commands(printed)
    allowed = re.findall(r"(parallel[=.])…", refused(*words, "optimizer.lr=1"))
    assert len(allowed) == 2
    works(*words, "parallel=single", "parallel.tensor_parallel_size=1")
    imported = setting(printed, "init_from")
    check([*run, imported])
    branch = imported.replace("init_from", "branch_of")
    [key] = re.findall(r"is named in (\w+)", refused("train", *run, "method=full", branch))
    check([*run, branch.replace("branch_of", key)])


def test_a_failed_conversion_names_files_that_are_still_there(base, tmp_path, monkeypatch):
    from retemper.pipeline.huggingface import verify

    exported = tmp_path / "exported"
    works("export", str(base), str(exported))
    monkeypatch.setattr(verify, "_TOLERANCE", -1.0)
    for verb, source in (("export", base), ("import", exported)):
        printed = refused(verb, str(source), str(tmp_path / "target"))
        named = re.findall(r"(/\S+)", printed)
        assert f"{source / 'config.json'}" in named
        assert all(Path(path).exists() for path in named), printed


@pytest.mark.slow
@follows("has no file 7; put it there, or do not set evals.tasks_dir, to download the dataset")
@follows("leaves no room for its prompt: set max_new_tokens of the task")
def test_tasks_are_scored_as_advised(base, tmp_path, shared_data):
    score = ["eval", "run", str(base), f"evals.tasks_dir={tmp_path}"]
    score += ["evals.tasks.gsm8k={limit: 1, shots: 0}"]
    for split in ("test", "train"):
        [missing] = set(re.findall(r"has no file (\S+);", refused(*score)))
        shutil.copy(shared_data / "evals" / f"gsm8k_{split}.jsonl", tmp_path / missing)
    [key] = set(re.findall(r"set (\w+) of the task", refused(*score)))
    works(*score, f"evals.tasks.gsm8k.{key}=8")


@pytest.mark.slow
@follows("`retemper eval worker 7`")
def test_a_run_with_tasks_for_workers_is_scored_by_the_advised_command(workspace, shared_data):
    run = run_of(workspace, "worked", f"evals.tasks_dir={shared_data / 'evals'}")
    run += ["evals.tasks.humaneval={where: worker, limit: 1, repeats: 1}"]
    works("train", *run)
    show = ["eval", "show", str(workspace / "runs" / "advice" / "worked")]
    [words] = commands(refused(*show))
    works(*words)
    assert "pass@1" in works(*show)


@follows("are both set: set one of them to null", "or set train.tokens and milestones in tokens")
@follows("schedule.warmup_fraction=7 are both set", "set more epochs or a smaller batch")
def test_a_refused_length_is_accepted_as_advised(workspace, tmp_path):
    run = run_of(workspace, "long")
    refusal = refused("config", *run, "train.epochs=2")
    [both] = re.findall(r"(\S+)=\S+ and (\S+)=\S+ are both set: set one of them to null", refusal)
    for key in both:
        works("config", *run, "train.epochs=2", f"{key}=null")
    warm = [*run, "schedule.warmup_tokens=512", "schedule.warmup_fraction=0.5"]
    refusal = refused("config", *warm)
    for key in ("schedule.warmup_tokens", "schedule.warmup_fraction"):
        works("config", *warm, setting(refusal, key))
    short = [*run, "train.tokens=null", "train.epochs=1e-3"]
    [batch] = re.findall(r"step of (\S+)=\d+: set more epochs", refused("config", *short))
    works("config", *short, "train.epochs=1")
    works("config", *short, "train.epochs=0.05", f"{batch}=1", "train.micro_batch_size=1")
    absent = [*run, f"data.path={tmp_path / 'none'}", "checkpoint.milestones=[1ep]"]
    [[verb]] = commands(refused("config", *absent))
    assert verb == "tokenize"
    works("config", *absent, "checkpoint.milestones=[512]")


@follows("restore it from a copy, or remove it and `retemper eval run` computes it again")
@follows("now 7 (evals.max_samples=7)")
def test_scores_are_computed_again_as_advised(workspace, tmp_path):
    run = run_of(workspace, "scored", "evals.max_samples=4", "evals.micro_batch_size=4")
    run += [f"evals.heldout.math={workspace / 'data' / 'math'}"]
    works("train", *run)
    folder = workspace / "runs" / "advice" / "scored"
    score = ["eval", "run", str(folder)]
    other = refused(*score, "evals.max_samples=8")
    files = re.findall(r"- (\S+): 4 samples of math, now 8", other)
    assert len(files) == 2
    for file in files:
        Path(file).rename(tmp_path / Path(file).parent.name)
    works(*score, "evals.max_samples=8")
    Path(files[0]).write_text("")
    [words] = set(map(tuple, commands(refused(*score, "evals.max_samples=8"))))
    Path(files[0]).unlink()
    works(*words, str(folder), "evals.max_samples=8")


@follows(" evals.heldout.NAME=FOLDER")
def test_a_run_without_scores_is_scored_by_the_command_of_the_report(workspace):
    works("train", *run_of(workspace, "unscored"), "study=alone")
    [words] = commands(works("report", str(workspace / "runs" / "alone")))
    folder = workspace / "data" / "math"
    domain = f"evals.heldout.math={folder}"
    words = [domain if word == "evals.heldout.NAME=FOLDER" else word for word in words]
    assert domain in words
    works(*words, "evals.max_samples=2")


@follows("is no folder: correct it, or leave it out to download the tasks' datasets")
def test_a_folder_of_tasks_that_is_none_may_be_left_out(workspace, tmp_path):
    run = run_of(workspace, "tasks", "evals.tasks={winogrande: {limit: 1}}")
    with pytest.raises(UserError, match="is no folder: correct it, or leave it out"):
        check([*run, f"evals.tasks_dir={tmp_path / 'none'}"])
    check(run)


# Distinctive words of a message -> the test elsewhere that follows it.
FOLLOWED_ELSEWHERE = {
    "Restore it from a copy, or import that model again": (
        "test_base.py::test_a_run_without_a_record_uses_the_base_of_its_newest_checkpoint"
    ),
    "is not a hub path: write hf://datasets": (
        "test_hub.py::test_a_hub_source_is_pinned_to_a_commit"
    ),
    "the hub does not provide revision": "test_hub.py::test_a_hub_source_is_pinned_to_a_commit",
    "; data.source.include_hidden=true takes hidden files and caches": (
        "test_text_sources.py::test_hidden_files_are_read_on_request"
    ),
    "this machine has no squeue": "test_tokenize_clusters.py::test_slurm",
}
NOT_RUN = {
    "cannot be read; change its permissions": "the user of the tests may be root, who reads all",
    "or check the credentials": "the user of the tests may be root, who reads all",
    "data.executor=ray needs Ray": "it installs a package",
    "set a smaller train.micro_batch_size": "it needs a full GPU",
    "but vocab_size=7 ends before it": "config.json of another program is edited",
}
# Help, documentation, reports of what is so, refusals for which there is no remedy, and assertions.
NO_ADVICE = [
    "Prove from the ledger",
    "on the tasks with where=worker",
    "study=mine name=lora model=llama2_7b method=lora",  # the example of `train --help`
    "parallel=… and parallel.…=…, for a model that one process cannot hold",
    "# Configuration",
    "began with marks of StarCoder's data",
    "/index.json was not written by `retemper tokenize`, do not trust it",
    "this MFU is assumed",
    "no peak FLOP/s of",
    "layers from 7, for init_from=7",
    "written by `retemper export`",
    "LoRA: computed with method.lora.kernel=plain, slower",
    "trainable and 7 frozen parameters",
    "the tokenizer does not belong to this model",
    "the cause is not a single batch",
    "method.name=lora requires init_from",
    "method=lora, but other parameters than adapters are trainable",
    "method=full, but frozen",
    "data.executor=slurm requires data.slurm",
]


def test_the_advice_of_every_message_is_followed():
    texts = [
        message.text
        for message in messages()
        # Examples of --help are parsed by test_documents.py, rules are followed by test_rules.py.
        if (message.commands or message.pairs)
        and not message.text.startswith("retemper ")
        and not message.place.startswith("pipeline/config/rules.py")
    ]
    known = [*FOLLOWED, *FOLLOWED_ELSEWHERE, *NOT_RUN, *NO_ADVICE]
    for words in known:
        found = [text for text in texts if words in text]
        exact = [text for text in found if words == text]
        assert len(exact or found) == 1, f"{words!r} is in {len(found)} messages"
    assert not [text for text in texts if not any(words in text for words in known)]


def test_the_tests_elsewhere_exist():
    for test in FOLLOWED_ELSEWHERE.values():
        file, _, name = test.partition("::")
        [path] = (ROOT / "tests").rglob(file)
        assert f"def {name}(" in path.read_text()
