"""Test trunks and branches in the report: scores at step 0, kinds of points, and comparisons."""

import json
import re
import shutil

import pytest
from test_report import LORA, PAPER, STEP, record, score, start_run, write_task

from retemper.pipeline.evals import show_scores
from retemper.pipeline.report.results import comparison, format_table, read_study, table
from retemper.pipeline.runs import eval_folder

# Steps of a branch -> the kind of its last point. The warm-up takes 4 steps, the trunk 16.
BRANCHES = {3: "ended in the warm-up", 10: "cooled down", 20: "cooled down"}


def write_trunk_and_branches(workspace, runs_dir, method, ends):
    """Write a trunk with scores at steps 0 and 10, and its branches.

    The branches have 3, 10 and 20 steps. They have no scores at step 0, which are the trunk's.
    """
    name = "lora" if method else "full"
    changes = [*method, f"schedule.warmup_tokens={4 * STEP}"]
    milestones = [
        f"train.branches=[{','.join(str(steps * STEP) for steps in BRANCHES)}]",
        f"train.tokens={16 * STEP}",
    ]
    trunk = start_run(
        workspace, runs_dir, name, *changes, *milestones, f"checkpoint.milestones=[{10 * STEP}]"
    )
    score(trunk.run_dir, 0, code=3.0, math=2.0)
    score(trunk.run_dir, 10, sign=-1.0, code=ends[10][0] + 0.3, math=ends[10][1] + 0.3)
    for steps, (code, math) in ends.items():
        tokens = f"train.tokens={steps * STEP}"
        branch = start_run(
            workspace, runs_dir, f"{name}-{steps}", *changes, tokens, f"branch_of={trunk.run_dir}"
        )
        score(branch.run_dir, steps, sign=-1.0 if method else 0.5, code=code, math=math)
    return trunk


FULL_ENDS = {3: (2.9, 2.1), 10: (2.2, 2.4), 20: (1.8, 2.6)}
LORA_ENDS = {3: (2.95, 2.05), 10: (2.6, 2.2), 20: (2.4, 2.3)}


@pytest.fixture
def study(workspace, tmp_path):
    record(workspace, tmp_path, "base", [], (3.0, 2.0))
    full = write_trunk_and_branches(workspace, tmp_path, [], FULL_ENDS)
    write_trunk_and_branches(workspace, tmp_path, LORA, LORA_ENDS)
    return full.run_dir.parent


def check_branches(folder):
    runs = {run.config.name: run for run in read_study(folder)}
    for name, ends in (("full", FULL_ENDS), ("lora", LORA_ENDS)):
        for steps, (code, math) in ends.items():
            run = runs[f"{name}-{steps}"]
            assert {round(curve[0], 9) for curve in run.curves.values()} == {3.0, 2.0}
            assert run.gains()[steps * STEP] == pytest.approx((3.0 - code, math - 2.0))


def test_branch_starts_from_the_scores_of_its_trunk(study, tmp_path):
    check_branches(study)
    moved_study = tmp_path / "elsewhere" / "study"
    shutil.copytree(study, moved_study)
    shutil.rmtree(study)
    check_branches(moved_study)


