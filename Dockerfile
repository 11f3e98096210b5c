# dctc on a CUDA machine. The torch wheels bring their own CUDA 13 libraries; the host needs a driver that runs them.
#   docker build -t dctc . && docker run --rm --gpus all dctc doctor        more: launch/README.md
FROM nvidia/cuda:13.0.2-runtime-ubuntu24.04

# The patch versions of distribution packages leave the archive as newer ones come, so pinning them breaks the build.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv tini \
    && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/venv/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1 \
    GIT_PYTHON_REFRESH=quiet \
    HOME=/tmp \
    USER=dctc

# Dependencies first: this layer changes only with the two files that name them.
WORKDIR /opt/dctc
COPY constraints.txt pyproject.toml ./
RUN python3 -m venv /opt/venv \
    && python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
        > /tmp/requirements.txt \
    && pip install -c constraints.txt -r /tmp/requirements.txt \
    && rm /tmp/requirements.txt

# Then the code, which changes often. setuptools is there by now: torch needs it.
COPY README.md LICENSE ./
COPY shards/ shards/
COPY dctc/ dctc/
RUN pip install --no-deps --no-build-isolation --editable .
COPY configs/ configs/
COPY launch/ launch/

# A user that is not root; with `--user` any other will do: the image itself is never written to, and HOME is /tmp.
RUN useradd --uid 10001 dctc \
    && install --directory --owner=dctc --group=dctc /work
USER 10001:10001
WORKDIR /work

ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="dctc" \
      org.opencontainers.image.description="Semi-supervised semantic segmentation of remote-sensing images" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

# No HEALTHCHECK: the container is a job that ends, not a service. tini hands signals on, so that a stop makes a checkpoint.
ENTRYPOINT ["tini", "--", "dctc"]
CMD ["--help"]
