"""Load the tokenizer for evaluating a run's models."""

from itertools import takewhile

from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from retemper.pipeline.corpus.manifest import read_manifest
from retemper.pipeline.corpus.tokenizer import Tokenizer
from retemper.pipeline.errors import UserError
from retemper.pipeline.schema.run import Config


def load_tokenizer(config: Config) -> PreTrainedTokenizerFast:
    """Load the run's tokenizer as transformers' class.

    Raises UserError where it differs from the tokenizer of the run's corpus, has more tokens than
    the model's vocabulary, or has no end-of-text token.
    """
    named = Tokenizer(config.data.tokenizer)
    corpus = read_manifest(config.data.path)
    if named.sha256 != corpus["tokenizer_sha256"]:
        raise UserError(
            f"data.tokenizer={config.data.tokenizer} is another tokenizer than that of the corpus "
            f"{config.data.path}, which the model was trained on: set data.tokenizer to that one"
        )
    if named.vocab_size > config.model.vocab_size:
        raise UserError(
            f"data.tokenizer={config.data.tokenizer} has {named.vocab_size} tokens, "
            f"model.vocab_size is only {config.model.vocab_size}: "
            "the tokenizer does not belong to this model"
        )
    if named.eos_id is None:
        raise UserError(
            f"data.tokenizer={config.data.tokenizer} has no end-of-text token: "
            "set eos_token in its tokenizer_config.json"
        )
    return prompt_tokenizer(named)


def prompt_tokenizer(named: Tokenizer) -> PreTrainedTokenizerFast:
    """Return a tokenizer as transformers' class, for prompts of a model that continues them.

    Text has the ids that it has in a corpus, except special tokens that it spells out. A prompt
    begins with the special tokens that the folder puts before a text, and ends with none.
    transformers' AutoTokenizer would let tokenizer_config.json change the ids, and fails on a class
    that it does not know.
    """
    names = {"bos_token": named.bos_id, "eos_token": named.eos_id}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=named.backend,
        **{name: named.backend.id_to_token(id) for name, id in names.items() if id is not None},
    )
    ids = _ids_before_a_text(named)
    tokens = [named.backend.id_to_token(id) for id in ids]
    before = {"id": "before", "ids": ids, "tokens": tokens}
    tokenizer.backend_tokenizer.post_processor = (
        TemplateProcessing(single="before $A", special_tokens=[before]) if ids else None
    )
    return tokenizer


def _ids_before_a_text(named: Tokenizer) -> list[int]:
    add_bos = named.settings().get("add_bos_token")
    if isinstance(add_bos, bool):
        return [named.bos_id] if add_bos and named.bos_id is not None else []
    encoding = named.backend.encode("a")
    marked = takewhile(lambda pair: pair[1], zip(encoding.ids, encoding.special_tokens_mask))
    return [id for id, _ in marked]
