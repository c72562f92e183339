"""Test that evaluation problems are found in documents, at every position and length."""

import json
import re

import pytest

from retemper.pipeline.errors import UserError
from retemper.pipeline.schema.data import DecontaminateConfig
from retemper.tokenize import ngrams
from retemper.tokenize.decontaminate import Problems


@pytest.fixture(scope="module")
def problems(shared_data) -> Problems:
    files = {
        "humaneval": "humaneval.jsonl",
        "gsm8k": "gsm8k_test.jsonl",
        "winogrande": "winogrande_validation.jsonl",
    }
    return Problems.read(
        DecontaminateConfig(
            tasks={task: str(shared_data / "evals" / file) for task, file in files.items()}
        )
    )


@pytest.fixture(scope="module")
def humaneval(shared_data) -> list[dict]:
    return [
        json.loads(line)
        for line in (shared_data / "evals" / "humaneval.jsonl").read_text().splitlines()
    ]


def test_every_problem_is_found_in_any_case_and_spacing(problems, humaneval):
    for problem in humaneval:
        text = (
            "x = 1\n"
            + (problem["prompt"] + problem["canonical_solution"]).upper().replace(" ", "\n\t ")
            + "\nend"
        )
        assert problems.match(text.encode()), problem["task_id"]


def test_a_problem_is_found_across_the_segments_of_a_long_document(
    problems, humaneval, monkeypatch
):
    monkeypatch.setattr(ngrams, "SEGMENT_BYTES", 4096)
    prompt = humaneval[5]["prompt"].encode()
    for before in range(3500, 4500, 37):
        for filler in (b"honest words, ", b"x " * 9, b" \n" * 20):
            document = (filler * (before // len(filler) + 1))[:before]
            assert (
                problems.match(document + b" " + prompt + b" and more words" * 900)[0]
                == "humaneval: HumanEval/5"
            )
    assert problems.match(b"a" * 20_000 + b" " + prompt)
    longer_in_lower_case = "Ⱥ".encode()  # two bytes, and three in lower case
    assert problems.match(longer_in_lower_case * 20_000 + b" " + prompt)


def test_a_problem_with_a_long_text_is_not_matched_by_its_short_texts(
    problems, humaneval, tmp_path
):
    """Check that eight words identify a problem only if it has no longer text.

    Eight words in a row of a longer problem also occur in code that has not copied the problem.
    """
    long = next(problem for problem in humaneval if problem["task_id"] == "HumanEval/152")
    solution = long["canonical_solution"]
    assert problems.match(solution.encode()) is None
    assert problems.match((long["prompt"] + solution).encode())[0] == "humaneval: HumanEval/152"
    short = {"question": "Which of these planets is the largest by far?", "choices": ["Mars"]}
    numbers = {"text": "Write a function to find the greatest common divisor", "code": "1, 2, " * 9}
    lines = [json.dumps(problem) + "\n" for problem in (short, numbers)]
    (tmp_path / "short.jsonl").write_text("".join(lines))
    found = Problems.read(DecontaminateConfig(tasks={"short": str(tmp_path / "short.jsonl")}))
    assert found.match(b"which of these planets is the largest, by far")[0] == "short: 0"
    assert found.match(b"write a function to find the greatest common divisor")[0] == "short: 1"
    assert found.counts["short"]["without_ngram"] == 0


@pytest.mark.parametrize(
    "text",
    [
        "Ünd “so” weiter – ÄÖ_Ü… ﬁn İ Ⱥ 中文。字",
        "plain A_b-c 1.5",
        "\ufffd",
        "".join(map(chr, range(0xA0, 0x3000))),
    ],
)
def test_normalised_words_match_a_regular_expression(text):
    words = re.sub(r"[\W_]+", " ", text.lower()).split()
    assert ngrams.normalised(text.encode()).replace(b"\0", b" ").decode().split() == words


def test_winogrande_blanks_are_filled(problems):
    assert (
        problems.match(
            b"Sarah was a much better surgeon than Maria so Maria always got the easier cases."
        )[0]
        == "winogrande: 0"
    )
    assert problems.match(b"Sarah was a much better surgeon than Maria, they say.") is None


def test_sequences_of_numbers_and_letters_are_not_contamination(problems):
    for text in (
        "0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16",
        "a b c d e f g h i j k l m n o p q r s t u v",
        "0, " * 500,
    ):
        assert problems.match(text.encode()) is None


def test_a_saved_index_finds_the_same_problems(problems, humaneval, tmp_path):
    problems.save(tmp_path / "problems.npz")
    loaded = Problems.load(tmp_path / "problems.npz")
    for problem in humaneval[:20]:
        assert loaded.match(problem["prompt"].encode()) == problems.match(
            problem["prompt"].encode()
        )


def test_missing_and_empty_problem_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="data.decontaminate.tasks.humaneval"):
        Problems.read(DecontaminateConfig(tasks={"humaneval": str(tmp_path / "none.jsonl")}))
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match="holds no problem"):
        Problems.read(DecontaminateConfig(tasks={"humaneval": str(tmp_path / "empty.jsonl")}))
