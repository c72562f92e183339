"""Test what an export writes beside the weights.

It writes the stop tokens of generation, the tokenizer, the rounding, and the base of adapters.
"""

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_weights import MODEL, megatron_shapes

from retemper.pipeline.checkpoint import commit
from retemper.pipeline.checkpoint.base import Base, base_of_checkpoint
from retemper.pipeline.cli import main
from retemper.pipeline.corpus.tokenizer import Tokenizer, train_tokenizer
from retemper.pipeline.errors import UserError
from retemper.pipeline.huggingface import export, load
from retemper.pipeline.huggingface.names import tensor_shapes
from retemper.pipeline.huggingface.source_config import config_of, transformers_folder
from retemper.pipeline.huggingface.source_folder import Weights
from retemper.pipeline.schema.model import LoraConfig, MethodConfig, ModelSetup, ParallelConfig


@dataclass
class Held:
    """A checkpoint in memory, in place of a StreamedModel."""

    folder: Path
    meta: dict
    setup: ModelSetup
    tensors: dict[str, torch.Tensor]

    @property
    def names(self) -> list[str]:
        return list(self.tensors)

    @property
    def base(self) -> Base | None:
        return base_of_checkpoint(self.folder, self.meta)

    def load(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        return {name: self.tensors[name] for name in names}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["a text of no words but these"], 260, folder)
    return folder


def held(
    run: Path, tokenizer: Path, *, step: int = 4, init_from: Path | None = None, **setup
) -> Held:
    """Write a run with a checkpoint of which only meta.json is on the disk, and return it.

    With LoRA it has an adapter of one layer.

    With LoRA it has an adapter of one layer.
    """
    method = setup.pop("method", MethodConfig(name="full"))
    model = MODEL.model_copy(update={"vocab_size": 260})
    setup = ModelSetup(
        **{"model": model, "method": method, "parallel": ParallelConfig(), "precision": "fp32"}
        | setup
    )
    commit.begin(run, step).joinpath("shard").touch()
    meta = {
        "train_state": {"step": step},
        "config": setup.model_dump()
        | {
            "init_from": str(init_from) if init_from else None,
            "data": {"tokenizer": str(tokenizer)},
        },
        "fingerprints": {"tokenizer": Tokenizer(tokenizer).sha256},
    }
    if init_from:
        meta["fingerprints"]["base"] = commit.fingerprint(commit.newest(init_from))
    commit.commit(run, step, meta)
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: torch.randn(shape, generator=generator)
        for name, shape in megatron_shapes(model, 1).items()
    }
    if method.name == "lora":
        adapter = {"lora_A": (2, 16), "lora_B": (16, 2)}
        tensors |= {
            f"decoder.layers.0.self_attention.adapters.o.{name}": torch.ones(shape)
            for name, shape in adapter.items()
        }
    return Held(commit.folder_of(run, step), meta, setup, tensors)


def test_a_model_that_was_never_imported_says_where_generation_stops(tmp_path, tokenizer):
    import transformers

    streamed = held(tmp_path / "run", tokenizer)
    (out := tmp_path / "out").mkdir()
    rounding = export.export_model(
        streamed, out, export.tokenizer_of(streamed.folder, streamed.meta, None)
    )
    assert not rounding.rounded and "no weight was rounded" in (out / "README.md").read_text()
    eos = Tokenizer(tokenizer).eos_id
    config = json.loads((out / "config.json").read_text())
    assert config["eos_token_id"] == eos and "bos_token_id" not in config
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.generation_config.eos_token_id == eos
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[eos] = 1000 * torch.sign(
            model.model(torch.tensor([[5]])).last_hidden_state[0, -1]
        )
    assert model.generate(torch.tensor([[5]]), max_new_tokens=9, do_sample=False).shape[1] < 10
    assert Weights(out).model == streamed.setup.model.model_copy(update={"head_size": 4})


