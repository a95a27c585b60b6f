"""Devices of the encoders: process-wide settings, what a GPU must offer, and which exceptions are faults of a GPU.

A GPU that a run was promised is used, or the run is refused before it plans (`GpuReport.problem`). An exception that a
GPU leaves behind is one of three kinds: too little memory, which a smaller batch may cure; a fault, after which every
further call in the process fails; or a defect.
"""

from __future__ import annotations

import errno
import gc
import os
import re
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from vidshard.schemas.errors import RunFailedError, one_line

DEFAULT_PRECISION = {"cuda": "float16", "cpu": "float32"}
"""Precision of a run that names none, by device. On the trained weights of the package float16 gives 99.3 % of the
tokens of float32, bfloat16 92.8 % and TF32 99.6 % (`python -m benchmarks.precision`, by emulation). By the roofline of
an H200, float16 and bfloat16 are five to ten times as fast as float32, and TF32 three times (docs/performance.md)."""

OLDEST_DRIVERS = {11: 450, 12: 525, 13: 580}
"""Oldest NVIDIA driver by the major version of CUDA that torch was built for."""

BROKEN_CUDNN = range(90800, 91500)
"""Versions of cuDNN whose bfloat16 3D convolutions are wrong, or take far more time and memory: 9.8 to 9.14
(pytorch/pytorch#163539, #166643). As ``torch.backends.cudnn.version()`` gives them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuReport:
    """State of the GPU of a process as PyTorch sees it, and of the node that it runs on."""

    node: str
    torch_version: str
    torch_cuda: str | None
    """Version of CUDA that torch was built for; None for a build without it."""
    driver: str | None
    """Version of the NVIDIA driver; None if none was found."""
    cudnn: int | None
    """Version of cuDNN, such as 91501 for 9.15.1."""
    name: str | None
    """Name of the GPU; None if PyTorch cannot use one."""
    memory_bytes: int = 0
    failure: str = ""
    """Message of the exception with which a first computation failed; empty if it worked."""

    @property
    def versions(self) -> str:
        """The versions in words."""
        cuda = f"built for CUDA {self.torch_cuda}" if self.torch_cuda else "built without CUDA"
        driver = f"NVIDIA driver {self.driver}" if self.driver else "no NVIDIA driver found"
        return f"torch {self.torch_version} {cuda}, {driver}"

    def problem(self, precision: str) -> str | None:
        """Describe why a run of this precision cannot use the GPU, with the remedy; None if it can."""
        if self.name is None or self.failure:
            state = f"a first computation on {self.name} failed" if self.name else "PyTorch sees no GPU"
            detail = f" ({self.failure})" if self.failure else ""
            return f"{state}{detail}: {self.versions}. {self._remedy()}"
        if precision == "bfloat16" and self.cudnn is not None and self.cudnn in BROKEN_CUDNN:
            return (
                f"cuDNN {_dotted(self.cudnn)} computes bfloat16 3D convolutions wrongly: install cuDNN 9.15 or later "
                "(pip install --upgrade nvidia-cudnn-cu13, or -cu12 for CUDA 12), or give --precision float16"
            )
        return None

    def _remedy(self) -> str:
        if self.torch_cuda is None:
            return "Install a build of torch for CUDA (https://pytorch.org/get-started/locally), or give --device cpu"
        if self.driver is None:
            return (
                "Let the container see the driver (docker run --gpus all, or the NVIDIA device plugin of Kubernetes), "
                "or give --device cpu"
            )
        oldest = OLDEST_DRIVERS.get(int(self.torch_cuda.split(".")[0]))
        if oldest is not None and _major(self.driver) < oldest:
            return (
                f"CUDA {self.torch_cuda} needs driver {oldest} or later: update the driver, install torch for an "
                "older CUDA, or give --device cpu"
            )
        return "See whether nvidia-smi lists the GPU on that node, and CUDA_VISIBLE_DEVICES; or give --device cpu"

    def __str__(self) -> str:
        cudnn = f", cuDNN {_dotted(self.cudnn)}" if self.cudnn else ""
        return f"{self.name} ({self.memory_bytes / 2**30:.0f} GiB), {self.versions}{cudnn}"


def examine_gpu() -> GpuReport:
    """Report on the GPU that this process may use; a small computation shows whether it works."""
    name, memory, failure = None, 0, ""
    try:
        if torch.cuda.is_available():
            name = torch.cuda.get_device_name()
            memory = torch.cuda.get_device_properties().total_memory
            one = torch.ones(1, 8, 4, 4, 4, device="cuda", dtype=torch.float16)
            torch.nn.functional.conv3d(one, one.new_ones(8, 8, 3, 3, 3)).sum().item()
    except (RuntimeError, AssertionError) as error:  # an old GPU without kernels, an exclusive one, a broken driver
        failure = one_line(error, 300)
    return GpuReport(
        node=socket.gethostname(),
        torch_version=str(torch.__version__),
        torch_cuda=torch.version.cuda,
        driver=driver_version(),
        cudnn=torch.backends.cudnn.version() if torch.version.cuda else None,  # type: ignore[no-untyped-call]
        name=name,
        memory_bytes=memory,
        failure=failure,
    )


def driver_version() -> str | None:
    """Version of the NVIDIA driver of this machine, such as ``580.159.03``; None if it has none."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        text = ""
    found = re.search(r"Kernel Module\s.*?(\d+\.\d+(?:\.\d+)?)", text)
    if found:
        return found[1]
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
    return said.split("\n")[0].strip() or None


