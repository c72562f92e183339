"""Test that near-duplicates of held-out documents in the training split are found and dropped."""

import functools
import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import data_config

from retemper.pipeline.cli import main
from retemper.pipeline.corpus.format import HELDOUT, TRAIN
from retemper.pipeline.corpus.manifest import read_manifest
from retemper.pipeline.data.shards import TokenShards
from retemper.pipeline.errors import UserError
from retemper.pipeline.files.sealed import dump_sealed
from retemper.pipeline.schema.data import SourceConfig
from retemper.tokenize import job, job_folder, ngrams
from retemper.tokenize.identify import split_of
from retemper.tokenize.job import tokenize
from retemper.tokenize.sketch import BINS, NONE, HeldoutSketches, sketches
from retemper.tokenize.sources import read_documents

LICENCE = "".join(
    f"# Permission {number} is granted to whoever keeps this notice in every copy.\n"
    for number in range(3)
)


def words_of(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def change_some_words(text: str, rng: random.Random) -> str:
    return re.sub(
        r"\w+", lambda word: f"other{rng.random()}" if rng.random() < 0.01 else word[0], text
    )


def rename_a_variable(text: str, rng: random.Random) -> str:
    return re.sub(rf"\b{rng.choice(re.findall(r'[a-z]{4,}', text))}\b", "renamed", text)


VARIANTS = {
    "whitespace": lambda text, rng: re.sub(
        r"\s+", lambda _: rng.choice([" ", "\n", "\t ", "\u00a0"]), text
    ),
    "case": lambda text, rng: text.upper(),
    "quotes": lambda text, rng: text.replace('"', "“").replace("'", "’").replace(",", " , "),
    "a licence": lambda text, rng: LICENCE + text,
    "some words": change_some_words,
    "a tail cut off": lambda text, rng: text[: len(text) * 9 // 10],
    "a variable": rename_a_variable,
    "the order of sentences": lambda text, rng: ". ".join(
        rng.sample(text.split(". "), len(text.split(". ")))
    ),
}


@pytest.fixture(scope="module")
def originals() -> list[str]:
    """Return real files of code with more than 200 words, none similar to another."""
    source = data_config(
        Path(), "x", source={"kind": "text", "path": "stdlib", "glob": "[a-d]*.py"}
    ).source
    return [
        document.text for document in read_documents(source) if len(words_of(document.text)) > 200
    ]


@pytest.mark.parametrize("kind", VARIANTS)
def test_near_duplicates_are_found_and_unrelated_documents_are_not(originals, kind):
    rng = random.Random(1)
    heldout = originals[::2]
    others = originals[1::2]
    index = HeldoutSketches.of(
        np.arange(len(heldout), dtype=np.uint64), sketches([text.encode() for text in heldout])
    )
    changed = [VARIANTS[kind](text, rng).encode() for text in heldout]
    assert np.mean(index.match(sketches(changed)) == np.arange(len(heldout))) >= 0.95
    assert (index.match(sketches([text.encode() for text in others])) == NONE).all()


def test_share_of_equal_bins_estimates_the_jaccard_similarity(originals):
    rng = random.Random(2)
    for text in originals[:20]:
        other = text
        for _ in range(6):
            other = change_some_words(other, rng)
            first, second = (
                set(zip(*(words_of(version)[start:] for start in range(5))))
                for version in (text, other)
            )
            similarity = len(first & second) / len(first | second)
            share = (np.equal(*sketches([text.encode(), other.encode()]))).mean()
            assert abs(share - similarity) < 5 * (0.25 / BINS) ** 0.5  # five standard errors


def test_sketch_depends_only_on_the_words(originals, monkeypatch):
    """Check that a sketch does not depend on the other documents of a call or on punctuation.

    A long document is processed in segments, which changes its sketch only at their ends.
    """
    texts = [*originals[:8], " ".join(originals), "", "—=(", "Ⱥ" * 1000, "two words"]
    encoded = [text.encode() for text in texts]
    alone = np.concatenate([sketches([text]) for text in encoded])
    assert np.array_equal(sketches(encoded), alone)
    assert np.array_equal(sketches([" ".join(words_of(text)).encode() for text in texts]), alone)
    monkeypatch.setattr(ngrams, "SEGMENT_BYTES", 10_000)
    in_segments = sketches(encoded)
    # The end of each segment adds a sequence of words that the text does not contain.
    assert np.mean(in_segments == alone) > 0.99


def test_short_documents_match_only_if_all_their_words_are_equal():
    heldout = ["To be, or not", "one", "", "--- ---"]
    index = HeldoutSketches.of(
        np.arange(len(heldout), dtype=np.uint64), sketches([text.encode() for text in heldout])
    )
    training = ["to BE or (not)", "to be or", "ONE!", "two", "", "---"]
    found = index.match(sketches([text.encode() for text in training])).tolist()
    assert found == [0, NONE, 1, NONE, NONE, NONE]


def test_nothing_matches_without_held_out_documents():
    index = HeldoutSketches.of(np.zeros(0, np.uint64), np.zeros((0, BINS), np.uint16))
    assert index.match(sketches([b"some words that are in no other text"])).tolist() == [NONE]


@pytest.fixture(scope="module")
def families(originals, tmp_path_factory) -> Path:
    """Return a file of rows: each document is followed by a near-duplicate of it."""
    rng = random.Random(3)
    rows = []
    for number, text in enumerate(originals[:48]):
        kind = list(VARIANTS)[number % len(VARIANTS)]
        rows += [
            {"family": number, "text": text},
            {"family": number, "text": VARIANTS[kind](text, rng)},
        ]
    path = tmp_path_factory.mktemp("families") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def corpus_of(workspace, families, tmp_path_factory):
    """Return a function: action -> folder of the families' corpus, tokenized once per action."""
    folder = tmp_path_factory.mktemp("corpora")

    @functools.cache
    def tokenized(action: str) -> Path:
        corpus = config(workspace, families, folder / action, near_duplicates=action)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(job_folder, "_BUCKET_BYTES", 300_000)
            tokenize(corpus, progress=False)
        return Path(corpus.path)

    return tokenized


def config(workspace, source: Path, path: Path, **changes):
    values = {"source": {"kind": "rows", "path": str(source)}, "tasks": 1, "heldout_fraction": 0.3}
    return data_config(workspace, "families", path=str(path), **values | changes)


def pairs_of(corpus: Path) -> list[dict]:
    return [
        json.loads(line) for line in (corpus / "near_duplicates.jsonl").read_text().splitlines()
    ]


def family_of(source: Path, name: str) -> int:
    """Return the family of a document, named by its file and the byte where its line begins."""
    path, _, position = name.rpartition(":")
    assert path == source.name
    return json.loads(source.read_bytes()[int(position) :].splitlines()[0])["family"]


def test_pairs_are_reported_and_counted(corpus_of, families):
    documents = len(families.read_text().splitlines())
    manifest = read_manifest(str(corpus_of("count")))
    pairs = pairs_of(corpus_of("count"))
    found = manifest["near_duplicates"]
    assert found["action"] == "count"
    assert found["documents"] == len(pairs) > 10
    for pair in pairs:
        assert pair["document"] != pair["heldout"]
        assert family_of(families, pair["document"]) == family_of(families, pair["heldout"])
    heldout = manifest["splits"]["heldout"]["documents"]
    # The last held-out document may fill no sample, so that it is not in the manifest's count.
    assert heldout <= found["compared_with"] <= heldout + 1
    assert manifest["documents_read"] == documents
    # A pair is reported for every family with members in both splits, except for a few members
    # that were changed too much.
    families_by_split = {
        split: {
            family_of(families, f"{families.name}:{number}")
            for number in documents_of(corpus_of("count"), split)
        }
        for split in ("train", "heldout")
    }
    assert len(pairs) >= 0.9 * len(families_by_split["train"] & families_by_split["heldout"])


def documents_of(corpus: Path, split: str) -> list[int]:
    shards = TokenShards(str(corpus), split)
    return shards.samples(np.arange(len(shards))).values("documents").tolist()


def test_counting_does_not_change_the_shards(corpus_of):
    def shards(corpus: Path) -> dict[str, bytes]:
        files = [
            path
            for path in corpus.rglob("*")
            if path.is_file() and path.parent != corpus or path.name == "sources.jsonl"
        ]
        return {str(path.relative_to(corpus)): path.read_bytes() for path in files}

    assert shards(corpus_of("count")) == shards(corpus_of("keep"))
    assert read_manifest(str(corpus_of("keep")))["near_duplicates"] == {"action": "keep"}
    assert not (corpus_of("keep") / "near_duplicates.jsonl").exists()


def test_drop_removes_exactly_the_counted_documents(corpus_of):
    counted, dropped = (read_manifest(str(corpus_of(action))) for action in ("count", "drop"))
    near = {int(pair["document"].rpartition(":")[2]) for pair in pairs_of(corpus_of("count"))}
    train = {action: set(documents_of(corpus_of(action), "train")) for action in ("count", "drop")}
    assert train["drop"].isdisjoint(near)
    assert train["count"] - near <= train["drop"] | {max(train["count"])}
    assert documents_of(corpus_of("drop"), "heldout") == documents_of(corpus_of("count"), "heldout")
    assert dropped["near_duplicates"] | {"action": "count"} == counted["near_duplicates"]
    assert pairs_of(corpus_of("drop")) == pairs_of(corpus_of("count"))
    assert dropped["dropped"]["near_duplicate"] == len(near)
    assert "near_duplicate" not in counted["dropped"]
    kept = sum(counts["documents"] for counts in dropped["splits"].values())
    assert dropped["documents_read"] == kept + sum(dropped["dropped"].values())


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_budget_is_filled_from_kept_documents_and_counts_only_those_written(
    workspace, families, corpus_of, tmp_path, packing
):
    samples = read_manifest(str(corpus_of("drop")))["splits"]["train"]["samples"] // 2
    for action in ("count", "drop"):
        corpus = config(
            workspace,
            families,
            tmp_path / action,
            near_duplicates=action,
            tokens=samples * 64,
            packing=packing,
        )
        manifest = tokenize(corpus, progress=False)
        assert packing == "best_fit" or manifest["splits"]["train"]["samples"] == samples
        assert manifest["documents_read"] == sum(
            counts["documents"] for counts in manifest["splits"].values()
        ) + sum(manifest["dropped"].values())
        reported = {
            int(pair["document"].rpartition(":")[2]) for pair in pairs_of(tmp_path / action)
        }
        written = set(documents_of(tmp_path / action, "train"))
        assert reported
        assert reported <= written if action == "count" else reported.isdisjoint(written)
        assert manifest["near_duplicates"]["documents"] == len(reported)


def test_shared_prompt_text_does_not_make_near_duplicates(workspace, tmp_path):
    prefix = "".join(f"Heed rule {number} of the house. " for number in range(12))
    suffix = "\n### Response: here it is\n"
    rng = random.Random(4)
    rows = [
        {"ask": f"question {number} {rng.random()}", "text": f"answer {rng.random()}"}
        for number in range(300)
    ]

    def split(row: dict) -> str:
        return split_of(prefix + row["ask"] + suffix + row["text"], 0.3)

    heldout = next(row for row in rows if split(row) == HELDOUT)
    copies = ({**heldout, "text": heldout["text"] + "!" * marks} for marks in range(1, 99))
    rows.append(next(copy for copy in copies if split(copy) == TRAIN))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {
        "kind": "rows",
        "path": str(tmp_path / "rows.jsonl"),
        "prompt": f"{prefix}{{ask}}{suffix}",
    }
    corpus = config(workspace, tmp_path, tmp_path / "out", packing="best_fit", seq_length=1024)
    corpus = corpus.model_copy(update={"source": SourceConfig.model_validate(source)})
    assert tokenize(corpus, progress=False)["near_duplicates"]["documents"] == 1


def test_corpus_without_the_key_is_accepted_unless_near_duplicates_are_dropped(
    workspace, families, corpus_of, tmp_path
):
    shutil.copytree(corpus_of("keep"), tmp_path / "out")
    manifest = read_manifest(str(tmp_path / "out"))
    del manifest["near_duplicates"]
    assert "near_duplicates" not in manifest["made_from"]
    (tmp_path / "out" / "manifest.json").write_text(dump_sealed(manifest))
    for action in ("count", "keep"):
        assert (
            tokenize(
                config(workspace, families, tmp_path / "out", near_duplicates=action),
                progress=False,
            )
            == manifest
        )
    with pytest.raises(UserError, match='data.near_duplicates: "count or keep" -> "drop"'):
        tokenize(
            config(workspace, families, tmp_path / "out", near_duplicates="drop"), progress=False
        )
    with pytest.raises(UserError, match='data.near_duplicates: "drop" -> "count or keep"'):
        tokenize(config(workspace, families, corpus_of("drop")), progress=False)


def test_job_started_without_the_key_continues(
    workspace, families, corpus_of, tmp_path, monkeypatch
):
    monkeypatch.setattr(job_folder, "_BUCKET_BYTES", 300_000)
    begun = config(workspace, families, tmp_path / "out", near_duplicates="keep")
    work = tmp_path / "out.partial"
    with monkeypatch.context() as patch:
        patch.setattr(
            job.Publish, "_publish", lambda self: (_ for _ in ()).throw(UserError("stopped here"))
        )
        with pytest.raises(UserError, match="stopped here"):
            tokenize(begun, progress=False)
    plan = json.loads((work / "plan.json").read_text())
    del plan["near_duplicates"]
    (work / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(UserError, match='-> "drop"'):
        tokenize(begun.model_copy(update={"near_duplicates": "drop"}), progress=False)
    tokenize(begun.model_copy(update={"near_duplicates": "count"}), progress=False)
    assert pairs_of(tmp_path / "out") == pairs_of(corpus_of("count"))


def test_command_prints_the_count_and_how_to_drop_near_duplicates(
    workspace, families, corpus_of, capsys
):
    arguments = [
        "tokenize",
        "data=local",
        f"data.source.path={families}",
        f"data.tokenizer={workspace / 'data' / 'tokenizer'}",
        "data.name=families",
        "data.seq_length=64",
        "data.heldout_fraction=0.3",
    ]
    for action, expected in (
        (
            "count",
            r"near-duplicates of the \d+ held-out documents: \d+ of \d+ training documents "
            r".*data.near_duplicates=drop with another data.path leaves them out",
        ),
        (
            "drop",
            r"near-duplicates of the \d+ held-out documents: \d+ documents left out of training",
        ),
        (
            "keep",
            r"near-duplicates of held-out documents were not looked for: .*near_duplicates=count",
        ),
    ):
        assert (
            main([*arguments, f"data.path={corpus_of(action)}", f"data.near_duplicates={action}"])
            == 0
        ), capsys.readouterr().err
        output = capsys.readouterr().out
        assert len(re.findall(expected, output)) == 1, output
