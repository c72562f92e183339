"""Test tasks on local files instead of hub datasets, and the tokenizer that tasks are run with."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import overrides

from retemper.pipeline.config.compose import load_config
from retemper.pipeline.errors import UserError
from retemper.pipeline.schema.evals import TASKS_WITH_FILES, EvalsConfig, TaskConfig

MAX_LENGTH = 512  # of the model that knows the answers


def load(name: str, folder, **settings):
    from retemper.pipeline.evals.tasks import load_task

    return load_task(name, EvalsConfig(tasks={name: TaskConfig(**settings)}, tasks_dir=str(folder)))


def refusal(name: str, folder) -> str:
    with pytest.raises(UserError) as caught:
        load(name, folder)
    return str(caught.value)


def test_every_task_reads_its_real_files(shared_data):
    counts = {"hellaswag": 1000, "arc_challenge": 1172, "winogrande": 1267, "gsm8k": 1319}
    for name, count in counts.items():
        task = load(name, shared_data / "evals", shots=1)
        assert len(task.eval_docs) == count
        assert task.config.num_fewshot == 1
    # The defaults are the shots and settings of the task's own definition.
    task = load("gsm8k", shared_data / "evals", temperature=0.5, top_p=0.9, max_new_tokens=7)
    assert task.config.num_fewshot == 5
    settings = {"temperature": 0.5, "top_p": 0.9, "max_gen_toks": 7, "do_sample": True}
    assert settings.items() <= task.config.generation_kwargs.items()
    assert "Question:" in task.config.generation_kwargs["until"]


BROKEN = {
    "hellaswag": ("hellaswag_validation.jsonl", {"query": "a", "choices": ["b"], "gold": 1}),
    "winogrande": (
        "winogrande_validation.jsonl",
        {"sentence": "a _", "option1": "b", "option2": "c", "answer": "3"},
    ),
    "arc_challenge": (
        "arc_challenge_validation.jsonl",
        {"question": "a", "choices": {"text": ["b"], "label": ["A"]}, "answerKey": "B"},
    ),
    "gsm8k": ("gsm8k_train.jsonl", {"question": "a", "answer": "7"}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_malformed_record_is_refused_with_its_file_and_line(name, tmp_path):
    file, record = BROKEN[name]
    for text in (json.dumps(record), "{", "7", "{}", "[" * 100_000):
        (tmp_path / file).write_text(text + "\n")
        assert f"{tmp_path / file}, line 1: not a record of the form" in refusal(name, tmp_path)
    (tmp_path / file).write_text("")
    assert "is empty" in refusal(name, tmp_path)


def test_records_end_at_newlines_alone(tmp_path):
    """Check a byte-order mark, a blank line, and separators that str.splitlines would split at."""
    rows = [{"question": f"a{mark}b", "answer": "#### 7"} for mark in "\u2028\u2029\x85\x1c\v\f"]
    for name in ("gsm8k_train.jsonl", "gsm8k_test.jsonl"):
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (tmp_path / name).write_text("\r\n\n".join(lines), encoding="utf-8-sig")
    documents = load("gsm8k", tmp_path).eval_docs
    assert [document["question"] for document in documents] == [row["question"] for row in rows]


def test_every_task_allowed_with_local_files_has_a_reader():
    from retemper.pipeline.evals.code_tasks import CODE_TASKS
    from retemper.pipeline.evals.tasks import LOCAL_TASKS

    assert set(TASKS_WITH_FILES) == LOCAL_TASKS.keys() | CODE_TASKS.keys()


def test_tokenizer_larger_than_the_vocabulary_of_the_model_is_refused(workspace):
    from retemper.pipeline.evals.run_tokenizer import load_tokenizer

    data = SimpleNamespace(
        tokenizer=str(workspace / "data" / "tokenizer"), path=str(workspace / "data" / "code")
    )
    assert (
        len(load_tokenizer(SimpleNamespace(data=data, model=SimpleNamespace(vocab_size=300))))
        == 300
    )
    with pytest.raises(UserError, match="has 300 tokens, model.vocab_size is only 299"):
        load_tokenizer(SimpleNamespace(data=data, model=SimpleNamespace(vocab_size=299)))


@pytest.mark.parametrize("stop", ["Question:", "é", "\n\n", " and"])
def test_generated_text_ends_with_the_token_that_completes_a_stop_string(
    workspace, monkeypatch, stop
):
    from retemper.pipeline.evals import team
    from retemper.pipeline.evals.run_tokenizer import load_tokenizer
    from retemper.pipeline.model.inference import Sampling

    data = SimpleNamespace(
        tokenizer=str(workspace / "data" / "tokenizer"), path=str(workspace / "data" / "code")
    )
    tokenizer = load_tokenizer(SimpleNamespace(data=data, model=SimpleNamespace(vocab_size=300)))
    words = tokenizer.encode(
        "Questions: cafés and more\n\nQuestion: why?", add_special_tokens=False
    )

    def generate_words(_model, _topology, prompts, _draws, _sampling, ended):
        return [
            words[: next(count for count in range(1, len(words) + 1) if ended(words[:count]))]
            for _ in prompts
        ]

    monkeypatch.setattr(team, "generate", generate_words)
    monkeypatch.setattr(team, "all_gather_data_parallel", lambda mine: [mine])
    config = SimpleNamespace(evals=SimpleNamespace(micro_batch_size=2), fp8_recipe=None)
    server = team.RankZeroServer(
        config, SimpleNamespace(rank=0, data_parallel_rank=0, data_parallel_size=1), None
    )
    [new] = server.generate(
        [np.array([1])], Sampling(99), [stop], tokenizer, tokenizer.eos_token_id, 1, ""
    )
    assert stop in tokenizer.decode(new)
    assert stop not in tokenizer.decode(new[:-1])


def oracle(right: bool):
    """Return a model that gives the right answer to every problem, or a wrong one to each."""
    from lm_eval.api.model import TemplateLM

    class Oracle(TemplateLM):
        eot_token_id = 0
        max_length = MAX_LENGTH  # a token is a byte

        def tok_encode(self, string, **_options):
            return list(string.encode())

        def _loglikelihood_tokens(self, requests, **_options):
            pytest.fail("these tasks request texts, not tokens")

        loglikelihood_rolling = _loglikelihood_tokens

        def loglikelihood(self, requests, **_options):
            # So far apart that dividing by the length of an answer does not change the order.
            return [
                (-1e-6 if (request.idx == right_choice(request.doc)) == right else -1e6, False)
                for request in requests
            ]

        def generate_until(self, requests, **_options):
            return [request.doc["answer"] + "1" * (not right) for request in requests]

    return Oracle()


def right_choice(doc: dict) -> int:
    """Return the index of the right choice of a problem."""
    if "gold" in doc:
        return doc["gold"]
    return (
        int(doc["answer"]) - 1
        if "sentence" in doc
        else doc["choices"]["label"].index(doc["answerKey"])
    )


# A prompt is cut if it exceeds MAX_LENGTH bytes together with its longest choice or, for gsm8k,
# with the tokens to generate. The first two numbers come from a separate count in the files.
@pytest.mark.parametrize(
    ("name", "count", "cut_prompts"),
    [
        ("hellaswag", 1000, 260),
        ("arc_challenge", 1172, 7),
        ("winogrande", 1267, 0),
        ("gsm8k", 1319, 1319),
    ],
)
def test_right_answers_score_one_and_wrong_answers_zero(
    name, count, cut_prompts, workspace, shared_data
):
    from retemper.pipeline.evals.harness import score_task

    config = load_config(
        overrides(
            workspace,
            "gold",
            f"evals.tasks_dir={shared_data / 'evals'}",
            f"evals.tasks.{name}={{}}",
        )
    )
    for right in (True, False):
        scores, problems = score_task(name, config, oracle(right))
        assert scores["samples"] == count
        assert len({problem["doc_id"] for problem in problems}) == count
        assert scores["cut_prompts"] == cut_prompts
        assert scores["score"] == right
        assert {value["value"] for value in scores["metrics"].values()} == {right}
