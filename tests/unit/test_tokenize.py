"""Test the tokenize job: equal corpora for any number of tasks and restarts, and exact budgets.

Remote folders, presets, decontamination and refused configurations are covered, too.
"""

import fcntl
import gzip
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from conftest import SEQ_LENGTH, data_config

from retemper.pipeline.config.compose import load_data_config
from retemper.pipeline.corpus.tokenizer import Tokenizer
from retemper.pipeline.data.shards import TokenShards
from retemper.pipeline.errors import UserError
from retemper.tokenize import job_folder, listing
from retemper.tokenize.job import tokenize
from retemper.tokenize.sources import read_documents


@pytest.fixture(scope="module")
def documents(tmp_path_factory) -> Path:
    """Return a folder of real code as rows in every format; three rows are duplicates."""
    import email

    folder = tmp_path_factory.mktemp("documents")
    files = sorted(Path(email.__file__).parent.rglob("*.py"))
    rows = [
        {"text": file.read_text(), "id": file.name} for file in files if file.read_text().strip()
    ]
    rows += rows[:3]
    lines = [json.dumps(row) + "\n" for row in rows]
    third = len(rows) // 3
    (folder / "a.jsonl").write_text("".join(lines[:third]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[third : third + 5]).encode()))
    (folder / "c.jsonl.zst").write_bytes(
        zstandard.compress("".join(lines[third + 5 : 2 * third]).encode())
    )
    pq.write_table(pa.Table.from_pylist(rows[2 * third :]), folder / "d.parquet", row_group_size=2)
    return folder


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(listing, "PART_BYTES", 20_000)
    monkeypatch.setattr(job_folder, "_BUCKET_BYTES", 100_000)


