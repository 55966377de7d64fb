# Targets:  cpu (default)   docker build --target cpu -t boomerang-serve:cpu .
#           cpu-torch       docker build --target cpu-torch -t boomerang-serve:cpu-torch .    distill, evaluate, export
#           cuda            docker build --target cuda -t boomerang-serve:cuda .
#           autoscaler      docker build --target autoscaler -t boomerang-autoscaler .
# Every runtime image runs as user 2000, group 0, and works with a read-only root file system: what is written goes to
# the volumes /store (models) and /cache (hub downloads, compiled kernels) and to /tmp.

ARG PYTHON_IMAGE=python:3.11.13-slim-bookworm

# --- builder: everything that needs a compiler, into a virtual environment that the runtime images copy
FROM ${PYTHON_IMAGE} AS builder
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/boomerang
ENV PATH=/opt/boomerang/bin:$PATH
WORKDIR /src
COPY constraints.txt ./

FROM builder AS builder-cpu
# Bytecode is kept for what a start imports and for nothing else: the image is read-only when it runs.
COPY pyproject.toml setup.py README.md LICENSE ./
COPY model_store model_store
COPY server server
COPY deploy deploy
RUN --mount=type=cache,target=/root/.cache/pip pip install -c constraints.txt . \
    && find /opt/boomerang -name __pycache__ -prune -exec rm -rf {} + \
    && python -P -m server.precompile

FROM builder-cpu AS builder-cpu-torch
# torch first and from its own index: the default one would bring gigabytes of CUDA libraries.
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --index-url https://download.pytorch.org/whl/cpu "$(grep '^torch==' constraints.txt)" \
    && pip install --no-compile -c constraints.txt '.[train]' \
    && rm -rf /opt/boomerang/lib/python3*/site-packages/torch/include \
              /opt/boomerang/lib/python3*/site-packages/torch/test

FROM builder AS builder-cuda
RUN --mount=type=cache,target=/root/.cache/pip pip install "$(grep '^torch==' constraints.txt)"
COPY pyproject.toml setup.py README.md LICENSE ./
COPY model_store model_store
COPY server server
COPY deploy deploy
RUN --mount=type=cache,target=/root/.cache/pip pip install -c constraints.txt '.[torch]' \
    && find /opt/boomerang -name __pycache__ -prune -exec rm -rf {} + \
    && python -P -m server.precompile

FROM builder AS builder-autoscaler
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install -c constraints.txt httpx prometheus-client docker

# --- what all server images share
FROM ${PYTHON_IMAGE} AS runtime
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="boomerang-serve" \
      org.opencontainers.image.description="Inference server that makes model size a dial" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
RUN useradd --uid 2000 --gid 0 --home-dir /cache --no-create-home --shell /usr/sbin/nologin boomerang \
    && install -d -o 2000 -g 0 -m 0775 /store /cache
# The licence of this project; those of its dependencies lie in their .dist-info folders.
COPY LICENSE* NOTICE* /usr/share/doc/boomerang-serve/
ENV PATH=/opt/boomerang/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/cache \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface \
    TRITON_CACHE_DIR=/cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    BOOMERANG_STORE=/store \
    BOOMERANG_HOST=0.0.0.0 \
    BOOMERANG_PORT=8000
VOLUME ["/store", "/cache"]
EXPOSE 8000
STOPSIGNAL SIGTERM
# Ready means: weights loaded and the engine alive. 503 while starting and while draining.
HEALTHCHECK --interval=5s --timeout=3s --start-period=300s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + (os.environ.get('BOOMERANG_METRICS_PORT') or os.environ['BOOMERANG_PORT']) + '/health', timeout=2)"]
ENTRYPOINT ["boomerang"]
CMD ["serve"]

# --- CUDA: Triton compiles its kernels at run time and needs gcc and the C headers for that
FROM runtime AS cuda
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY --from=builder-cuda /opt/boomerang /opt/boomerang
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 2000:0

# --- autoscaler: no torch, no model, about 60 MB over Python's own image
FROM ${PYTHON_IMAGE} AS autoscaler
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="boomerang-autoscaler" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}"
COPY --from=builder-autoscaler /opt/boomerang /opt/boomerang
COPY LICENSE* NOTICE* /usr/share/doc/boomerang-serve/
COPY deploy/__init__.py /app/deploy/__init__.py
COPY deploy/autoscaler /app/deploy/autoscaler
# A named volume takes over the owner of the folder it is mounted on.
RUN install -d -o 2000 -g 0 -m 0775 /decisions
WORKDIR /app
ENV PATH=/opt/boomerang/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 2000:0
EXPOSE 9105
HEALTHCHECK --interval=10s --timeout=3s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:9105/metrics', timeout=2)"]
ENTRYPOINT ["python", "-m", "deploy.autoscaler"]

# --- CPU with torch, for distill, evaluate and export
FROM runtime AS cpu-torch
# OpenMP for torch.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/*
COPY --from=builder-cpu-torch /opt/boomerang /opt/boomerang
USER 2000:0

# --- CPU, the default target: no compiler, no torch
FROM runtime AS cpu
COPY --from=builder-cpu /opt/boomerang /opt/boomerang
USER 2000:0
