# vLLM with LoRA adapters that come and go. In the root of the repository:
#   docker build --file infra/docker/serve.Dockerfile --tag preflow-serve .
FROM vllm/vllm-openai:v0.32.0

RUN groupadd --gid 10001 preflow \
    && useradd --uid 10001 --gid 10001 --create-home preflow

ENV DO_NOT_TRACK=1 \
    HOME=/home/preflow \
    PYTHONPATH=/opt/preflow/vllm_plugin \
    VLLM_ALLOW_RUNTIME_LORA_UPDATING=True \
    VLLM_NO_USAGE_STATS=1
COPY infra/docker/vllm_plugin /opt/preflow/vllm_plugin
COPY infra/docker/serve.sh infra/docker/served_adapters.py tasks/llm/choose_template.py /opt/preflow/

USER 10001:10001
ENTRYPOINT ["/opt/preflow/serve.sh"]