def rows_config(workspace, documents: Path, path: Path, **changes):
    source = {"kind": "rows", "path": str(documents)}
    return data_config(
        workspace,
        "rows",
        path=str(path),
        **{"source": source, "compression": "zstd", "tasks": 1} | changes,
    )


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def folder_hash(folder: Path) -> str:
    """Return a hash of every file's name and content."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest.update(
                f"{path.relative_to(folder)}\n".encode()
                + hashlib.sha256(path.read_bytes()).digest()
            )
    return digest.hexdigest()


def documents_of(path: str, split: str = "train") -> set[int]:
    shards = TokenShards(path, split)
    return set(shards.samples(np.arange(len(shards))).values("documents").tolist())


def test_corpus_has_equal_bytes_for_any_number_of_tasks(
    workspace, documents, tmp_path, small_parts
):
    for packing in ("concat", "best_fit"):
        hashes = {}
        for tasks in (1, 2, 5) if packing == "concat" else (1, 2):
            corpus = rows_config(
                workspace, documents, tmp_path / f"{packing}{tasks}", tasks=tasks, packing=packing
            )
            manifest = tokenize(corpus, progress=False)
            hashes[tasks] = folder_hash(Path(corpus.path))
        assert len(set(hashes.values())) == 1, hashes
        lines = (Path(corpus.path) / "sources.jsonl").read_text().splitlines()
        assert len({json.loads(line)["path"] for line in lines}) == 4
        kept = sum(counts["documents"] for counts in manifest["splits"].values())
        assert manifest["documents_read"] == kept + sum(manifest["dropped"].values())
        assert manifest["dropped"]["duplicate"] == 3
    assert len(list((Path(corpus.path) / "train").iterdir())) > 3


def test_parts_cover_every_record_once(documents, monkeypatch):
    source = data_config(documents, "x", source={"kind": "rows", "path": str(documents)}).source
    whole = [document.text for document in read_documents(source)]
    for size in (1000, 7777, 50_000):
        monkeypatch.setattr(listing, "PART_BYTES", size)
        assert [document.text for document in read_documents(source)] == whole
    assert len(whole) > 20


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_smaller_budget_takes_a_subset_of_the_documents_of_a_larger_one(
    workspace, documents, tmp_path, small_parts, packing
):
    """Check the counts, too: concat cuts the last of the documents, best_fit omits it."""
    chosen = {}
    total = tokenize(
        rows_config(workspace, documents, tmp_path / "None", packing=packing), progress=False
    )["splits"]["train"]["samples"]
    for samples in (None, total * 2 // 3, total // 3):
        tokens = None if samples is None else samples * SEQ_LENGTH + 63
        corpus = rows_config(
            workspace, documents, tmp_path / f"{samples}", tokens=tokens, packing=packing
        )
        manifest = tokenize(corpus, progress=False)
        if samples:
            shards = TokenShards(corpus.path, "train")
            train = manifest["splits"]["train"]
            assert train["samples"] == len(shards)
            assert len(shards) == samples or packing == "best_fit" and len(shards) < samples
            assert manifest["dropped"]["beyond_budget"] > 0
            written = shards.samples(np.arange(len(shards)))
            assert train["tokens"] == written.values("lengths").sum()
            token_bytes = np.load(f"{corpus.path}/token_bytes.npy")
            # Padding is end-of-text, which counts zero bytes.
            assert train["bytes"] == token_bytes[written.tokens_NT].sum()
        chosen[samples] = documents_of(corpus.path)
    assert chosen[total // 3] < chosen[total * 2 // 3] < chosen[None]
    with pytest.raises(UserError, match=r"samples of 64, the corpus has [\d,]+"):
        tokenize(
            rows_config(workspace, documents, tmp_path / "more", tokens="1B", packing=packing),
            progress=False,
        )


def test_seed_changes_the_order_but_not_the_held_out_documents(workspace, documents, tmp_path):
    paths = [rows_config(workspace, documents, tmp_path / str(seed), seed=seed) for seed in (1, 2)]
    for corpus in paths:
        tokenize(corpus, progress=False)
    first, second = (TokenShards(corpus.path, "train") for corpus in paths)
    assert not np.array_equal(
        first.samples(np.arange(5)).tokens, second.samples(np.arange(5)).tokens
    )
    assert documents_of(paths[0].path, "heldout") == documents_of(paths[1].path, "heldout")


def test_restart_keeps_finished_parts_and_reads_changed_files_again(
    workspace, documents, tmp_path, small_parts, monkeypatch
):
    source = tmp_path / "docs"
    shutil.copytree(documents, source)
    (source / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 999)[:-20])
    corpus = rows_config(workspace, source, tmp_path / "out")
    work = tmp_path / "out.partial"
    with pytest.raises(UserError, match="cut.jsonl.gz"):
        tokenize(corpus, progress=False)
    with pytest.raises(UserError, match="data.seed: 17 -> 18"):
        tokenize(corpus.model_copy(update={"seed": 18}), progress=False)

    def finished() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in work.glob("parts/*/done.json")}

    before = finished()
    unchanged = [
        path
        for path in sorted(before)
        if "cut.jsonl" not in (path.parent / "inputs.json").read_text()
    ]
    first, second, third, fourth, *_ = (path for path in unchanged if [*path.parent.glob("*.ids")])
    next(first.parent.glob("*.ids")).unlink()  # an output was deleted
    second.write_text("{half a mark")  # a mark was damaged
    flip_bit(next(third.parent.glob("*.ids")))
    (fourth.parent / "inputs.json").write_text("[]")
    repaired = gzip.compress(b'{"text": "x and y"}\n')
    (source / "cut.jsonl.gz").write_bytes(repaired)
    with monkeypatch.context() as patch:
        patch.setattr(job_folder, "remove", lambda folder: None)
        manifest = tokenize(corpus, progress=False)
    after = finished()
    assert {path for path in before if after[path] == before[path]} == set(before) - {
        first,
        second,
        third,
    }
    assert len(after) == len(before) + 1  # the part of the repaired file is new
    whole = rows_config(workspace, source, tmp_path / "whole")
    assert tokenize(whole, progress=False) == manifest
    assert folder_hash(tmp_path / "out") == folder_hash(tmp_path / "whole")


def test_finished_corpus_that_lost_a_file_is_tokenized_again(workspace, documents, tmp_path):
    corpus = rows_config(workspace, documents, tmp_path / "out")
    tokenize(corpus, progress=False)
    before = folder_hash(Path(corpus.path))
    for file in ("train/00000/shard.00000.mds.zstd", "heldout/index.json", "manifest.json"):
        (Path(corpus.path) / file).unlink()
        if file == "manifest.json":
            with pytest.raises(UserError, match="is not a token corpus"):
                tokenize(corpus, progress=False)
        else:
            tokenize(corpus, progress=False)
            assert folder_hash(Path(corpus.path)) == before


def test_a_bit_that_flipped_in_a_finished_corpus_is_found_and_said(
    workspace, documents, tmp_path, capsys
):
    corpus = rows_config(workspace, documents, tmp_path / "out")
    tokenize(corpus, progress=False)
    before = folder_hash(Path(corpus.path))
    for file in ("heldout/00000/shard.00000.mds.zstd", "sources.jsonl", "token_bytes.npy"):
        flip_bit(Path(corpus.path) / file)
        tokenize(corpus, progress=False)
        assert f"{corpus.path}/{file} is missing or damaged" in capsys.readouterr().err
        assert folder_hash(Path(corpus.path)) == before
    tokenize(corpus, progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "damage", [b"", b"[]", b"null", b"{}", b'{"made_from": ', b"\xff", b"[" * 10**5]
)
@pytest.mark.parametrize("name", ["plan.json", "chosen.json"])
def test_a_damaged_plan_of_a_job_is_one_message(tmp_path, name, damage):
    (tmp_path / name).write_bytes(damage)
    with pytest.raises(UserError, match=f"{name} is damaged .*: remove {tmp_path} and run"):
        job_folder.load_plan(tmp_path) if name == "plan.json" else job_folder.read_limit(
            tmp_path, "train", 0
        )


def test_folders_with_foreign_files_are_left_unchanged(workspace, documents, tmp_path):
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("do not lose")
    (foreign / "manifest.json").write_text('{"name": "a web app"}')
    with pytest.raises(UserError, match="is not a token corpus"):
        tokenize(rows_config(workspace, documents, foreign), progress=False)
    for source, message in ((tmp_path / "nowhere", "does not exist"), (documents, None)):
        corpus = rows_config(workspace, source, tmp_path / "out", work_dir=str(foreign))
        if message:
            with pytest.raises(UserError, match=message):
                tokenize(corpus, progress=False)
        else:
            tokenize(corpus, progress=False)
    assert sorted(path.name for path in foreign.iterdir()) == ["manifest.json", "thesis.txt"]
    for path, work_dir in (
        (documents / "out", None),
        (tmp_path / "new", tmp_path / "new" / "work"),
    ):
        with pytest.raises(UserError, match="outside of it|overlap: choose"):
            tokenize(
                rows_config(workspace, documents, path, work_dir=work_dir and str(work_dir)),
                progress=False,
            )


def test_damaged_corpus_is_not_replaced_by_another_configuration(workspace, documents, tmp_path):
    """Check this with a path that ends in a slash, which must make no difference."""
    corpus = rows_config(workspace, documents, tmp_path / "out").model_copy(
        update={"path": f"{tmp_path}/out/"}
    )
    tokenize(corpus, progress=False)
    (tmp_path / "out" / "train" / "index.json").unlink()
    with pytest.raises(UserError, match="data.seed: 17 -> 18"):
        tokenize(corpus.model_copy(update={"seed": 18}), progress=False)
    tokenize(corpus, progress=False)
    assert len(TokenShards(corpus.path, "train"))


def test_links_are_followed_and_dangling_links_are_named(workspace, documents, tmp_path):
    source = tmp_path / "docs"
    (source / "run[1]").mkdir(parents=True)
    (source / "linked").symlink_to(documents)
    (source / "again").symlink_to(source)  # a cycle
    (source / "run[1]" / "a.jsonl").symlink_to(documents / "a.jsonl")
    corpus = rows_config(workspace, source, tmp_path / "out")
    whole = [
        document.text
        for document in read_documents(rows_config(workspace, documents, tmp_path).source)
    ]
    first = [
        document.text
        for document in read_documents(
            corpus.source.model_copy(update={"path": str(source / "run[1]" / "a.jsonl")})
        )
    ]
    assert [document.text for document in read_documents(corpus.source)] == [*whole, *first]
    (source / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="gone.jsonl is a dangling link"):
        tokenize(corpus, progress=False)


def test_metadata_keys_may_have_the_names_of_internal_columns(workspace, documents, tmp_path):
    (tmp_path / "rows.jsonl").write_text(
        "".join(
            json.dumps({"text": f"text {n} " * 50, "position": 7, "file": "x"}) + "\n"
            for n in range(9)
        )
    )
    source = {
        "kind": "rows",
        "path": str(tmp_path / "rows.jsonl"),
        "metadata_keys": ["position", "file", "split"],
    }
    corpus = rows_config(
        workspace, documents, tmp_path / "out", source=source, heldout_fraction=0.0
    )
    assert tokenize(corpus, progress=False)["splits"]["train"]["documents"] == 9
    assert len(documents_of(corpus.path)) == 9


@pytest.mark.parametrize(
    ("lengths", "changes", "message"),
    [
        (
            [400] * 5,
            {"heldout_fraction": 1e-9},
            "is 0 documents, which fill no held-out sample of 64 tokens",
        ),
        (
            [100] * 20 + [1] * 9,
            {"heldout_fraction": 0.1, "seq_length": 4000},
            "documents, which fill no held-out sample of 4000 tokens",
        ),
        ([400] * 5, {"heldout_fraction": 1e-9, "packing": "best_fit"}, "is 0 documents"),
    ],
)
def test_held_out_split_without_a_sample_is_refused_unless_its_fraction_is_zero(
    workspace, tmp_path, lengths, changes, message
):
    texts = [f"number {number} " * length for number, length in enumerate(lengths)]
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts)
    )
    corpus = rows_config(workspace, tmp_path / "rows.jsonl", tmp_path / "out", **changes)
    with pytest.raises(UserError, match=message) as refusal:
        tokenize(corpus, progress=False)
    assert str(refusal.value).startswith(
        f"data.heldout_fraction={changes['heldout_fraction']} of {tmp_path / 'rows.jsonl'} is "
    )
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"], (
        "files are left over that would make the advised command fail"
    )
    without = corpus.model_copy(update={"heldout_fraction": 0.0})
    assert tokenize(without, progress=False)["splits"]["heldout"]["samples"] == 0
    shutil.rmtree(without.path)
    more = corpus.model_copy(update={"heldout_fraction": 0.5, "seq_length": 64})
    assert tokenize(more, progress=False)["splits"]["heldout"]["samples"] > 0


def test_second_job_on_the_same_corpus_is_refused(workspace, documents, tmp_path):
    with open(tmp_path / "out.partial.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="being written by another"):
            tokenize(rows_config(workspace, documents, tmp_path / "out"), progress=False)


def test_documents_without_a_separating_token_are_refused(workspace, documents, tmp_path):
    with pytest.raises(UserError, match="data.bos=true"):
        tokenize(rows_config(workspace, documents, tmp_path / "out", bos=True), progress=False)
    with pytest.raises(UserError, match="both false"):
        tokenize(rows_config(workspace, documents, tmp_path / "out", eos=False), progress=False)


PRESETS = {
    "starcoder_python": "starcoder",
    "openwebmath": "openwebmath",
    "magicoder_evol_instruct": "magicoder",
    "metamathqa": "metamath",
}


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_runs_on_a_local_copy(preset, shared_data, tmp_path):
    data = load_data_config(
        [
            f"data={preset}",
            f"data.source.path={shared_data}/samples/{PRESETS[preset]}_like.jsonl",
            f"data.path={tmp_path / 'out'}",
            f"data.tokenizer={shared_data / 'llama2-tokenizer'}",
            "data.tokens=null", "data.seq_length=1024", "data.heldout_fraction=0.0",
            "data.decontaminate=null", "data.tasks=1",
        ]
    )  # fmt: skip
    manifest = tokenize(data, progress=False)
    assert manifest["encoder"]["name"] == "gigatoken"
    train = manifest["splits"]["train"]
    assert manifest["documents_read"] == train["documents"] + sum(manifest["dropped"].values())
    tokenizer = Tokenizer(data.tokenizer)
    shards = TokenShards(data.path, "train")
    rows = {
        json.loads(line)[data.source.text_key]
        for line in Path(data.source.path).read_text().splitlines()
    }
    if data.source.prompt is None:
        return
    assert 0 < train["padding_fraction"] < 0.05
    assert train["cut_documents"] == 0
    samples = shards.samples(np.arange(len(shards)))
    for row, tokens in enumerate(samples.tokens_NT):
        *pieces, padding = np.split(tokens, samples.values("lengths", row).cumsum())
        for ids, prompt in zip(pieces, samples.values("prompt_lengths", row)):
            text = tokenizer.backend.decode(ids[:-1].tolist(), skip_special_tokens=False)
            response = tokenizer.backend.decode(ids[prompt:-1].tolist(), skip_special_tokens=False)
            assert ids[-1] == tokenizer.eos_id
            assert text.endswith(response)
            assert text.startswith("Below is an instruction")
            assert text.partition("### Response:\n")[2] in rows
            assert response in rows or response.lstrip("\n") in rows
        assert (padding == tokenizer.eos_id).all()


def test_decontamination_drops_only_reformatted_problems(shared_data, tmp_path):
    evals = shared_data / "evals"
    tasks = {
        "humaneval": "humaneval.jsonl", "mbpp": "mbpp_test.jsonl", "gsm8k": "gsm8k_test.jsonl",
        "hellaswag": "hellaswag_validation_1000.jsonl",
        "winogrande": "winogrande_validation.jsonl", "arc_challenge": "arc_challenge_test.jsonl",
    }  # fmt: skip
    code = json.loads((evals / tasks["humaneval"]).read_text().splitlines()[5])
    question = json.loads((evals / tasks["gsm8k"]).read_text().splitlines()[0])
    rows = [
        json.loads(line)
        for line in (shared_data / "samples" / "openwebmath_like.jsonl").read_text().splitlines()
    ]
    planted = {
        "humaneval: HumanEval/5": "# my utilities\n"
        + code["prompt"].upper().replace("    ", "\t\t")
        + "    return 1\n",
        "gsm8k: 0": "A nice puzzle!\n\n  "
        + question["question"].replace(" ", "\n ").replace("\u2019", "'").title(),
    }
    for place, text in zip((3, 500), planted.values()):
        rows.insert(
            place, {"text": text, "url": f"https://planted/{place}", "date": "", "metadata": ""}
        )
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load_data_config(
        [
            "data=openwebmath", f"data.source.path={tmp_path / 'docs.jsonl'}",
            f"data.path={tmp_path / 'out'}", "data.tasks=1",
            f"data.tokenizer={shared_data / 'llama2-tokenizer'}", "data.seq_length=512",
            *(f"data.decontaminate.tasks.{task}={evals / file}" for task, file in tasks.items()),
        ]
    )  # fmt: skip
    manifest = tokenize(data, progress=False)
    report = [
        json.loads(line)
        for line in (tmp_path / "out" / "contaminated.jsonl").read_text().splitlines()
    ]
    assert {line["problem"]: line["url"] for line in report} == {
        "humaneval: HumanEval/5": "https://planted/3",
        "gsm8k: 0": "https://planted/500",
    }
    assert manifest["dropped"]["contaminated"] == 2
    found = manifest["decontamination"]["tasks"]
    assert {task: counts["documents_dropped"] for task, counts in found.items()} == {
        task: int(task in ("humaneval", "gsm8k")) for task in tasks
    }
    assert found["humaneval"]["problems"] == 164
    assert found["gsm8k"]["problems"] == 1319


def test_documents_and_shards_may_be_in_s3(
    workspace, documents, tmp_path, store, small_parts, monkeypatch
):
    import boto3

    monkeypatch.chdir(tmp_path)
    client = boto3.client("s3")
    for path in documents.iterdir():
        client.upload_file(str(path), "corpora", f"docs/{path.name}")
    local = tokenize(rows_config(workspace, documents, tmp_path / "local"), progress=False)
    corpus = rows_config(workspace, documents, tmp_path / "unused").model_copy(
        update={"path": "s3://corpora/shards"}
    )
    remote = corpus.model_copy(
        update={"source": corpus.source.model_copy(update={"path": "s3://corpora/docs"})}
    )
    manifest = tokenize(remote, progress=False)
    assert manifest["fingerprint"] == local["fingerprint"]
    assert manifest["splits"] == local["splits"]
    assert not list(tmp_path.glob("*.partial"))
    shards = [
        item["Key"].removeprefix("shards/")
        for item in client.list_objects_v2(Bucket="corpora", Prefix="shards/train")["Contents"]
    ]
    assert sorted(shards) == sorted(
        str(path.relative_to(tmp_path / "local"))
        for path in (tmp_path / "local" / "train").rglob("*.*")
    )
    assert tokenize(remote, progress=False) == manifest  # it is finished
    one_file = corpus.source.model_copy(update={"path": "s3://corpora/docs/d.parquet"})
    assert [document.text for document in read_documents(one_file)] == pq.read_table(
        documents / "d.parquet"
    )["text"].to_pylist()
    client.delete_object(Bucket="corpora", Key="shards/train/00000/shard.00000.mds.zstd")
    assert tokenize(remote, progress=False) == manifest  # tokenized again
    assert (
        client.head_object(Bucket="corpora", Key="shards/train/00000/shard.00000.mds.zstd")[
            "ContentLength"
        ]
        > 0
    )
