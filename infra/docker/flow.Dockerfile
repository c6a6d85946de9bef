# The Prefect workers, and the flows that need no GPU. In the root of the repository:
#   docker build --file infra/docker/flow.Dockerfile --tag preflow-flow .
FROM python:3.11.14-slim-bookworm

# No version pins: Debian's mirrors keep only the newest of a release, so that a pin breaks the build later.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 preflow \
    && useradd --uid 10001 --gid 10001 --create-home preflow

ENV HOME=/home/preflow \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1
WORKDIR /opt/preflow

COPY pyproject.toml constraints.txt infra/docker/requirements.py ./
RUN python requirements.py > /tmp/requirements.txt \
    && pip install --constraint constraints.txt --requirement /tmp/requirements.txt \
    && rm /tmp/requirements.txt

COPY flows flows
COPY preflow preflow
COPY tasks tasks
COPY deployments deployments
RUN touch README.md LICENSE \
    && pip install --no-deps --no-build-isolation --editable . \
    && python -m compileall -q flows preflow tasks

USER 10001:10001
# Without -g: a SIGTERM must reach Prefect's supervisor alone, which tells the flow's process what it means before it
# passes the signal on.
ENTRYPOINT ["tini", "--"]
CMD ["prefect", "worker", "start", "--pool", "local", "--no-create-pool-if-not-found"]
