# syntax=docker/dockerfile:1
# tiglon for NVIDIA GPUs; docs/launch.md says how to build and run it.

# torch's wheels bring CUDA, cuDNN and NCCL, and Triton its assembler: of NVIDIA's images the smallest is enough, which has the container
# runtime mount the host's driver. Its CUDA is that of torch's wheels on PyPI.
ARG BASE=nvidia/cuda:13.0.2-base-ubuntu24.04

FROM ${BASE} AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /build
WORKDIR /source
COPY . .
RUN /build/bin/pip wheel --no-deps --wheel-dir /wheels .

FROM ${BASE}
# torch.compile and Triton compile at run time: they need g++ and Python's headers.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/tiglon
ENV PATH=/opt/tiglon/bin:$PATH
# The cache spares the next build a download of some gigabytes; EXTRAS is for example [huggingface,wandb].
ARG EXTRAS=""
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels --mount=type=cache,target=/root/.cache/pip \
    DS_BUILD_OPS=0 pip install "$(echo /wheels/*.whl)${EXTRAS}"

# Caches of compiled kernels go home, which anyone may write: `docker run --user` gives the run the owner of the files on the host,
# whom this image does not know.
RUN useradd --system --create-home tiglon && chmod 1777 /home/tiglon
USER tiglon
ENV HOME=/home/tiglon USER=tiglon
WORKDIR /work
ENTRYPOINT ["tiglon"]
CMD ["--help"]
