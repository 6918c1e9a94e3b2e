# dcdit in a container, built from this checkout: docs/install.md#in-a-container
#   docker build -t dcdit .
#   docker build -t dcdit:cuda --build-arg BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04 .    with nvcc
ARG BASE=ubuntu:24.04
FROM ${BASE}

# Optional packages, see docs/install.md
ARG EXTRAS=demo,slurm,tensorboard,wandb
# Another package index for torch and torchvision, such as the one for CPU wheels that pytorch.org names
ARG TORCH_INDEX=

# Runtimes of containers let GPUs in where these variables say so.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PATH=/opt/dcdit/bin:$PATH

# Compilers and headers are for torch.compile.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/dcdit

# The large packages are a layer of their own, which changes of the code leave as it is.
COPY constraints.txt /opt/dcdit/
RUN pip install --no-cache-dir -c /opt/dcdit/constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch torchvision

RUN --mount=type=bind,source=.,target=/source,rw \
    pip install --no-cache-dir -c /opt/dcdit/constraints.txt "/source[$EXTRAS]"

# Not root: the user "ubuntu" of the base images, by number.
USER 1000
WORKDIR /work
ENTRYPOINT ["dcdit"]
CMD ["--help"]
