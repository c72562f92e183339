"""A config becomes a megatron-core model on this rank. The only module that chooses between layer implementations."""

import math
from functools import partial

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

from retemper.pipeline.distributed.collectives import sum_over_stages
from retemper.pipeline.distributed.topology import Topology
from retemper.pipeline.model import lora
from retemper.pipeline.model.adapted import hand_out_gradients
from retemper.pipeline.model.attention import SdpaAttention
from retemper.pipeline.model.fp8 import forget_scales, hold_in_fp8_alone, plain_weights
from retemper.pipeline.model.kernels import kernels_here, start_tensor_parallel_overlap
from retemper.pipeline.model.weights import init_weights
from retemper.pipeline.schema.model import ModelSetup, RopeScaling


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, whose weight tells megatron-core to sum its gradient over a sequence-parallel group.

    megatron-core's own torch wrapper refuses sequence parallelism.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel


def build_model(config: ModelSetup, topology: Topology) -> torch.nn.ModuleList:
    """This rank's stages and shards, initialised, on its device, with only the method's parameters trainable.

    One DistributedDataParallel for each of parallel.virtual_pipeline_parallel_size stages.
    """
    local = not (HAVE_TE and topology.device.type == "cuda")
    if config.parallel.tensor_parallel_overlap:
        start_tensor_parallel_overlap(config)
    if config.fp8_recipe == "delayed":
        forget_scales()
    stages = torch.nn.ModuleList(
        [
            _trainable(stage, config, topology)
            for stage in build_layers(config, topology, local=local)
        ]
    )
    if config.parallel.overlap:
        # Gradients are reduced once a step, during the last micro-batch's backward pass.
        without_reducing = [stage.no_sync for stage in stages]
        stages[0].config.no_sync_func = without_reducing if len(stages) > 1 else without_reducing[0]
    return stages


def _trainable(model: GPTModel, config: ModelSetup, topology: Topology) -> DistributedDataParallel:
    with plain_weights(model, trained=config.method.name == "full"):
        init_weights(model, config.model, config.seed)
    if config.method.name == "lora":
        lora.freeze_base(model)
        if config.fp8_weights:
            hold_in_fp8_alone(model, keep_transposed=config.fp8.keep_transposed)
        if model.pre_process and config.parallel.recompute != "none":
            lora.open_to_gradients(model.embedding)
    lora.check_what_trains(
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
    """This rank's stages and shards, their parameters as memory had them; on the device of torch.device's context.

    local: of megatron-core's own layers, else of Transformer Engine's. Checkpoints know no difference.
    """
    stages = config.parallel.virtual_pipeline_parallel_size
    return [
        _stage(config, topology, number if stages > 1 else None, local) for number in range(stages)
    ]


def _stage(config: ModelSetup, topology: Topology, number: int | None, local: bool) -> GPTModel:
    """number: among the virtual stages of this rank."""
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
    model.rotary_pos_emb.inv_freq = _scaled(
        model.rotary_pos_emb.inv_freq, config.model.rope_scaling
    )
    if not local:
        for layer in model.modules():
            if hasattr(
                layer, "fuse_wgrad_accumulation"
            ):  # Transformer Engine's own, whatever sums the output layer's
                layer.fuse_wgrad_accumulation = True
    if model.post_process:
        _silence_padding(model.output_layer, config.model.vocab_size, topology.tensor_parallel_rank)
    return model


def _silence_padding(
    output_layer: torch.nn.Module, vocab_size: int, tensor_parallel_rank: int
) -> None:
    """Take the vocabulary's padding out of the softmax: with megatron-core alone each row of it adds e^0 to every denominator."""
    rows = output_layer.output_size_per_partition
    held = min(rows, max(0, vocab_size - tensor_parallel_rank * rows))

    @torch.no_grad()  # its gradient is zero by the softmax: to note what is written here would copy the gradient of all logits
    def silence(_layer, _inputs, output):
        logits_SBV, _bias = output
        logits_SBV[..., held:] = -math.inf

    if held < rows:
        output_layer.register_forward_hook(silence)


def _scaled(inv_freq: torch.Tensor, scaling: RopeScaling | None) -> torch.Tensor:
    """Rotary frequencies as transformers' modeling_rope_utils scales them; megatron-core has Llama 3.1's constants alone."""
    if scaling is None:
        return inv_freq
    stretched = inv_freq / scaling.factor
    if scaling.kind == "linear":
        return stretched
    wavelength = 2 * math.pi / inv_freq
    context, low, high = (
        scaling.original_max_sequence_length,
        scaling.low_freq_factor,
        scaling.high_freq_factor,
    )
    kept = ((context / wavelength - low) / (high - low)).clamp(
        0, 1
    )  # 1 for the fast ones, 0 for the slow ones
    return (1 - kept) * stretched + kept * inv_freq


# Attention's own activations are not kept anyway by fused kernels: of the rest, the feed-forward layers' are the larger half.
_RECOMPUTED = {
    "none": {},
    "selective": {"recompute_modules": ["mlp"]},
    "full": {"recompute_method": "uniform", "recompute_num_layers": 1},
}


def transformer_config(config: ModelSetup, *, local: bool = True) -> TransformerConfig:
    """megatron-core's view of the run. local: its layers are megatron-core's own, else Transformer Engine's."""
    model = config.model
    parallel = config.parallel
    kernels = kernels_here()
    bf16 = config.precision != "fp32"
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
        hidden_dropout=0.0,
        attention_dropout=0.0,
        perform_initialization=False,  # init_weights does it, the same at every topology
        # Else megatron-core allocates on the GPU, whatever torch.device's context says.
        use_cpu_initialization=not torch.cuda.is_available()
        or torch.get_default_device().type == "meta",
        tensor_model_parallel_size=parallel.tensor_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        sequence_parallel=parallel.sequence_parallel,
        recompute_granularity=None if parallel.recompute == "none" else parallel.recompute,
        **_RECOMPUTED[parallel.recompute],
        overlap_p2p_comm=parallel.overlap and virtual > 1,
        batch_p2p_comm=not (parallel.overlap and virtual > 1),
        tp_comm_overlap=parallel.tensor_parallel_overlap,
        # Transformer Engine finishes these within the weight's own gradient, and a frozen one has none.
        tp_comm_bulk_wgrad=config.method.name == "full",
        tp_comm_bulk_dgrad=config.method.name == "full",
        pipeline_dtype=torch.bfloat16 if bf16 else torch.float32,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        bf16=bf16,
        # Means over all tokens of the global batch, right also when loss masks differ between ranks.
        calculate_per_token_loss=True,
        finalize_model_grads_func=_finalize_gradients,
        gradient_accumulation_fusion=kernels.apex,
        bias_activation_fusion=bool(kernels.gpu) and local,
        use_te_activation_func=not local,
        # Where a norm is a module of its own, its backward pass adds the residual stream's gradient.
        fused_residual_rmsnorm=not local and config.fused_adapters,
        apply_rope_fusion=bool(kernels.transformer_engine),
        # Of a frozen head the loss has a way of its own (frozen_head.py).
        cross_entropy_loss_fusion=bool(kernels.gpu) and config.method.name == "full",
        cross_entropy_fusion_impl="native",
        masked_softmax_fusion=False,  # attention is Transformer Engine's or torch's, fused as a whole
        **_fp8(config),
    )


