"""Test that the report reads run folders and states the measured result, whatever it is."""

import html
import json
import random
import re
import shutil
from dataclasses import replace
from statistics import fmean

import pytest
from conftest import overrides, run_command

from retemper.pipeline.config.compose import load_config
from retemper.pipeline.corpus.manifest import read_manifest
from retemper.pipeline.errors import UserError
from retemper.pipeline.evals import show_scores
from retemper.pipeline.evals.uncertainty import estimate, ratio
from retemper.pipeline.files.atomic import replace_bytes, replace_file
from retemper.pipeline.files.jsonl import append_line
from retemper.pipeline.report import verdicts
from retemper.pipeline.report.results import comparison, format_table, read_study, table
from retemper.pipeline.runs import eval_folder, run_folder

STEP = 8 * 64
SIZES = [100.0, 140.0, 120.0, 160.0, 180.0, 100.0]  # bytes of each held-out sample
# How far the bits per byte of each sample are from those of its run.
WAVE = [0.02, -0.01, 0.01, -0.02, 0.01, -0.01]


def score(run, step, sign=1.0, sizes=SIZES, **domains):
    """Write held-out scores of a step: the bits per byte of each domain, and of its samples.

    The samples deviate by `sign` × WAVE from the value of their domain.
    """
    scores = {}
    samples = {}
    for domain, value in domains.items():
        bits = [size * (value + sign * wave) for size, wave in zip(sizes, WAVE)]
        shift = ratio(bits, sizes).value - value
        bits = [part - size * shift for part, size in zip(bits, sizes)]
        found = ratio(bits, sizes)
        scores[domain] = {"bits_per_byte": found.value, "stderr": found.stderr}
        scores[domain] |= {"interval": [found.low, found.high], "samples": len(sizes)}
        numbered = enumerate(zip(bits, sizes))
        samples[domain] = [
            {"sample": n, "bits": part, "bytes": size} for n, (part, size) in numbered
        ]
    eval_folder.write_heldout(run, step, scores, samples)


def start_run(workspace, runs_dir, name, *changes):
    """Write the folder of a run with its config and one logged step, and return the config."""
    run_changes = [*changes] if name == "base" else ["init_from=base", *changes]
    corpus = "math" if name == "base" else "code"
    config = load_config(
        [*overrides(workspace, name, *run_changes, corpus=corpus), f"runs_dir={runs_dir}"]
    )
    run_folder.start_or_resume(config, 0)
    line = {"step": 10, "tokens": 5120, "loss": 2.5, "grad_norm": 1.0, "lr": 0.0}
    append_line(config.run_dir / run_folder.METRICS, line | {"tokens_per_second": 1234.0})
    return config


def record(workspace, tmp_path, name, method, end, sign=-1.0):
    """Write a run folder whose held-out scores go from (code 3, math 2) to `end`.

    The change is nearly equal on every sample.
    """
    config = start_run(workspace, tmp_path, name, *method)
    for step, (code, math) in ((0, (3.0, 2.0)), (10, end)):
        score(config.run_dir, step, sign=sign if step else 1.0, code=code, math=math)
    return config


LORA = ["method=lora", "method.lora.rank=4"]
BEGINS = "lora (LoRA) beside full (full), after 5,120 tokens: "
ONE_SEED = " One seed; interval over held-out samples. "
PAPER = '"LoRA Learns Less and Forgets Less" found.'