def test_every_point_has_a_row_with_its_kind(study):
    rows = table(read_study(study))
    assert rows[0][:6] == ["run", "method", "tokens", "point", "code bits/byte", "math bits/byte"]
    found = {(row[0], int(row[2].replace(",", "")) // STEP): row[3:8] for row in rows[1:]}
    assert found["full", 0][0] == found["lora", 0][0] == "start"
    assert found["full", 10][0] == found["lora", 10][0] == "trunk"
    assert found["base", 10][0] == "cooled down"
    for name in ("full", "lora"):
        for steps, kind in BRANCHES.items():
            cell, *_, learned, forgotten = found[f"{name}-{steps}", steps]
            assert cell == (f"{kind}, at 50% of the peak rate" if steps == 3 else kind)
            assert learned
            assert forgotten
            assert (f"{name}-{steps}", 0) not in found


@pytest.mark.parametrize(
    ("schedule", "steps", "expected"),
    [
        (
            ["schedule.warmup_tokens=0"],
            (2, 8, 9, 10),
            ["trunk", "trunk", "cooling down", "cooled down"],
        ),
        (["schedule.cooldown_fraction=0"], (2, 10), ["trunk", "trunk"]),
        (
            ["schedule=cosine", f"schedule.warmup_tokens={2 * STEP}"],
            (2, 5, 10),
            ["trunk", "cooling down", "cooled down"],
        ),
        (
            ["schedule=inverse_sqrt", f"schedule.warmup_tokens={2 * STEP}"],
            (2, 10),
            ["trunk", "trunk"],
        ),
    ],
)
def test_kind_of_a_point_follows_the_schedule(workspace, tmp_path, schedule, steps, expected):
    config = start_run(workspace, tmp_path, "full", *schedule)
    for step in steps:
        score(config.run_dir, step, code=2.0, math=2.0)
    assert [row[3] for row in table(read_study(config.run_dir.parent))[1:]] == expected


def test_branches_are_compared_at_equal_tokens_and_kind(study):
    sentences = comparison(read_study(study))
    subjects = [sentence.partition(": ")[0] for sentence in sentences]
    assert subjects == [
        "lora-20 (LoRA) beside full-20 (full), after 10,240 tokens",
        "lora-10 (LoRA) beside full-10 (full), after 5,120 tokens",
        "lora-3 (LoRA) beside full-3 (full), after 1,536 tokens (ended in the warm-up)",
    ]
    assert "learned less, +0.600 against +1.200 bits/byte on code" in sentences[0]
    for sentence in sentences:
        assert sentence.endswith(f"As {PAPER}")


def test_trunk_is_not_compared_with_a_cooled_down_branch(study):
    for steps in BRANCHES:
        shutil.rmtree(study / f"full-{steps}")
    (sentence,) = comparison(read_study(study))
    assert sentence.startswith("lora (LoRA) beside full (full), after 5,120 tokens (trunk): ")
    shutil.rmtree(eval_folder.scores_path(study / "lora", 10).parent)
    (sentence,) = comparison(read_study(study))
    assert sentence == (
        "lora-10 (LoRA) beside full (full): not compared, "
        "for they have no points of equal tokens and equal kind: "
        "after 5,120 tokens lora-10 is cooled down, full a point of a trunk."
    )


def test_missing_trunk_is_named(study):
    shutil.rmtree(study / "lora")
    runs = read_study(study)
    assert [run.gains() for run in runs if run.config.method.name == "lora"] == [{}] * 3
    blank = [sentence for sentence in comparison(runs) if "nothing to compare with" in sentence]
    assert len(blank) == 3
    for sentence in blank:
        assert f"its trunk {study / 'lora'} is gone" in sentence
    assert format_table(table(runs))


def test_scores_of_the_start_are_shown_with_those_of_a_branch(study):
    config = next(run.config for run in read_study(study) if run.config.name == "lora-10")
    lines = list(show_scores.table(config))
    assert re.search(r"^ +0  code ", "\n".join(lines), re.MULTILINE)
    assert re.search(
        r"^ +10  code .* -0\.4000 ± 0\.\d+ \(-0\.\d+ to -0\.\d+\)", "\n".join(lines), re.MULTILINE
    )


def test_scores_of_the_start_in_the_branch_folder_are_still_read(study):
    """Check scores of step 0 in a branch's folder, where older workers wrote them.

    If the trunk has scores of step 0, too, those are used.
    """
    config = next(run.config for run in read_study(study) if run.config.name == "lora-10")
    trunk = config.model_copy(update={"name": "lora"})
    for step, right in ((0, 0.5), (10, 1.0)):
        write_task(config, step, "gsm8k", [1.0, right, 0.0, right])
    change = {row[0]: row[6] for row in show_scores.task_rows(config, 10)}
    assert change["10"].startswith("+0.2500 ± ")
    write_task(trunk, 0, "gsm8k", [1.0, 1.0, 0.0, 1.0])
    change = {row[0]: row[6] for row in show_scores.task_rows(config, 10)}
    assert change["10"].startswith("+0.0000 on each of 4")


@pytest.mark.parametrize("branch_of", ["by a link", "branch of a branch", "itself", "each other"])
def test_start_is_found_through_links_and_chains_but_not_cycles(study, tmp_path, branch_of):
    path = study / "lora-20" / "config.json"
    config = json.loads(path.read_text())
    if branch_of == "by a link":
        (tmp_path / "link").symlink_to(study)
        config["branch_of"] = str(tmp_path / "link" / "lora")
    elif branch_of == "branch of a branch":
        config["branch_of"] = str(study / "lora-10")
    elif branch_of == "itself":
        config["branch_of"] = str(study / "lora-20")
    else:
        other = study / "lora-10" / "config.json"
        other.write_text(
            json.dumps(json.loads(other.read_text()) | {"branch_of": str(study / "lora-20")})
        )
        config["branch_of"] = str(study / "lora-10")
    path.write_text(json.dumps(config))
    runs = {run.config.name: run for run in read_study(study)}
    sentences = comparison(list(runs.values()))
    if branch_of in ("by a link", "branch of a branch"):
        assert runs["lora-20"].family == study / "lora"
        assert runs["lora-20"].gains()
        assert sentences[0].startswith(
            "lora-20 (LoRA) beside full-20 (full), after 10,240 tokens: learned less"
        )
    else:
        assert not runs["lora-20"].gains()
        assert any("lora-20: nothing to compare with" in sentence for sentence in sentences)
