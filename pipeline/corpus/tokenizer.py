"""Tokenizers as folders in the transformers format: read one, or train a byte-level BPE."""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from retemper.pipeline.errors import UserError

EOS = "<|endoftext|>"
_BYTE_CHARACTERS = set(pre_tokenizers.ByteLevel.alphabet())  # one for each byte


class Tokenizer:
    """A fast tokenizer and what training needs to know of it: vocabulary size, end-of-text id, bytes per token, hash."""

    def __init__(self, folder: str | Path):
        """Raises UserError where the folder holds no usable tokenizer."""
        folder = _local_folder(str(folder))
        path = Path(folder, "tokenizer.json")
        if not path.is_file():
            raise UserError(
                f"data.tokenizer={folder}: there is no {path}; name a folder with a transformers fast tokenizer"
            )
        try:
            self.backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust parser raises bare Exception
            raise UserError(
                f"{path} is no tokenizer that this version reads ({error}); save it again with transformers"
            ) from None
        # A document that spells out a special token holds text, not the token.
        self.backend.encode_special_tokens = True
        self.folder = Path(folder).absolute()
        self.vocab_size = self.backend.get_vocab_size()
        # The smallest type that holds every id.
        self.dtype = "uint16" if self.vocab_size <= 2**16 else "uint32"
        self._is_byte_level = "ByteLevel" in repr(self.backend.decoder)
        self.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        self.eos_id = self._special_id("eos_token")
        self.bos_id = self._special_id("bos_token")

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens."""
        return [
            encoding.ids
            for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)
        ]

    def require(self, *, bos: bool, eos: bool) -> None:
        """Raises UserError where a token that documents are joined by is not in the vocabulary."""
        for name, wanted, id in (("bos", bos, self.bos_id), ("eos", eos, self.eos_id)):
            if wanted and id is None:
                raise UserError(
                    f"data.{name}=true, but {self.folder / 'tokenizer_config.json'} names no {name}_token of the vocabulary; set data.{name}=false"
                )
        if not (bos or eos):
            raise UserError(
                "data.bos and data.eos are both false: nothing would part one document from the next; set one of them"
            )

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes each id stands for, int32 (vocab_size,).

        0 for special tokens, which stand for no text. A token that takes the spaces beside it with
        it (lstrip, rstrip) counts as its own text alone.
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
        """Of a token as the model spells it; byte-level, every byte is one character."""
        return len(token) if self._is_byte_level else _sentencepiece_bytes(token)

    def _bytes_of_added(self, token: str) -> int:
        """Of a token that was added: of the text that it is found by.

        Unless the model makes it out of other text too.
        """
        is_piece = self.backend.model.token_to_id(token) is not None
        if is_piece and not (self._is_byte_level and set(token) - _BYTE_CHARACTERS):
            return self._bytes_of_piece(token)
        return len(token.encode())

    def _special_id(self, key: str) -> int | None:
        path = self.folder / "tokenizer_config.json"
        token = json.loads(path.read_text()).get(key) if path.is_file() else None
        token = token["content"] if isinstance(token, dict) else token
        return None if token is None else self.backend.token_to_id(token)


def sha256_here(name: str) -> str | None:
    """The hash of a tokenizer without loading or fetching it.

    name: a folder, or a hub name that was fetched before. None where its tokenizer.json is not on this machine.
    """
    path = Path(name, "tokenizer.json")
    if not Path(name).exists() and is_hub_name(name):
        from huggingface_hub import try_to_load_from_cache

        repository, _, revision = name.partition("@")
        cached = try_to_load_from_cache(repository, "tokenizer.json", revision=revision or None)
        path = Path(cached) if isinstance(cached, str) else path
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def is_hub_name(name: str) -> bool:
    """Whether a name has the form owner/name or owner/name@revision, as the hub allows it."""
    part = r"\w([\w.-]*\w)?"
    return re.fullmatch(rf"(?!.*(--|\.\.)){part}/{part}(@[\w.-]+)?", name, re.ASCII) is not None


def fetched(name: str, files: Iterable[str], given: str) -> Path:
    """The folder that a hub name's files were fetched to.

    files: patterns of their names. given: the name as the person gave it. Raises UserError where the hub does not give it.
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
            f"{given} is no folder, and the hub does not give it ({str(error).splitlines()[0]}); "
            f"check the name and HF_TOKEN"
        ) from None


def _local_folder(name: str) -> Path:
    """A folder as it is; a hub name as the folder its tokenizer files were fetched to."""
    if Path(name).exists() or not is_hub_name(name):
        return Path(name)
    return fetched(name, ["tokenizer*.json", "special_tokens_map.json"], f"data.tokenizer={name}")


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Train a byte-level BPE of exactly vocab_size tokens and save it in the transformers format."""
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
            f"The sample yields a vocabulary of {backend.get_vocab_size()}, not {vocab_size}: give more text or a smaller vocab_size"
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
