"""Construction of the megatron-core model on this rank from a config.

Only this module chooses between layer implementations.
"""

import math
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.extensions.transformer_engine import HAVE_TE, TENorm
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_submodules,
    get_gpt_layer_with_transformer_engine_submodules,
)
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.core.utils import unwrap_model

from retemper.pipeline.distributed.collectives import all_reduce_over_stages
from retemper.pipeline.distributed.topology import Topology
from retemper.pipeline.model import lora
from retemper.pipeline.model.adapted import hand_out_gradients, recompute_product
from retemper.pipeline.model.attention import SdpaAttention
from retemper.pipeline.model.fp8 import (
    dequantized_weights,
    drop_transposed_copies,
    reset_fp8_state,
    update_gradient_scales,
)
from retemper.pipeline.model.kernels import detect_kernels, start_tensor_parallel_overlap
from retemper.pipeline.model.weights import init_weights
from retemper.pipeline.schema.model import LoraConfig, ModelSetup, RopeScaling
from retemper.pipeline.schema.run import Config


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, marked for megatron-core's gradient sum over a sequence-parallel group.

    megatron-core's own wrapper of torch's RMSNorm does not support sequence parallelism.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel


class SwiGLU(torch.nn.Module):
    """The product of gate, after SiLU, and up. megatron-core computes it outside of any module."""

    def __init__(self, config: TransformerConfig):
        super().__init__()

    def forward(self, gate_up_SBF: torch.Tensor) -> torch.Tensor:
        """Return the product, (S, B, F), of (S, B, 2 F)."""
        gate_SBF, up_SBF = gate_up_SBF.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate_SBF) * up_SBF


def build_model(config: Config, topology: Topology) -> torch.nn.ModuleList:
    """Return this rank's part of the model, initialised and on its device.

    Only the method's parameters are trainable. The list has one DistributedDataParallel for each of
    parallel.virtual_pipeline_parallel_size stages.

    Collective: every rank must call this.
    """
    local = not (HAVE_TE and topology.device.type == "cuda")
    if config.parallel.tensor_parallel_overlap:
        start_tensor_parallel_overlap(config)
    if config.fp8_recipe == "delayed" or config.fp8.attention:
        reset_fp8_state()
    stages = torch.nn.ModuleList(
        [
            _trainable(stage, config, topology)
            for stage in build_layers(config, topology, local=local)
        ]
    )
    if config.parallel.overlap:
        # Gradients are reduced once a step, during the last micro-batch's backward pass.
        no_sync_functions = [stage.no_sync for stage in stages]
        stages[0].config.no_sync_func = (
            no_sync_functions if len(stages) > 1 else no_sync_functions[0]
        )
    return stages


def _trainable(model: GPTModel, config: ModelSetup, topology: Topology) -> DistributedDataParallel:
    if config.method.name == "lora" and config.fp8_weights:
        # Before bf16 values exist beside them: otherwise building needs more memory than training.
        drop_transposed_copies(model, keep_transposed=config.fp8.keep_transposed)
    with dequantized_weights(model, trained=config.method.name == "full"):
        init_weights(model, config.model, config.seed)
    if config.method.name == "lora":
        lora.freeze_base(model)
        if model.pre_process and config.parallel.recompute in ("selective", "full"):
            lora.enable_input_require_grads(model.embedding)
    lora.check_trainable_parameters(
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        config.method.lora,
    )
    model.to(topology.device)
    if model.config.bf16:
        model = Float16Module(model.config, model)
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=config.parallel.overlap,
        overlap_param_gather=config.parallel.overlap,
        fp8_param_gather=config.fp8.param_gather,
    )
    return DistributedDataParallel(model.config, ddp, model)


def build_layers(config: ModelSetup, topology: Topology, *, local: bool = True) -> list[GPTModel]:
    """Return this rank's stages with uninitialised parameters.

    They are on the device of the current torch.device context.

    Args:
        config: The model and its parallel layout.
        topology: This rank's position in the layout.
        local: Use megatron-core's own layers, else Transformer Engine's. Checkpoints are the same.
    """
    stages = config.parallel.virtual_pipeline_parallel_size
    return [
        _stage(config, topology, number if stages > 1 else None, local) for number in range(stages)
    ]