def _finalize_gradients(stages: list[torch.nn.Module], *args, **kwargs) -> None:
    """megatron-core's reduction of gradients over ranks, after the last micro-batch of a step."""
    hand_out_gradients(stages)
    finalize_model_grads(stages, *args, **kwargs)


def _fp8(config: ModelSetup) -> dict[str, object]:
    """megatron-core's options of an 8-bit precision."""
    if config.fp8_recipe is None:
        return {}
    return {
        # Gradients want the wider exponent of E5M2 unless each block has a scale of its own.
        "fp8": "hybrid" if config.fp8_recipe in ("delayed", "tensorwise") else "e4m3",
        "fp8_recipe": config.fp8_recipe,
        "fp8_param": config.fp8_weights,
        # Transformer Engine's own defaults: the largest of the last 1024 steps.
        "fp8_amax_history_len": 1024,
        "fp8_amax_compute_algo": "max",
        "fp8_dot_product_attention": config.fp8.attention,
        "first_last_layers_bf16": config.fp8.bf16_layers > 0,
        "num_layers_at_start_in_bf16": config.fp8.bf16_layers,
        "num_layers_at_end_in_bf16": config.fp8.bf16_layers,
    }


def parameter_counts(model: torch.nn.ModuleList, tensor_parallel_size: int) -> tuple[int, int]:
    """(trainable, frozen) elements of the whole model, the vocabulary's padding among them. Every rank calls it."""
    counts = {True: 0, False: 0}
    for name, parameter in (
        pair for stage in unwrap_model(list(model)) for pair in stage.named_parameters()
    ):
        if name == "output_layer.weight" and getattr(parameter, "shared_embedding", False):
            continue  # the last stage's copy of the first's embedding
        parts = tensor_parallel_size if getattr(parameter, "tensor_model_parallel", False) else 1
        counts[parameter.requires_grad] += parameter.numel() * parts
    return tuple(sum_over_stages([counts[True], counts[False]]))


def _block_spec(config: ModelSetup, local: bool) -> TransformerBlockSubmodules:
    layer = _local_layer(config) if local else _te_layer(config)
    if config.method.lora:
        _use_adapters(layer, config, local)
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
    if config.model.qk_norm:
        layer.self_attention.submodules.q_layernorm = (
            layer.self_attention.submodules.k_layernorm
        ) = RMSNorm
    return layer


def _use_adapters(layer: TransformerLayerSubmodules, config: ModelSetup, local: bool) -> None:
    """Let a layer spec build its targeted linear layers with adapters."""
    attention = layer.self_attention.submodules
    mlp = layer.mlp.keywords["submodules"]
    settings = config.method.lora
    fused = config.fused_adapters
    if local:
        qkv, gate_up, row = lora.LoraQkvLinear, lora.LoraGateUpLinear, lora.LoraRowLinear
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
