"""Test that wrong names and folders of tasks are found before a run starts."""

import pytest
from conftest import overrides

from retemper.pipeline.config.compose import load_config
from retemper.pipeline.entry.preflight import preflight
from retemper.pipeline.errors import UserError
from retemper.pipeline.evals.known_tasks import check_tasks


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["evals.tasks.gsm8k.shots=0", "evals.tasks_dir=nowhere"],
            "=nowhere is no folder",
        ),
        (["evals.tasks.helaswag.shots=0"], "no task with that name; did you mean hellaswag"),
        (["evals.tasks.lambada_opena.where=worker"], "did you mean lambada_openai"),
        (["evals.heldout.wiki=nowhere"], "nowhere holds no token corpus"),
    ],
)
def test_what_an_evaluation_lacks_is_found_before_the_first_step(workspace, changes, message):
    with pytest.raises(UserError, match=message):
        preflight(load_config(overrides(workspace, "lacking", *changes)))


@pytest.mark.parametrize("task", ["gsm8k", "lambada_openai", "mmlu_anatomy", "truthfulqa_mc1"])
def test_tasks_of_lm_eval_are_accepted(workspace, task):
    check_tasks(load_config(overrides(workspace, "known", f"evals.tasks.{task}.shots=0")).evals)


def test_the_folder_of_tasks_of_workers_may_be_on_another_machine(workspace):
    away = ["evals.tasks.gsm8k.where=worker", "evals.tasks_dir=elsewhere"]
    check_tasks(load_config(overrides(workspace, "away", *away)).evals)
