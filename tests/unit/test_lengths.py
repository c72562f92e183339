"""Test lengths in epochs and fractions: the tokens that they become, and what is refused."""

import pytest
from conftest import SEQ_LENGTH, overrides
from manifests import write_manifest

from retemper.pipeline.checkpoint.trunk import branches_of
from retemper.pipeline.config.compose import load_config
from retemper.pipeline.corpus.manifest import read_manifest
from retemper.pipeline.data.open_streams import Streams
from retemper.pipeline.errors import UserError
from retemper.pipeline.runs.run_folder import check_resumable, start_or_resume

BATCH = 8  # train.global_batch_size
NO_TOKENS = ["train.tokens=null", "schedule.warmup_tokens=0"]


@pytest.fixture
def samples(workspace) -> int:
    """Return the training samples of the corpus "code"."""
    return read_manifest(str(workspace / "data" / "code"))["splits"]["train"]["samples"]


def config_of(workspace, *changes):
    return load_config(overrides(workspace, "epochs", *changes, corpus="code"))


@pytest.mark.parametrize("epochs", ["1", "3", "0.29", "2.5"])
def test_epochs_are_rounded_down_to_whole_steps(workspace, samples, epochs):
    config = config_of(workspace, *NO_TOKENS, f"train.epochs={epochs}")
    hundredths = round(100 * float(epochs))
    assert config.steps == hundredths * samples // (100 * BATCH)
    assert config.train.tokens == config.steps * config.tokens_per_step


def test_with_a_mixture_an_epoch_reads_the_own_corpus_once(workspace, samples):
    mixture = [
        f"data.mixture.math.path={workspace / 'data' / 'math'}",
        "data.mixture.math.fraction=0.25",
    ]
    config = config_of(workspace, *NO_TOKENS, *mixture, "train.epochs=2")
    read = Streams(config).epochs(config.steps * BATCH)["code"]
    assert read <= 2 < read + BATCH / samples


def test_milestones_branches_and_warmup_follow_from_the_corpus(workspace, samples):
    config = config_of(
        workspace,
        *NO_TOKENS,
        "train.epochs=4",
        "train.branches=[1ep,2.5ep]",
        "checkpoint.milestones=[2ep,1024]",
        "schedule.warmup_fraction=0.1",
    )
    step = BATCH * SEQ_LENGTH
    assert config.train.branches == [samples // BATCH * step, 5 * samples // (2 * BATCH) * step]
    assert config.checkpoint.milestones == [2 * samples // BATCH * step, 1024]
    assert config.schedule.warmup_tokens == config.train.tokens // 10
    lengths = [(branch.train.tokens, branch.train.epochs) for branch in branches_of(config)]
    assert lengths == [(tokens, None) for tokens in config.train.branches]


def test_a_run_continues_with_either_form_of_its_length(workspace, tmp_path):
    folder = f"runs_dir={tmp_path}"
    config = config_of(
        workspace, folder, *NO_TOKENS, "train.epochs=2", "schedule.warmup_fraction=0.1"
    )
    start_or_resume(config, 0)
    same = [
        f"train.tokens={config.train.tokens}",
        f"schedule.warmup_tokens={config.schedule.warmup_tokens}",
    ]
    check_resumable(config_of(workspace, folder, *same))
    with pytest.raises(UserError, match=r"train.tokens: \d+ -> \d+"):
        check_resumable(config_of(workspace, folder, *NO_TOKENS, "train.epochs=3"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["train.epochs=2"], "train.tokens=5120 and train.epochs=2 are both set"),
        (["schedule.warmup_fraction=0.1"], "schedule.warmup_tokens=1024 and schedule.warmup_fract"),
        ([*NO_TOKENS, "train.epochs=0.001"], "0.001 epochs of .* less than one step of train.glob"),
        ([*NO_TOKENS, "train.epochs=-1"], "train.epochs: Input should be greater than 0"),
        ([*NO_TOKENS, "train.epochs=two"], "train.epochs: Input should be a valid number"),
        (["checkpoint.milestones=[1ep,2epochs]"], "'2epochs' is not a token count"),
        ([*NO_TOKENS, "train.epochs=2", "train.global_batch_size=x"], "global_batch_size: Input"),
        ([*NO_TOKENS, "train.epochs=2", "data.path=nowhere"], "nowhere holds no token corpus"),
        ([*NO_TOKENS, "train.epochs=2", "data.packing=x"], "data.packing: Input should be"),
        ([*NO_TOKENS], "train.tokens"),
    ],
)
def test_other_lengths_are_refused(workspace, changes, message):
    with pytest.raises(UserError, match=message):
        config_of(workspace, *changes)


@pytest.mark.parametrize(
    ("preset", "changes", "rates"),
    [
        ("paper_code_ift_full", [], (5e-5, 192, 6, 4096)),
        ("paper_code_ift_lora", ["method.lora.rank=64"], (2e-4, 192, 6, 4096)),
        ("paper_math_ift_full", ["data=metamathqa_unpacked"], (1e-5, 768, 24, 1024)),
        ("paper_math_ift_lora", ["data=metamathqa_unpacked"], (1e-4, 768, 24, 1024)),
    ],
)
@pytest.mark.parametrize("epochs", [1, 16])
def test_instruction_presets_have_the_papers_values(
    tmp_path, monkeypatch, preset, changes, rates, epochs
):
    """Compare with the table of hyperparameters of arXiv 2405.09673, version 2."""
    monkeypatch.chdir(tmp_path)
    for corpus in ("magicoder_evol_instruct", "metamathqa_unpacked"):
        write_manifest(tmp_path / "shards" / corpus, 395_000)
    config = load_config([f"run={preset}", *changes, f"train.epochs={epochs}"])
    train, optimizer = config.train, config.optimizer
    batches = (train.global_batch_size, train.micro_batch_size)
    assert (optimizer.lr, *batches, config.data.seq_length) == rates
    assert (optimizer.name, optimizer.beta1, optimizer.beta2) == ("lion", 0.9, 0.95)
    assert (optimizer.weight_decay, optimizer.clip_grad) == (0, 1)
    assert config.steps == epochs * 395_000 // train.global_batch_size
    assert (config.schedule.name, config.schedule.min_lr_ratio) == ("cosine", 0.01)
    assert config.schedule.warmup_tokens == train.tokens // 10
    assert config.data.mask_documents == (config.data.packing == "best_fit")
    assert (config.precision, config.model.num_layers) == ("bf16", 32)
    if lora := config.method.lora:
        assert (lora.alpha, lora.dropout) == (2 * lora.rank, 0.05)
        assert len(lora.targets) == 7
