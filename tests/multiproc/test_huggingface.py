"""Test weights from transformers and back, and training beside transformers and peft.

Logits, losses and weights must be the same.
"""

import email
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SHARED_DATA, data_config, launch, overrides
from mutated import LLAMA3
from safetensors.torch import load_file

from retemper.pipeline.checkpoint import commit
from retemper.pipeline.config.compose import load_config
from retemper.pipeline.data.open_streams import Streams
from retemper.pipeline.huggingface.names import LINEAR
from retemper.pipeline.runs import run_folder
from retemper.pipeline.schema.run import Config
from retemper.tokenize.job import tokenize

# What every random model has, and what tells the families apart. 300 tokens: no multiple of 128.
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SHAPE |= {"vocab_size": 300, "max_position_embeddings": 256}
FAMILIES = {
    "llama2": ("Llama", {"num_key_value_heads": 4}),
    "llama3": (
        "Llama",
        {"rope_theta": 500000.0, "rope_scaling": LLAMA3, "tie_word_embeddings": True},
    ),
    "linear_rope": (
        "Llama",
        {
            "rope_theta": 5000.0,
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            "head_dim": 8,
        },
    ),
    "mistral": ("Mistral", {"sliding_window": 128, "head_dim": 32, "rope_theta": 1e6}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 24}),
}


def save_random(
    folder: Path, family: str, changes: dict, tokenizer: Path, dtype=torch.float32, seed: int = 1
) -> Path:
    """Write a folder as transformers does.

    Its weights, biases and norms all differ from their initial values.
    """
    import transformers

    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**SHAPE | changes)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1 + (1 if "norm" in name else 0))
    model.to(dtype).save_pretrained(folder, max_shard_size="200KB")
    (folder / "tokenizer.json").write_text((tokenizer / "tokenizer.json").read_text())
    return folder


def respell(folder: Path, *layer_types: str) -> None:
    """Rewrite config.json as transformers 5 does.

    layer_types: where there are any, each has its own dictionary of rotary parameters.
    """
    config = json.loads((folder / "config.json").read_text())
    scaling = config.pop("rope_scaling", None) or {"rope_type": "default"}
    rope = scaling | {"rope_theta": config.pop("rope_theta")}
    config["rope_parameters"] = dict.fromkeys(layer_types, rope) if layer_types else rope
    (folder / "config.json").write_text(json.dumps(config))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


@pytest.fixture(scope="module")
def folders(workspace) -> dict[str, Path]:
    """Write folders of every family, in half precision, of random shapes, and really pretrained."""
    tokenizer, root = workspace / "data" / "tokenizer", workspace / "transformers"
    made = {
        name: save_random(root / name, family, changes, tokenizer)
        for name, (family, changes) in FAMILIES.items()
    }
    made["bf16"] = save_random(root / "bf16", "Qwen2", {}, tokenizer, torch.bfloat16)
    made["fp16"] = save_random(root / "fp16", "Llama", {}, tokenizer, torch.float16)
    draw = random.Random(7)
    for number in range(2):
        groups, per_group = draw.choice([2, 4]), draw.choice([1, 2, 3])
        changes = {
            "num_key_value_heads": groups,
            "num_attention_heads": groups * per_group,
            "head_dim": 2 * draw.randint(2, 12),
        }
        changes |= {
            "hidden_size": 8 * draw.randint(3, 12),
            "intermediate_size": 2 * draw.randint(5, 90),
        }
        changes |= {
            "vocab_size": draw.randint(300, 700),
            "num_hidden_layers": 2 * draw.randint(1, 2),
            "tie_word_embeddings": draw.random() < 0.5,
            "rope_theta": 3e5,
        }
        made[f"random-{number}"] = save_random(
            root / f"random-{number}",
            draw.choice(["Llama", "Qwen2", "Qwen3"]),
            changes,
            tokenizer,
            seed=number,
        )
    for name in ("linear_rope", "mistral"):
        respell(made[name])
    respell(made["random-1"], "full_attention", "sliding_attention")
    if (SHARED_DATA / "stories260K").is_dir():
        made["stories260K"] = SHARED_DATA / "stories260K"
    return made


