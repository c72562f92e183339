"""Tokenizer folders in the transformers format: load one, or train a byte-level BPE."""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import orjson
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from retemper.pipeline.errors import UserError
from retemper.pipeline.files.json_file import read_json

EOS = "<|endoftext|>"
_BYTE_CHARACTERS = set(pre_tokenizers.ByteLevel.alphabet())  # one for each byte


class Tokenizer:
    """A fast tokenizer with what training needs of it.

    That is the vocabulary size, the end-of-text id, the bytes of each token, and the hash.
    """

    def __init__(self, folder: str | Path):
        """Load a tokenizer.

        Args:
            folder: A folder, or a name on the Hugging Face hub.

        Raises:
            UserError: The folder has no usable tokenizer, or the hub does not provide it.
        """
        folder = _local_folder(str(folder))
        path = Path(folder, "tokenizer.json")
        if not path.is_file():
            raise UserError(
                f"tokenizer {folder}: there is no {path}; "
                "name a folder with a transformers fast tokenizer"
            )
        self.folder = Path(folder).absolute()
        self.backend = _read_backend(path)
        # Ids may have gaps: this is one more than the largest, not the number of tokens.
        self.vocab_size = max(self.backend.get_vocab().values(), default=-1) + 1
        # The smallest type that can represent every id.
        self.dtype = "uint16" if self.vocab_size <= 2**16 else "uint32"
        self._is_byte_level = "ByteLevel" in repr(self.backend.decoder)
        self.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        self.eos_id = self._special_id("eos_token")
        self.bos_id = self._special_id("bos_token")

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of each whole text, without special tokens."""
        return [
            encoding.ids
            for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)
        ]

    def require(self, *, bos: bool, eos: bool) -> None:
        """Check that the tokens that separate documents are in the vocabulary.

        Raises:
            UserError: A token is not in the vocabulary, or both `bos` and `eos` are false.
        """
        for name, required, id in (("bos", bos, self.bos_id), ("eos", eos, self.eos_id)):
            if required and id is None:
                raise UserError(
                    f"data.{name}=true, but {self.folder / 'tokenizer_config.json'} names no "
                    f"{name}_token of the vocabulary; name one there, or set data.{name}=false"
                )
        if not (bos or eos):
            raise UserError(
                "data.bos and data.eos are both false: "
                "no token would separate one document from the next; set one of them to true"
            )

    def token_bytes(self) -> np.ndarray:
        """Return the number of UTF-8 bytes that each id represents, int32 (vocab_size,).

        Special tokens represent no text and have 0. For a token that absorbs the spaces beside it
        (lstrip, rstrip), only the text of the token itself is counted.
        """
        added = self.backend.get_added_tokens_decoder()
        sizes = np.zeros(self.vocab_size, np.int32)
        for token, id in self.backend.get_vocab().items():
            if id not in added:
                sizes[id] = self._bytes_of_piece(token)
            elif not added[id].special:
                sizes[id] = self._bytes_of_added(token)
        return sizes

    def _bytes_of_piece(self, token: str) -> int:
        """Return the bytes of a token in the model's spelling.

        A byte-level model spells every byte as one character.
        """
        return len(token) if self._is_byte_level else _sentencepiece_bytes(token)

    def _bytes_of_added(self, token: str) -> int:
        """Return the bytes of an added token.

        These are the bytes of the text that it matches, except for a token that the model also
        produces from text: such a token is in the model's spelling.
        """
        is_piece = self.backend.model.token_to_id(token) is not None
        if is_piece and not (self._is_byte_level and set(token) - _BYTE_CHARACTERS):
            return self._bytes_of_piece(token)
        return len(token.encode())

    def settings(self, name: str = "tokenizer_config.json") -> dict:
        """Return the content of a JSON file beside tokenizer.json, {} if there is none.

        Raises:
            UserError: The file is damaged.
        """
        path = self.folder / name
        return read_json(path, dict, "save the tokenizer again") if path.is_file() else {}

    def _special_id(self, key: str) -> int | None:
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            token = self.settings(name).get(key)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                return self.backend.token_to_id(token)
        return None


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    """Load a tokenizer.json so that it encodes whole texts, always to the same ids.

    Raises:
        UserError: The library cannot read the file, or does not give its tokens the ids of the
            file.
    """
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the Rust parser raises bare Exception, or it panics
        raise UserError(
            f"{path} is not a tokenizer that this version can read ({error}); "
            "save it again with transformers"
        ) from None
    for token in orjson.loads(path.read_bytes())["added_tokens"]:
        if (id := backend.token_to_id(token["content"])) != token["id"]:
            raise UserError(
                f"{path}: its added token {token['content']!r} has the id {token['id']}, but the "
                f"tokenizers library, and so transformers, reads {id}, because the ids have a gap "
                "or are not in order: correct the ids to those that the model was trained with"
            )
    # Settings of batches and of training, which were saved with the tokenizer.
    backend.no_truncation()
    backend.no_padding()
    if hasattr(backend.model, "dropout"):
        backend.model.dropout = None
    # A special token that is spelled out in a document is encoded as text, not as the token.
    backend.encode_special_tokens = True
    return backend


def sha256_here(name: str) -> str | None:
    """Return the hash of a tokenizer without loading or downloading it.

    Args:
        name: A folder, or a hub name that was downloaded before.

    Returns:
        The SHA-256 of its tokenizer.json; None if that file is not on this machine.
    """
    path = Path(name, "tokenizer.json")
    if not Path(name).exists() and is_hub_name(name):
        from huggingface_hub import try_to_load_from_cache

        repository, _, revision = name.partition("@")
        cached = try_to_load_from_cache(repository, "tokenizer.json", revision=revision or None)
        path = Path(cached) if isinstance(cached, str) else path
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def is_hub_name(name: str) -> bool:
    """Return whether a name is a valid hub name, owner/name or owner/name@revision."""
    part = r"\w([\w.-]*\w)?"
    return re.fullmatch(rf"(?!.*(--|\.\.)){part}/{part}(@[\w.-]+)?", name, re.ASCII) is not None


def fetched(name: str, files: Iterable[str], given: str) -> Path:
    """Download files of a hub repository and return the folder that they are in.

    Args:
        name: The hub name, owner/name or owner/name@revision.
        files: Patterns of the file names.
        given: The setting as the user wrote it, for the error message.

    Raises:
        UserError: The hub does not provide the repository.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    try:
        return Path(
            snapshot_download(repository, revision=revision or None, allow_patterns=list(files))
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{given} is not a folder, and the hub does not provide it "
            f"({str(error).splitlines()[0]}); check the name and HF_TOKEN"
        ) from None


def _local_folder(name: str) -> Path:
    """Return a folder unchanged; for a hub name, the folder of its downloaded tokenizer files."""
    if Path(name).exists() or not is_hub_name(name):
        return Path(name)
    return fetched(name, ["tokenizer*.json", "special_tokens_map.json"], f"data.tokenizer={name}")


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Train a byte-level BPE tokenizer and save it in the transformers format.

    Args:
        texts: The training text.
        vocab_size: The exact number of tokens, including the end-of-text token.
        folder: Where to save it; created if missing.

    Raises:
        UserError: The text does not yield a vocabulary of this size.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    if backend.get_vocab_size() != vocab_size:
        raise UserError(
            f"The sample yields a vocabulary of {backend.get_vocab_size()}, not {vocab_size}: "
            "provide more text or set a smaller vocab_size"
        )
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": EOS}, indent=2))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def _sentencepiece_bytes(token: str) -> int:
    is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return 1 if is_byte else len(token.replace("▁", " ").encode())
