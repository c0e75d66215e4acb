# The command `ahn` in a small image:
#   docker build -t ahn .                             # CPU
#   docker build -t ahn --build-arg DEVICE=cuda .     # NVIDIA GPUs; run it with --gpus all
#   docker run -it -v ahn:/home/ahn ahn chat --model smollm2
# --build-arg VERSION=0.2.0 names the version, which is not in the files (it is git's newest tag).
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
ARG VERSION=
WORKDIR /ahn
COPY pyproject.toml hatch_build.py README.md LICENSE NOTICE ./
COPY configs configs
COPY src src
RUN SETUPTOOLS_SCM_PRETEND_VERSION="$VERSION" pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:${PYTHON}-slim
ARG DEVICE=cpu
COPY constraints.txt /tmp/constraints.txt
# Triton compiles its kernels' launchers with a C compiler; torch's CPU build is a tenth of the other's size.
# hadolint ignore=DL3008
RUN if [ "$DEVICE" = cuda ]; then \
        apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*; \
    else \
        pip install --no-cache-dir --constraint /tmp/constraints.txt --index-url https://download.pytorch.org/whl/cpu torch; \
    fi
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir --constraint /tmp/constraints.txt "$(ls /wheels/ahn-*.whl)[smollm2,serve,train]"
RUN useradd --create-home --uid 1000 ahn
# By its number, so that a cluster sees that it is not root.
USER 1000
WORKDIR /home/ahn
ENTRYPOINT ["ahn"]
CMD ["--help"]
