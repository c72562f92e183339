"""LoRA on Transformer Engine's layers, whose column-parallel ones normalise their input themselves. Imported where it is installed.

Shapes as in lora.py.
"""

from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear, TERowParallelLinear

from retemper.pipeline.model.lora import ColumnAdapters, GateUpOutputs, QkvOutputs, RowAdapter
from retemper.pipeline.schema.model import LoraConfig


class _TEColumn(ColumnAdapters, TELayerNormColumnParallelLinear):
    def __init__(self, *args, lora: LoraConfig, targets: list[str], **kwargs):
        super().__init__(*args, **kwargs)
        # What the adapters take in is the normalised input, this rank's part of it under sequence parallelism.
        self.return_layernorm_output, self.return_layernorm_output_gathered = True, False
        self.add_adapters(lora, targets, self.in_features, self._tp_group)

    def forward(self, x_SBI):
        (output_SBO, normalised_SBI), bias = super().forward(x_SBI)
        return self.with_adapters(output_SBO, normalised_SBI), bias


class TELoraQkvLinear(QkvOutputs, _TEColumn):
    """Norm, q, k and v."""


class TELoraGateUpLinear(GateUpOutputs, _TEColumn):
    """Norm, gate and up."""


class TELoraRowLinear(RowAdapter, TERowParallelLinear):
    """o, or down."""

    def __init__(self, *args, lora: LoraConfig, targets: list[str], **kwargs):
        super().__init__(*args, **kwargs)
        self.add_adapter(lora, *targets, self.in_features, self.out_features, self._tp_group)

    def forward(self, x_SBI):
        output_SBO, bias = super().forward(x_SBI)
        return self.with_adapter(output_SBO, x_SBI), bias
