# DPO training on a GPU, started as a Prefect flow run. In the root of the repository:
#   docker build --file infra/docker/train.Dockerfile --tag preflow-train .
# The CUDA runtime comes with torch's own wheels, so the base image needs none; the driver comes from the node.
FROM python:3.11.14-slim-bookworm

# gcc: Triton compiles the launchers of its kernels when they are first used.
# No version pins: Debian's mirrors keep only the newest of a release, so that a pin breaks the build later.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev tini \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 preflow \
    && useradd --uid 10001 --gid 10001 --create-home preflow

# GKE mounts the driver under /usr/local/nvidia; elsewhere NVIDIA's container runtime puts it in place.
ENV HOME=/home/preflow \
    LD_LIBRARY_PATH=/usr/local/nvidia/lib64 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    NVIDIA_VISIBLE_DEVICES=all \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1
WORKDIR /opt/preflow

COPY pyproject.toml constraints.txt infra/docker/requirements.py ./
RUN python requirements.py train > /tmp/requirements.txt \
    && pip install --constraint constraints.txt --requirement /tmp/requirements.txt \
    && rm /tmp/requirements.txt

COPY flows flows
COPY preflow preflow
COPY tasks tasks
RUN touch README.md LICENSE \
    && pip install --no-deps --no-build-isolation --editable . \
    && python -m compileall -q flows preflow tasks

USER 10001:10001
# Without -g: a SIGTERM must reach Prefect's supervisor alone, which tells the flow's process what it means before it
# passes the signal on.
ENTRYPOINT ["tini", "--"]
CMD ["prefect", "flow-run", "execute"]
