"""Peak FLOP/s of GPUs by name."""

# Dense tensor-core FLOP/s by (part of) the name that CUDA reports; the first match counts. Where
# NVIDIA states a figure with sparsity, it is half of that. Sources, for H100 (SXM, PCIe, NVL):
# https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet
# for H200: https://nvdam.widen.net/s/nb5zzzsjdf/hpc-datasheet-sc23-h200-datasheet-3002446
# for A100:
# https://www.nvidia.com/en-us/data-center/a100/
_PEAKS = {
    "H100 PCIe": {"bf16": 756e12, "fp8": 1513e12},
    "H100 NVL": {"bf16": 835e12, "fp8": 1671e12},
    "H100": {"bf16": 989e12, "fp8": 1979e12},
    "H200 NVL": {"bf16": 835e12, "fp8": 1671e12},
    "H200": {"bf16": 989e12, "fp8": 1979e12},
    "A100": {"bf16": 312e12},
    "B200": {"bf16": 2250e12, "fp8": 4500e12},
}


def peak_flops(gpu: str | None, precision: str) -> float | None:
    """Return the peak FLOP/s of a GPU at a precision, or None if unknown or without a GPU.

    For FP8 recipes it is the FP8 peak, though attention and the output head are computed in bf16.
    """
    known = next((peaks for name, peaks in _PEAKS.items() if gpu and name in gpu), {})
    return known.get(precision if precision in ("fp32", "bf16") else "fp8")
