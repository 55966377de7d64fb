# Targets:  cpu (default)   docker build --target cpu -t boomerang-serve:cpu .
#           cpu-torch       docker build --target cpu-torch -t boomerang-serve:cpu-torch .    distill, evaluate, export
#           cuda            docker build --target cuda -t boomerang-serve:cuda .
#           autoscaler      docker build --target autoscaler -t boomerang-autoscaler .
# Every runtime image runs as user 2000, group 0, and works with a read-only root file system: what is written goes to
# the volumes /store (models) and /cache (hub downloads, compiled kernels) and to /tmp.
# Packages, kernels and code are layers of their own: a change of the code makes only the last one anew.
# For both kinds of processor: docker buildx build --platform linux/amd64,linux/arm64 ... The image for ARM carries torch as
# well: its kernels were run under emulation only.

ARG PYTHON_IMAGE=python:3.11.13-slim-bookworm

# --- builder: everything that needs a compiler, into a virtual environment that the runtime images copy
FROM ${PYTHON_IMAGE} AS builder
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/boomerang
ENV PATH=/opt/boomerang/bin:$PATH
WORKDIR /src

FROM builder AS packages
COPY constraints.txt pyproject.toml ./
RUN --mount=type=cache,target=/root/.cache/pip \
    python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > packages.txt \
    && pip install --no-compile -c constraints.txt -r packages.txt \
    && pip uninstall -y setuptools \
    && find /opt/boomerang -name __pycache__ -prune -exec rm -rf {} + \
    && find /opt/boomerang/lib -path '*/numpy/*' -name tests -prune -exec rm -rf {} +

# torch comes from its own index: the default one would bring gigabytes of CUDA libraries.
FROM packages AS packages-torch
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --no-compile --index-url https://download.pytorch.org/whl/cpu "$(grep '^torch==' constraints.txt)" \
    && python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['train'], sep='\n')" > train.txt \
    && grep -v '^boomerang' train.txt > packages.txt && pip install --no-compile -c constraints.txt -r packages.txt \
    && rm -rf /opt/boomerang/lib/python3*/site-packages/torch/include /opt/boomerang/lib/python3*/site-packages/torch/test

FROM packages AS packages-cpu
RUN --mount=type=cache,target=/root/.cache/pip \
    if [ "$(uname -m)" != x86_64 ]; then \
        pip install --no-compile --index-url https://download.pytorch.org/whl/cpu "$(grep '^torch==' constraints.txt)"; \
    fi

FROM packages AS packages-cuda
RUN --mount=type=cache,target=/root/.cache/pip pip install --no-compile "$(grep '^torch==' constraints.txt)"

FROM builder AS kernels
COPY server/kernels/cpu/*.h server/kernels/cpu/*.cpp server/kernels/cpu/build.py server/kernels/cpu/
RUN mkdir -p /root/.cache/boomerang && python server/kernels/cpu/build.py

FROM builder AS wheel
# What was compiled of the same sources is taken from there.
COPY --from=kernels /root/.cache/boomerang /root/.cache/boomerang
COPY pyproject.toml setup.py README.md LICENSE ./
COPY model_store model_store
COPY server server
COPY deploy deploy
RUN --mount=type=cache,target=/root/.cache/pip pip wheel --no-deps --wheel-dir /wheel .

FROM builder AS builder-autoscaler
COPY constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --no-compile -c constraints.txt httpx prometheus-client docker

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
# The licence of this project; deploy/licenses.py lists those of everything else.
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
COPY --from=packages-cuda /opt/boomerang /opt/boomerang
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    pip install --no-index --no-deps --no-compile --no-cache-dir /wheel/*.whl \
    && python -P -m boomerang_serve.server.precompile && python -P -m boomerang_serve.deploy.licenses /usr/share/doc/boomerang-serve
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
# A named volume takes over the owner of the folder it is mounted on.
RUN install -d -o 2000 -g 0 -m 0775 /decisions
WORKDIR /app
COPY deploy/__init__.py deploy/licenses.py /app/deploy/
RUN /opt/boomerang/bin/python -m deploy.licenses /usr/share/doc/boomerang-serve
COPY deploy/autoscaler /app/deploy/autoscaler
ENV PATH=/opt/boomerang/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 2000:0
EXPOSE 9105
HEALTHCHECK --interval=10s --timeout=3s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:9105/metrics', timeout=2)"]
ENTRYPOINT ["python", "-m", "deploy.autoscaler"]

# --- CPU with torch, for distill, evaluate and export
FROM runtime AS cpu-torch
COPY --from=packages-torch /opt/boomerang /opt/boomerang
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    pip install --no-index --no-deps --no-compile --no-cache-dir /wheel/*.whl \
    && python -P -m boomerang_serve.server.precompile && python -P -m boomerang_serve.deploy.licenses /usr/share/doc/boomerang-serve
USER 2000:0

# --- CPU, the default target: no compiler, no torch. Bytecode is kept for what a start imports and for nothing else: the
# image is read-only when it runs.
FROM runtime AS cpu
COPY --from=packages-cpu /opt/boomerang /opt/boomerang
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    pip install --no-index --no-deps --no-compile --no-cache-dir /wheel/*.whl \
    && python -P -m boomerang_serve.server.precompile && python -P -m boomerang_serve.deploy.licenses /usr/share/doc/boomerang-serve
USER 2000:0
