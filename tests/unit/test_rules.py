"""Test the rules between config keys: one configuration for every rule that breaks it."""

import ast
import re
import sys
from pathlib import Path

import pytest
from conftest import overrides

from retemper.pipeline.config import rules
from retemper.pipeline.config.compose import load_config
from retemper.pipeline.errors import UserError
from retemper.pipeline.schema import section

TP2 = "parallel.tensor_parallel_size=2"
LORA = ["method=lora", "init_from=base", "model.num_layers=2", "model.hidden_size=64"]
FP8 = ["precision=fp8_tensorwise", "model.hidden_size=128", "model.ffn_hidden_size=128"]

BROKEN = [
    # corpora
    (["data.executor=slurm"], "data.executor=slurm needs data.slurm.partition=NAME"),
    (["data.source.kind=text", "data.source.prompt=x"], "refers to columns of rows"),
    (["data.source.kind=rows", r"data.source.prompt='a\\n'"], "which is no line break"),
    (["data.tokens=10"], "is less than one sample of data.seq_length=64"),
    (["data.path=ftp://a"], "a folder, s3:// or gs://"),
    (["data.mixture.replay={path:x,fraction:0.1}"], "data.mixture.replay: that name is taken"),
    (["data.replay={path:x,fraction:0.005}"], "is not a whole number of samples"),
    (
        ["data.replay={path:x,fraction:0.5}", "data.mixture.web={path:y,fraction:0.5}"],
        "leave nothing for the run's own corpus",
    ),
    # model and layout
    (["parallel.tensor_parallel_size=3"], "does not divide model.num_attention_heads=4"),
    (["parallel.tensor_parallel_size=4"], "does not divide model.num_query_groups=2"),
    (["parallel.pipeline_parallel_size=5"], "does not divide model.num_layers=2"),
    (
        ["parallel=pp2", "parallel.virtual_pipeline_parallel_size=2"],
        "virtual_pipeline_parallel_size=2 does not divide model.num_layers=2",
    ),
    (["parallel.virtual_pipeline_parallel_size=2"], "needs parallel.pipeline_parallel_size > 1"),
    (["model.hidden_size=66"], "does not divide model.hidden_size=66"),
    (["model.head_size=15"], "rotary embeddings need an even one"),
    (["model.num_query_groups=3"], "does not divide model.num_attention_heads=4"),
    (["parallel.sequence_parallel=true"], "needs parallel.tensor_parallel_size > 1"),
    (["method.name=lora", "init_from=x"], "method.name=lora needs method.lora"),
    ([*LORA, "method.lora.rslora=true"], "method.lora.alpha=8 gives a scale of 2"),
    (
        [*LORA, "method.lora.dora=true", "method.lora.dropout=0.1"],
        "method.lora.dora=true cannot be combined with method.lora.dropout",
    ),
    (
        [*LORA, "method.lora.pissa=true", "method.lora.rank=33"],
        "the weight of k, 32 × 64, has 32: set method.lora.rank=32 or less",
    ),
    (["method.lora={rank:4,targets:all}"], "method.name=full trains every weight"),
    ([TP2, "parallel.tensor_parallel_overlap=true"], "needs parallel.sequence_parallel=true"),
    (
        [TP2, "parallel.sequence_parallel=true", "parallel.tensor_parallel_overlap=true"],
        "cannot be combined with precision=fp32",
    ),
    (["method=lora"], "method.name=lora adapts a pretrained model: set init_from"),
    # FP8
    (["fp8.bf16_layers=1"], "fp8.* is set, but precision=fp32"),
    ([*LORA, *FP8, "method.lora.dora=true"], "cannot be combined with method.lora.dora or pissa"),
    ([*LORA, "precision=fp8_delayed"], "needs amax history from earlier steps"),
    ([*LORA, *FP8, "fp8.param_gather=true"], "fp8.param_gather=true only applies to method=full"),
    (["precision=mxfp8", "fp8.param_gather=true"], "cannot be combined with precision=mxfp8"),
    ([*FP8, "fp8.keep_transposed=true"], "fp8.keep_transposed=true only applies to method=lora"),
    (["precision=mxfp8", "fp8.attention=true"], "fp8.attention=true requires precision"),
    ([*FP8, "fp8.attention=true"], "fp8.attention=true requires heads of 128 features"),
    (
        [*FP8, "fp8.attention=true", "model.head_size=128", "data.seq_length=64"],
        "fp8.attention=true requires a data.seq_length divisible by 128",
    ),
    (["parallel.recompute=swiglu"], "parallel.recompute=swiglu requires method=lora"),
    (
        [*LORA, "method.lora.targets=[q,v]", "parallel.recompute=swiglu"],
        "parallel.recompute=swiglu requires method=lora with down",
    ),
    (["precision=fp8_delayed", "fp8.bf16_layers=1"], "scales apply to the whole model"),
    ([*FP8, "fp8.bf16_layers=3"], "is more than the 2 layers of a pipeline stage"),
    ([*FP8, "model.ffn_hidden_size=100"], "requires numbers of features divisible by 16"),
    (
        [*FP8, "train.micro_batch_size=1", "data.seq_length=60"],
        "requires micro-batches whose number of tokens is divisible by 8",
    ),
    ([*FP8, "data.seq_length=60"], "requires a data.seq_length whose part on a rank"),
    (
        [*FP8, "fp8.attention=true", "dropout.attention=0.1"],
        "fp8.attention=true cannot be combined with dropout.attention",
    ),
    (
        [*FP8, "fp8.attention=true", "data.mask_documents=true"],
        "fp8.attention=true cannot be combined with data.mask_documents=true",
    ),
    # batches
    (
        [
            "precision=bf16",
            TP2,
            "parallel.sequence_parallel=true",
            "parallel.tensor_parallel_overlap=true",
        ],
        "has buffers for micro-batches of one size",
    ),
    (["parallel.context_parallel_size=3"], "is not divisible by the 6 parts that"),
    (["parallel=cp2", "data.mask_documents=true"], "with parallel.context_parallel_size > 1"),
    (["parallel.data_parallel_size=7"], "train.micro_batch_size × parallel.data_parallel_size"),
    (
        [
            "parallel=pp2",
            "model.num_layers=4",
            "parallel.virtual_pipeline_parallel_size=2",
            "train.micro_batch_size=8",
        ],
        "1 micro-batches a step are not divisible by parallel.pipeline_parallel_size=2",
    ),
    (["data.seq_length=128"], "exceeds model.max_sequence_length"),
    # length and schedule
    (["train.tokens=100"], "is less than one step of 512 tokens"),
    (["schedule.warmup_tokens=1M"], "is not less than the run's 5120 tokens"),
    (["schedule.warmup_tokens=4500"], "reaches into the cooldown, which begins after 4096"),
    (["schedule=inverse_sqrt", "schedule.warmup_tokens=0"], "set schedule.warmup_tokens above 0"),
    (["schedule=cosine", "schedule.cooldown_fraction=0.2"], "only applies to schedule=trapezoid"),
    (["profile.steps=[3,20]"], "at most 10, the run's last"),
    (["checkpoint.milestones=[1B]"], "is beyond train.tokens=5120"),
    # branches
    (["train.branches=[5K]", "branch_of=x"], "a branch has no branches"),
    (["train.branches=[5K]", "schedule=cosine"], "set schedule=trapezoid"),
    (["train.branches=[10K]"], "begins after step 15, but train.tokens=5120 is 10 steps"),
    # CUDA graphs
    (["train.cuda_graph=on", "parallel=pp2"], "stages wait for each other between kernels"),
    (["train.cuda_graph=on", "data.mask_documents=true"], "shapes change with the documents"),
    (["train.cuda_graph=on", "parallel.overlap=true"], "start communication from the host"),
    (["train.cuda_graph=on", "precision=fp8_delayed"], "which scales and weights are new"),
    # evaluations
    (["evals.tasks_dir=x", "evals.tasks.arc_chalenge.limit=1"], "did you mean arc_challenge?"),
    (["evals.tasks.humaneval.where=inline"], "generated programs are run by workers only"),
    (["evals.learned=[codes]"], "codes is not a domain of evals.heldout"),
    (["evals.tasks.heldout.limit=1"], "that name is taken by the held-out domains"),
    # values
    (["train.tokens=20 billion"], "is not a token count"),
    (["train.tokens=true"], "a token count is an integer, or a number with K, M, B or T"),
    ([*LORA, "method.lora.targets=some"], "targets must be all, attention, mlp, or a list"),
    (["name=../escape"], "name: String should match pattern"),
    (["optimizer.name=sgd"], "optimizer.name: Input should be 'adamw' or 'lion'"),
    (["run=demo_bse"], "no such preset; available: demo_base"),
    (["nonsense"], "'nonsense' is not key=value"),
]


