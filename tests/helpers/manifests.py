"""Write the manifest of a corpus that is not there."""

from pathlib import Path

from retemper.pipeline.files.sealed import dump_sealed


def write_manifest(folder: Path, samples: int, tokenizer_sha256: str = "") -> Path:
    """Write a manifest with some samples into a folder that is created, and return the folder."""
    counts = {"documents": 1, "samples": samples, "tokens": 64 * samples}
    manifest = {
        "name": folder.name,
        "made_from": {},
        "fingerprint": "",
        "tokenizer_sha256": tokenizer_sha256,
        "vocab_size": 300,
        "seq_length": 64,
        "splits": {"train": counts, "heldout": counts},
        "files": {},
    }
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(dump_sealed(manifest))
    return folder
