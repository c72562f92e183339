"""LoRA on Transformer Engine's layers. Can be imported only if Transformer Engine is installed.

Written for Transformer Engine 2.19: the products of adapted layers call what its `Linear` calls,
with an output to accumulate onto.

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

# The norm before each column-parallel layer, and the prefix of its weight in checkpoints, which
# store it as a part of that layer.
NORMS = {
    "linear_qkv": ("input_layernorm", "self_attention.linear_qkv.layer_norm_"),
    "linear_fc1": ("pre_mlp_layernorm", "mlp.linear_fc1.layer_norm_"),
}


def layers(*, fused: bool) -> tuple[type, type, type]:
    """Return the adapted layer classes for q-k-v, gate-up and row-parallel layers."""
    if fused:
        return TEAdaptedQkvLinear, TEAdaptedGateUpLinear, TELoraRowLinear
    return TELoraQkvLinear, TELoraGateUpLinear, TELoraRowLinear


def set_norm_apart(layer: TransformerLayerSubmodules, name: str) -> None:
    """Make the norm before the column-parallel layer `name` a separate module of a layer spec.

    A LayerNormLinear that also returns its normalised output keeps an FP8 copy of it, which a
    frozen weight never reads, and casts its gradient twice.
    """
    norm, stored = NORMS[name]
    setattr(layer, norm, TESpecProvider().layer_norm(has_residual=True))
    layer.sharded_state_dict_keys_map = layer.sharded_state_dict_keys_map | {f"{norm}.": stored}


class TEProducts(TorchProducts):
    """The products with a frozen layer's weight, bf16 or FP8, and float32 sums of bf16 products."""

    def add_output(self, output_TO, x_TI):
        x_TI = self.prepare_forward(x_TI)
        try:
            (weight,) = self._get_weight_tensors()
            if not self.fp8:
                output_TO.addmm_(x_TI, weight.t())
                return None
            quantizers = self._get_quantizers(False, False, True)
            input_quantizer = quantizers[0]
            gradient_quantizer = quantizers[-1]
            input_quantizer.set_usage(rowwise=True, columnwise=False)
            recipe = FP8GlobalStateManager.get_fp8_recipe()
            _add_fp8_product(
                weight, input_quantizer(x_TI), output_TO, recipe.fp8_gemm_fprop, layout="TN"
            )
            return gradient_quantizer, recipe.fp8_gemm_dgrad
        finally:
            self.end_forward()

    def add_input_gradient(self, gradient_TI, gradient_TO, context):
        if context is None:
            gradient_TI.addmm_(gradient_TO, self.weight)
            return
        gradient_quantizer, precision = context
        gradient_quantizer.set_usage(rowwise=True, columnwise=False)
        self.weight.update_usage(columnwise_usage=True)
        _add_fp8_product(
            self.weight, gradient_quantizer(gradient_TO), gradient_TI, precision, layout="NN"
        )

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
    """Add a product with an FP8 weight to a bf16 tensor.

    precision: The recipe's accumulation settings for this product.
    """
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
    """A column-parallel layer whose input is already normalised.

    In training it is one autograd function with its adapters.
    """

    def __init__(self, *args, lora: LoraConfig, targets: list[str], fused: bool, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_adapters(lora, targets, self.in_features, self._tp_group, fused=fused)

    def forward(self, x_SBI):
        if self.training:
            return adapted_column(self, x_SBI), None
        output_SBO, bias = super().forward(x_SBI)
        return self.with_adapters(output_SBO, x_SBI), bias


class TEAdaptedQkvLinear(QkvOutputs, _TEAdaptedColumn):
    """The layer with adapters for q, k and v."""


class TEAdaptedGateUpLinear(GateUpOutputs, _TEAdaptedColumn):
    """The layer with adapters for gate and up."""


class _TEColumn(ColumnAdapters, TELayerNormColumnParallelLinear):
    """A column-parallel layer that normalises its own input, with separately computed adapters."""

    def __init__(self, *args, lora: LoraConfig, targets: list[str], fused: bool, **kwargs):
        super().__init__(*args, **kwargs)
        # The adapters' input is the normalised input, under sequence parallelism this rank's part.
        self.return_layernorm_output = True
        self.return_layernorm_output_gathered = False
        self.add_adapters(lora, targets, self.in_features, self._tp_group, fused=fused)

    def forward(self, x_SBI):
        (output_SBO, normalised_SBI), bias = super().forward(x_SBI)
        return self.with_adapters(output_SBO, normalised_SBI), bias


class TELoraQkvLinear(QkvOutputs, _TEColumn):
    """The norm and the layer with adapters for q, k and v."""


class TELoraGateUpLinear(GateUpOutputs, _TEColumn):
    """The norm and the layer with adapters for gate and up."""


class TELoraRowLinear(RowAdapter, TEProducts, TERowParallelLinear):
    """The row-parallel layer with an adapter for o or down."""

    def __init__(self, *args, lora: LoraConfig, targets: list[str], fused: bool, **kwargs):
        super().__init__(*args, **kwargs)
        (target,) = targets
        sizes = self.in_features, self.out_features
        self.add_adapter(lora, target, *sizes, self._tp_group, fused=fused)

    def forward(self, x_SBI):
        if self.fused and self.training:
            return adapted_row(self, x_SBI), None
        output_SBO, bias = super().forward(x_SBI)
        return self.with_adapter(output_SBO, x_SBI), bias
