"""One low-rank adapter, independent of the layer: its parameters and the update they define.

Shapes: S sequence (this rank's part under sequence parallelism), B batch, R rank of the adapter, I
and O the features in and out (this rank's part where the layer shards them).
"""

import contextlib
import math

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from retemper.pipeline.schema.model import LoraConfig


def is_adapter(name: str) -> bool:
    """Return whether a parameter or checkpoint key belongs to an adapter."""
    return name.rpartition(".")[2].startswith("lora_")


def lora_scaling(lora: LoraConfig) -> float:
    """Return the factor of the update B·A.

    It is alpha / rank, or alpha / sqrt(rank) for rsLoRA (arXiv 2312.03732).
    """
    assert lora.alpha is not None, "with rslora alpha is required, else it has a default"
    return lora.alpha / (math.sqrt(lora.rank) if lora.rslora else lora.rank)


class Adapter(torch.nn.Module):
    """The parameters lora_A (R, I) and lora_B (O, R) of one linear layer.

    With DoRA there is also lora_magnitude (O,). With PiSSA there are also the initial factors,
    which are frozen and subtracted from the update, so that the base weights stay unchanged.
    """

    def __init__(self, in_features: int, out_features: int, lora: LoraConfig, config):
        super().__init__()

        def parameter(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype))

        self.lora_A = parameter(lora.rank, in_features)
        self.lora_B = parameter(out_features, lora.rank)
        if lora.pissa:
            self.lora_A_initial = parameter(lora.rank, in_features)
            self.lora_B_initial = parameter(out_features, lora.rank)
        if lora.dora:
            self.lora_magnitude = parameter(out_features)

    def sharded_axes(
        self, *, of_A: int | None = None, of_B: int | None = None, of_magnitude: int | None = None
    ) -> dict[str, int]:
        """Return the axis along which tensor parallelism shards each sharded parameter.

        Parameters without an axis, and those that this adapter does not have, are omitted.
        """
        axes = {
            "lora_A": of_A,
            "lora_A_initial": of_A,
            "lora_B": of_B,
            "lora_B_initial": of_B,
            "lora_magnitude": of_magnitude,
        }
        return {
            name: axis for name, axis in axes.items() if axis is not None and hasattr(self, name)
        }

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A and B of the whole update, for PiSSA of twice the rank.

        It must be reached by calling the module: megatron-core's hooks then wait for parameters
        that are still being gathered.
        """
        return joined_factors(self._parameters)

    def init_factors(self, A_RI: torch.Tensor, B_OR: torch.Tensor) -> None:
        """Initialise the factors, and PiSSA's frozen initial factors, with these values."""
        for parameter, value in zip(
            (self.lora_A, self.lora_A_initial, self.lora_B, self.lora_B_initial),
            (A_RI, A_RI, B_OR, B_OR),
            strict=True,
        ):
            parameter.copy_(value)


def joined_factors(parameters: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A (R, I) and B (O, R) of the update that an adapter's parameters define.

    For PiSSA the initial factors are concatenated with a negative sign, and R is twice the rank.
    """
    A_RI = parameters["lora_A"]
    B_OR = parameters["lora_B"]
    if "lora_A_initial" not in parameters:
        return A_RI, B_OR
    return torch.cat([A_RI, parameters["lora_A_initial"]]), torch.cat(
        [B_OR, -parameters["lora_B_initial"]], dim=1
    )


def principal_factors(
    weight_OI: torch.Tensor, rank: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return PiSSA's initial factors A and B of a weight (arXiv 2404.02948).

    scale · B·A is the best approximation of the weight at that rank.

    Args:
        weight_OI: The whole weight, not a shard.
        rank: The rank of the factors.
        scale: The factor of the update.
    """
    U, S, Vh = torch.linalg.svd(weight_OI.float(), full_matrices=False)
    # The signs of an SVD are arbitrary: make the largest element of each row of A positive.
    signs = torch.where(Vh[:rank].gather(1, Vh[:rank].abs().argmax(1, keepdim=True)) < 0, -1.0, 1.0)
    root = (S[:rank] / scale).sqrt()
    return root[:, None] * Vh[:rank] * signs, U[:, :rank] * root * signs.T


@torch.no_grad()
def row_norms(weight_OI, A_RI, B_OR, scale: float, total=lambda part: part) -> torch.Tensor:
    """Return the norm of each row of W + scale · B·A, (O,), without computing that matrix.

    DoRA (arXiv 2402.09353) divides by these norms.

    Args:
        weight_OI: The weight W.
        A_RI: The factor A.
        B_OR: The factor B.
        scale: The factor of the update.
        total: Sums a tensor over the ranks that have parts of the input features.
    """
    weight_OI = weight_OI.float()
    A_RI = A_RI.float()
    B_OR = B_OR.float()
    squares = total(weight_OI.square().sum(1))
    cross = total(weight_OI @ A_RI.T)
    gram = total(A_RI @ A_RI.T)
    return (
        (squares + 2 * scale * (cross * B_OR).sum(1) + scale**2 * ((B_OR @ gram) * B_OR).sum(1))
        .clamp_min(0)
        .sqrt()
    )


class Dropout(torch.nn.Module):
    """Dropout of an adapter's input.

    The masks are equal on ranks that have the same activation, and differ where it is sharded.
    """

    def __init__(self, probability: float, sharded_input: bool):
        super().__init__()
        self.probability = probability
        self.sharded_input = sharded_input

    def forward(self, x_SBI: torch.Tensor) -> torch.Tensor:
        if not self.probability or not self.training:
            return x_SBI
        with get_cuda_rng_tracker().fork() if self.sharded_input else contextlib.nullcontext():
            return torch.nn.functional.dropout(x_SBI, self.probability)


def dora_gain(adapter: Adapter, norms_O: torch.Tensor) -> torch.Tensor:
    """Return DoRA's gain of each row of the updated weight, (O,).

    It is the trainable magnitude divided by the row's norm.
    """
    return (adapter.lora_magnitude / norms_O).to(adapter.lora_B.dtype)


def dora_delta(
    gain_O: torch.Tensor, plain_SBO: torch.Tensor, delta_SBO: torch.Tensor
) -> torch.Tensor:
    """Return the output that DoRA adds to the base layer's output.

    With it each row of the updated weight is multiplied by its gain.

    Args:
        gain_O: The gains of the rows.
        plain_SBO: The base layer's output without bias.
        delta_SBO: The output of the update scale · B·A.
    """
    return (gain_O - 1) * plain_SBO + gain_O * delta_SBO


def mark_tensor_parallel(adapter: Adapter, axes: dict[str, int]) -> None:
    """Mark the parameters that tensor parallelism shards.

    megatron-core then sums their squares over ranks in the gradient norm.
    """
    for name, axis in axes.items():
        parameter = getattr(adapter, name)
        parameter.tensor_model_parallel = True
        parameter.partition_dim = axis
