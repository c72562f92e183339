"""Test tasks on a really pretrained model at every layout.

The sharded class is compared with lm-eval's own on the exported folder.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from conftest import data_config, launch, overrides
from safetensors.torch import load_file, save_file

from retemper.pipeline.config.compose import load_config
from retemper.pipeline.runs import eval_folder

CHOICES = ("hellaswag", "arc_challenge", "winogrande")
PLAIN = [f"evals.tasks.{name}={{shots:0,limit:200}}" for name in CHOICES]
SHOTS = [
    "evals.tasks.hellaswag={shots:10,limit:40}",
    "evals.tasks.arc_challenge={shots:10,limit:40}",
]  # longer than the model takes: cut
WRITTEN = ["evals.tasks.gsm8k={limit:20,max_new_tokens:48}"]
DRAWN = ["evals.tasks.gsm8k={limit:10,shots:0,temperature:1.0,top_p:0.95,max_new_tokens:32}"]


def with_an_idle_layer(source: Path, target: Path) -> Path:
    """Return the model with a sixth layer that adds nothing.

    Five layers cannot be split into two pipeline stages.
    """
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if name.startswith("model.layers.0.")]:
        adds = "o_proj" in name or "down_proj" in name
        tensors[name.replace(".0.", ".5.", 1)] = (
            torch.zeros_like(tensors[name]) if adds else tensors[name].clone()
        )
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 6}))
    return target


class Scored:
    """The pretrained model as a base, its export, and runs that start from it."""

    def __init__(self, workspace: Path, shared: Path):
        from retemper.tokenize.job import tokenize

        self.workspace, self.files = workspace, shared / "evals"
        folder = with_an_idle_layer(shared / "stories260K", workspace / "scored" / "stories")
        self.base, self.exported = workspace / "scored" / "base", workspace / "scored" / "exported"
        self.corpus = data_config(
            workspace,
            "scored",
            documents=Path(json.__file__).parent,
            tokenizer=str(folder),
            bos=True,
            heldout_fraction=0.0,
        )
        tokenize(self.corpus, progress=False)
        world_size = 1 if torch.cuda.device_count() == 1 else 2
        layout = ["parallel=tp2"] if world_size == 2 else []
        imported = {"folder": str(folder), "run": str(self.base), "keys": layout}
        launch(world_size, [{"import": imported}], "exchange")
        exported = {"run": str(self.base), "folder": str(self.exported)}
        launch(1, [{"export": exported}], "exchange")

    def overrides(self, run: str, *changes: str) -> list[str]:
        own = [
            f"init_from={self.base}",
            f"data.path={self.corpus.path}",
            "data.name=scored",
            f"data.tokenizer={self.corpus.tokenizer}",
        ]
        own += [
            "data.bos=true",
            "evals.heldout={}",
            "evals.micro_batch_size=16",
            f"evals.tasks_dir={self.files}",
        ]
        asked = overrides(self.workspace, run, *own, *changes)
        return [text for text in asked if not text.startswith(("model.", "evals.heldout."))]

    def score(self, world_size: int, runs: dict[str, list[str]]) -> None:
        """Score the runs that are not scored yet."""
        new = {run: changes for run, changes in runs.items() if not self.folder(run).exists()}
        launch(
            world_size,
            [{"overrides": self.overrides(run, *changes)} for run, changes in new.items()],
            "scored",
        )

    def folder(self, run: str) -> Path:
        return eval_folder.task_path(self.workspace / "runs" / "test" / run, 0, "any").parent

    def scores(self, run: str, task: str) -> dict:
        return json.loads((self.folder(run) / f"{task}.json").read_text())

    def problems(self, run: str, task: str) -> list[dict]:
        text = zstandard.decompress(
            (self.folder(run) / f"{task}.samples.jsonl.zst").read_bytes()
        ).decode()
        return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def scored(workspace, shared_data) -> Scored:
    return Scored(workspace, shared_data)


@pytest.fixture(scope="module")
def theirs(scored):
    """Return a function of overrides that scores the exported folder with lm-eval's own class.

    The function returns task -> (metrics, problems).
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    from retemper.pipeline.evals.tasks import chosen_problems, load_task

    lm, known = (
        HFLM(pretrained=str(scored.exported), device="cpu", dtype="float32", batch_size=16),
        {},
    )

    def say(changes: list[str]) -> dict[str, tuple[dict, list[dict]]]:
        evals = load_config(scored.overrides("theirs", *changes)).evals
        for name, asked in evals.tasks.items():
            if (key := (name, asked.model_dump_json())) not in known:
                task = load_task(name, evals)
                chosen = chosen_problems(len(task.eval_docs), asked.limit)
                results = evaluate(
                    lm,
                    {"tasks": {name: task}},
                    samples={name: chosen} if chosen else None,
                    bootstrap_iters=100,
                )
                known[key] = results["results"][name], results["samples"][name]
        return {name: known[name, asked.model_dump_json()] for name, asked in evals.tasks.items()}

    return say