@pytest.mark.parametrize(
    ("lora_end", "full_end", "clauses", "conclusion"),
    [
        (
            (2.8, 2.1),
            (2.0, 2.5),
            ["learned less, +0.200 against +1.000 bits/byte on code "
             "(difference -0.800, 95% interval",
             "forgot less, +0.100 against +0.500 bits/byte on math "
             "(difference -0.400, 95% interval"],
            f"As {PAPER}",
        ),
        (
            (1.5, 2.7),
            (2.0, 2.5),
            ["learned more, +1.500 against +1.000 bits/byte on code "
             "(difference +0.500, 95% interval",
             "forgot more, +0.700 against +0.500 bits/byte on math "
             "(difference +0.200, 95% interval"],
            f"Not as {PAPER}",
        ),
        (  # regression: was reported as "forgot no less"
            (2.8, 1.989),
            (2.0, 1.791),
            ["learned less, +0.200 against +1.000 bits/byte on code",
             "both improved on the old domain, lora less, +0.011 against +0.209 bits/byte on math "
             "(difference -0.198, 95% interval"],
            f"Nothing was forgotten that could be compared with what {PAPER}",
        ),
        (
            (2.001, 2.1),
            (2.0, 2.099),
            ["learned: no difference measured, +0.999 against +1.000 bits/byte on code "
             "(difference -0.001, 95% interval",
             "forgot: no difference measured, +0.100 against +0.099 bits/byte on math "
             "(difference +0.001, 95% interval"],
            f"Not decided whether as {PAPER}",
        ),
        (  # one of two improved
            (2.8, 1.9),
            (2.0, 2.5),
            ["learned less", "forgot less, -0.100 against +0.500 bits/byte on math"],
            f"As {PAPER}",
        ),
    ],
)  # fmt: skip
def test_finding_follows_the_scores(workspace, tmp_path, lora_end, full_end, clauses, conclusion):
    record(workspace, tmp_path, "base", [], (3.0, 2.0))
    record(workspace, tmp_path, "full", [], full_end)
    config = record(workspace, tmp_path, "lora", LORA, lora_end, sign=1.0)
    runs = read_study(config.run_dir.parent)
    assert [run.config.name for run in runs] == ["base", "full", "lora"]
    (sentence,) = comparison(runs)
    assert sentence.startswith(BEGINS), sentence
    assert sentence.endswith(ONE_SEED + conclusion), sentence
    for clause in clauses:
        assert clause in sentence, sentence
    intervals = re.findall(r"difference (\S+), 95% interval (\S+) to (\S+)\)", sentence)
    assert len(intervals) == 2
    for difference, low, high in intervals:
        assert float(low) < float(difference) < float(high)


def test_page_contains_the_finding_and_the_table(workspace, tmp_path):
    record(workspace, tmp_path, "base", [], (3.0, 2.0))
    record(workspace, tmp_path, "full", [], (2.0, 2.5))
    config = record(workspace, tmp_path, "lora", LORA, (2.8, 2.1))
    runs = read_study(config.run_dir.parent)
    assert "1,234" in format_table(table(runs))
    result = run_command(["report", str(config.run_dir.parent)])
    assert result.returncode == 0, result.stderr
    page = (config.run_dir.parent / "report.html").read_text()
    for sentence in comparison(runs):
        assert html.escape(sentence) in page
    manifests = [read_manifest(str(workspace / "data" / name)) for name in ("code", "math")]
    for manifest in manifests:
        found = manifest["near_duplicates"]
        documents = manifest["splits"]["train"]["documents"]
        assert (
            f"<li>{manifest['name']}: near-duplicates of the {found['compared_with']:,} held-out "
            f"documents: {found['documents']:,} of {documents:,} training documents "
        ) in page
    assert manifests[0]["near_duplicates"]["compared_with"] > 0
    assert page.count("<svg") == 2
    assert "<td>cooled down</td>" in page
    for namespace in (
        "http://www.w3.org",
        "http://purl.org",
        "https://matplotlib.org",
        "http://creativecommons.org",
    ):
        page = page.replace(namespace, "")
    assert "http" not in page, "the page must need no network"


def test_interval_of_a_finding_is_students_t_interval_of_paired_differences(workspace, tmp_path):
    full = record(workspace, tmp_path, "full", [], (2.0, 2.5))
    record(workspace, tmp_path, "lora", LORA, (2.8, 2.1), sign=1.0)
    (sentence,) = comparison(read_study(full.run_dir.parent))
    # The waves of the two runs have opposite signs. So the residual of a sample's difference is
    # 2 × size × (wave - mean wave). The half width is its standard error times t(5) = 2.5706.
    mean = sum(s * w for s, w in zip(SIZES, WAVE)) / sum(SIZES)
    residuals = [2 * size * (wave - mean) for size, wave in zip(SIZES, WAVE)]
    half = 2.5706 * (sum(r * r for r in residuals) / 5 * 6) ** 0.5 / sum(SIZES)
    assert f"difference -0.800, 95% interval {-0.8 - half:+.3f} to {-0.8 + half:+.3f})" in sentence
    assert f"difference -0.400, 95% interval {-0.4 - half:+.3f} to {-0.4 + half:+.3f})" in sentence


def test_improvement_within_its_own_interval_is_marked(workspace, tmp_path):
    full = record(workspace, tmp_path, "full", [], (2.0, 1.8))
    record(workspace, tmp_path, "lora", LORA, (2.8, 1.999))
    (sentence,) = comparison(read_study(full.run_dir.parent))
    assert "both improved on the old domain, lora less, +0.001 against +0.200" in sentence
    assert "; lora not beyond its own 95% interval. One seed" in sentence


