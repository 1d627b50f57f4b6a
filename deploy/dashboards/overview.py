"""Overview: is it well, and how long do people wait."""

from deploy.dashboards.promql import AT, quantiles, rate, share
from deploy.panels import Dashboard, Panel, Query, Row

OVERVIEW = Dashboard(
    uid="appliance-overview",
    title="Appliance: overview",
    about="Is it well, how long do people wait, how much is asked of it.",
    rows=(
        Row(
            title="Now",
            panels=(
                Panel(
                    title="Accepts requests",
                    about="1: everything is ready. 0: it loads, restarts or shuts down.",
                    kind="number",
                    queries=(Query(expr=f"min(appliance_engine_ready{{{AT}}})"),),
                    bad=1,
                    is_low_bad=True,
                ),
                Panel(
                    title="Being answered",
                    about="Requests that have a slot.",
                    kind="number",
                    queries=(Query(expr=f"sum(appliance_requests_running{{{AT}}})"),),
                ),
                Panel(
                    title="Waiting",
                    about="Requests in the queue.",
                    kind="number",
                    queries=(Query(expr=f"sum(appliance_requests_waiting{{{AT}}})"),),
                    bad=8,
                ),
                Panel(
                    title="Failed",
                    about="Share of the last five minutes' requests. More than a few in a hundred: look at the log.",
                    kind="number",
                    unit="percentunit",
                    queries=(
                        Query(
                            expr=share(
                                f"sum(model:appliance_failed_requests:rate5m{{{AT}}})",
                                f"sum(model:appliance_requests:rate5m{{{AT}}})",
                            )
                        ),
                    ),
                    bad=0.05,
                ),
                Panel(
                    title="First word, 95 of 100",
                    about="95 of 100 answers began within this time.",
                    kind="number",
                    unit="s",
                    queries=(Query(expr=f"max(model:appliance_time_to_first_token_seconds:p95_5m{{{AT}}})"),),
                    bad=10,
                ),
                Panel(
                    title="Tokens a second",
                    about="Of all answers together. A person reads some five a second.",
                    kind="number",
                    queries=(Query(expr=f"sum(model:appliance_generated_tokens:rate5m{{{AT}}})"),),
                ),
            ),
        ),
        Row(
            title="How long people wait",
            panels=(
                Panel(
                    title="Until the first word",
                    about="From a request's arrival to its first token: queue and reading the prompt.",
                    unit="s",
                    queries=quantiles("appliance_time_to_first_token_seconds", 0.5, 0.95),
                ),
                Panel(
                    title="Between words",
                    about="Between two tokens of an answer. Below 0.2 s it is faster than most people read.",
                    unit="s",
                    queries=quantiles("appliance_inter_token_seconds", 0.5, 0.95),
                ),
                Panel(
                    title="Until the last word",
                    about="From a request's arrival to the end of its answer.",
                    unit="s",
                    queries=quantiles("appliance_request_duration_seconds", 0.5, 0.95),
                ),
                Panel(
                    title="In the queue",
                    about="Until a slot is free.",
                    unit="s",
                    queries=quantiles("appliance_queue_seconds", 0.5, 0.95),
                ),
                Panel(
                    title="Slots and queue",
                    about="All slots busy for long, and others waiting: it is asked more than it can answer.",
                    queries=(
                        Query(expr=f"sum(appliance_requests_running{{{AT}}})", legend="running"),
                        Query(expr=f"sum(appliance_requests_waiting{{{AT}}})", legend="waiting"),
                        Query(expr=f"sum(appliance_slots{{{AT}}})", legend="slots"),
                    ),
                ),
                Panel(
                    title="Answers cut off by their time",
                    about="Requests a minute whose deadline came, by where they were.",
                    queries=(Query(expr=f"60 * {rate('appliance_deadline_misses_total', 'phase')}", legend="{{phase}}"),),
                ),
            ),
        ),
        Row(
            title="What is asked",
            panels=(
                Panel(
                    title="Requests",
                    about="By outcome: stop and length are whole answers.",
                    unit="reqps",
                    queries=(
                        Query(expr=rate("appliance_requests_total", "model", "outcome"), legend="{{model}} {{outcome}}"),
                    ),
                ),
                Panel(
                    title="Refused at the door",
                    about="By reason. queue_full: asked too much of it; unauthorized: a wrong key, or somebody guessing.",
                    unit="reqps",
                    queries=(
                        Query(
                            expr=f"{rate('appliance_rejections_total', 'reason')} > 0",
                            legend="{{reason}}",
                            may_be_empty="nobody was refused",
                        ),
                    ),
                ),
                Panel(
                    title="Tokens",
                    about="Generated, and read from prompts: computed or found in the cache.",
                    unit="cps",
                    queries=(
                        Query(expr=rate("appliance_generated_tokens_total", "model"), legend="{{model}} generated"),
                        Query(expr=rate("appliance_prompt_tokens_total", "model", "source"), legend="{{model}} {{source}}"),
                    ),
                ),
                Panel(
                    title="Prompt and answer length",
                    about="Half of the requests are shorter, in tokens.",
                    queries=(
                        *quantiles("appliance_request_prompt_tokens", 0.5, what="prompt "),
                        *quantiles("appliance_request_generated_tokens", 0.5, what="answer "),
                    ),
                ),
                Panel(
                    title="Failures",
                    about="Requests a minute that failed after they were accepted, by error code.",
                    queries=(
                        Query(
                            expr=f"60 * {rate('appliance_failures_total', 'code')}",
                            legend="{{code}}",
                            may_be_empty="nothing has failed yet",
                        ),
                    ),
                ),
                Panel(
                    title="Engine restarts",
                    about="In an hour, by reason. oom: the model does not fit; hang: a step took longer than allowed.",
                    queries=(
                        Query(
                            expr=f"sum by (model, reason) (increase(appliance_engine_restarts_total{{{AT}}}[1h]))",
                            legend="{{model}} {{reason}}",
                        ),
                    ),
                ),
            ),
        ),
    ),
)