def _stage(config: ModelSetup, topology: Topology, number: int | None, local: bool) -> GPTModel:
    """Return one stage of this rank.

    number: Its index among the virtual stages of this rank; None if there is only one.
    """
    transformer = transformer_config(config, local=local)
    last = config.parallel.virtual_pipeline_parallel_size - 1
    model = GPTModel(
        config=transformer,
        transformer_layer_spec=_block_spec(config, local),
        vp_stage=number,
        vocab_size=config.padded_vocab_size,
        max_sequence_length=config.model.max_sequence_length,
        pre_process=topology.is_first_stage and number in (None, 0),
        post_process=topology.is_last_stage and number in (None, last),
        share_embeddings_and_output_weights=config.model.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=config.model.rotary_base,
    )
    model.rotary_pos_emb.inv_freq = _scale_rope(
        model.rotary_pos_emb.inv_freq, config.model.rope_scaling
    )
    if not local:
        for layer in model.modules():
            # Transformer Engine's layers have their own fused kernel, without apex.
            if hasattr(layer, "fuse_wgrad_accumulation"):
                layer.fuse_wgrad_accumulation = True
    if config.parallel.recompute == "swiglu":
        for layer in model.decoder.layers:
            recompute_product(layer.mlp)
    if model.post_process:
        _mask_padded_logits(
            model.output_layer, config.model.vocab_size, topology.tensor_parallel_rank
        )
    return model


def _mask_padded_logits(
    output_layer: torch.nn.Module, vocab_size: int, tensor_parallel_rank: int
) -> None:
    """Exclude the vocabulary's padding from the softmax.

    Otherwise megatron-core adds e^0 to every denominator for each padded row.
    """
    rows = output_layer.output_size_per_partition
    valid_rows = min(rows, max(0, vocab_size - tensor_parallel_rank * rows))

    # The softmax makes the gradient of these logits zero, and recording the write in autograd would
    # copy the gradient of all logits.
    @torch.no_grad()
    def mask(_layer, _inputs, output):
        logits_SBV, _bias = output
        logits_SBV[..., valid_rows:] = -math.inf

    if valid_rows < rows:
        output_layer.register_forward_hook(mask)


def _scale_rope(inv_freq: torch.Tensor, scaling: RopeScaling | None) -> torch.Tensor:
    """Return rotary frequencies scaled as by transformers' modeling_rope_utils.

    megatron-core supports only Llama 3.1's constants.
    """
    if scaling is None:
        return inv_freq
    scaled = inv_freq / scaling.factor
    if scaling.kind == "linear":
        return scaled
    wavelength = 2 * math.pi / inv_freq
    context, low, high = (
        scaling.original_max_sequence_length,
        scaling.low_freq_factor,
        scaling.high_freq_factor,
    )
    # 1 for high frequencies, which are not scaled; 0 for low ones.
    unscaled_share = ((context / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - unscaled_share) * scaled + unscaled_share * inv_freq


# Fused attention kernels store no activations in any case; of the remaining ones, those of the
# feed-forward layers are the larger half.
_RECOMPUTE_OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "swiglu": {},  # by the adapted layer itself (adapted.py, recompute_product)
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}


def transformer_config(config: ModelSetup, *, local: bool = True) -> TransformerConfig:
    """Return megatron-core's configuration of the run.

    local: Whether the layers are megatron-core's own, else Transformer Engine's.
    """
    model = config.model
    parallel = config.parallel
    kernels = detect_kernels()
    bf16 = config.precision != "fp32"
    swiglu_module = not local or parallel.recompute == "swiglu"
    virtual = parallel.virtual_pipeline_parallel_size
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.qk_norm,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=config.dropout.hidden,
        attention_dropout=config.dropout.attention,
        perform_initialization=False,  # done by init_weights, the same for every topology
        # Otherwise megatron-core allocates on the GPU, regardless of torch.device's context.
        use_cpu_initialization=not torch.cuda.is_available()
        or torch.get_default_device().type == "meta",
        tensor_model_parallel_size=parallel.tensor_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        sequence_parallel=parallel.sequence_parallel,
        **_RECOMPUTE_OPTIONS[parallel.recompute],
        # Interleaved stages send activations and gradients at once. Sent together, between two
        # ranks one is received as the other: megatron-core's arguments.py refuses that.
        overlap_p2p_comm=virtual > 1,
        batch_p2p_comm=virtual == 1,
        tp_comm_overlap=parallel.tensor_parallel_overlap,
        # Transformer Engine completes these in the weight's gradient, which frozen weights lack.
        tp_comm_bulk_wgrad=config.method.name == "full",
        tp_comm_bulk_dgrad=config.method.name == "full",
        pipeline_dtype=torch.bfloat16 if bf16 else torch.float32,
        # What was sent to the next stage is only needed for the shape of its gradient.
        deallocate_pipeline_outputs=parallel.pipeline_parallel_size > 1,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        bf16=bf16,
        # Average over all tokens of the global batch, which is right even if loss masks differ
        # between ranks.
        calculate_per_token_loss=True,
        finalize_model_grads_func=partial(
            _finalize_gradients,
            update_scales=config.fp8.attention and config.fused_adapters,
        ),
        gradient_accumulation_fusion=kernels.apex,
        bias_activation_fusion=bool(kernels.gpu) and not swiglu_module,
        use_te_activation_func=swiglu_module,
        # If a norm is a separate module, its backward pass adds the residual stream's gradient.
        fused_residual_rmsnorm=not local and config.fused_adapters,
        apply_rope_fusion=bool(kernels.transformer_engine),
        # The loss of a frozen output layer is computed by frozen_head.py instead.
        cross_entropy_loss_fusion=bool(kernels.gpu) and config.method.name == "full",
        cross_entropy_fusion_impl="native",
        masked_softmax_fusion=False,  # all of attention is fused, by Transformer Engine or torch
        **_fp8(config),
    )