LAYOUTS = {"tp2": ["parallel=tp2"], "pp2": ["parallel=pp2"]}
HUB_NAMES = {"qwen2": "owner/qwen2@main"}
STAGED = ("llama2", "llama3")  # under pp2 too: separate and tied head


LORA = ["method=lora", "method.lora.rank=4", "method.lora.alpha=16"]
VARIANTS = {
    "dora": ["method.lora.dora=true"],
    "pissa": ["method.lora.pissa=true"],
    "rslora": ["method.lora.rslora=true", "method.lora.lr_ratio=4"],
}
METHODS = {"full": [], "lora": LORA} | {
    name: [*LORA, *changes] for name, changes in VARIANTS.items()
}
TRAINED = [
    ("stories260K", "full"),
    ("stories260K", "lora"),
    ("qwen2", "full"),
    ("qwen2", "dora"),
    ("qwen3", "full"),
]
SLOW_TRAINED = [("qwen2", "lora"), ("qwen2", "pissa"), ("qwen2", "rslora"), ("qwen3", "lora")]
# One step that moves nothing: the checkpoint after it holds the adapters as they began.
STILL = ["optimizer.lr=1e-30", f"train.tokens={8 * 64}", "schedule.warmup_tokens=0"]


class Exchange:
    """The imports and training runs of two ranks, and the exports of one; each rank starts once."""

    def __init__(
        self,
        workspace: Path,
        folders: dict[str, Path],
        corpora: dict[str, list[str]],
        where: str,
        round_trips,
        trained,
    ):
        self.workspace, self.root, self.folders, self.corpora = (
            workspace,
            workspace / where,
            folders,
            corpora,
        )
        self.on_two, self.on_one = [], []
        self.round_trips = {pair: self._round_trip(*pair) for pair in round_trips}
        self.trained = {
            (name, method): self._train(name, method) for name, method in trained if name in folders
        }
        launch(2, self.on_two, "exchange")
        launch(1, self.on_one, "exchange")

    def _round_trip(self, name: str, layout: str) -> tuple[Path, Path]:
        """The base that a folder is imported as, and what is exported from that."""
        base, out = (self.root / where / f"{name}-{layout}" for where in ("bases", "exported"))
        options = {
            "folder": str(self.folders[name]),
            "run": str(base),
            "keys": LAYOUTS[layout],
        }
        self.on_two.append({"import": options | {"name": HUB_NAMES.get(name)}})
        self._export(base, out)
        return base, out

    def _train(self, name: str, method: str) -> tuple[Config, Path]:
        """Train ten steps under TP2.

        Returns the run's config, and the model or adapter that is exported from it.
        """
        config, out = self._run(name, method, f"{name}-{method}")
        if method != "full":
            self._run(name, method, f"{name}-{method}-still", *STILL)
            self._export(config.run_dir, beside(out, "merged"))
        return config, out

    def _run(self, name: str, method: str, run: str, *changes: str) -> tuple[Config, Path]:
        base = self.round_trips[name, "tp2"][0]
        where = [
            "parallel=tp2",
            f"init_from={base}",
            "optimizer.weight_decay=0.1",
            "optimizer.lr=1e-3",
            *self.corpora.get(name, []),
        ]
        asked = overrides(self.workspace, run, *where, *METHODS[method], *changes)
        command = [text for text in asked if not text.startswith("model.")]  # the base's model
        self.on_two.append({"train": {"overrides": command}})
        out = self.root / "trained" / run
        self._export(self.workspace / "runs" / "test" / run, out, adapter=method != "full")
        return load_config(asked), out

    def _export(self, run: Path, folder: Path, *, adapter: bool = False) -> None:
        options = {"run": str(run), "folder": str(folder), "adapter": adapter}
        self.on_one.append({"export": options})


