"""Test what an export writes beside the weights.

It writes the end-of-text id, the tokenizer, a note on rounding, and the base of adapters.
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
from retemper.pipeline.schema.exchange import ExportRequest
from retemper.pipeline.schema.model import LoraConfig, MethodConfig, ModelSetup, ParallelConfig


@dataclass
class InMemoryCheckpoint:
    """A checkpoint whose tensors are in memory, in place of a StreamedModel."""

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


def write_checkpoint(
    run: Path, tokenizer: Path, *, step: int = 4, init_from: Path | None = None, **setup
) -> InMemoryCheckpoint:
    """Write a run with a checkpoint of which only meta.json is on disk, and return it.

    With LoRA it has an adapter in one layer.
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
    return InMemoryCheckpoint(commit.folder_of(run, step), meta, setup, tensors)


def test_an_exported_model_without_an_import_stops_generation_at_end_of_text(tmp_path, tokenizer):
    import transformers

    streamed = write_checkpoint(tmp_path / "run", tokenizer)
    (out := tmp_path / "out").mkdir()
    rounding = export.export_model(
        streamed, out, export.tokenizer_of(streamed.folder, streamed.meta, None)
    )
    assert not rounding.rounded
    assert "no weight was rounded" in (out / "README.md").read_text()
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1  # that of the umask
    eos = Tokenizer(tokenizer).eos_id
    config = json.loads((out / "config.json").read_text())
    assert config["eos_token_id"] == eos
    assert "bos_token_id" not in config
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.generation_config.eos_token_id == eos
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[eos] = 1000 * torch.sign(
            model.model(torch.tensor([[5]])).last_hidden_state[0, -1]
        )
    assert model.generate(torch.tensor([[5]]), max_new_tokens=9, do_sample=False).shape[1] < 10
    assert Weights(out).model == streamed.setup.model.model_copy(update={"head_size": 4})


