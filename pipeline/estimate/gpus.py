"""Peak arithmetic of GPUs by name."""

# Dense FLOP/s of a tensor core by the name that CUDA reports, first match first; where NVIDIA prints a figure with sparsity, half of it.
# https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet (H100: SXM, PCIe, NVL),
# https://nvdam.widen.net/s/nb5zzzsjdf/hpc-datasheet-sc23-h200-datasheet-3002446 (H200),
# https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf (A100).
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
    """FLOP/s that a GPU of this name has at a precision; None where that is not known, or where there is no GPU.

    In FP8 those of FP8, though attention and the output head are computed in bf16 there.
    """
    known = next((peaks for name, peaks in _PEAKS.items() if gpu and name in gpu), {})
    return known.get(precision if precision in ("fp32", "bf16") else "fp8")
