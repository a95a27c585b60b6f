"""Requirements on a GPU; exceptions told apart: shortage of memory, fault of the GPU, defect."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.gpus import GOOD_GPU
from vidshard.pipeline import devices
from vidshard.pipeline.devices import GpuFaultError, is_gpu_fault, is_out_of_memory, make_reproducible


@pytest.mark.parametrize("precision", ["float32", "tf32", "float16", "bfloat16"])
def test_a_gpu_that_works_is_used(precision: str) -> None:
    assert GOOD_GPU.problem(precision) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"torch_cuda": None, "torch_version": "2.13.0+cpu"}, ["2.13.0+cpu built without CUDA", "Install a build"]),
        ({"driver": None}, ["CUDA 13.0", "no NVIDIA driver found", "--gpus all"]),
        ({"driver": "570.86.15"}, ["CUDA 13.0", "driver 570.86.15", "needs driver 580 or later"]),
        ({"driver": "470.1", "torch_cuda": "12.8"}, ["CUDA 12.8", "driver 470.1", "needs driver 525 or later"]),
        ({}, ["PyTorch sees no GPU", "CUDA_VISIBLE_DEVICES"]),
        (
            {"name": "NVIDIA K80", "failure": "no kernel image"},
            ["on NVIDIA K80 failed", "no kernel image"],
        ),
    ],
)
def test_a_gpu_that_cannot_be_used_is_refused_with_versions_and_remedy(
    changes: dict[str, str | None], words: list[str]
) -> None:
    problem = replace(GOOD_GPU, **({"name": None} | changes)).problem("float32")  # type: ignore[arg-type]
    assert problem is not None
    for word in [*words, "--device cpu"]:
        assert word in problem


@pytest.mark.parametrize(
    ("cudnn", "is_broken"),
    [(90701, False), (90800, True), (91002, True), (91400, True), (91500, False), (91501, False), (8902, False)],
)
def test_a_cudnn_with_broken_bfloat16_convolutions_is_refused_by_number(cudnn: int, is_broken: bool) -> None:
    report = replace(GOOD_GPU, cudnn=cudnn)
    problem = report.problem("bfloat16")
    assert (problem is not None) is is_broken
    if problem is not None:
        assert f"cuDNN {cudnn // 10000}.{cudnn % 10000 // 100}.{cudnn % 100} " in problem
        assert "9.15" in problem
    assert all(report.problem(precision) is None for precision in ("float32", "tf32", "float16"))


SHORTAGES: list[BaseException] = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("cuDNN Frontend error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"),
    RuntimeError("CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY"),
    RuntimeError("HIP error: hipErrorOutOfMemory"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"),
    RuntimeError("std::bad_alloc"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    MemoryError(),
]
FAULTS: list[BaseException] = [
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: uncorrectable ECC error encountered\nKernel errors might come later"),
    RuntimeError("CUDA error: unspecified launch failure"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("CUDA driver error: unknown error"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_MAPPING_ERROR"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
    RuntimeError("HIP error: the operation cannot be performed in the present state"),
    RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    RuntimeError("No CUDA GPUs are available"),
    GpuFaultError("the GPU of this encoder is gone"),
]
DEFECTS: list[BaseException] = [
    ValueError("out of memory"),
    RuntimeError("shape '[2, 3]' is invalid for input of size 7"),
    RuntimeError("Expected all tensors to be on the same device, cuda:0 and cpu"),
    OSError(errno.ENOSPC, "No space left on device"),
    KeyError("CUDA error"),
]


@pytest.mark.parametrize("error", SHORTAGES, ids=str)
def test_every_form_of_a_shortage_of_memory_is_one_and_no_fault(error: BaseException) -> None:
    assert is_out_of_memory(error)
    assert not is_gpu_fault(error)


@pytest.mark.parametrize("error", FAULTS, ids=str)
def test_every_form_of_a_fault_of_the_gpu_is_one_and_no_shortage(error: BaseException) -> None:
    assert is_gpu_fault(error)
    assert not is_out_of_memory(error, num_clips=8)


@pytest.mark.parametrize("error", DEFECTS, ids=str)
def test_a_defect_is_neither(error: BaseException) -> None:
    assert not is_gpu_fault(error)
    assert not is_out_of_memory(error, num_clips=8)


@pytest.mark.parametrize(
    "message",
    [
        "GET was unable to find an engine to execute this computation",
        "FIND was unable to find an engine to execute this computation",
        "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED",
        "could not create a primitive",
    ],
)
def test_an_error_with_several_causes_is_a_shortage_if_fewer_clips_may_help_or_little_memory_is_free(
    message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = RuntimeError(message)
    assert is_out_of_memory(error, num_clips=8)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 30, 80 << 30))
    assert is_out_of_memory(error, num_clips=1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (70 << 30, 80 << 30))
    assert not is_out_of_memory(error, num_clips=1)


@pytest.mark.parametrize("precision", ["float32", "tf32", "float16", "bfloat16"])
def test_only_tf32_lets_a_gpu_round_the_factors_of_float32_products(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("allow_tf32", "deterministic", "benchmark")
    for name in names:
        monkeypatch.setattr(torch.backends.cudnn, name, getattr(torch.backends.cudnn, name))
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        make_reproducible("cuda", torch.get_num_threads(), precision)
        assert torch.backends.cudnn.allow_tf32 is torch.backends.cuda.matmul.allow_tf32 is (precision == "tf32")
        assert torch.backends.cudnn.deterministic
        assert not torch.backends.cudnn.benchmark
        assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
        assert not torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = True


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 23 2025\nGCC version: 12", "570.86.15"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.03  Release Build", "580.159.03"),
    ],
)
def test_the_drivers_version_is_read_from_the_kernel(text: str, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self: text)
    assert devices.driver_version() == version
