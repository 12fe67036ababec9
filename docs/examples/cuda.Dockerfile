# swin_moe for NVIDIA GPUs: docker build -f docs/examples/cuda.Dockerfile -t registry/swin-moe:cuda .
# CUDA must be the release that torch of requirements.txt was built with (torch.version.cuda): --build-arg CUDA=13.0.1. The kernels are
# compiled without a GPU; narrow SWIN_MOE_CUDA_ARCHITECTURES to your own to build faster. Not built or run by the authors so far.
ARG CUDA=13.0.1
FROM nvidia/cuda:${CUDA}-devel-ubuntu24.04
ARG SWIN_MOE_CUDA_ARCHITECTURES="80 90 100"
ARG PIP_INDEX_URL
ENV PIP_NO_CACHE_DIR=1
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-venv python3-dev g++ make openssh-client openssh-server \
    && rm -rf /var/lib/apt/lists/* && mkdir -p /run/sshd
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /opt/swin_moe
COPY requirements.txt ./
RUN pip install "$(grep '^torch==' requirements.txt)" && pip install -r requirements.txt
COPY setup.py pyproject.toml README.md LICENSE ./
COPY csrc csrc
COPY configs configs
COPY launcher launcher
COPY checkpoint_tools checkpoint_tools
COPY swin_moe swin_moe
RUN SWIN_MOE_REQUIRE_EXT=1 SWIN_MOE_CUDA_ARCHITECTURES="$SWIN_MOE_CUDA_ARCHITECTURES" pip install --no-deps --no-build-isolation . \
    && python -m swin_moe.data.torchvision_site
WORKDIR /data/run
CMD ["swin-moe", "doctor"]