def compare_choices(scored: Scored, theirs, run: str, changes: list[str]) -> None:
    for name, (metrics, problems) in theirs(changes).items():
        ours, scores = scored.problems(run, name), scored.scores(run, name)
        assert len(ours) == len(problems) == scores["samples"] == scores["settings"]["limit"]
        for mine, other in zip(ours, problems, strict=True):
            assert mine["doc_hash"] == other["doc_hash"]
            nats, expected = (
                np.array([nats for [(nats, _greedy)] in problem["resps"]])
                for problem in (mine, other)
            )
            np.testing.assert_allclose(nats, expected, rtol=0, atol=1e-3)
            assert nats.argmax() == expected.argmax()
            assert [greedy for [(_nats, greedy)] in mine["resps"]] == [
                greedy for [(_nats, greedy)] in other["resps"]
            ]
        for metric in scores["metrics"].keys() - {"acc_token_loss"}:
            assert scores["metrics"][metric] == {
                "value": metrics[f"{metric},none"],
                "stderr": metrics[f"{metric}_stderr,none"],
            }
        assert (
            scores["metric"] == "acc_token_loss"
            and 0 < scores["score"] < 1
            and 0 < scores["stderr"] < 0.2
        )
        assert bool(scores["cut_prompts"]) == (changes == SHOTS)
        assert (
            scores["version"] == 1.0
            and scores["step"] == 0
            and scores["settings"]["lm_eval"] == "0.4.13"
        )


TWO = {"tp2": ["parallel=tp2"], "pp2": ["parallel=pp2"]}


@pytest.mark.parametrize("layout", TWO)
def test_log_likelihoods_equal_those_of_lm_evals_class(scored, theirs, layout):
    scored.score(2, {f"plain-{name}": [*PLAIN, *where] for name, where in TWO.items()})
    compare_choices(scored, theirs, f"plain-{layout}", PLAIN)


