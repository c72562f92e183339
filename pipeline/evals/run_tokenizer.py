"""Load the tokenizer for evaluating a run's models."""

from transformers import AutoTokenizer, PreTrainedTokenizerFast

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
    tokenizer = AutoTokenizer.from_pretrained(
        named.folder, local_files_only=True, trust_remote_code=False
    )
    if len(tokenizer) > config.model.vocab_size:
        raise UserError(
            f"data.tokenizer={config.data.tokenizer} has {len(tokenizer)} tokens, "
            f"model.vocab_size is only {config.model.vocab_size}: "
            "the tokenizer does not belong to this model"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"data.tokenizer={config.data.tokenizer} has no end-of-text token: "
            "set eos_token in its tokenizer_config.json"
        )
    return tokenizer
