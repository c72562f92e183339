"""What only a look inside a running model shows, one rank's part of each look. Run by conftest.launch.

A case: {"probe": the name of a function below, "overrides": [...]}. A probe raises AssertionError where something is wrong.
"""

import weakref

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from retemper.pipeline.config import load_config
from retemper.pipeline.distributed import topology


def main(cases: list[dict]) -> None:
    from retemper.pipeline.distributed.seeds import seed_step
    from retemper.pipeline.model.build import build_model

    probes = {"documents": documents, "dropout": dropout, "frozen": frozen, "counts": counts, "memory": memory}
    for case in cases:
        config = load_config(case["overrides"])
        place = topology.start(config.parallel)
        seed_step(config.seed, 0, place)
        probes[case["probe"]](config, place, build_model(config, place))
        topology.stop(leave=False)


def batch_of(config, samples, *, mask_documents=False):
    from retemper.pipeline.data.batch import make_batches

    [batch] = make_batches(samples, len(samples), mask_documents=mask_documents)
    return batch


def samples_of(config):
    from retemper.pipeline.data.shards import TokenShards

    return TokenShards(config.data.path, "train").samples(np.arange(4))


def documents(config, place, model) -> None:
    """With document masking every document has the losses it has alone; of a corpus of several documents a sample."""
    from retemper.pipeline.data.mds import Samples
    from retemper.pipeline.model.forward import run_schedule

    samples = samples_of(config)

    @torch.no_grad()
    def losses(samples, *, mask_documents):
        (output,) = run_schedule(model, [batch_of(config, samples, mask_documents=mask_documents)], forward_only=True)
        return output["losses_BT"].flatten()

    def loss_of_one(tokens):
        sample = Samples(1, len(tokens))
        sample.leave_out(0)
        sample.tokens_NT[0] = tokens
        return losses(sample, mask_documents=False)

    together = losses(samples, mask_documents=True)
    alone, labelled = [], []
    for row, tokens_T in enumerate(samples.tokens_NT):
        *pieces, padding = np.split(tokens_T, samples.values("lengths", row).cumsum())
        for tokens in pieces:
            alone.append(loss_of_one(tokens))
            labelled += [True] * (len(tokens) - 1) + [False]  # the last has another document's token for its label
        alone.append(torch.zeros(len(padding)))
        labelled += [False] * len(padding)
    labelled = torch.tensor(labelled)
    assert labelled.sum() > 100 and len(samples.values("lengths")) > len(samples)
    torch.testing.assert_close(together[labelled], torch.cat(alone)[labelled], rtol=1e-5, atol=1e-6)
    unmasked = losses(samples, mask_documents=False)
    assert not torch.allclose(unmasked[labelled], together[labelled], rtol=1e-3), "without the mask documents see each other"


def dropout(config, place, model) -> None:
    """Tensor-parallel ranks drop the same of an activation that all hold, each its own of one that they share; other ranks differ.
    What is computed again drops what it dropped at first."""
    from retemper.pipeline.model.adapter import Dropout
    from retemper.pipeline.model.forward import run_schedule

    kept: dict[str, list[torch.Tensor]] = {}
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Dropout)}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda _layer, _inputs, output, name=name: kept.setdefault(name, []).append(output.detach() != 0))
    batch = batch_of(config, samples_of(config)).of_context_rank(place.context_parallel_rank, config.parallel.context_parallel_size)
    run_schedule(model, [batch], forward_only=False)
    times = 2 if config.parallel.recompute == "full" else 1
    assert len(kept) == len(layers) == 4 * config.model.num_layers
    assert all(len(masks) == times and masks[0].equal(masks[-1]) for masks in kept.values())
    assert all(0.3 < masks[0].float().mean() < 0.7 for masks in kept.values())
    of_ranks = [None] * place.world_size
    torch.distributed.all_gather_object(of_ranks, {name: masks[0] for name, masks in kept.items()})
    replicated = config.parallel.tensor_parallel_size > 1
    for name, layer in layers.items():
        first, second = (masks[name] for masks in of_ranks)
        assert first.equal(second) == (replicated and not layer.sharded_input), name