@pytest.fixture(scope="module")
def refusals(tmp_path_factory) -> tuple[list[str], set[tuple[str, int]]]:
    """Return the message for each example, and the executed lines of the rules and the schema."""
    files = {str(path) for path in rule_files()}
    executed = set()
    monitoring = sys.monitoring
    tool = monitoring.PROFILER_ID

    def note(code, line):
        if code.co_filename in files:
            executed.add((code.co_filename, line))
        return monitoring.DISABLE  # a line is noted once

    monitoring.use_tool_id(tool, "rules")
    monitoring.register_callback(tool, monitoring.events.LINE, note)
    monitoring.set_events(tool, monitoring.events.LINE)
    try:
        messages = [message_of(tmp_path_factory.getbasetemp(), changes) for changes, _ in BROKEN]
    finally:
        monitoring.set_events(tool, monitoring.events.NO_EVENTS)
        monitoring.free_tool_id(tool)
    return messages, executed


def message_of(folder: Path, changes: list[str]) -> str:
    try:
        load_config(overrides(folder, "broken", *changes))
    except UserError as error:
        return str(error)
    return "not refused"


def rule_files() -> list[Path]:
    return [Path(rules.__file__), *sorted(Path(section.__file__).parent.glob("*.py"))]


@pytest.mark.parametrize("number", range(len(BROKEN)), ids=[said for _, said in BROKEN])
def test_a_broken_rule_is_named(refusals, number):
    messages, _ = refusals
    _, said = BROKEN[number]
    assert said in messages[number]


