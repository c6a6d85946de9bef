#!/bin/sh
# Serve a base model and its LoRA adapters with vLLM; arguments are handed on to it. From the environment:
#   MODEL          hub name or folder of the base model
#   SFT_ADAPTER    folder of the SFT adapter, served as "sft"; empty: none at the start
#   MAX_MODEL_LEN  longest prompt + completion, in tokens (4096)
#   MAX_LORAS      adapters on the GPU at once (4)      MAX_LORA_RANK  highest rank of an adapter (64)
#   VLLM_API_KEY   key that clients must send
#   CHAT_TEMPLATE  file with the chat template; empty: the SFT adapter's chat_template.jinja, else the base model's own
set -eu
# Training takes the adapter's template too: sampling must speak to the model in the same words.
[ ! -f "${SFT_ADAPTER:-}/chat_template.jinja" ] || : "${CHAT_TEMPLATE:=$SFT_ADAPTER/chat_template.jinja}"
: "${MODEL:?name the base model}"
[ -z "${SFT_ADAPTER:-}" ] || set -- --lora-modules "sft=$SFT_ADAPTER" "$@"
# exec: vLLM itself must get the SIGTERM, to finish what is in flight.
exec vllm serve "$MODEL" \
    --host 0.0.0.0 --port 8000 \
    --max-model-len "${MAX_MODEL_LEN:-4096}" \
    --enable-lora --max-loras "${MAX_LORAS:-4}" --max-lora-rank "${MAX_LORA_RANK:-64}" \
    --structured-outputs-config '{"backend":"xgrammar","disable_any_whitespace":true}' \
    --shutdown-timeout 20 \
    ${CHAT_TEMPLATE:+--chat-template "$CHAT_TEMPLATE"} \
    "$@"
