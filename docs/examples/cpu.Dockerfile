# swin_moe for CPUs: docker build -f docs/examples/cpu.Dockerfile -t registry/swin-moe:cpu .
# The default torch brings CUDA along; --build-arg PIP_INDEX_URL=ADDRESS of an index whose torch is for CPUs does not. Built by
# the authors without a docker daemon (buildah), on a Debian with Python 3.11 in the place of the base image.
FROM python:3.12-slim
ARG PIP_INDEX_URL
ENV PIP_NO_CACHE_DIR=1
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ make openssh-client openssh-server \
    && rm -rf /var/lib/apt/lists/* && mkdir -p /run/sshd
RUN python -m venv /opt/venv
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
RUN SWIN_MOE_REQUIRE_EXT=1 pip install --no-deps --no-build-isolation . && python -m swin_moe.data.torchvision_site
WORKDIR /data/run
CMD ["swin-moe", "doctor"]
