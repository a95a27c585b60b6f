# One image for every node of a cluster: driver, decoders and encoders run the same code.
#
#   docker build -t vidshard --build-arg COMMIT=$(git rev-parse --short=12 HEAD) .
#   docker build -t vidshard --build-arg VARIANT=cpu .   without CUDA
#
# torch from PyPI brings the CUDA 13 that it was built with, so the base needs none: only the driver is the host's.
# The digest is that of the tag on Docker Hub; `docker buildx imagetools inspect python:3.12-slim-bookworm` prints a newer.
ARG BASE=python:3.12-slim-bookworm@sha256:782412e85d0f0984994c290652577d4018aff08145c85b262bb63dc0c7522254
# cuda or cpu
ARG VARIANT=cuda
FROM ${BASE} AS base

# tini passes signals on and reaps processes; KubeRay's health probes call wget and bash; Triton compiles with gcc.
# The base's digest names Debian's state; its packages get security fixes in between, so their versions are not pinned.
# hadolint ignore=DL3008
RUN apt-get update && \
    apt-get install -y --no-install-recommends ca-certificates gcc libc6-dev tini wget && \
    rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    MALLOC_ARENA_MAX=4

WORKDIR /opt/vidshard
COPY constraints.txt pyproject.toml README.md LICENSE NOTICE ./

# torch has a layer of its own: it is the largest, and differs between CPU and CUDA.
FROM base AS cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir --index-url "${TORCH_INDEX}" --constraint constraints.txt torch

FROM base AS cuda
ARG TORCH_INDEX=https://pypi.org/simple
RUN pip install --no-cache-dir --index-url "${TORCH_INDEX}" --constraint constraints.txt torch
# NVIDIA's container toolkit mounts the driver, and refuses one that is too old for CUDA 13.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    NVIDIA_REQUIRE_CUDA="cuda>=13.0"

# hadolint ignore=DL3006
FROM ${VARIANT}
WORKDIR /opt/vidshard
# vidshard/ holds links to the four folders after it.
COPY vidshard vidshard
COPY schemas schemas
COPY pipeline pipeline
COPY models models
COPY jobs jobs
RUN pip install --no-cache-dir --constraint constraints.txt '.[cluster,train]'

# Recorded in every shard.
ARG COMMIT=
ENV VIDSHARD_COMMIT=${COMMIT}
LABEL org.opencontainers.image.title="vidshard" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${COMMIT}"

RUN useradd --create-home --uid 1000 --user-group vidshard
# 0:0 for SkyPilot, which sets itself up in the container and needs root for it (deploy/sky.yaml)
ARG RUN_AS=1000:1000
USER ${RUN_AS}
WORKDIR /home/vidshard
ENTRYPOINT ["tini", "-g", "--", "vidshard"]
CMD ["--help"]