def test_both_tokens_are_written_where_the_tokenizer_names_them(tmp_path, tokenizer):
    shutil.copytree(tokenizer, named := tmp_path / "named")
    settings = json.loads((named / "tokenizer_config.json").read_text())
    for bos, expected in (
        ({"content": "t"}, Tokenizer(named).backend.token_to_id("t")),
        ("nowhere to be found", None),
    ):
        (named / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": bos}))
        assert export._special_ids(Tokenizer(named)).get("bos_token_id") == expected
    (named / "tokenizer_config.json").unlink()
    assert export._special_ids(Tokenizer(named)) == {}


def test_an_export_takes_no_other_tokenizer_than_the_models(tmp_path, tokenizer):
    streamed = held(tmp_path / "run", tokenizer)
    train_tokenizer(["another text, and other tokens"], 262, other := tmp_path / "other")
    with pytest.raises(
        UserError,
        match=rf"{other} is another tokenizer than the one that .*step-00000004 was trained with"
        r".*--tokenizer",
    ):
        export.tokenizer_of(streamed.folder, streamed.meta, str(other))
    with pytest.raises(UserError, match=r"there is no nowhere/tokenizer.json.*--tokenizer FOLDER"):
        export.tokenizer_of(streamed.folder, streamed.meta, "nowhere")
    streamed.meta["config"]["data"]["tokenizer"] = "gone"
    assert export.tokenizer_of(streamed.folder, streamed.meta, str(tokenizer)).folder == tokenizer


def test_the_command_refuses_another_tokenizer_before_it_exports(tmp_path, tokenizer, capfd):
    streamed = held(tmp_path / "run", tokenizer)
    train_tokenizer(["another text, and other tokens"], 262, other := tmp_path / "other")
    from retemper.pipeline.huggingface.__main__ import exporting

    prepare, _ = exporting(
        str(tmp_path / "run"), str(tmp_path / "out"), None, False, None, str(other)
    )
    with pytest.raises(UserError, match="another tokenizer"):
        prepare()
    assert streamed.folder.is_dir() and not (tmp_path / "out").exists()


def imported(
    run: Path,
    tokenizer: Path,
    dtype: torch.dtype = torch.float32,
    name: str | None = None,
    folder: Path | None = None,
) -> Path:
    """Write what an import leaves of a folder beside its checkpoint, and return the folder."""
    folder = folder or run.with_name(f"{run.name}-folder")
    model = MODEL.model_copy(update={"vocab_size": 260})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_of(model, "float32")))
    save_file(
        {key: torch.zeros(shape, dtype=dtype) for key, shape in tensor_shapes(model).items()},
        folder / "model.safetensors",
    )
    for file in tokenizer.iterdir():
        shutil.copyfile(file, folder / file.name)
    load._keep_origin(Weights(folder), name, run / load.ORIGIN)
    return folder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_the_sources_type_is_told_and_written_down(tmp_path, tokenizer, dtype):
    imported(tmp_path / "run", tokenizer, dtype)
    streamed = held(tmp_path / "run", tokenizer)
    streamed.tensors["decoder.final_layernorm.weight"].fill_(1.0)  # loses nothing
    (out := tmp_path / "out").mkdir()
    rounding = export.export_model(
        streamed, out, export.tokenizer_of(streamed.folder, streamed.meta, None)
    )
    said, count = str(dtype).removeprefix("torch."), len(tensor_shapes(streamed.setup.model))
    assert rounding.rounded == {said: count - 1}
    told = (
        f"{count - 1} of {count} tensors were rounded to {said}: "
        "the type of the model that was imported"
    )
    assert str(rounding) == told and told in (out / "README.md").read_text()
    assert "The run run after step 4" in (out / "README.md").read_text()


def test_a_run_in_bf16_that_was_never_imported_tells_of_its_rounding_too(tmp_path, tokenizer):
    streamed = held(tmp_path / "run", tokenizer, precision="bf16")
    (out := tmp_path / "out").mkdir()
    rounding = export.export_model(streamed, out, Tokenizer(tokenizer))
    assert "rounded to bfloat16: the type of the run's precision" in str(rounding)


LORA = MethodConfig(name="lora", lora=LoraConfig(rank=2, alpha=4, targets=["o"], dropout=0.0))