@pytest.fixture(scope="module")
def exchange(workspace, folders) -> Exchange:
    corpora = {}
    if "stories260K" in folders:
        tokenizer = str(folders["stories260K"])
        corpus = data_config(
            workspace,
            "stories",
            documents=Path(email.__file__).parent,
            tokenizer=tokenizer,
            bos=True,
        )
        tokenize(corpus, progress=False)
        heldout = [f"evals.heldout.{name}={corpus.path}" for name in ("code", "math")]
        corpora["stories260K"] = [
            f"data.path={corpus.path}",
            "data.name=stories",
            f"data.tokenizer={tokenizer}",
            "data.bos=true",
            *heldout,
        ]
    round_trips = [(name, "tp2") for name in folders] + [(name, "pp2") for name in STAGED]
    return Exchange(workspace, folders, corpora, "exchange", round_trips, TRAINED)


@pytest.fixture(scope="module")
def slow_exchange(workspace, folders) -> Exchange:
    return Exchange(
        workspace,
        folders,
        {},
        "slow-exchange",
        {(name, "tp2") for name, _ in SLOW_TRAINED},
        SLOW_TRAINED,
    )


def test_stock_transformers_confirms_every_import_and_export(exchange):
    for run, out in exchange.round_trips.values():
        for proof in (run / "huggingface", out):
            figures = json.loads((proof / "verified.json").read_text())
            assert figures["positions"] >= 128 and figures["max_abs_difference"] < 1e-4 * max(
                1, figures["largest_logit"]
            )
            assert figures["equal"] and not figures["weights_rounded"]
        assert "no weight was rounded" in (out / "README.md").read_text()


def test_a_round_trip_changes_no_byte(exchange):
    for (name, _), (_, out) in exchange.round_trips.items():
        before, after = tensors_of(exchange.folders[name]), tensors_of(out)
        assert before.keys() == after.keys()
        for tensor in before:
            assert before[tensor].dtype == after[tensor].dtype and before[tensor].equal(
                after[tensor]
            ), (out, tensor)
        for file in ("generation_config.json", "tokenizer.json"):
            assert (exchange.folders[name] / file).read_bytes() == (out / file).read_bytes()
        source, exported = (
            json.loads((folder / "config.json").read_text())
            for folder in (exchange.folders[name], out)
        )
        spelled = ("rope_theta", "rope_scaling", "rope_parameters", "torch_dtype", "dtype")
        unchanged = {key: value for key, value in source.items() if key not in spelled}
        assert exported | unchanged == exported
        assert exported["rope_theta"] == exported["rope_parameters"]["rope_theta"]
        scaling = exported["rope_scaling"] or {"rope_type": "default"}
        assert exported["rope_parameters"] == scaling | {"rope_theta": exported["rope_theta"]}
        assert exported["dtype"] == exported["torch_dtype"]


def test_a_changed_config_is_imported_as_transformers_reads_it_or_refused_by_its_key(folders):
    names = ("llama2", "mistral", "qwen2", "qwen3")
    launch(1, [{"folders": [str(folders[name]) for name in names], "examples": 25}], "mutated")


def test_a_base_is_the_same_at_every_layout(exchange):
    for name in STAGED:
        assert (
            len(
                {
                    commit.fingerprint(commit.newest(exchange.round_trips[name, layout][0]))
                    for layout in LAYOUTS
                }
            )
            == 1
        )
    assert len(
        {commit.fingerprint(commit.newest(base)) for base, _ in exchange.round_trips.values()}
    ) == len(exchange.folders)


# Run by transformers 5 in an environment of its own: write a folder, or the logits of folders.
WRITE = """
import json, sys, torch, transformers
for folder, family, values in json.loads(sys.argv[1]):
    torch.manual_seed(3)
    config = getattr(transformers, f"{family}Config")(**values)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        parameter.data = torch.randn_like(parameter) * 0.1 + (1 if "norm" in name else 0)
    model.save_pretrained(folder)
"""
READ = """
import json, sys, torch, transformers
for folder in json.loads(sys.argv[1]):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        torch.save(model(torch.arange(128)[None]).logits, f"{folder}/logits.pt")
"""
ROPES_OF_5 = {
    "Llama": LLAMA3 | {"rope_theta": 5e5},
    "Mistral": {"rope_type": "default", "rope_theta": 1e6},
    "Qwen2": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e5},
    "Qwen3": {"rope_type": "default", "rope_theta": 5e6},
}


