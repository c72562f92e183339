"""Test that texts of lm-eval's rolling tasks begin with exactly one begin-of-text token.

Some tokenizers add one of their own.
"""

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'retemper[evals]'")

import torch
import transformers
from lm_eval.api.instance import Instance
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from retemper.pipeline.corpus.tokenizer import EOS, Tokenizer, train_tokenizer
from retemper.pipeline.evals.generate import language_model as exported_model
from retemper.pipeline.evals.sharded_lm import ShardedLM

BOS = "<bos>"
TEXT = "a text of words, and a second one"


class RecordingServer:
    """A stand-in for the ranks of a model that records all requested sequences.

    It records the tokens of each sequence and how many of them are scored.
    """

    def __init__(self, length: int):
        self.config = SimpleNamespace(model=SimpleNamespace(max_sequence_length=length))
        self.sequences: list[tuple[list[int], int]] = []

    def call(
        self, _method: str, sequences: list[np.ndarray], lengths: list[int], label: str
    ) -> np.ndarray:
        self.sequences += [
            (sequence.tolist(), count) for sequence, count in zip(sequences, lengths, strict=True)
        ]
        return np.array([(-1.0 * count, 0) for count in lengths])


def language_model(
    tmp_path, *, bos: bool, before: str = "", after: str = "", length: int = 512
) -> tuple[ShardedLM, RecordingServer]:
    """Return a language model and the server that records its requests.

    The tokenizer adds the tokens `before` and `after` to every text.
    """
    train_tokenizer([TEXT], 262, tmp_path / "t")
    backend = Tokenizer(tmp_path / "t").backend
    backend.encode_special_tokens = False
    backend.add_special_tokens([BOS])
    template = [word for word in (before, "$A", after) if word]
    ids = [(token, backend.token_to_id(token)) for token in (BOS, EOS)]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=EOS, bos_token=BOS if bos else None
    )
    server = RecordingServer(length)
    return ShardedLM(server, tokenizer, 0, ""), server


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"bos": True}, TEXT),
        ({"bos": True, "before": BOS}, TEXT),
        ({"bos": True, "before": BOS, "after": EOS}, TEXT),
        ({"bos": True, "before": BOS}, BOS + TEXT),
        ({"bos": True}, BOS + TEXT),
        ({"bos": False, "after": EOS}, TEXT),
        ({"bos": False, "before": EOS}, EOS + TEXT),
    ],
)
def test_text_begins_with_exactly_one_prefix_token(tmp_path, options, text):
    lm, server = language_model(tmp_path, **options)
    plain = lm.tokenizer.encode(TEXT, add_special_tokens=False)
    assert lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)]) == [
        -len(plain)
    ]
    assert server.sequences == [([lm.prefix_token_id, *plain], len(plain))]


def test_only_the_first_window_of_a_long_text_begins_with_the_prefix_token(tmp_path):
    lm, server = language_model(tmp_path, bos=True, before=BOS, length=5)
    plain = lm.tokenizer.encode(TEXT, add_special_tokens=False)
    assert lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (TEXT,), 0)]) == [
        -len(plain)
    ]
    assert [
        token for sequence, count in server.sequences for token in sequence[len(sequence) - count :]
    ] == plain
    assert sum(sequence.count(lm.prefix_token_id) for sequence, _ in server.sequences) == 1


def test_exported_model_also_scores_one_prefix_token(tmp_path, monkeypatch):
    lm, _ = language_model(tmp_path, bos=True, before=BOS)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 263,
    }
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, max_position_embeddings=512, initializer_range=1.0)
    )
    model.save_pretrained(tmp_path / "model")
    lm.tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = SimpleNamespace(
        seed=1,
        model=SimpleNamespace(num_attention_heads=2),
        evals=SimpleNamespace(micro_batch_size=1),
    )
    exported = exported_model(config, tmp_path / "model")
    tokens = torch.tensor(
        [lm.prefix_token_id, *lm.tokenizer.encode(TEXT, add_special_tokens=False)]
    )
    with torch.no_grad():
        logprobs = model(tokens[None, :-1]).logits[0].log_softmax(-1)
    expected = logprobs.gather(1, tokens[1:, None]).sum().item()
    for text in (TEXT, BOS + TEXT):
        [nats] = exported.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
        assert nats == pytest.approx(expected, rel=1e-5)
    # For other requests the tokenizer still adds its token.
    assert exported.tok_encode(TEXT)[0] == lm.prefix_token_id
