"""Test that no credential of a value or of the environment is stored or shown."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retemper.pipeline import cli
from retemper.pipeline.config.compose import load_config, load_data_config
from retemper.pipeline.errors import UserError, masked

TOKEN = "hf_" + "aB3" * 11
PLANTED = {
    "user and password": "s3://me:pa55word@bucket/a",
    "a user that is a key": "s3://AKIApa55word@bucket/a",
    "a password with a slash": "s3://me:x/pa55word@bucket/a",
    "no host": "s3://me:pa55word/a",
    "http": "http://me:pa55word@host:8080/a.jsonl",
    "a signed address": "https://host/a?X-Amz-Date=1&X-Amz-Signature=pa55word",
    "a shared access signature": "https://host/a?sv=2024&sig=pa55word",
    "a key as parameter": "https://host/a?AWSAccessKeyId=pa55word",
    "inside other text": "a,s3://me:pa55word@bucket/a",
}
HARMLESS = [
    "s3://bucket/a:b/c@d.jsonl",
    "hf://datasets/openai/gsm8k@main/data",
    "http://host:8080/a?page=2",
    "http://[::1]:8080/a",
    "me@example.org",
    "runs/demo/base@80",
    "s3://${oc.env:BUCKET}/a",
    "a:b@c",
]


@pytest.mark.parametrize("planted", PLANTED.values(), ids=PLANTED)
@pytest.mark.parametrize("key", ["data.source.path", "track.project", "init_from"])
def test_a_value_with_a_credential_is_refused_without_showing_it(key, planted, capsys):
    for words in (["config", f"{key}={planted}"], ["tokenize", f"{key}='{planted}'"]):
        assert cli.main(words) == 1
        shown = capsys.readouterr()
        assert "pa55word" not in shown.out + shown.err
        assert shown.err.startswith(f"error: {key}=") and "AWS_ACCESS_KEY_ID" in shown.err


@pytest.mark.parametrize("load", [load_config, load_data_config])
@pytest.mark.parametrize("value", [PLANTED["user and password"], TOKEN])
def test_a_credential_from_the_environment_is_refused(monkeypatch, load, value):
    monkeypatch.setenv("MY_TOKEN", value)
    for text in ("data.path=${oc.env:MY_TOKEN}", "evals.tasks.t.metric=a${oc.env:MY_TOKEN}"):
        with pytest.raises(
            UserError, match=r"^(data.path|evals.tasks.t.metric)=\S*\*\*\*"
        ) as raised:
            load([text])
        assert value not in str(raised.value)


def test_words_that_are_no_values_are_searched_too(capsys):
    assert cli.main(["import", PLANTED["http"], "runs/models/a"]) == 1
    assert "http://***@host" in capsys.readouterr().err


@pytest.mark.parametrize("text", HARMLESS)
def test_what_only_looks_like_a_credential_is_left_alone(monkeypatch, tmp_path, text):
    monkeypatch.setenv("DATA_KEY", "short")
    monkeypatch.setenv("TOKENIZER", "meta-llama/Llama-2-7b")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path))
    text += f" short meta-llama/Llama-2-7b {tmp_path}/a"
    assert masked(text) == text


_WORDS = st.text(st.sampled_from("aB0/+=:%~._-@"), min_size=8).filter(lambda text: "B" in text)


@given(password=_WORDS, scheme=st.sampled_from(["s3", "gs", "http", "https", "hf"]))
def test_no_password_is_shown(password, scheme):
    shown = str(UserError(f"{scheme}://me:B{password}@bucket/a could not be read"))
    assert f"B{password}" not in shown and shown.endswith("bucket/a could not be read")