def make_reproducible(device: str, num_threads: int, precision: str = "float32") -> None:
    """Set process-wide options so that the same clip gives the same bits in every run on the same hardware.

    Args:
        device: "cpu" or "cuda".
        num_threads: CPU threads of PyTorch.
        precision: name of a precision; only ``tf32`` lets the GPU round the factors of float32 products.
    """
    torch.set_num_threads(num_threads)
    if device == "cuda":
        torch.backends.cudnn.benchmark = False  # it chooses kernels by timing, which differs between runs
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


class GpuFaultError(RunFailedError):
    """The GPU of this process failed, and nothing more can be computed in the process."""


MEMORY_MESSAGES = (
    "out of memory",  # the CUDA and HIP runtimes, Triton: memory of the GPU, pinned memory
    "out_of_memory",  # the names of their codes: CUDA_ERROR_OUT_OF_MEMORY
    "allocate memory",  # "can't" by PyTorch's CPU allocator, "cannot" by the system
    "not enough memory",  # the CPU allocator on Windows
    "insufficient memory",
    "failed to allocate",
    "unable to allocate",
    "bad_alloc",
    "bad allocation",
    "alloc_failed",  # cuBLAS, cuDNN
    "allocation_failed",  # sub-codes of cuDNN 9: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED
    "erroroutofmemory",  # hipErrorOutOfMemory
    "memoryallocation",  # cudaErrorMemoryAllocation
)
"""Parts of messages of out-of-memory errors, in small letters; PyTorch has an exception class for its CUDA allocator
alone."""

PERHAPS_MEMORY_MESSAGES = (
    "unable to find an engine to execute this computation",  # PyTorch: no engine of cuDNN got its workspace, as a rule
    "cudnn_status_not_initialized",  # a library's own memory did not fit
    "cublas_status_not_initialized",
    "could not create a primitive",  # oneDNN on a CPU, which allocates the code and constants of a convolution there
)
"""As `MEMORY_MESSAGES`, of errors that have other causes too."""

_FREE_SHARE = 0.1
"""Share of a GPU's memory that must be free for `PERHAPS_MEMORY_MESSAGES` at a single clip to be no shortage."""


def is_out_of_memory(error: BaseException, *, num_clips: int = 1) -> bool:
    """Whether a computation failed because memory ran out, so that a smaller one may succeed.

    Args:
        num_clips: clips of the batch. An error with several causes counts for more than one clip, so that fewer are
            tried; for one clip it counts if little memory is free.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if not isinstance(error, RuntimeError):
        return False
    message = str(error).lower()
    if any(part in message for part in MEMORY_MESSAGES):
        return True
    return any(part in message for part in PERHAPS_MEMORY_MESSAGES) and (num_clips > 1 or _free_share() < _FREE_SHARE)


def _free_share() -> float:
    """Share of the GPU's memory that is free; 1 without a GPU that answers."""
    try:
        free, total = torch.cuda.mem_get_info()
    except (RuntimeError, AssertionError):
        return 1.0
    return free / total


def free_caches() -> None:
    """Release unused memory: blocks cached for a failed batch may not fit the next, smaller one."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


FAULT_MESSAGE = re.compile(
    r"\b(?:CUDA|HIP) (?:driver )?error|device-side assert|Triton Error|cuda ?runtime ?error|"
    r"(?:CUDNN|CUBLAS|CUSOLVER|CUSPARSE|CUFFT|NVRTC)_STATUS_(?:EXECUTION_FAILED|INTERNAL_ERROR|MAPPING_ERROR|"
    r"NOT_INITIALIZED|ARCH_MISMATCH)|"
    r"CUDA unknown error|no CUDA GPUs are available|no CUDA-capable device|NVML.*(?:error|lost)|"
    r"unspecified launch failure|illegal (?:memory access|instruction|address)|uncorrectable ECC|fallen off the bus",
    re.IGNORECASE,
)
"""Messages of faults of a GPU, its driver or a library on it; they are RuntimeErrors of a process that lives on."""


def is_gpu_fault(error: BaseException) -> bool:
    """Whether an exception is a fault of the GPU, after which its context in this process can no longer be used.

    A shortage of memory is none.
    """
    if isinstance(error, GpuFaultError):
        return True
    if is_out_of_memory(error):
        return False
    known = getattr(torch, "AcceleratorError", None)
    if known is not None and isinstance(error, known):
        return True
    return isinstance(error, RuntimeError) and FAULT_MESSAGE.search(str(error)) is not None


def end_process(code: int = 1) -> None:
    """End this process at once: exit handlers of CUDA may wait for ever for a GPU that failed."""
    os._exit(code)


def _dotted(version: int) -> str:
    """Version of cuDNN in words: 91501 is 9.15.1, and 8902 is 8.9.2."""
    major = 10000 if version >= 10000 else 1000
    return f"{version // major}.{version % major // 100}.{version % 100}"


def _major(version: str) -> int:
    found = re.match(r"\d+", version)
    return int(found[0]) if found else 0