class Operations(TorchDispatchMode):
    """Notes the name of every operation and the shape of what it gives."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        first = output[0] if isinstance(output, tuple | list) and output else output
        self.seen.append((func._schema.name, tuple(first.shape) if isinstance(first, torch.Tensor) else ()))
        return output

    def count(self, name: str, shapes=None) -> int:
        return sum(name in seen and (shapes is None or shape in shapes) for seen, shape in self.seen)


class Held(TorchDispatchMode):
    """Counts the bytes of all tensors made under it that are still held, by whomever, and their peak.

    torch's profiler, which also sees what kernels work with, loses what gloo's threads free; on one rank both agree (NOTES.md).
    """

    def __init__(self):
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        torch.utils._pytree.tree_map_only(torch.Tensor, self._see, output)
        return output

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, self._forget, storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)

    def _forget(self, storage: int) -> None:
        self.now -= self.sizes.pop(storage)


def frozen(config, _place, model) -> None:
    """Of a frozen base nothing is computed, kept or reserved: weight gradients, buffers, optimizer states; and nothing goes back
    beyond the first layer that trains."""
    from retemper.pipeline.model.adapter import is_adapter
    from retemper.pipeline.model.forward import run_schedule
    from retemper.pipeline.train.optimizer import build_optimizer

    (stage,) = model
    optimizer = build_optimizer(config, model)
    trained = [parameter for parameter in stage.parameters() if parameter.requires_grad]
    with Operations() as operations:
        run_schedule(model, [batch_of(config, samples_of(config))], forward_only=False)
    optimizer.step()

    base = {tuple(p.shape) for name, p in stage.named_parameters() if not is_adapter(name) and p.ndim == 2}
    weight_gradients = operations.count("::mm", base | {shape[::-1] for shape in base})
    backward = operations.count("attention_for_cpu_backward")
    if config.method.name == "full":
        assert weight_gradients == 4 * config.model.num_layers + 1 and backward == config.model.num_layers
        return
    assert weight_gradients == 0
    assert all(p.grad is None and not hasattr(p, "main_grad") for p in stage.parameters() if not p.requires_grad)
    held = sum(buffer.grad_data.numel() for buffer in stage.buffers)
    assert held < sum(p.numel() for p in trained) + 1024 * len(trained)  # a buffer's parameters are aligned
    states = sum(value.numel() for state in optimizer.optimizer.state.values() for value in state.values())
    assert states == 2 * sum(p.numel() for p in trained)
    # Attention of the first layer is asked for nothing where only what follows it trains.
    assert backward == config.model.num_layers - ("q" not in config.method.lora.targets)


def counts(config, place, model) -> None:
    """The plan's parameters are those of the model: of the whole, and the bytes on this rank."""
    from retemper.pipeline import memory
    from retemper.pipeline.model.build import parameter_counts

    assert memory.parameter_counts(config) == parameter_counts(model, config.parallel.tensor_parallel_size)
    held = sum(parameter.nbytes for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    planned = memory.rank_memory(config, place.pipeline_parallel_rank)
    assert (planned.weights + planned.adapters, planned.gradients) == (held, 4 * trained)


def memory(config, place, _model) -> None:
    """What the plan says of this rank is within a tenth of what its tensors take at most: building the model, two steps, scoring."""
    from retemper.pipeline.memory import rank_memory
    from retemper.pipeline.model.build import build_model
    from retemper.pipeline.model.forward import run_schedule
    from retemper.pipeline.train.optimizer import build_optimizer, build_schedule
    from retemper.pipeline.train.step import train_step

    planned = rank_memory(config, place.pipeline_parallel_rank, fused=False)
    with Held() as held:
        model = build_model(config, place)
        optimizer = build_optimizer(config, model)
        schedule = build_schedule(config, optimizer)
        for _step in range(2):
            train_step(config, model, optimizer, schedule, drawn_batches(config, place, config.train.micro_batch_size))
        if config.evals.heldout:
            with torch.no_grad():
                run_schedule(model.eval(), drawn_batches(config, place, config.evals.micro_batch_size)[:1], forward_only=True)
    off = planned.total / held.peak - 1
    print(f"planned {planned.total:,} of {held.peak:,} measured bytes ({off:+.2%}): {planned}", flush=True)
    assert abs(off) < 0.1, f"{planned} is {off:+.1%} of {held.peak:,}"


def drawn_batches(config, place, micro_batch_size):
    """This rank's micro-batches of one step, of tokens drawn at random."""
    from retemper.pipeline.data.batch import make_batches
    from retemper.pipeline.data.mds import Samples

    samples = Samples(config.train.global_batch_size // config.parallel.data_parallel_size, config.data.seq_length)
    whole = np.array([config.data.seq_length], "<u4").tobytes()
    samples.pieces |= {"lengths": [whole] * len(samples), "prompt_lengths": [bytes(4)] * len(samples)}
    samples.tokens_NT[:] = np.random.default_rng(0).integers(config.model.vocab_size, size=samples.tokens_NT.shape)
    batches = make_batches(samples, micro_batch_size, mask_documents=False)
    return [batch.of_context_rank(place.context_parallel_rank, config.parallel.context_parallel_size) for batch in batches]
