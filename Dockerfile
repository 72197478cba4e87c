# The image for a cluster: NVIDIA's PyTorch image, megatron-core, and this project.
#
#     docker build -t megatron_chatflow .
#     docker run --rm --gpus all --ipc=host --ulimit memlock=-1 -v "$PWD:/workspace" --user "$(id -u):$(id -g)" megatron_chatflow train --config run.yaml
#
# 25.11 is the image that megatron-core 0.16.1 is tested on. Another one works if its Transformer
# Engine is at least 2.9 and before 2.12; the build checks that.
ARG BASE=nvcr.io/nvidia/pytorch:25.11-py3
FROM ${BASE}

# NVIDIA's image pins every package through PIP_CONSTRAINT. That is removed here, and
# tools/check_image.py pins the packages that must stay (torch, Transformer Engine, ...).
ENV PIP_CONSTRAINT="" \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    MPLCONFIGDIR=/tmp/matplotlib \
    TRITON_CACHE_DIR=/tmp/triton

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /opt/megatron_chatflow

# The small dependencies as tested; megatron-core without its dependencies (it would install another
# torch); nothing that NVIDIA built is changed.
COPY requirements.txt ./
COPY tools/check_image.py tools/
RUN python tools/check_image.py hold > /tmp/held.txt \
    && grep -vE '^(torch|numpy|megatron-core)==' requirements.txt > /tmp/small.txt \
    && pip install --constraint /tmp/held.txt --requirement /tmp/small.txt \
    && pip install --no-deps "$(grep '^megatron-core==' requirements.txt)"

COPY . .
RUN pip install --no-deps . \
    && python tools/check_image.py check /tmp/held.txt \
    && rm /tmp/held.txt /tmp/small.txt \
    && useradd --create-home --uid 10001 chatflow \
    && mkdir -p /workspace \
    && chown -R chatflow /workspace examples

USER 10001
WORKDIR /workspace
ENTRYPOINT ["chatflow"]
CMD ["--help"]
