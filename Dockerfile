# One image for every node of a cluster: driver, decoders and encoders run the same code.
#
#   docker build -t vidshard .                                                          CUDA
#   docker build -t vidshard --build-arg BASE=python:3.12-slim-bookworm \
#                --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .          CPU
ARG BASE=nvidia/cuda:12.8.1-cudnn-runtime-ubuntu24.04
FROM ${BASE}

# The CUDA base brings no Python; the Python base has one.
RUN if ! command -v python3 >/dev/null; then \
        apt-get update && \
        apt-get install -y --no-install-recommends python3 python3-venv ca-certificates && \
        rm -rf /var/lib/apt/lists/*; \
    fi
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    MALLOC_ARENA_MAX=4

WORKDIR /opt/vidshard
COPY constraints.txt pyproject.toml README.md LICENSE NOTICE ./
# torch has a layer of its own: it is the largest, and the only one that differs between CPU and CUDA.
ARG TORCH_INDEX=https://pypi.org/simple
RUN pip install --no-cache-dir --index-url "${TORCH_INDEX}" --constraint constraints.txt torch
# vidshard/ holds links to the four folders after it.
COPY vidshard vidshard
COPY schemas schemas
COPY pipeline pipeline
COPY models models
COPY jobs jobs
RUN pip install --no-cache-dir --constraint constraints.txt .

# Recorded in every shard: docker build --build-arg COMMIT=$(git rev-parse --short=12 HEAD)
ARG COMMIT=
ENV VIDSHARD_COMMIT=${COMMIT}

RUN useradd --create-home vidshard
USER vidshard
WORKDIR /home/vidshard
ENTRYPOINT ["vidshard"]
CMD ["--help"]