def in_cache(hub: Path, name: str, files: Path, monkeypatch) -> Path:
    """Put a folder where huggingface_hub stores what it has fetched, and be offline."""
    snapshot = hub / f"models--{name.replace('/', '--')}" / "snapshots" / ("1" * 40)
    (snapshot.parent.parent / "refs").mkdir(parents=True)
    for branch in ("main", "v2"):
        (snapshot.parent.parent / "refs" / branch).write_text("1" * 40)
    shutil.copytree(files, snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return snapshot


def test_adapters_name_their_base_as_it_was_given(tmp_path, tokenizer, monkeypatch):
    run, base = tmp_path / "lora", tmp_path / "base"
    folder = imported(base, tokenizer, name="owner/model@v2")
    held(base, tokenizer, step=0)
    streamed = held(run, tokenizer, init_from=base, method=LORA)
    snapshot = in_cache(tmp_path / "hub", "owner/model", folder, monkeypatch)
    shutil.copytree(folder, elsewhere := tmp_path / "elsewhere")
    assert export.base_of(streamed, None) == ("owner/model@v2", folder)
    assert export.base_of(streamed, "some/copy") == ("some/copy", folder)
    assert export.base_of(streamed, str(elsewhere)) == (str(elsewhere), elsewhere)
    for name, written, revision in (
        ("owner/model@v2", "owner/model", "v2"),
        ("a/b", "a/b", None),
        (str(elsewhere), str(elsewhere), None),
    ):
        (out := tmp_path / f"out-{written.replace('/', '-')}").mkdir()
        export.export_adapter(streamed, out, name)
        config = json.loads((out / "adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["revision"]) == (written, revision)
        assert f"of the model {name}" in (out / "README.md").read_text()
    shutil.rmtree(folder)  # the name is all that is left of it here
    assert export.base_of(streamed, None) == ("owner/model@v2", snapshot.resolve())
    assert export.base_of(streamed, "owner/model") == ("owner/model", snapshot.resolve())
    with pytest.raises(
        UserError,
        match="the adapters' base some/copy is not a folder, and the hub does not provide it",
    ):
        export.base_of(streamed, "some/copy")
    with pytest.raises(UserError, match="no transformers folder that is here.*--base"):
        export.base_of(streamed, str(tmp_path / "typo"))


def test_a_base_that_was_never_imported_is_what_base_names(tmp_path, tokenizer, monkeypatch):
    run, base = tmp_path / "lora", tmp_path / "base"
    held(base, tokenizer, step=0)
    (base / "config.json").write_text("{}")  # a run folder's
    streamed = held(run, tokenizer, init_from=base, method=LORA)
    with pytest.raises(UserError, match=rf"retemper export {base} FOLDER"):
        export.base_of(streamed, None)
    folder = imported(tmp_path / "other", tokenizer)
    snapshot = in_cache(tmp_path / "hub", "owner/model", folder, monkeypatch)
    assert export.base_of(streamed, "owner/model") == ("owner/model", snapshot)
    assert export.base_of(streamed, str(folder)) == (str(folder), folder)


def test_a_base_of_before_hub_names_were_kept_is_named_by_its_folder(tmp_path, tokenizer):
    run, base = tmp_path / "lora", tmp_path / "base"
    folder = imported(base, tokenizer)
    source = json.loads((base / load.ORIGIN / load.SOURCE).read_text())
    del source["name"]
    (base / load.ORIGIN / load.SOURCE).write_text(json.dumps(source))
    held(base, tokenizer, step=0)
    assert export.base_of(held(run, tokenizer, init_from=base, method=LORA), None) == (
        str(folder),
        folder,
    )


def test_a_hub_name_is_imported_from_where_it_was_fetched_to(
    tmp_path, tokenizer, monkeypatch, capfd
):
    folder = imported(tmp_path / "run", tokenizer)
    snapshot = in_cache(tmp_path / "hub", "owner/model", folder, monkeypatch)
    assert (
        transformers_folder("owner/model", "")
        == transformers_folder("owner/model@v2", "")
        == snapshot
    )
    assert transformers_folder(str(folder), "") == folder and transformers_folder(
        "a/b/c", ""
    ) == Path("a/b/c")
    asked = []
    monkeypatch.setattr(
        "retemper.launch.torchrun.run_here",
        lambda module, words, ranks: asked.append(json.loads(words[1])) or 0,
    )
    assert (
        main(["import", "owner/model@v2", str(tmp_path / "base")])
        == 0
        == main(["import", str(folder), str(tmp_path / "base")])
    )
    assert [(options["folder"], options["name"]) for options in asked] == [
        (str(snapshot), "owner/model@v2"),
        (str(folder), None),
    ]
    assert main(["import", "owner/absent", str(tmp_path / "base")]) == 1
    said = capfd.readouterr().err
    assert (
        "owner/absent is not a folder, and the hub does not provide it" in said
        and "Traceback" not in said
    )
