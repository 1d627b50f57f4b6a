"""Recording rules under the names of vLLM's metrics, so that dashboards made for it show an appliance too.

Names: https://docs.vllm.ai/en/stable/usage/metrics/. Where vLLM renamed a metric, both names are there.
"""

HISTOGRAMS = {
    "time_to_first_token_seconds": "time_to_first_token_seconds",
    "inter_token_latency_seconds": "inter_token_seconds",
    "time_per_output_token_seconds": "inter_token_seconds",  # until 0.11
    "e2e_request_latency_seconds": "request_duration_seconds",
    "request_queue_time_seconds": "queue_seconds",
    "request_prefill_time_seconds": "prefill_seconds",
    "request_decode_time_seconds": "decode_seconds",
    "request_prompt_tokens": "request_prompt_tokens",
    "request_generation_tokens": "request_generated_tokens",
    "request_params_max_tokens": "request_max_tokens",
    "request_params_n": "request_answers",
}
COUNTERS = {
    "prompt_tokens_total": "sum by (job, instance, model) (appliance_prompt_tokens_total)",
    "generation_tokens_total": "sum by (job, instance, model) (appliance_generated_tokens_total)",
    "prefix_cache_queries_total": "sum by (job, instance, model) (appliance_prompt_tokens_total)",
    "prefix_cache_hits_total": 'sum by (job, instance, model) (appliance_prompt_tokens_total{source=~"cached|stitched"})',
}
# What all models of an appliance share is said for each that is loaded.
GAUGES = {
    "num_requests_running": "requests_running",
    "num_requests_waiting": "requests_waiting",
    "kv_cache_usage_perc": "kv_use_ratio",
    "gpu_cache_usage_perc": "kv_use_ratio",  # until 0.10
}
FINISHED = (
    'label_replace(sum by (job, instance, model, outcome) (appliance_requests_total{outcome=~"stop|length"}), '
    '"finished_reason", "$1", "outcome", "(.*)")'
)


def rules() -> dict[str, str]:
    """Expressions by the names under which they are recorded."""
    found = {}
    for theirs, ours in HISTOGRAMS.items():
        for part in ("bucket", "sum", "count"):
            labels = "job, instance, model, le" if part == "bucket" else "job, instance, model"
            found[f"vllm:{theirs}_{part}"] = _named(f"sum by ({labels}) (appliance_{ours}_{part})")
    found |= {f"vllm:{theirs}": _named(expression) for theirs, expression in COUNTERS.items()}
    for theirs, ours in GAUGES.items():
        loaded = "(appliance_model_loaded == 1)"
        found[f"vllm:{theirs}"] = _named(f"{loaded} * on (job, instance) group_left () appliance_{ours}")
    found["vllm:request_success_total"] = _named(FINISHED)
    return found


def _named(expression: str) -> str:
    return f'label_replace({expression}, "model_name", "$1", "model", "(.*)")'
