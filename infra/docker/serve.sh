#!/bin/sh
# Serve a base model and its LoRA adapters with vLLM; arguments are handed on to it. From the environment:
#   MODEL          hub name or folder of the base model
#   SFT_ADAPTER    folder of the SFT adapter, served as "sft"; empty: none at the start
#   ADAPTERS       <workspace>/adapters: what each CURRENT.json there names is served from the start; empty: none
#   MAX_MODEL_LEN  longest prompt + completion, in tokens (4096)
#   MAX_LORAS      adapters on the GPU at once (4)      MAX_LORA_RANK  highest rank of an adapter (64)
#   VLLM_API_KEY   key that clients must send
#   CHAT_TEMPLATE  file with the chat template; empty: the SFT adapter's own, else the base model's
set -eu
# Training takes the adapter's template too: sampling must speak to the model in the same words.
here=$(dirname "$0")
choose="$here/choose_template.py"
[ -f "$choose" ] || choose="$here/../../tasks/llm/choose_template.py"
# An assignment, not `: "${...:=...}"`: where this fails, vLLM must not start in other words than the training's.
CHAT_TEMPLATE=${CHAT_TEMPLATE:-$(python3 "$choose" "${SFT_ADAPTER:-}")}
: "${MODEL:?name the base model}"
loras=$(python3 "$here/served_adapters.py" "${ADAPTERS:-}" "${SFT_ADAPTER:-}")
# A name or path with a space in it would not come through; names have none, and paths are ours.
# shellcheck disable=SC2086
[ -z "$loras" ] || set -- --lora-modules $loras "$@"
# exec: vLLM itself must get the SIGTERM, to finish what is in flight.
exec vllm serve "$MODEL" \
    --host 0.0.0.0 --port 8000 \
    --max-model-len "${MAX_MODEL_LEN:-4096}" \
    --enable-lora --max-loras "${MAX_LORAS:-4}" --max-lora-rank "${MAX_LORA_RANK:-64}" \
    --structured-outputs-config '{"backend":"xgrammar","disable_any_whitespace":true}' \
    --shutdown-timeout 20 \
    ${CHAT_TEMPLATE:+--chat-template "$CHAT_TEMPLATE"} \
    "$@"
