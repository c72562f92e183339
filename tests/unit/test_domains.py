"""Test which held-out domains measure what a run learns and which measure what it forgets."""

import pytest
from conftest import overrides

from retemper.pipeline.config.compose import load_config
from retemper.pipeline.config.existing_run import load_run
from retemper.pipeline.data.domains import Domains, domains_of, measures
from retemper.pipeline.errors import UserError
from retemper.pipeline.runs.run_folder import start_or_resume

LORA = ["method=lora", "init_from=base", "model=gpt_tiny"]
WIKI = ["data.mixture.wiki.path={data}/wiki", "data.mixture.wiki.fraction=0.25"]
REPLAY = ["data.replay.path={data}/math", "data.replay.fraction=0.1"]
EMPTY = "evals.heldout={}"


def config_of(tmp_path, *changes):
    """Return the config of a run on corpus "code" that is scored on "code" and "math"."""
    resolved = [change.replace("{data}", str(tmp_path / "data")) for change in changes]
    return load_config(overrides(tmp_path, "run", *resolved, corpus="code"))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([], Domains(["code"], ["math"], [])),
        # A domain with the name of a stream of the mixture is learned, even from another folder.
        (
            [*WIKI, "evals.heldout.wiki={data}/wiki-heldout"],
            Domains(["code", "wiki"], ["math"], []),
        ),
        # So is a domain with the folder of a stream, under any name and any spelling of the path.
        (
            [*WIKI, "evals.heldout.encyclopedia={data}/../data/wiki/"],
            Domains(["code", "encyclopedia"], ["math"], []),
        ),
        # Every replay stream has the name "replay", so its domain is recognised by the folder.
        (REPLAY, Domains(["code"], ["math"], ["math"])),
        (
            ["data.replay.path={data}/books", REPLAY[1], "evals.heldout.replay={data}/books2"],
            Domains(["code"], ["math", "replay"], ["replay"]),
        ),
        # If the name and the folder disagree, the folder decides.
        (
            [*WIKI, EMPTY, "evals.heldout.wiki={data}/code", "evals.heldout.code={data}/wiki"],
            Domains(["code", "wiki"], [], []),
        ),
        (
            [*REPLAY, EMPTY, "evals.heldout.code={data}/math", "evals.heldout.new={data}/code"],
            Domains(["new"], ["code"], ["code"]),
        ),
        # A corpus that is both trained on and replayed is learned.
        (["data.replay.path={data}/code", REPLAY[1]], Domains(["code"], ["math"], [])),
        (["evals.learned=[math]", *REPLAY], Domains(["math"], ["code"], [])),
        (["evals.learned=[]", *REPLAY], Domains([], ["code", "math"], ["math"])),
        ([EMPTY], Domains([], [], [])),
        (
            ["data.path=s3://bucket/code/", EMPTY, "evals.heldout.new=s3://bucket/code"],
            Domains(["new"], [], []),
        ),
    ],
)
def test_a_domain_is_learned_or_old_according_to_its_stream(tmp_path, changes, expected):
    found = domains_of(config_of(tmp_path, *changes))
    assert [sorted(names) for names in (found.learned, found.old, found.replayed)] == [
        expected.learned,
        expected.old,
        expected.replayed,
    ]


def test_a_symlink_to_a_corpus_counts_as_that_corpus(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "linked").symlink_to("code")
    config = config_of(tmp_path, EMPTY, "evals.heldout.new={data}/linked")
    assert domains_of(config).learned == ["new"]


def test_a_domain_that_is_scored_later_is_recognised_by_its_name(tmp_path):
    config = config_of(tmp_path, *WIKI, EMPTY)
    assert domains_of(config, ["wiki", "news", "code"]) == Domains(["wiki", "code"], ["news"], [])


def test_an_unknown_learned_domain_is_refused_with_the_nearest_name(tmp_path):
    with pytest.raises(
        UserError,
        match=r"evals.learned: coed is not a domain of evals.heldout \(code, math\).*code",
    ):
        config_of(tmp_path, "evals.learned=[coed]")


def test_evals_learned_is_kept_when_a_run_is_scored_with_another_preset(tmp_path):
    config = config_of(tmp_path, "evals.learned=[math]")
    start_or_resume(config, 0)
    assert load_run(config.run_dir, ["evals=quick"]).evals.learned == ["math"]
    assert load_run(config.run_dir, ["evals.learned=[code]"]).evals.learned == ["code"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            [],
            ["what it learns is measured on held-out code",
             "what it forgets is measured on held-out math"],
        ),
        (
            [*REPLAY, *WIKI, "evals.heldout.wiki={data}/wiki"],
            ["what it learns is measured on held-out code, wiki",
             "what it forgets is measured on held-out math (replayed)"],
        ),
        (
            [EMPTY, "evals.heldout.math={data}/math"],
            ["no learning will be measured: no domain of evals.heldout is of the text "
             "that it trains on (code). "
             "Set evals.heldout.code={data}/code, or name such domains in evals.learned=[…]",
             "what it forgets is measured on held-out math"],
        ),
        (
            [EMPTY, "evals.heldout.code={data}/code"],
            ["what it learns is measured on held-out code",
             "no forgetting will be measured on held-out text: "
             "evals.heldout has no domain that it does not train on. "
             "Set evals.heldout.NAME=FOLDER to token shards of text that the base knew"],
        ),
    ],
)  # fmt: skip
def test_measured_domains_are_listed_with_advice_for_missing_ones(tmp_path, changes, expected):
    lines = [line.replace("{data}", str(tmp_path / "data")) for line in expected]
    assert measures(config_of(tmp_path, *changes)) == lines