def test_every_rule_has_an_example_above(refusals):
    """Check that each `yield` of a rule, and each `raise` of the schema, was reached."""
    _, executed = refusals
    statements = [
        (str(path), node)
        for path in rule_files()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Raise if path.name != "rules.py" else ast.Yield)
    ]
    assert len(statements) > 60
    without = [
        f"{path}:{node.lineno}"
        for path, node in statements
        if not any((path, line) in executed for line in range(node.lineno, node.end_lineno + 1))
    ]
    assert not without


PAIR = r"([a-z]\w*(?:\.\w+)*)(?:=| to a multiple of )([^\s,;]+)"


def advised(message: str) -> list[list[str]]:
    """Return the alternatives that a message advises, each as overrides that go together."""
    *_, advice = re.split(r"(?:[:;,]|for which no alpha is usual:) (?=set |use )", message)
    if advice == message:
        return []
    alternatives = []
    for text in advice.split(", or "):
        pairs = re.findall(PAIR, text)
        if value := re.search(r"set it to (\S+)", text):
            key = re.match(r"[a-z]\w*(\.\w+)+", message)
            pairs += [(key[0], value[1].rstrip(","))] if key else []
        if pairs:
            alternatives.append([f"{key}={value}" for key, value in pairs])
    return alternatives


def test_the_advice_of_every_rule_helps(refusals, tmp_path):
    """Check that following each alternative of a message's advice makes the message disappear."""
    messages, _ = refusals
    followed = 0
    for message, (changes, said) in zip(messages, BROKEN, strict=True):
        line = next((line for line in message.splitlines() if said in line), message)
        line = line.strip().removeprefix("- ")
        for overrides_of_advice in advised(line):
            after = message_of(tmp_path, [*changes, *overrides_of_advice])
            assert said not in after, (line, overrides_of_advice)
            followed += 1
    assert followed > 20
