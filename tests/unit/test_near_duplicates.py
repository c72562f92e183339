"""Test training documents that are near-duplicates of held-out ones.

They are found, named, counted and dropped.
"""

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


def some_words_changed(text: str, rng: random.Random) -> str:
    return re.sub(
        r"\w+", lambda word: f"other{rng.random()}" if rng.random() < 0.01 else word[0], text
    )


def a_variable_renamed(text: str, rng: random.Random) -> str:
    return re.sub(rf"\b{rng.choice(re.findall(r'[a-z]{4,}', text))}\b", "renamed", text)


VARIANTS = {
    "whitespace": lambda text, rng: re.sub(
        r"\s+", lambda _: rng.choice([" ", "\n", "\t ", "\u00a0"]), text
    ),
    "case": lambda text, rng: text.upper(),
    "quotes": lambda text, rng: text.replace('"', "“").replace("'", "’").replace(",", " , "),
    "a licence": lambda text, rng: LICENCE + text,
    "some words": some_words_changed,
    "a tail cut off": lambda text, rng: text[: len(text) * 9 // 10],
    "a variable": a_variable_renamed,
    "the order of sentences": lambda text, rng: ". ".join(
        rng.sample(text.split(". "), len(text.split(". ")))
    ),
}


@pytest.fixture(scope="module")
def originals() -> list[str]:
    """Return real code of 200 words and more, of which no file is like another."""
    source = data_config(
        Path(), "x", source={"kind": "text", "path": "stdlib", "glob": "[a-d]*.py"}
    ).source
    return [
        document.text for document in read_documents(source) if len(words_of(document.text)) > 200
    ]


@pytest.mark.parametrize("kind", VARIANTS)
def test_every_kind_of_near_duplicate_is_found_and_unlike_documents_are_not(originals, kind):
    rng = random.Random(1)
    heldout, others = originals[::2], originals[1::2]
    index = HeldoutSketches.of(
        np.arange(len(heldout), dtype=np.uint64), sketches([text.encode() for text in heldout])
    )
    changed = [VARIANTS[kind](text, rng).encode() for text in heldout]
    assert np.mean(index.match(sketches(changed)) == np.arange(len(heldout))) >= 0.95
    assert (index.match(sketches([text.encode() for text in others])) == NONE).all()


def test_equal_bins_estimate_the_similarity_of_the_sets_of_five_words(originals):
    rng = random.Random(2)
    for text in originals[:20]:
        other = text
        for _ in range(6):
            other = some_words_changed(other, rng)
            first, second = (
                set(zip(*(words_of(version)[start:] for start in range(5))))
                for version in (text, other)
            )
            similarity = len(first & second) / len(first | second)
            share = (np.equal(*sketches([text.encode(), other.encode()]))).mean()
            assert abs(share - similarity) < 5 * (0.25 / BINS) ** 0.5  # five standard errors


def test_a_sketch_is_a_function_of_the_words_alone(originals, monkeypatch):
    """Check that a sketch depends on nothing else.

    It is the same whatever documents come with it, however long it is, and where a long one is cut.
    """
    texts = [*originals[:8], " ".join(originals), "", "—=(", "Ⱥ" * 1000, "two words"]
    encoded = [text.encode() for text in texts]
    alone = np.concatenate([sketches([text]) for text in encoded])
    assert np.array_equal(sketches(encoded), alone)
    assert np.array_equal(sketches([" ".join(words_of(text)).encode() for text in texts]), alone)
    monkeypatch.setattr(ngrams, "SEGMENT_BYTES", 10_000)
    cut = sketches(encoded)
    assert (
        np.mean(cut == alone) > 0.99
    )  # a run of words at the end of each piece is one that the text has not


def test_documents_of_few_words_are_near_duplicates_where_all_their_words_are_equal():
    heldout = ["To be, or not", "one", "", "--- ---"]
    index = HeldoutSketches.of(
        np.arange(len(heldout), dtype=np.uint64), sketches([text.encode() for text in heldout])
    )
    training = ["to BE or (not)", "to be or", "ONE!", "two", "", "---"]
    found = index.match(sketches([text.encode() for text in training])).tolist()
    assert found == [0, NONE, 1, NONE, NONE, NONE]


def test_without_held_out_documents_there_is_nothing_to_match():
    index = HeldoutSketches.of(np.zeros(0, np.uint64), np.zeros((0, BINS), np.uint16))
    assert index.match(sketches([b"some words that are in no other text"])).tolist() == [NONE]


@pytest.fixture(scope="module")
def families(originals, tmp_path_factory) -> Path:
    """Return documents, each followed by a near-duplicate of it in one of the ways."""
    rng, rows = random.Random(3), []
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
def made(workspace, families, tmp_path_factory):
    """Return made(action) -> the folder of the families' corpus, each made once."""
    folder = tmp_path_factory.mktemp("made")

    @functools.cache
    def make(action: str) -> Path:
        corpus = config(workspace, families, folder / action, near_duplicates=action)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(job_folder, "_BUCKET_BYTES", 300_000)
            tokenize(corpus, progress=False)
        return Path(corpus.path)

    return make


def config(workspace, source: Path, path: Path, **changes):
    values = {"source": {"kind": "rows", "path": str(source)}, "tasks": 1, "heldout_fraction": 0.3}
    return data_config(workspace, "families", path=str(path), **values | changes)


def pairs_of(corpus: Path) -> list[dict]:
    return [
        json.loads(line) for line in (corpus / "near_duplicates.jsonl").read_text().splitlines()
    ]


def family_of(source: Path, name: str) -> int:
    """Return the family of a document.

    The document is named by its file and the byte where its line begins.
    """
    path, _, position = name.rpartition(":")
    assert path == source.name
    return json.loads(source.read_bytes()[int(position) :].splitlines()[0])["family"]


def test_pairs_are_named_and_counted(made, families):
    documents = len(families.read_text().splitlines())
    manifest, pairs = read_manifest(str(made("count"))), pairs_of(made("count"))
    found = manifest["near_duplicates"]
    assert found["action"] == "count" and found["documents"] == len(pairs) > 10
    for pair in pairs:
        assert pair["document"] != pair["heldout"]
        assert family_of(families, pair["document"]) == family_of(families, pair["heldout"])
    heldout = manifest["splits"]["heldout"]["documents"]
    assert heldout <= found["compared_with"] <= heldout + 1  # the last one may fill no sample
    assert manifest["documents_read"] == documents
    # Every family of which a member is in each split, but for a few that were changed too much.
    numbers = {split: set(documents_of(made("count"), split)) for split in ("train", "heldout")}
    lines = {
        split: {family_of(families, f"{families.name}:{number}") for number in of_split}
        for split, of_split in numbers.items()
    }
    assert len(pairs) >= 0.9 * len(lines["train"] & lines["heldout"])


def documents_of(corpus: Path, split: str) -> list[int]:
    shards = TokenShards(str(corpus), split)
    return shards.samples(np.arange(len(shards))).values("documents").tolist()


def test_counting_changes_no_byte_of_the_shards(made):
    def shards(corpus: Path) -> dict[str, bytes]:
        files = [
            path
            for path in corpus.rglob("*")
            if path.is_file() and path.parent != corpus or path.name == "sources.jsonl"
        ]
        return {str(path.relative_to(corpus)): path.read_bytes() for path in files}

    assert shards(made("count")) == shards(made("keep"))
    assert read_manifest(str(made("keep")))["near_duplicates"] == {"action": "keep"}
    assert not (made("keep") / "near_duplicates.jsonl").exists()


def test_dropping_leaves_out_what_was_counted_and_nothing_else(made):
    counted, dropped = (read_manifest(str(made(action))) for action in ("count", "drop"))
    near = {int(pair["document"].rpartition(":")[2]) for pair in pairs_of(made("count"))}
    train = {action: set(documents_of(made(action), "train")) for action in ("count", "drop")}
    assert train["drop"].isdisjoint(near) and train["count"] - near <= train["drop"] | {
        max(train["count"])
    }
    assert documents_of(made("drop"), "heldout") == documents_of(made("count"), "heldout")
    assert dropped["near_duplicates"] | {"action": "count"} == counted["near_duplicates"]
    assert pairs_of(made("drop")) == pairs_of(made("count"))
    assert (
        dropped["dropped"]["near_duplicate"] == len(near)
        and "near_duplicate" not in counted["dropped"]
    )
    kept = sum(counts["documents"] for counts in dropped["splits"].values())
    assert dropped["documents_read"] == kept + sum(dropped["dropped"].values())


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_a_budget_is_filled_from_what_is_kept_and_counts_what_it_holds(
    workspace, families, made, tmp_path, packing
):
    samples = read_manifest(str(made("drop")))["splits"]["train"]["samples"] // 2
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
        named = {int(pair["document"].rpartition(":")[2]) for pair in pairs_of(tmp_path / action)}
        written = set(documents_of(tmp_path / action, "train"))
        assert named and (named <= written if action == "count" else named.isdisjoint(written))
        assert manifest["near_duplicates"]["documents"] == len(named)


def test_the_wording_of_a_prompt_makes_no_near_duplicates(workspace, tmp_path):
    before = "".join(f"Heed rule {number} of the house. " for number in range(12))
    after = "\n### Response: here it is\n"
    rng = random.Random(4)
    rows = [
        {"ask": f"question {number} {rng.random()}", "text": f"answer {rng.random()}"}
        for number in range(300)
    ]

    def split(row: dict) -> str:
        return split_of(before + row["ask"] + after + row["text"], 0.3)

    heldout = next(row for row in rows if split(row) == HELDOUT)
    copies = ({**heldout, "text": heldout["text"] + "!" * marks} for marks in range(1, 99))
    rows.append(next(copy for copy in copies if split(copy) == TRAIN))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {
        "kind": "rows",
        "path": str(tmp_path / "rows.jsonl"),
        "prompt": f"{before}{{ask}}{after}",
    }
    corpus = config(workspace, tmp_path, tmp_path / "out", packing="best_fit", seq_length=1024)
    corpus = corpus.model_copy(update={"source": SourceConfig.model_validate(source)})
    assert tokenize(corpus, progress=False)["near_duplicates"]["documents"] == 1


def test_a_corpus_from_before_the_key_is_the_same_unless_near_duplicates_are_dropped(
    workspace, families, made, tmp_path
):
    shutil.copytree(made("keep"), tmp_path / "out")
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
        tokenize(config(workspace, families, made("drop")), progress=False)


def test_a_job_begun_before_the_key_goes_on(workspace, families, made, tmp_path, monkeypatch):
    monkeypatch.setattr(job_folder, "_BUCKET_BYTES", 300_000)
    begun, work = (
        config(workspace, families, tmp_path / "out", near_duplicates="keep"),
        tmp_path / "out.partial",
    )
    with monkeypatch.context() as patch:
        patch.setattr(
            job.Publish, "_publish", lambda self: (_ for _ in ()).throw(UserError("stopped here"))
        )
        with pytest.raises(UserError, match="stopped here"):
            tokenize(begun, progress=False)
    before = json.loads((work / "plan.json").read_text())
    del before["near_duplicates"]
    (work / "plan.json").write_text(json.dumps(before))
    with pytest.raises(UserError, match='-> "drop"'):
        tokenize(begun.model_copy(update={"near_duplicates": "drop"}), progress=False)
    tokenize(begun.model_copy(update={"near_duplicates": "count"}), progress=False)
    assert pairs_of(tmp_path / "out") == pairs_of(made("count"))


def test_the_command_says_how_many_there_are_and_what_drops_them(workspace, families, made, capsys):
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
            r".*data.near_duplicates=drop leaves them out",
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
            main([*arguments, f"data.path={made(action)}", f"data.near_duplicates={action}"]) == 0
        ), capsys.readouterr().err
        printed = capsys.readouterr().out
        assert len(re.findall(expected, printed)) == 1, printed
