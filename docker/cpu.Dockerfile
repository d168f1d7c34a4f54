# The toolkit without a GPU: the demo, small models, sampling and judging on servers that run elsewhere.
#
#   docker build --file docker/cpu.Dockerfile --tag align-cpu .
#   docker run --rm --user "$(id -u):$(id -g)" --volume "$PWD:/work" align-cpu demo --folder demo-run
#
# A folder of the host can be written by its owner, so that is who runs in it; a user without a name has this home.
FROM python:3.11-slim-bookworm

# DeepSpeed compiles a part of itself at its first use.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 align \
    && mkdir /home/align/.cache \
    && chmod 1777 /home/align /home/align/.cache
ENV HOME=/home/align USER=align

WORKDIR /opt/align
COPY locks locks
# torch first, as a build for the CPU; what it requires has its version from the lock in the next step.
RUN pip install --no-cache-dir --requirement locks/install.txt \
    && pip install --no-cache-dir --no-deps --index-url https://download.pytorch.org/whl/cpu \
        "$(grep --extended-regexp '^torch==' locks/dev.txt)"
COPY pyproject.toml README.md LICENSE ./
COPY align align
COPY reward reward
RUN pip install --no-cache-dir --no-build-isolation --constraint locks/dev.txt \
    '.[demo,report,servers,deepspeed,video,sentencepiece,wandb,mlflow]'

USER 10001
WORKDIR /work
ENTRYPOINT ["align"]
CMD ["--help"]