def test_runs_are_compared_at_equal_tokens_and_missing_scores_stay_blank(workspace, tmp_path):
    record(workspace, tmp_path, "base", [], (3.0, 2.0))
    full = record(workspace, tmp_path, "full", [], (2.0, 2.5))
    lora = record(workspace, tmp_path, "lora", ["method=lora"], (2.8, 2.1))
    shutil.rmtree(eval_folder.scores_path(lora.run_dir, 10).parent)
    (sentence,) = comparison(read_study(full.run_dir.parent))
    assert sentence == "lora (LoRA) beside full (full): no milestone that both have reached yet."
    code = eval_folder.read_scores(full.run_dir)[0]["code"]
    replace_file(eval_folder.scores_path(full.run_dir, 0), json.dumps({"code": code}))
    runs = read_study(full.run_dir.parent)
    assert runs[1].gains() == {}
    row = next(row for row in table(runs) if row[0] == "full" and row[2] == "0")
    assert row[3:8] == ["start", "3.0000", "", "+0.000", ""]
    assert (
        "full: nothing to compare with, for its start was not scored on math: "
        f"`retemper eval run {full.run_dir}`" in comparison(runs)[-1]
    )


@pytest.mark.parametrize("broken", ["missing", "other samples", "one sample"])
def test_no_verdict_without_comparable_sample_scores(workspace, tmp_path, broken):
    """Check the verdict on folders without the scores of each sample, as older versions wrote."""
    full = record(workspace, tmp_path, "full", [], (2.0, 2.5))
    lora = record(workspace, tmp_path, "lora", LORA, (2.8, 2.1))
    path = eval_folder.samples_path(lora.run_dir, 10, "heldout-code")
    if broken == "missing":
        path.unlink()
        expected = (
            "learned: no verdict, +0.200 against +1.000 bits/byte on code "
            f"(no interval: {path} does not exist"
        )
    elif broken == "other samples":
        score(lora.run_dir, 10, sizes=[*SIZES[:-1], 101.0], code=2.8, math=2.1)
        expected = (
            "learned: no verdict, +0.200 against +1.000 bits/byte on code "
            "(no interval: scored on other samples)"
        )
    else:
        for config, code in ((full, 2.0), (lora, 2.8)):
            for step, value in ((0, 3.0), (10, code)):
                score(config.run_dir, step, sizes=SIZES[:1], code=value)
        expected = (
            "learned: no difference measured, +0.200 against +1.000 bits/byte on code "
            "(difference -0.800, of one sample and without an interval)"
        )
    (sentence,) = comparison(read_study(full.run_dir.parent))
    assert expected in sentence
    assert sentence.endswith(f"Not decided whether as {PAPER}")


def test_only_old_domains_scored_in_both_runs_count(workspace, tmp_path):
    full = record(workspace, tmp_path, "full", [], (2.0, 2.5))
    lora = record(workspace, tmp_path, "lora", LORA, (2.8, 2.1))
    for step, wiki in ((0, 1.0), (10, 3.0)):
        score(lora.run_dir, step, sign=1.0, wiki=wiki)
    (sentence,) = comparison(read_study(full.run_dir.parent))
    assert "forgot less, +0.100 against +0.500 bits/byte on math (difference -0.400" in sentence
    for step, wiki in ((0, 1.0), (10, 1.3)):
        score(full.run_dir, step, sign=-1.0, wiki=wiki)
    (sentence,) = comparison(read_study(full.run_dir.parent))
    assert (
        "forgot more, +1.050 against +0.400 bits/byte on math, wiki (difference +0.650" in sentence
    )


