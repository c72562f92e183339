"""LoRA on Transformer Engine's layers. Imported where it is installed.

Written against Transformer Engine 2.19: the products of adapted layers call what its `Linear` calls, with an output to
accumulate onto.

Shapes as in lora.py and adapted.py.
"""

import torch
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelLinear,
    TELayerNormColumnParallelLinear,
    TERowParallelLinear,
)
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from transformer_engine.pytorch.cpp_extensions import general_gemm
from transformer_engine.pytorch.quantization import FP8GlobalStateManager

from retemper.pipeline.model.adapted import TorchProducts, adapted_column, adapted_row
from retemper.pipeline.model.lora import ColumnAdapters, GateUpOutputs, QkvOutputs, RowAdapter
from retemper.pipeline.schema.model import LoraConfig

# The norm before each column-parallel layer, and what checkpoints call its weight, where it is a part of that layer.
NORMS = {
    "linear_qkv": ("input_layernorm", "self_attention.linear_qkv.layer_norm_"),
    "linear_fc1": ("pre_mlp_layernorm", "mlp.linear_fc1.layer_norm_"),
}


def layers(*, fused: bool) -> tuple[type, type, type]:
    """The classes of q-k-v, gate-up and row-parallel layers with adapters."""
    if fused:
        return TEAdaptedQkvLinear, TEAdaptedGateUpLinear, TELoraRowLinear
    return TELoraQkvLinear, TELoraGateUpLinear, TELoraRowLinear


def set_norm_apart(layer: TransformerLayerSubmodules, name: str) -> None:
    """Give a layer spec the norm before the column-parallel layer `name` as a module of its own.

    A LayerNormLinear whose normalised output is asked for keeps an FP8 copy of it that a frozen weight never reads, and
    casts its gradient twice.
    """
    norm, stored = NORMS[name]
    setattr(layer, norm, TESpecProvider().layer_norm(has_residual=True))
    layer.sharded_state_dict_keys_map = layer.sharded_state_dict_keys_map | {f"{norm}.": stored}


class TEProducts(TorchProducts):
    """The products of a frozen layer's weight, bf16 or FP8, and float32 sums of bf16 products."""

    def add_output(self, output_TO, x_TI):
        x_TI = self.prepare_forward(x_TI)
        try:
            (weight,) = self._get_weight_tensors()
            if not self.fp8:
                output_TO.addmm_(x_TI, weight.t())
                return None
            quantizers = self._get_quantizers(False, False, True)
            of_input = quantizers[0]
            of_gradient = quantizers[-1]
            of_input.set_usage(rowwise=True, columnwise=False)
            recipe = FP8GlobalStateManager.get_fp8_recipe()
            _add_fp8_product(weight, of_input(x_TI), output_TO, recipe.fp8_gemm_fprop, layout="TN")
            return of_gradient, recipe.fp8_gemm_dgrad
        finally:
            self.end_forward()

    def add_input_gradient(self, gradient_TI, gradient_TO, context):
        if context is None:
            gradient_TI.addmm_(gradient_TO, self.weight)
            return
        of_gradient, precision = context
        of_gradient.set_usage(rowwise=True, columnwise=False)
        self.weight.update_usage(columnwise_usage=True)
        _add_fp8_product(self.weight, of_gradient(gradient_TO), gradient_TI, precision, layout="NN")

    def add_weight_gradient(self, main_grad, left_TX, right_TY):
        if main_grad.dtype == left_TX.dtype:
            super().add_weight_gradient(main_grad, left_TX, right_TY)
            return
        general_gemm(
            right_TY,
            left_TX,
            layout="NT",
            grad=True,
            out=main_grad,
            out_dtype=main_grad.dtype,
            accumulate=True,
        )


def _add_fp8_product(weight, quantized, output: torch.Tensor, precision, *, layout: str) -> None:
    """Add a product with a weight in FP8 to a bf16 tensor. precision: how a recipe accumulates this product."""
    general_gemm(
        weight,
        quantized,
        layout=layout,
        grad=layout == "NN",
        out=output,
        out_dtype=output.dtype,
        accumulate=True,
        use_split_accumulator=precision.use_split_accumulator,
    )


class _TEAdaptedColumn(ColumnAdapters, TEProducts, TEColumnParallelLinear):
    """A column-parallel layer whose input was normalised before it; one function with its adapters in training."""

    def __init__(self, *args, lora: LoraConfig, targets: list[str], fused: bool, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_adapters(lora, targets, self.in_features, self._tp_group, fused=fused)

    def forward(self, x_SBI):
        if self.training:
            return adapted_column(self, x_SBI), None
        output_SBO, bias = super().forward(x_SBI)
        return self.with_adapters(output_SBO, x_SBI), bias


class TEAdaptedQkvLinear(QkvOutputs, _TEAdaptedColumn):
    """q, k and v."""


class TEAdaptedGateUpLinear(GateUpOutputs, _TEAdaptedColumn):
    """gate and up."""


class _TEColumn(ColumnAdapters, TELayerNormColumnParallelLinear):
    """A column-parallel layer that normalises its input itself, its adapters computed beside it."""

    def __init__(self, *args, lora: LoraConfig, targets: list[str], fused: bool, **kwargs):
        super().__init__(*args, **kwargs)
        # What the adapters take in is the normalised input, this rank's part of it under sequence parallelism.
        self.return_layernorm_output = True
        self.return_layernorm_output_gathered = False
        self.add_adapters(lora, targets, self.in_features, self._tp_group, fused=fused)

    def forward(self, x_SBI):
        (output_SBO, normalised_SBI), bias = super().forward(x_SBI)
        return self.with_adapters(output_SBO, normalised_SBI), bias


class TELoraQkvLinear(QkvOutputs, _TEColumn):
    """Norm, q, k and v."""


class TELoraGateUpLinear(GateUpOutputs, _TEColumn):
    """Norm, gate and up."""


class TELoraRowLinear(RowAdapter, TEProducts, TERowParallelLinear):
    """o, or down."""

    def __init__(self, *args, lora: LoraConfig, targets: list[str], fused: bool, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_adapter(
            lora, *targets, self.in_features, self.out_features, self._tp_group, fused=fused
        )

    def forward(self, x_SBI):
        if self.fused and self.training:
            return adapted_row(self, x_SBI), None
        output_SBO, bias = super().forward(x_SBI)
        return self.with_adapter(output_SBO, x_SBI), bias