def _finalize_gradients(
    stages: list[torch.nn.Module], *args, update_scales: bool, **kwargs
) -> None:
    """Reduce gradients over ranks after the last micro-batch of a step.

    update_scales: Whether the scales of attention's gradients in FP8 are to be updated here.

    Collective: every rank must call this.
    """
    hand_out_gradients(stages)
    if update_scales:
        update_gradient_scales()
    finalize_model_grads(stages, *args, **kwargs)


def _fp8(config: ModelSetup) -> dict[str, Any]:
    """Return megatron-core's options for an FP8 precision."""
    if config.fp8_recipe is None:
        return {}
    return {
        # Gradients need the wider exponent of E5M2 unless each block has a separate scale.
        "fp8": "hybrid" if config.fp8_recipe in ("delayed", "tensorwise") else "e4m3",
        "fp8_recipe": config.fp8_recipe,
        "fp8_param": config.fp8_weights,
        # Transformer Engine's defaults: the maximum over the last 1024 steps.
        "fp8_amax_history_len": 1024,
        "fp8_amax_compute_algo": "max",
        "fp8_dot_product_attention": config.fp8.attention,
        "first_last_layers_bf16": config.fp8.bf16_layers > 0,
        "num_layers_at_start_in_bf16": config.fp8.bf16_layers,
        "num_layers_at_end_in_bf16": config.fp8.bf16_layers,
    }


def parameter_counts(model: torch.nn.ModuleList, tensor_parallel_size: int) -> tuple[int, int]:
    """Return the (trainable, frozen) number of elements of the whole model.

    The vocabulary's padding is included.

    Collective: every rank must call this.
    """
    counts = {True: 0, False: 0}
    for name, parameter in (
        pair for stage in unwrap_model(list(model)) for pair in stage.named_parameters()
    ):
        if name == "output_layer.weight" and getattr(parameter, "shared_embedding", False):
            continue  # the last stage's copy of the first stage's embedding
        parts = tensor_parallel_size if getattr(parameter, "tensor_model_parallel", False) else 1
        counts[parameter.requires_grad] += parameter.numel() * parts
    trainable, frozen = all_reduce_over_stages([counts[True], counts[False]])
    return trainable, frozen


def _block_spec(config: ModelSetup, local: bool) -> TransformerBlockSubmodules:
    layer = _local_layer(config) if local else _te_layer(config)
    if settings := config.method.lora:
        _use_adapters(layer, settings, fused=config.fused_adapters, local=local)
    parallel = config.parallel
    layers = config.model.num_layers // (
        parallel.pipeline_parallel_size * parallel.virtual_pipeline_parallel_size
    )
    spec = ModuleSpec(module=TransformerLayer, submodules=layer)
    return TransformerBlockSubmodules(
        layer_specs=[spec] * layers, layer_norm=RMSNorm if local else TENorm
    )


def _te_layer(config: ModelSetup) -> TransformerLayerSubmodules:
    return get_gpt_layer_with_transformer_engine_submodules(
        qk_layernorm=config.model.qk_norm, use_te_activation_func=True
    )


def _local_layer(config: ModelSetup) -> TransformerLayerSubmodules:
    layer = get_gpt_layer_local_submodules(normalization="RMSNorm")
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    layer.self_attention.submodules.core_attention = SdpaAttention
    layer.mlp.keywords["submodules"].activation_func = SwiGLU
    if config.model.qk_norm:
        layer.self_attention.submodules.q_layernorm = (
            layer.self_attention.submodules.k_layernorm
        ) = RMSNorm
    return layer


def _use_adapters(
    layer: TransformerLayerSubmodules, settings: LoraConfig, *, fused: bool, local: bool
) -> None:
    """Replace the targeted linear layers of a layer spec by layers with adapters."""
    attention = layer.self_attention.submodules
    mlp = layer.mlp.keywords["submodules"]
    if local:
        qkv, gate_up, row = lora.layers()
    else:
        from retemper.pipeline.model import lora_te

        qkv, gate_up, row = lora_te.layers(fused=fused)
    for submodules, name, adapted, targets in (
        (attention, "linear_qkv", qkv, ("q", "k", "v")),
        (attention, "linear_proj", row, ("o",)),
        (mlp, "linear_fc1", gate_up, ("gate", "up")),
        (mlp, "linear_fc2", row, ("down",)),
    ):
        if targeted := [target for target in targets if target in settings.targets]:
            setattr(
                submodules, name, partial(adapted, lora=settings, targets=targeted, fused=fused)
            )
            if fused and not local and name in lora_te.NORMS:
                lora_te.set_norm_apart(layer, name)