MORE = {
    "tp2sp": ["parallel=tp2", "parallel.sequence_parallel=true"],
    "cp2": ["parallel=cp2"],
    "dp2": ["parallel=dp2"],
    "pp2": ["parallel=pp2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", MORE)
def test_log_likelihoods_of_cut_contexts_equal_at_other_layouts(scored, theirs, layout):
    scored.score(2, {f"shots-{layout}": [*SHOTS, *MORE[layout]]})
    compare_choices(scored, theirs, f"shots-{layout}", SHOTS)


def answers(scored: Scored, run: str) -> list[str]:
    """Return one answer to each problem, whatever the filters."""
    return [
        problem["resps"][0][0]
        for problem in scored.problems(run, "gsm8k")
        if problem["filter"] == "strict-match"
    ]


GENERATED = TWO | {"dp2": ["parallel=dp2"]}


def compare_greedy_text(scored: Scored, theirs, runs: list[str]) -> None:
    _metrics, problems = theirs(WRITTEN)["gsm8k"]
    expected = [
        problem["resps"][0][0] for problem in problems if problem["filter"] == "strict-match"
    ]
    assert len(expected) == 20 and len(set(expected)) > 10
    for run in runs:
        assert answers(scored, run) == expected, run


def test_greedy_text_equals_that_of_lm_evals_class(scored, theirs):
    scored.score(1, {"written-one": WRITTEN})
    scored.score(2, {f"written-{name}": [*WRITTEN, *where] for name, where in GENERATED.items()})
    compare_greedy_text(scored, theirs, ["written-one", *(f"written-{name}" for name in GENERATED)])
    assert scored.scores("written-tp2", "gsm8k")["metric"] == "exact_match/strict-match"
    assert scored.scores("written-tp2", "gsm8k")["cut_prompts"] == 20, (
        "five examples are more than 512 tokens of stories"
    )


@pytest.mark.gpu
def test_a_gpu_gives_the_same_results(scored, theirs):
    scored.score(1, {"plain-gpu": PLAIN, "written-gpu": WRITTEN})
    compare_choices(scored, theirs, "plain-gpu", PLAIN)
    compare_greedy_text(scored, theirs, ["written-gpu"])


def test_sampled_text_depends_only_on_the_seed(scored):
    scored.score(1, {"drawn-one": DRAWN, "drawn-other": [*DRAWN, "seed=18"]})
    scored.score(2, {"drawn-tp2": [*DRAWN, *TWO["tp2"]]})
    first = answers(scored, "drawn-one")
    assert len(set(first)) == 10 and answers(scored, "drawn-tp2") == first
    assert answers(scored, "drawn-other") != first


@pytest.mark.slow
def test_sampled_text_is_equal_at_other_layouts_and_with_adapters(scored):
    scored.score(1, {"drawn-one": DRAWN})
    runs = {f"drawn-{name}": [*DRAWN, *MORE[name]] for name in ("tp2sp", "pp2", "dp2")}
    runs["drawn-lora"] = [*runs["drawn-tp2sp"], "method=lora", "method.lora.rank=2"]
    scored.score(2, runs | {"refused-cp": [*DRAWN, "parallel=cp2"]})
    for run in runs:
        assert answers(scored, run) == answers(scored, "drawn-one"), run
    assert (
        "do not work with parallel.context_parallel_size > 1"
        in scored.scores("refused-cp", "gsm8k")["error"]
    )


@pytest.mark.slow
def test_text_is_equal_with_virtual_stages_and_on_four_ranks(workspace, shared_data):
    """Compare the sampled text of initial weights, which are the same at every layout.

    Greedy text of such weights repeats itself, sampled text does not.
    """
    layouts = {
        "one": [],
        "vpp2": ["parallel=pp2", "parallel.virtual_pipeline_parallel_size=2"],
        "grid": ["parallel=tp2", "parallel.pipeline_parallel_size=2"],
    }
    task = "evals.tasks.gsm8k={limit:10,shots:0,temperature:1.0,max_new_tokens:24}"
    said = {}
    for world_size, (name, where) in zip((1, 2, 4), layouts.items(), strict=True):
        asked = overrides(
            workspace,
            f"random-{name}",
            "model.num_layers=4",
            task,
            f"evals.tasks_dir={shared_data / 'evals'}",
            *where,
        )
        launch(world_size, [{"overrides": asked}], "scored")
        path = eval_folder.task_path(
            workspace / "runs" / "test" / f"random-{name}", 0, "gsm8k"
        ).with_suffix(".samples.jsonl.zst")
        said[name] = [
            json.loads(line)["resps"]
            for line in zstandard.decompress(path.read_bytes()).decode().splitlines()
        ]
    assert (
        said["one"] == said["vpp2"] == said["grid"]
        and len({str(each) for each in said["one"]}) == 10
    )