@pytest.fixture(scope="module")
def transformers5(tmp_path_factory):
    """Return a function that runs a script with transformers 5 beside this environment's torch."""
    packages = tmp_path_factory.mktemp("transformers5")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(packages)]
    installed = subprocess.run([*pip, "transformers>=5,<6"], capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"transformers 5 cannot be installed: {installed.stderr[-300:]}")

    def run(script: str, argument: list) -> None:
        command = [sys.executable, "-c", script, json.dumps(argument)]
        environment = os.environ | {"PYTHONPATH": str(packages)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    return run


@pytest.mark.slow
def test_transformers_5_writes_what_is_imported_and_reads_what_is_exported(
    workspace, transformers5
):
    import transformers

    root = workspace / "transformers5"
    written = {family: root / family for family in ROPES_OF_5}
    exported = {family: root / f"{family}-exported" for family in ROPES_OF_5}
    made = [
        (str(written[family]), family, SHAPE | {"rope_parameters": rope})
        for family, rope in ROPES_OF_5.items()
    ]
    transformers5(WRITE, made)
    cases = []
    for family, folder in written.items():
        assert "rope_theta" not in json.loads((folder / "config.json").read_text())
        shutil.copy(workspace / "data" / "tokenizer" / "tokenizer.json", folder)
        base = str(root / f"{family}-base")
        cases += [
            {"import": {"folder": str(folder), "run": base}},
            {"export": {"run": base, "folder": str(exported[family])}},
        ]
    launch(1, cases, "exchange")
    transformers5(READ, [str(folder) for folder in (*written.values(), *exported.values())])
    for family, out in exported.items():
        logits = torch.load(written[family] / "logits.pt")
        assert torch.load(out / "logits.pt").equal(logits)
        ours = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        with torch.no_grad():
            torch.testing.assert_close(ours(torch.arange(128)[None]).logits, logits)


def beside(out: Path, what: str) -> Path:
    return out.with_name(f"{out.name}-{what}")


def train_with_transformers(config, model: torch.nn.Module, lrs: list[float]) -> list[float]:
    """Return the losses of plain torch on the run's samples, with AdamW and clipped gradients.

    Nothing but the order of the data is retemper's.
    """
    streams = Streams(config)
    (shards,) = streams.shards.values()
    trained = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    ratio = config.method.lora.lr_ratio if config.method.lora else 1.0
    groups = [
        {
            "params": [parameter],
            "weight_decay": 0.1 if parameter.ndim > 1 else 0,  # none of DoRA's magnitudes
            "ratio": ratio if "lora_B" in name else 1.0,
        }
        for name, parameter in trained.items()
    ]
    settings, losses = config.optimizer, []
    optimizer = torch.optim.AdamW(groups, betas=(settings.beta1, settings.beta2), eps=settings.eps)
    for step, lr in enumerate(lrs):
        ids = streams.order.batch(
            step * config.train.global_batch_size, config.train.global_batch_size
        )
        tokens_BT = torch.from_numpy(shards.samples(ids).tokens_NT)
        loss = model(input_ids=tokens_BT, labels=tokens_BT).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), settings.clip_grad)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["ratio"]
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("name", "method"), TRAINED)
def test_ten_steps_equal_those_of_transformers_and_peft(exchange, name, method):
    if name not in exchange.folders:
        pytest.skip(f"{SHARED_DATA} is not here; set RETEMPER_SHARED_DATA")
    compare_ten_steps(exchange, name, method)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method"), SLOW_TRAINED)
def test_ten_steps_of_other_families_equal_those_of_transformers(slow_exchange, name, method):
    compare_ten_steps(slow_exchange, name, method)


