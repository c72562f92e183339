"""Test a base that trains on after other runs have started from it: they keep their start."""

import shutil

import pytest
from conftest import launch, overrides
from safetensors.torch import load_file
from test_branches import curve, tensors

from retemper.pipeline.checkpoint.base import read_record
from retemper.pipeline.checkpoint.commit import committed_steps
from retemper.pipeline.config.existing_run import load_run
from retemper.pipeline.evals import worker
from retemper.pipeline.runs import eval_folder

STEP = 8 * 64
EMBEDDING = "model.embed_tokens.weight"  # which adapters leave as it is
BASE = ["study=pinned", f"train.tokens={4 * STEP}", "checkpoint.save_every_steps=2", "parallel=tp2"]


@pytest.fixture(scope="module")
def study(workspace):
    """Return the folder of the study.

    The base has its step 2 when the others begin and are cut off, and its step 4 when they go on.
    """
    folder = workspace / "runs" / "pinned"

    def case(name, *changes, **how):
        asked = ["study=pinned", f"init_from={folder / 'base'}"]
        asked += ["method=lora", "method.lora.rank=4"]
        asked += [f"train.tokens={4 * STEP}", "checkpoint.save_every_steps=2", "parallel=tp2"]
        return {"overrides": overrides(workspace, name, *asked, *changes, corpus="code")} | how

    base = {"overrides": overrides(workspace, "base", *BASE)}
    branching = f"train.branches=[{4 * STEP}]"
    begun = [case("straight"), case("cut", stop_after=3), case("early", stop_after=1)]
    begun.append(case("trunk", branching, stop_after=1))
    launch(2, [base | {"stop_after": 2}, *begun])
    assert committed_steps(folder / "base") == [2]
    assert not committed_steps(folder / "early")
    later = workspace / "later"
    shutil.copytree(folder / "straight", later / "pinned" / "straight")
    shutil.rmtree(later / "pinned" / "straight" / "evals")
    asked = case("asked", f"init_from={folder / 'base'}@2")
    launch(2, [base, case("cut"), case("early"), case("trunk", branching), asked])
    assert committed_steps(folder / "base") == [2, 4]
    launch(2, [case("straight", f"runs_dir={later}", all=True)], "scored")
    return folder


def test_ranks_that_see_different_checkpoints_begin_from_one(study, workspace):
    asked = overrides(workspace, "probe", f"init_from={study / 'base'}", "parallel=tp2")
    launch(2, [{"probe": "base", "overrides": asked}], "probes")


@pytest.mark.parametrize("name", ["cut", "early", "asked"])
def test_a_run_continues_from_the_checkpoint_it_began_from(study, name):
    assert read_record(study / name) == read_record(study / "straight")
    assert curve(study / name) == curve(study / "straight")
    assert eval_folder.read_scores(study / name) == eval_folder.read_scores(study / "straight")
    found, expected = (tensors(study / run, 4) for run in (name, "straight"))
    assert found.keys() == expected.keys()
    assert all(found[key].equal(expected[key]) for key in expected)


def test_a_branch_has_the_base_of_its_trunk(study):
    [branch] = study.glob("trunk-*")
    assert read_record(branch) == read_record(study / "trunk") == read_record(study / "straight")


def test_scores_made_later_use_the_checkpoint_that_the_run_began_from(study, workspace):
    later = eval_folder.read_scores(workspace / "later" / "pinned" / "straight")
    at_once = eval_folder.read_scores(study / "straight")
    assert at_once.keys() == {0, 4}
    assert at_once.items() <= later.items()


def test_exports_use_the_checkpoint_that_the_run_began_from(study, tmp_path):
    begun, merged, adapter = (tmp_path / name for name in ("begun", "merged", "adapter"))
    first = worker.export_request(load_run(study / "straight", []), 0, begun).model_dump()
    whole = first | {"run": str(study / "straight"), "step": None, "folder": str(merged)}
    # Before an adapter is done, its logits on this base are compared with the run's.
    adapted = whole | {"folder": str(adapter), "adapter": True, "base": str(begun)}
    launch(1, [{"export": options} for options in (first, whole, adapted)], "exchange")
    assert "The run base after step 2," in (begun / "README.md").read_text()
    embeddings = [load_file(folder / "model.safetensors")[EMBEDDING] for folder in (begun, merged)]
    assert embeddings[0].equal(embeddings[1])
    assert (adapter / "adapter_model.safetensors").is_file()
