# The toolkit on NVIDIA GPUs. The host brings the driver and the NVIDIA container toolkit.
#
#   docker build --file docker/cuda.Dockerfile --tag align-cuda .
#   docker run --rm --gpus all --ipc host --user "$(id -u):$(id -g)" --volume "$PWD:/work" align-cuda run --rounds 3
#
# A folder of the host can be written by its owner, so that is who runs in it; a user without a name has this home. Models of
# the Hub are kept with --volume "$HOME/.cache/huggingface:/home/align/.cache/huggingface".
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

# The compilers are for Triton and for what DeepSpeed builds at its first use.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 align \
    && mkdir /home/align/.cache \
    && chmod 1777 /home/align /home/align/.cache
ENV HOME=/home/align USER=align
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

WORKDIR /opt/align
COPY locks locks
# torch first and with all that its build requires: CUDA's libraries.
RUN pip install --no-cache-dir --requirement locks/install.txt \
    && pip install --no-cache-dir --constraint locks/dev.txt --constraint locks/cuda.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY align align
COPY reward reward
RUN pip install --no-cache-dir --no-build-isolation --constraint locks/dev.txt \
    '.[demo,report,servers,deepspeed,video,sentencepiece,wandb,mlflow]'

USER 10001
WORKDIR /work
ENTRYPOINT ["align"]
CMD ["--help"]
