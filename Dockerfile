# Two images from one file (docs/docker.md):
#   docker build --tag llada-mega .                     for GPUs, on NVIDIA's PyTorch image
#   docker build --tag llada-mega:cpu --target cpu .    to try it on any machine
# tests/test_docker.py holds the versions below equal to constraints.txt.

# Python 3.12 with PyTorch, CUDA 13, cuDNN, NCCL and compilers.
ARG BASE=nvcr.io/nvidia/pytorch:26.05-py3
# Any Python >= 3.11 with venv.
ARG CPU_BASE=python:3.12-slim-bookworm


# This package as a wheel, the same for both images.
FROM ${CPU_BASE} AS wheel
WORKDIR /src
COPY . .
RUN python3 -m venv /opt/build \
    && /opt/build/bin/pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .


FROM ${CPU_BASE} AS cpu-build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /build
COPY constraints.txt .
RUN python3 -m venv /opt/llada
ENV PATH=/opt/llada/bin:${PATH}
# PyTorch by itself: this layer is large and changes seldom.
RUN pip install --no-cache-dir --constraint constraints.txt --extra-index-url "${TORCH_INDEX}" torch
COPY --from=wheel /wheels /wheels
RUN pip install --no-cache-dir --constraint constraints.txt /wheels/*.whl tensorboard wandb


FROM ${CPU_BASE} AS cpu
RUN useradd --create-home --uid 10001 llada
COPY --from=cpu-build /opt/llada /opt/llada
ENV PATH=/opt/llada/bin:${PATH}
USER 10001
WORKDIR /home/llada
HEALTHCHECK --interval=5m --timeout=1m --start-period=1m CMD ["llada-mega", "doctor"]
ENTRYPOINT ["llada-mega"]
CMD ["--help"]


FROM ${BASE} AS gpu-build
ARG MEGATRON_CORE=0.19.2
ARG TRANSFORMER_ENGINE=2.20.2
ARG CUDNN_FRONTEND=1.32.0
ARG CUTLASS_DSL=4.8.1
# A tag of github.com/NVIDIA/apex, which publishes no package (PyPI's "apex" is something else).
ARG APEX=25.09
ARG CUDA_ARCHITECTURES="9.0 10.0"
ARG MAX_JOBS=8
# The image's own pip constraints would hold back what is pinned here.
ENV PIP_CONSTRAINT="" PATH=/opt/llada/bin:${PATH}
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
WORKDIR /build
COPY constraints.txt .
# The environment sees the image's packages and adds to them. PyTorch stays the one that the image was built around:
# whatever asks for another stops the build.
RUN python3 -m venv --system-site-packages /opt/llada \
    && { grep -vE '^(torch|triton)==' constraints.txt; python3 -c "import torch; print('torch==' + torch.__version__)"; } > pins.txt
RUN pip install --no-cache-dir --constraint pins.txt setuptools wheel ninja pybind11 \
    && NVTE_FRAMEWORK=pytorch MAX_JOBS="${MAX_JOBS}" \
       pip install --no-cache-dir --constraint pins.txt --no-build-isolation \
       "transformer-engine[core_cu13,pytorch]==${TRANSFORMER_ENGINE}" \
    && pip install --no-cache-dir --constraint pins.txt \
       "megatron-core==${MEGATRON_CORE}" "nvidia-cudnn-frontend==${CUDNN_FRONTEND}" \
       "nvidia-cutlass-dsl==${CUTLASS_DSL}" apache-tvm-ffi cuda-bindings tensorboard wandb
# A layer of its own, so that another apex does not build TransformerEngine again.
# hadolint ignore=DL3059
RUN APEX_CPP_EXT=1 APEX_CUDA_EXT=1 MAX_JOBS="${MAX_JOBS}" TORCH_CUDA_ARCH_LIST="${CUDA_ARCHITECTURES}" \
    pip install --no-cache-dir --no-deps --no-build-isolation "apex @ git+https://github.com/NVIDIA/apex@${APEX}"
COPY --from=wheel /wheels /wheels
RUN pip install --no-cache-dir --constraint pins.txt /wheels/*.whl


FROM ${BASE} AS gpu
RUN useradd --create-home --uid 10001 llada
COPY --from=gpu-build /opt/llada /opt/llada
ENV PATH=/opt/llada/bin:${PATH}
USER 10001
WORKDIR /home/llada
# Without the GPUs: each of them would get a CUDA context beside the one that trains.
HEALTHCHECK --interval=5m --timeout=2m --start-period=2m CMD ["env", "CUDA_VISIBLE_DEVICES=", "llada-mega", "doctor"]
ENTRYPOINT ["llada-mega"]
CMD ["--help"]
