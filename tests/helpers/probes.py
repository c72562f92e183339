"""Check the inside of a running model, one rank's part of each probe. conftest.launch runs it.

A case is {"probe": the name of a function below, "overrides": [...]}. A probe raises AssertionError
if a check fails.
"""

from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from retemper.pipeline.config.compose import load_config
from retemper.pipeline.distributed import topology


def main(cases: list[dict]) -> None:
    from dropped import masks, mean_loss
    from planned import counts, memory
    from trajectory import norms_of_each_rank, trajectory

    from retemper.pipeline.distributed.seeds import seed_step
    from retemper.pipeline.model.build import build_model

    probes = {
        "documents": documents,
        "dropout": dropout,
        "frozen": frozen,
        "kernels": kernels,
        "adapted": adapted,
        "base": base,
        "launches": launches,
        "fp8": fp8,
        "masks": masks,
        "mean_loss": mean_loss,
        "counts": counts,
        "memory": memory,
    }
    probes |= {"trajectory": trajectory, "norms_of_each_rank": norms_of_each_rank}
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
    """Check that with document masking every document has the losses that it has alone.

    The corpus has several documents a sample.
    """
    from retemper.pipeline.data.mds import Samples
    from retemper.pipeline.model.forward import run_schedule

    samples = samples_of(config)

    @torch.no_grad()
    def losses(samples, *, mask_documents):
        (output,) = run_schedule(
            model, [batch_of(config, samples, mask_documents=mask_documents)], forward_only=True
        )
        return output["losses_BT"].flatten()

    def loss_of_one(tokens):
        sample = Samples(1, len(tokens))
        sample.mask_sample(0)
        sample.tokens_NT[0] = tokens
        return losses(sample, mask_documents=False)

    together = losses(samples, mask_documents=True)
    alone, labelled = [], []
    for row, tokens_T in enumerate(samples.tokens_NT):
        *pieces, padding = np.split(tokens_T, samples.values("lengths", row).cumsum())
        for tokens in pieces:
            alone.append(loss_of_one(tokens))
            labelled += [True] * (len(tokens) - 1) + [
                False
            ]  # the last has another document's token for its label
        alone.append(torch.zeros(len(padding)))
        labelled += [False] * len(padding)
    labelled = torch.tensor(labelled)
    assert labelled.sum() > 100 and len(samples.values("lengths")) > len(samples)
    torch.testing.assert_close(together[labelled], torch.cat(alone)[labelled], rtol=1e-5, atol=1e-6)
    unmasked = losses(samples, mask_documents=False)
    assert not torch.allclose(unmasked[labelled], together[labelled], rtol=1e-3), (
        "without the mask documents see each other"
    )