def compare_ten_steps(exchange: Exchange, name: str, method: str) -> None:
    import peft
    import transformers

    config, out = exchange.trained[name, method]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        exchange.folders[name], dtype=torch.float32
    )
    if method == "pissa":  # peft's own, for ours is exported beside the base's weights as they were
        modules = [module.rpartition(".")[2] for module in LINEAR.values()]
        model = peft.get_peft_model(
            model,
            peft.LoraConfig(r=4, lora_alpha=16, target_modules=modules, init_lora_weights="pissa"),
        )
    elif method != "full":
        model = peft.PeftModel.from_pretrained(model, beside(out, "still"), is_trainable=True)
    records = list(run_folder.read_metrics(config.run_dir))
    losses = train_with_transformers(config, model, [record["lr"] for record in records])
    assert len(losses) == 10 and [record["loss"] for record in records] == pytest.approx(
        losses, rel=1e-4
    )
    if method == "pissa":
        return
    theirs = peft.get_peft_model_state_dict(model) if method != "full" else model.state_dict()
    ours = tensors_of(out)
    assert ours.keys() == theirs.keys() - (
        {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    )
    moved = 0.0
    for tensor in ours:
        assert (ours[tensor] - theirs[tensor]).norm() <= 1e-4 * theirs[tensor].norm(), tensor
        before = tensors_of(beside(out, "still") if method != "full" else exchange.folders[name])[
            tensor
        ]
        moved = max(moved, ((ours[tensor] - before).norm() / ours[tensor].norm()).item())
    assert moved > 1e-3


def test_merged_and_separate_adapters_give_equal_logits(exchange):
    compare_merged(exchange)


@pytest.mark.slow
def test_merged_and_separate_adapters_of_other_kinds_give_equal_logits(slow_exchange):
    compare_merged(slow_exchange)


def test_adapters_name_the_model_as_it_was_imported(exchange):
    for (name, method), (_, out) in exchange.trained.items():
        if method != "full":
            config = json.loads((out / "adapter_config.json").read_text())
            hub_name, _, revision = HUB_NAMES.get(name, "").partition("@")
            assert config["base_model_name_or_path"] == (
                hub_name or str(exchange.folders[name].resolve())
            )
            assert config["revision"] == (revision or None)


def compare_merged(exchange: Exchange) -> None:
    import peft
    import transformers

    for (name, method), (_, out) in exchange.trained.items():
        if method == "full":
            continue
        merged = transformers.AutoModelForCausalLM.from_pretrained(
            beside(out, "merged"), dtype=torch.float32
        )
        base = transformers.AutoModelForCausalLM.from_pretrained(
            exchange.folders[name], dtype=torch.float32
        )
        tokens = torch.arange(100)[None]
        with torch.no_grad():
            plain, expected = (
                base(tokens).logits,
                peft.PeftModel.from_pretrained(base, out)(tokens).logits,
            )
            got = merged(tokens).logits
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
        assert (plain - expected).abs().max() > 1e-2, "the adapters change nothing"


def test_a_model_larger_than_the_memory_is_compared_layer_by_layer(folders, monkeypatch, tmp_path):
    import peft
    import psutil
    import transformers

    from retemper.pipeline.huggingface import verify

    monkeypatch.chdir(tmp_path)  # peft would write a copy of the base below it
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=600_000))
    tokens = torch.arange(100)[None]
    for name in ("llama2", "llama3"):  # of their own, and a tied head
        model = verify._reference(folders[name], None)
        assert set(model.hf_device_map.values()) == {"cpu", "disk"}
        whole = transformers.AutoModelForCausalLM.from_pretrained(
            folders[name], dtype=torch.float32
        )
        adapted = peft.get_peft_model(
            whole, peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        ).eval()
        adapted.save_pretrained(tmp_path / name)
        with torch.no_grad():
            got = verify._reference(folders[name], tmp_path / name)(tokens).logits
            assert got.equal(adapted(tokens).logits)
            with adapted.disable_adapter():
                plain = adapted(tokens).logits
                assert model(tokens).logits.equal(plain) and not got.equal(plain)
    assert not any(
        path.is_dir() and path.name not in ("llama2", "llama3") for path in tmp_path.iterdir()
    )
