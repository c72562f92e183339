"""The tokenizer that a model is evaluated with."""

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from retemper.pipeline.corpus.manifest import read_manifest
from retemper.pipeline.corpus.tokenizer import Tokenizer
from retemper.pipeline.errors import UserError
from retemper.pipeline.schema.run import Config


def load_tokenizer(config: Config) -> PreTrainedTokenizerFast:
    """The run's. Raises UserError where it is not the one that the corpus was made with, or larger than the model."""
    ours = Tokenizer(config.data.tokenizer)
    corpus = read_manifest(config.data.path)
    if ours.sha256 != corpus["tokenizer_sha256"]:
        raise UserError(
            f"data.tokenizer={config.data.tokenizer} is another tokenizer than that of the corpus {config.data.path}, which the model "
            "was trained on: name that one"
        )
    tokenizer = AutoTokenizer.from_pretrained(
        ours.folder, local_files_only=True, trust_remote_code=False
    )
    if len(tokenizer) > config.model.vocab_size:
        raise UserError(
            f"data.tokenizer={config.data.tokenizer} has {len(tokenizer)} tokens, model.vocab_size is only {config.model.vocab_size}: "
            "it is not this model's"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"data.tokenizer={config.data.tokenizer} names no end-of-text: give its tokenizer_config.json an eos_token"
        )
    return tokenizer