def test_mixture_domains_count_as_learned_and_replayed_domains_as_old(workspace, tmp_path):
    mixture = [f"data.mixture.wiki.path={workspace}/wiki", "data.mixture.wiki.fraction=0.2"]
    replay = [f"data.replay.path={workspace}/data/math", "data.replay.fraction=0.1"]
    full = record(workspace, tmp_path, "full", mixture, (2.0, 2.5))
    lora = record(workspace, tmp_path, "lora", [*LORA, *mixture, *replay], (2.8, 2.1), sign=1.0)
    for config, end in ((full, 0.4), (lora, 0.9)):
        for step, wiki in ((0, 1.0), (10, end)):
            score(config.run_dir, step, wiki=wiki)
    runs = read_study(full.run_dir.parent)
    # The means of code and wiki: (1.0 + 0.6) / 2 and (0.2 + 0.1) / 2. Regression: wiki was counted
    # as forgotten.
    gains = [run.gains()[10 * STEP] for run in runs]
    assert gains == [pytest.approx((0.8, 0.5)), pytest.approx((0.15, 0.1))]
    (sentence,) = comparison(runs)
    assert (
        "learned less, +0.150 against +0.800 bits/byte on code, wiki (difference -0.650" in sentence
    )
    assert (
        "+0.100 against +0.500 bits/byte on math (replayed by lora) (difference -0.400" in sentence
    )
    for config in (full, lora):
        raw = json.loads((config.run_dir / "config.json").read_text())
        raw["evals"]["learned"] = ["math"]
        raw["evals"]["heldout"]["wiki"] = str(workspace / "wiki")
        (config.run_dir / "config.json").write_text(json.dumps(raw))
    learned = {
        run.config.name: run.gains()[10 * STEP][0] for run in read_study(full.run_dir.parent)
    }
    assert learned == {"lora": pytest.approx(-0.1), "full": pytest.approx(-0.5)}


def write_task(config, step, task, scores):
    """Write the scores of a task: 0 or 1 for each problem."""
    found = estimate(scores).headline("acc") | {
        "decontaminated": {},
        "settings": {"shots": 0},
        "metrics": {},
    }
    problems = [{"doc_id": n, "filter": "none", "acc": value} for n, value in enumerate(scores)]
    eval_folder.write_result(config.run_dir, step, task, found, problems)


def test_forgetting_score_has_an_interval_and_a_paired_difference(workspace, tmp_path):
    chance = random.Random(5)
    full = record(workspace, tmp_path, "full", [], (2.0, 2.5))
    lora = record(workspace, tmp_path, "lora", LORA, (2.8, 2.1))
    scores = {}
    stderrs = {}
    for config, step, right in ((full, 0, 0.7), (lora, 0, 0.7), (full, 10, 0.3), (lora, 10, 0.65)):
        for task in eval_folder.FORGETTING_TASKS:
            drawn = random.Random(task)  # the same problems are hard for every run
            values = [float(drawn.random() < right) for _ in range(200)]
            values[0] = float(chance.random() < 0.5) if step else 1.0
            write_task(config, step, task, values)
            scores.setdefault((config.name, step), []).append(fmean(values))
            stderrs.setdefault((config.name, step), []).append(estimate(values).stderr)
    row = next(row for row in show_scores.task_rows(lora, 10) if row[1] == "forgetting score")
    assert row[3:5] == ("600", f"{fmean(scores['lora', 10]):.4f}")
    low, high = map(float, row[5].split(" to "))
    half = 1.96 * sum(error**2 for error in stderrs["lora", 10]) ** 0.5 / 3
    assert low < fmean(scores["lora", 10]) < high
    assert high - low == pytest.approx(2 * half, rel=0.03)
    change = fmean(scores["lora", 10]) - fmean(scores["lora", 0])
    assert re.match(rf"{change:+.4f} ± 0\.0\d+ \(-0\.\d+ to [+-]0\.\d+\)", row[6])
    (sentence,) = comparison(read_study(full.run_dir.parent))
    difference = fmean(scores["lora", 10]) - fmean(scores["full", 10])
    assert (
        f"; forgetting score, {fmean(scores['lora', 10]):.3f} against "
        f"{fmean(scores['full', 10]):.3f} on HellaSwag, ARC-Challenge "
        f"and WinoGrande: higher (difference {difference:+.3f}, 95% interval" in sentence
    )
    eval_folder.samples_path(lora.run_dir, 10, "hellaswag").unlink()
    (sentence,) = comparison(read_study(full.run_dir.parent))
    assert "WinoGrande: no verdict (" in sentence
    assert "hellaswag.samples.jsonl.zst does not exist" in sentence


