"""Titles of the fields of a Prefect form: the field's own words, with its unit."""

from typing import Any

# Whole titles, where a field's name alone would not do.
TITLES = {
    "adapter_root": "Workspace as the server sees it",
    "api_key": "API key (name of the secret)",
    "bf16": "bfloat16 autocast",
    "bnb_4bit_compute_dtype": "4-bit base: compute type",
    "bnb_4bit_quant_type": "4-bit base: format",
    "bnb_4bit_use_double_quant": "4-bit base: double quantisation",
    "budget_usd": "Budget of the stage (US$)",
    "completion_price": "Price of completion tokens (US$ per million)",
    "confidence": "Confidence of the interval",
    "endpoint": "Endpoint (base URL)",
    "eval_prompts": "Held-out prompts (JSONL)",
    "eval_steps": "Evaluate every (optimizer steps)",
    "generation": "Generation: sampling",
    "judging": "Judging: the judge and the pairs",
    "evaluation": "Evaluation: proof on held-out prompts",
    "training": "Training: DPO",
    "promotion": "Promotion: gate and serving",
    "keep_lines": "Lines to keep (regular expression)",
    "load_in_4bit": "Load the base in 4 bits (QLoRA)",
    "logging_steps": "Log every (optimizer steps)",
    "loss_type": "DPO loss",
    "lr_scheduler_type": "Learning-rate schedule",
    "max_attempts": "Attempts per verdict",
    "max_concurrency": "Requests in flight, at most",
    "max_failure_ratio": "Failures allowed (share of prompts)",
    "max_grad_norm": "Gradient clipping norm",
    "max_length": "Longest prompt + completion (tokens)",
    "max_outage_seconds": "Longest outage waited for (s)",
    "max_prompts": "Held-out prompts, at most",
    "max_steps": "Optimizer steps in all",
    "max_tokens": "Longest answer (tokens)",
    "measured_label_smoothing": "Label smoothing as measured",
    "min_confidence": "Confidence of a pair, at least (1-5)",
    "min_win_rate": "Bar for the win rate's lower bound",
    "name": "Name it is served under",
    "null_test": "Null test: SFT against itself",
    "num_completions": "Completions per prompt",
    "num_processes": "Training processes (GPUs)",
    "num_samples": "Samples per prompt and adapter",
    "num_train_epochs": "Epochs",
    "orders": "Orders each prompt is judged in",
    "panel": "Panel: further judges",
    "per_device_eval_batch_size": "Evaluation batch (pairs)",
    "per_device_train_batch_size": "Micro-batch (pairs)",
    "gradient_accumulation_steps": "Micro-batches in an optimizer step",
    "prompt_price": "Price of prompt tokens (US$ per million)",
    "prompts": "Prompts (JSONL)",
    "report_to": "Experiment tracker",
    "requests_per_minute": "Requests per minute, at most",
    "save_steps": "Checkpoint every (optimizer steps)",
    "serve_from": "Adapter folder as vLLM sees it",
    "shard_size": "Prompts in a shard",
    "sft_weight": "Weight of the SFT loss",
    "size": "Size (bytes)",
    "tokens_per_minute": "Tokens per minute, at most",
    "val_ratio": "Held-out share of the pairs",
    "val_rows": "Held-out pairs",
    "warmup_steps": "Warm-up (optimizer steps)",
}
WORDS = {"sft": "SFT", "dpo": "DPO", "uri": "URI", "sha256": "SHA-256", "seconds": "(s)"}


def field_title(name: str, _: Any) -> str:
    """Return the title of the field `name`, for pydantic's `field_title_generator`."""
    if name in TITLES:
        return TITLES[name]
    title = " ".join(WORDS.get(word, word) for word in name.split("_"))
    return title[:1].upper() + title[1:]