def test_special_token_ids_come_from_the_tokenizer_config(tmp_path, tokenizer):
    shutil.copytree(tokenizer, named := tmp_path / "named")
    settings = json.loads((named / "tokenizer_config.json").read_text())
    for bos, expected in (
        ({"content": "t"}, Tokenizer(named).backend.token_to_id("t")),
        ("nowhere to be found", None),
    ):
        (named / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": bos}))
        assert export._special_ids(Tokenizer(named)).get("bos_token_id") == expected
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (named / name).unlink()
    assert export._special_ids(Tokenizer(named)) == {}


def test_an_export_refuses_a_tokenizer_other_than_the_one_of_training(tmp_path, tokenizer):
    streamed = write_checkpoint(tmp_path / "run", tokenizer)
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


def test_an_export_copies_no_file_from_outside_the_tokenizers_folder(tmp_path, tokenizer):
    streamed = write_checkpoint(tmp_path / "run", tokenizer)
    shutil.copytree(tokenizer, linked := tmp_path / "linked")
    (tmp_path / "secret").write_text("password")
    (linked / "chat_template.jinja").symlink_to("../secret")
    (out := tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="chat_template.jinja is a link out of its folder"):
        export.export_model(streamed, out, Tokenizer(linked))


def test_another_tokenizer_is_refused_before_any_rank_starts(tmp_path, tokenizer):
    write_checkpoint(tmp_path / "run", tokenizer)
    train_tokenizer(["another text, and other tokens"], 262, other := tmp_path / "other")
    from retemper.pipeline.huggingface.__main__ import exporting

    run = str(tmp_path / "run")
    out = str(tmp_path / "out")
    prepare, _ = exporting(ExportRequest(run=run, folder=out, tokenizer=str(other)))
    with pytest.raises(UserError, match="another tokenizer"):
        prepare()


def write_imported(
    run: Path,
    tokenizer: Path,
    dtype: torch.dtype = torch.float32,
    name: str | None = None,
    folder: Path | None = None,
) -> Path:
    """Write a transformers folder and the record of its import, and return the folder."""
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
def test_rounding_to_the_type_of_the_source_is_reported_and_documented(tmp_path, tokenizer, dtype):
    write_imported(tmp_path / "run", tokenizer, dtype)
    streamed = write_checkpoint(tmp_path / "run", tokenizer)
    streamed.tensors["decoder.final_layernorm.weight"].fill_(1.0)  # ones lose nothing by rounding
    (out := tmp_path / "out").mkdir()
    rounding = export.export_model(
        streamed, out, export.tokenizer_of(streamed.folder, streamed.meta, None)
    )
    type_name = str(dtype).removeprefix("torch.")
    count = len(tensor_shapes(streamed.setup.model))
    assert rounding.rounded == {type_name: count - 1}
    message = (
        f"{count - 1} of {count} tensors were rounded to {type_name}: "
        "the type of the model that was imported"
    )
    assert str(rounding) == message
    assert message in (out / "README.md").read_text()
    assert "The run run after step 4" in (out / "README.md").read_text()


def test_rounding_of_a_bf16_run_without_an_import_is_reported(tmp_path, tokenizer):
    streamed = write_checkpoint(tmp_path / "run", tokenizer, precision="bf16")
    (out := tmp_path / "out").mkdir()
    rounding = export.export_model(streamed, out, Tokenizer(tokenizer))
    assert "rounded to bfloat16: the type of the run's precision" in str(rounding)


LORA = MethodConfig(name="lora", lora=LoraConfig(rank=2, alpha=4, targets=["o"], dropout=0.0))


def put_in_hub_cache(hub: Path, name: str, files: Path, monkeypatch) -> Path:
    """Copy a folder to where huggingface_hub caches downloads, and switch the hub to offline."""
    snapshot = hub / f"models--{name.replace('/', '--')}" / "snapshots" / ("1" * 40)
    (snapshot.parent.parent / "refs").mkdir(parents=True)
    for branch in ("main", "v2"):
        (snapshot.parent.parent / "refs" / branch).write_text("1" * 40)
    shutil.copytree(files, snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return snapshot


def test_adapters_name_their_base_as_it_was_imported(tmp_path, tokenizer, monkeypatch):
    run = tmp_path / "lora"
    base = tmp_path / "base"
    folder = write_imported(base, tokenizer, name="owner/model@v2")
    write_checkpoint(base, tokenizer, step=0)
    streamed = write_checkpoint(run, tokenizer, init_from=base, method=LORA)
    snapshot = put_in_hub_cache(tmp_path / "hub", "owner/model", folder, monkeypatch)
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
    shutil.rmtree(folder)  # now only the name leads to the base
    assert export.base_of(streamed, None) == ("owner/model@v2", snapshot.resolve())
    assert export.base_of(streamed, "owner/model") == ("owner/model", snapshot.resolve())
    with pytest.raises(
        UserError,
        match="the adapters' base some/copy is not a folder, and the hub does not provide it",
    ):
        export.base_of(streamed, "some/copy")
    with pytest.raises(UserError, match="no transformers folder that is here.*--base"):
        export.base_of(streamed, str(tmp_path / "typo"))


def test_a_base_without_an_import_must_be_given_by_base(tmp_path, tokenizer, monkeypatch):
    run = tmp_path / "lora"
    base = tmp_path / "base"
    write_checkpoint(base, tokenizer, step=0)
    (base / "config.json").write_text("{}")  # as in the folder of a trained run
    streamed = write_checkpoint(run, tokenizer, init_from=base, method=LORA)
    with pytest.raises(UserError, match=rf"retemper export {base} FOLDER"):
        export.base_of(streamed, None)
    folder = write_imported(tmp_path / "other", tokenizer)
    snapshot = put_in_hub_cache(tmp_path / "hub", "owner/model", folder, monkeypatch)
    assert export.base_of(streamed, "owner/model") == ("owner/model", snapshot)
    assert export.base_of(streamed, str(folder)) == (str(folder), folder)


def test_a_base_whose_import_recorded_no_name_is_named_by_its_folder(tmp_path, tokenizer):
    run = tmp_path / "lora"
    base = tmp_path / "base"
    folder = write_imported(base, tokenizer)
    source = json.loads((base / load.ORIGIN / load.SOURCE).read_text())
    del source["name"]
    (base / load.ORIGIN / load.SOURCE).write_text(json.dumps(source))
    write_checkpoint(base, tokenizer, step=0)
    assert export.base_of(write_checkpoint(run, tokenizer, init_from=base, method=LORA), None) == (
        str(folder),
        folder,
    )


def test_a_hub_model_is_imported_from_the_cache(tmp_path, tokenizer, monkeypatch, capfd):
    folder = write_imported(tmp_path / "run", tokenizer)
    snapshot = put_in_hub_cache(tmp_path / "hub", "owner/model", folder, monkeypatch)
    assert transformers_folder("owner/model", "") == snapshot
    assert transformers_folder("owner/model@v2", "") == snapshot
    assert transformers_folder(str(folder), "") == folder
    assert transformers_folder("a/b/c", "") == Path("a/b/c")
    requests = []
    monkeypatch.setattr(
        "retemper.launch.local.run_here",
        lambda module, arguments, ranks: requests.append(json.loads(arguments[1])) or 0,
    )
    assert main(["import", "owner/model@v2", str(tmp_path / "base")]) == 0
    assert main(["import", str(folder), str(tmp_path / "base")]) == 0
    assert [(request["folder"], request["name"]) for request in requests] == [
        (str(snapshot), "owner/model@v2"),
        (str(folder), None),
    ]
    assert main(["import", "owner/absent", str(tmp_path / "base")]) == 1
    stderr = capfd.readouterr().err
    assert "owner/absent is not a folder, and the hub does not provide it" in stderr
    assert "Traceback" not in stderr