def test_equal_runs_are_rarely_reported_to_differ(workspace, tmp_path):
    """Compare 300 pairs of runs whose samples and problems differ by chance alone.

    Each kind of verdict reports a difference in at most 8% of the pairs. It must report one in at
    least 1%: a test with intervals of 95% that never does would be too conservative.
    """
    chance = random.Random(11)
    pairs = 300
    count = 24
    full = record(workspace, tmp_path, "full", [], (2.0, 2.5))
    record(workspace, tmp_path, "lora", LORA, (2.0, 2.5))
    sizes = [chance.lognormvariate(5, 0.7) for _ in range(count)]
    hard = [chance.gauss(2.0, 0.5) for _ in sizes]
    runs = read_study(full.run_dir.parent)
    differences_reported = {"learned": 0, "forgot": 0, "kept": 0}

    def draw(run, step, domain):
        spread = (
            [0.05 * chance.gauss(0, 1) / max(0.3, abs(chance.gauss(0, 1))) for _ in sizes]
            if step
            else [0.0] * count
        )
        bits = [size * (each + more) for size, each, more in zip(sizes, hard, spread)]
        samples = [
            {"sample": n, "bits": part, "bytes": size}
            for n, (part, size) in enumerate(zip(bits, sizes))
        ]
        path = eval_folder.samples_path(run.config.run_dir, step, f"heldout-{domain}")
        replace_bytes(path, eval_folder.compress_records(samples))
        return sum(bits) / sum(sizes)

    for _ in range(pairs):
        drawn = []
        for run in runs:
            curves = {
                domain: {0: draw(run, 0, domain), 5120: draw(run, 10, domain)}
                for domain in ("code", "math")
            }
            drawn.append(replace(run, curves=curves))
            for task in eval_folder.FORGETTING_TASKS:
                eval_folder.task_path(run.config.run_dir, 10, task).unlink(missing_ok=True)
                write_task(run.config, 10, task, [float(chance.random() < 0.4) for _ in range(60)])
        (sentence,) = comparison(drawn)
        learned, forgot, *_, kept = (
            sentence.partition(". One seed")[0].partition("tokens: ")[2].split("; ")
        )
        differences_reported["learned"] += "no difference measured" not in learned
        differences_reported["forgot"] += "no difference measured" not in forgot
        differences_reported["kept"] += "no difference measured" not in kept
    print(differences_reported)
    for verdict, reported in differences_reported.items():
        assert 0.01 * pairs <= reported <= 0.08 * pairs, verdict


def test_difference_far_outside_its_interval_is_reported():
    found = ratio(
        [size * wave for size, wave in zip(SIZES, [0.3, 0.28, 0.31, 0.29, 0.3, 0.31])], SIZES
    )
    assert verdicts.verdict(found) == verdicts.MORE


def test_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        read_study(tmp_path)
    assert run_command(["report", str(tmp_path)]).returncode == 1


@pytest.mark.parametrize(("dropped", "blank"), [("math", "forgotten"), ("code", "learned")])
def test_learned_and_forgotten_are_shown_without_each_other(workspace, tmp_path, dropped, blank):
    config = record(workspace, tmp_path, "lora", LORA, (2.5, 2.3))
    (run,) = read_study(config.run_dir.parent)
    del run.curves[dropped]
    header, *rows = table([run])
    filled = {"learned", "forgotten"} - {blank}
    assert all(row[header.index(blank)] == "" for row in rows)
    assert [row[header.index(*filled)] for row in rows][0] == "+0.000"
    assert rows[-1][header.index(*filled)] in ("+0.500", "+0.300")


def test_models_beside_the_runs_of_a_study_are_not_compared(workspace, tmp_path):
    config = record(workspace, tmp_path, "base", [], (3.0, 2.0))
    exported = config.run_dir.parent / "exported"
    exported.mkdir()
    (exported / "config.json").write_text('{"model_type": "llama", "hidden_size": 64}')
    assert [run.config.name for run in read_study(exported.parent)] == ["base"]


def test_metrics_after_the_resumed_step_are_dropped_and_a_partial_line_ignored(workspace, tmp_path):
    config = record(workspace, tmp_path, "base", [], (3.0, 2.0))
    with open(config.run_dir / "metrics.jsonl", "a") as file:
        file.write('{"step": 11, "lo')
    assert [record["step"] for record in run_folder.read_metrics(config.run_dir)] == [10]
    run_folder.start_or_resume(config, 9)
    assert (config.run_dir / "metrics.jsonl").read_text() == ""


def test_run_without_scores_is_named_with_the_command_that_scores_it(workspace, tmp_path):
    config = start_run(workspace, tmp_path, "unscored")
    assert comparison(read_study(config.run_dir.parent))[-1] == (
        f"unscored: no held-out scores: `retemper eval run {config.run_dir}` computes them."
    )