def dropout(config, place, model) -> None:
    """Check which elements dropout drops on which rank.

    Tensor-parallel ranks drop the same elements of a replicated activation, and different ones of a
    sharded activation; other ranks differ. A recomputed activation drops the same elements again.
    """
    from retemper.pipeline.model.adapter import Dropout
    from retemper.pipeline.model.forward import run_schedule

    kept: dict[str, list[torch.Tensor]] = {}
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Dropout)}
    for name, layer in layers.items():
        layer.register_forward_hook(
            lambda _layer, _inputs, output, name=name: kept.setdefault(name, []).append(
                output.detach() != 0
            )
        )
    batch = batch_of(config, samples_of(config)).shard_for_context_parallel(
        place.context_parallel_rank, config.parallel.context_parallel_size
    )
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
    """The mode that records the name of every operation and the shape of its result."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        first = output[0] if isinstance(output, tuple | list) and output else output
        self.seen.append(
            (func._schema.name, tuple(first.shape) if isinstance(first, torch.Tensor) else ())
        )
        return output

    def count(self, name: str, shapes=None) -> int:
        return sum(
            name in seen and (shapes is None or shape in shapes) for seen, shape in self.seen
        )


def frozen(config, _place, model) -> None:
    """Check that a frozen base has no weight gradients, gradient buffers or optimizer states.

    The backward pass ends at the first layer with trainable parameters.
    """
    from retemper.pipeline.model.adapter import is_adapter
    from retemper.pipeline.model.forward import run_schedule
    from retemper.pipeline.train.optimizer import build_optimizer

    (stage,) = model
    optimizer = build_optimizer(config, model)
    trained = [parameter for parameter in stage.parameters() if parameter.requires_grad]
    with Operations() as operations:
        run_schedule(model, [batch_of(config, samples_of(config))], forward_only=False)
    optimizer.step()

    base = {
        tuple(p.shape)
        for name, p in stage.named_parameters()
        if not is_adapter(name) and p.ndim == 2
    }
    weight_gradients = operations.count("::mm", base | {shape[::-1] for shape in base})
    backward = operations.count("attention_for_cpu_backward")
    if config.method.name == "full":
        assert (
            weight_gradients == 4 * config.model.num_layers + 1
            and backward == config.model.num_layers
        )
        return
    assert weight_gradients == 0
    assert all(
        p.grad is None and not hasattr(p, "main_grad")
        for p in stage.parameters()
        if not p.requires_grad
    )
    held = sum(buffer.grad_data.numel() for buffer in stage.buffers)
    assert held < sum(p.numel() for p in trained) + 1024 * len(
        trained
    )  # a buffer's parameters are aligned
    states = sum(
        value.numel() for state in optimizer.optimizer.state.values() for value in state.values()
    )
    assert states == {"adamw": 2, "lion": 1}[config.optimizer.name] * sum(
        p.numel() for p in trained
    )
    # Attention of the first layer is asked for nothing where only what follows it trains.
    assert backward == config.model.num_layers - ("q" not in config.method.lora.targets)


def fp8(config, place, model) -> None:
    """Check that losses are those of bf16 to a few parts in a hundred.

    Frozen weights of one scale have no second form after a step.
    """
    from megatron.core.fp8_utils import is_float8tensor

    from retemper.pipeline.model.build import build_model
    from retemper.pipeline.model.forward import run_schedule
    from retemper.pipeline.train.optimizer import build_optimizer

    batch = batch_of(config, samples_of(config)).to(place.device)
    (of_fp8,) = run_schedule(model, [batch], forward_only=False)
    build_optimizer(config, model)
    held = [p for p in model.parameters() if is_float8tensor(p)]
    assert len(held) == (4 * config.model.num_layers if config.fp8_weights else 0)
    assert not any(hasattr(p, "_high_precision_init_val") for p in held)
    if config.method.lora and config.fp8_recipe in ("tensorwise", "delayed"):
        assert all(p._data.dtype == torch.uint8 and p._transpose is None for p in held)
    plain = build_model(
        config.model_copy(update={"precision": "bf16", "fp8": type(config.fp8)()}), place
    )
    (of_bf16,) = run_schedule(plain, [batch], forward_only=False)
    torch.testing.assert_close(of_fp8["loss"], of_bf16["loss"], rtol=0.03, atol=0)


def kernels(config, place, model) -> None:
    """Check that Transformer Engine's layers compute the same as megatron-core's own.

    The losses and the gradients of all trainable parameters are compared.
    """
    from retemper.pipeline.model import build

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with mock.patch.object(build, "HAVE_TE", False):
        plain = build.build_model(plainly_adapted(config), place)
    batch = batch_of(config, samples_of(config)).to(place.device)
    expected, got = losses_and_gradients(plain, batch), losses_and_gradients(model, batch)
    assert expected.keys() == got.keys() and type(model[0].module.decoder.layers[0]) is type(
        plain[0].module.decoder.layers[0]
    )
    assert type(model[0].module.decoder.layers[0].mlp.linear_fc1) is not type(
        plain[0].module.decoder.layers[0].mlp.linear_fc1
    )
    for name, value in expected.items():
        assert (got[name] - value).norm() <= 1e-4 * value.norm(), name


def adapted(config, place, model) -> None:
    """Check that a frozen layer and its adapters compute the same as one function as separately.

    Both ways use the same layers and the same precision.
    """
    from retemper.pipeline.model import build

    plain = build.build_model(plainly_adapted(config), place)
    batch = batch_of(config, samples_of(config)).to(place.device)
    expected, got = losses_and_gradients(plain, batch), losses_and_gradients(model, batch)
    assert expected.keys() == got.keys() and any(
        getattr(layer, "fused", False) for layer in model.modules()
    )
    furthest = max(
        ((got[name] - value).norm() / value.norm()).item() for name, value in expected.items()
    )
    print(f"adapted: {config.precision}: {furthest:.2e}", flush=True)
    assert furthest <= {"fp32": 1e-5, "bf16": 0.03}.get(config.precision, 0.1)


# What gives another view of a tensor, or memory, and launches nothing.
_NO_KERNELS = (
    "view",
    "::t",
    "transpose",
    "split",
    "slice",
    "select",
    "as_strided",
    "expand",
    "detach",
    "alias",
    "unflatten",
)
_NO_KERNELS += (
    "unsqueeze",
    "permute",
    "empty",
    "empty_like",
    "new_empty",
    "chunk",
    "_unsafe_view",
    "_reshape_alias",
)


def base(config, place, model) -> None:
    """Check that ranks that see different newest checkpoints of a base start from rank 0's.

    Here rank 1 sees the newer one.
    """
    from retemper.pipeline.checkpoint.base import base_of
    from retemper.pipeline.checkpoint.sharded import Checkpointer
    from retemper.pipeline.entry.preflight import preflight
    from retemper.pipeline.entry.rank import _inputs_of_rank_zero

    asked = config.model_copy(update={"init_from": f"{config.init_from}@2"})
    found = preflight(config if place.rank else asked)
    assert (found["base"] == base_of(asked).fingerprint) == (place.rank == 0)
    Checkpointer(asked, place, model, None, preflight(asked)).begin()
    expected = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.data.zero_()
    Checkpointer(config, place, model, None, _inputs_of_rank_zero(place.rank, found)).begin()
    assert all(parameter.equal(expected[name]) for name, parameter in model.named_parameters())


def launches(config, _place, model) -> None:
    """Check that the adapters of a decoder layer launch 28 kernels at most.

    The two products of each frozen linear layer are not counted.
    """
    from retemper.pipeline.model.adapted import join_factors

    join_factors(list(model))
    layer = model[0].module.decoder.layers[0]
    hidden, ffn = config.model.hidden_size, config.model.ffn_hidden_size
    linears = {layer.self_attention.linear_qkv: hidden, layer.self_attention.linear_proj: hidden}
    linears |= {layer.mlp.linear_fc1: hidden, layer.mlp.linear_fc2: ffn}
    operations = Operations()
    for linear, features in linears.items():
        x_SBI = torch.randn(16, 2, features, requires_grad=True)
        with operations:
            output_SBO, _bias = linear(x_SBI)
        gradient_SBO = torch.ones_like(output_SBO)
        with operations:
            output_SBO.backward(gradient_SBO)
    kernels = [name for name, _shape in operations.seen if not name.endswith(_NO_KERNELS)]
    of_adapters = len(kernels) - 2 * len(linears)
    assert (of_adapters <= 28) == (config.method.lora.kernel == "fused"), (
        f"{of_adapters}: {kernels}"
    )


def plainly_adapted(config):
    """Return the config with the products of adapters as separate operations."""
    if not config.method.lora:
        return config
    lora = config.method.lora.model_copy(update={"kernel": "plain"})
    return config.model_copy(update={"method": config.method.model_copy(update={"lora": lora})})


def losses_and_gradients(model, batch) -> dict[str, torch.Tensor]:
    """Return the losses and the gradients of one micro-batch, after a small change of the weights.

    The keys are the names that parameters have in megatron-core's own layers.
    """
    from retemper.pipeline.model.forward import run_schedule

    generator = torch.Generator().manual_seed(1)
    names = {_local_name(name): parameter for name, parameter in model.named_parameters()}
    for name in sorted(names):
        if names[name].requires_grad:  # B begins at zero, and A's gradient with it
            names[name].data += 0.02 * torch.randn(names[name].shape, generator=generator).to(
                names[name]
            )
    outputs = run_schedule(model, [batch], forward_only=False)
    gradients = {
        f"gradient of {name}": parameter.main_grad.clone()
        for name, parameter in names.items()
        if parameter.requires_grad
    }
    losses = (
        {"losses": outputs[0]["losses_BT"]} if outputs else {}
    )  # of the last pipeline stage alone
    return gradients | losses


def _local_name(name: str) -> str:
    """Return the name that a fused norm's weight has in a separate norm."""
    for fused, apart in (
        ("self_attention.linear_qkv.layer_norm_", "input_layernorm."),
        ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."),
    ):
        name = name.replace(fused, apart)
    return name
