"""Check dropout in the model: who drops what, and that the mean loss is that of one rank.

probes.py runs it.
"""

import json
import statistics
from collections import Counter
from pathlib import Path
from unittest import mock

import torch


def masks(config, place, model) -> None:
    """Check which elements of hidden states and which attention weights are dropped on which rank.

    Hidden states are equal on tensor-parallel ranks, and so are their masks, unless sequence
    parallelism distributes their tokens. Heads are always distributed. Recomputed activations drop
    the same elements again, and another step drops others.
    """
    first = _dropped(config, place, model, step=0)
    assert first != _dropped(config, place, model, step=1)
    recomputed = config.parallel.recompute == "full"
    embedding, *hidden = first["hidden"]
    assert len(embedding) and len(hidden) == 2 * config.model.num_layers * (1 + recomputed)
    assert set(Counter(hidden).values()) == {1 + recomputed}
    assert set(Counter(first["attention"]).values()) == {1 + recomputed}
    of_ranks = [None] * place.world_size
    torch.distributed.all_gather_object(of_ranks, first)
    one, other = of_ranks
    parallel = config.parallel
    replicated = parallel.tensor_parallel_size > 1 and not parallel.sequence_parallel
    assert (one["hidden"] == other["hidden"]) == replicated
    assert not set(one["attention"]) & set(other["attention"])


def _dropped(config, place, model, *, step: int) -> dict[str, list]:
    """Return the masks of hidden states and the outputs of attention of a pass, as bytes.

    Attention gets equal inputs in all layers and on all ranks, so that only dropout differs.
    """
    from probes import batch_of, samples_of

    from retemper.pipeline.distributed.seeds import seed_step
    from retemper.pipeline.model.attention import SdpaAttention
    from retemper.pipeline.model.forward import run_schedule

    seen: dict[str, list] = {"hidden": [], "attention": []}
    drop = torch.nn.functional.dropout

    def recorded(values, *arguments, **options):
        output = drop(values, *arguments, **options)
        seen["hidden"].append((output != 0).numpy().tobytes())
        return output

    def with_equal_inputs(_layer, inputs):
        query, key, value = (torch.ones_like(tensor).detach() for tensor in inputs[:3])
        value = value * torch.arange(1, len(value) + 1).view(-1, 1, 1, 1)
        return query, key, value.requires_grad_(), *inputs[3:]

    def record(_layer, _inputs, output):
        seen["attention"].append(output.detach().numpy().tobytes())

    layers = [layer for layer in model.modules() if isinstance(layer, SdpaAttention)]
    hooks = [layer.register_forward_pre_hook(with_equal_inputs) for layer in layers]
    hooks += [layer.register_forward_hook(record) for layer in layers]
    batch = batch_of(config, samples_of(config)).shard_for_context_parallel(
        place.context_parallel_rank, config.parallel.context_parallel_size
    )
    seed_step(config.seed, step, place)
    with mock.patch.object(torch.nn.functional, "dropout", recorded):
        run_schedule(model, [batch], forward_only=False)
    for hook in hooks:
        hook.remove()
    return seen


STEPS = 200


def mean_loss(config, place, model) -> None:
    """Compare the mean loss of one batch over many steps' masks with that of one rank.

    One rank writes its mean and standard error beside the run, and the others read them.
    """
    from probes import batch_of, samples_of

    from retemper.pipeline.distributed.collectives import all_reduce_from_last_stage
    from retemper.pipeline.distributed.seeds import seed_step
    from retemper.pipeline.model.forward import run_schedule

    batch = batch_of(config, samples_of(config)).shard_for_context_parallel(
        place.context_parallel_rank, config.parallel.context_parallel_size
    )
    losses = []
    for step in range(STEPS):
        seed_step(config.seed, step, place)
        outputs = run_schedule(model, [batch], forward_only=True)
        sums = [outputs[0][key].double() for key in ("loss", "tokens")] if outputs else [0.0, 0.0]
        nats, tokens = all_reduce_from_last_stage(torch.tensor(sums))
        losses.append(nats / tokens)
    found = statistics.fmean(losses), statistics.stdev(losses) / STEPS**0.5
    path = Path(config.runs_dir, "mean_loss.json")
    if place.world_size == 1:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found))
        return
    mean, error = json.loads(path.read_text())
    assert abs(found[0] - mean) < 3 * (found[1] ** 2 + error**2) ** 0.5, (found, mean, error)
