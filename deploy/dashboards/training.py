"""Training: a run, while it runs."""

from deploy.dashboards.promql import AT, rate
from deploy.panels import Dashboard, Panel, Query, Row

NO_GPU = "no GPU"
NOW = "and on (phase, instance) appliance_training_active == 1"

TRAINING = Dashboard(
    uid="appliance-training",
    title="Appliance: training",
    about="A training run, while it runs: compose's service `training`, or `appliance train RECIPE --metrics-port 9465`.",
    rows=(
        Row(
            title="Now",
            panels=(
                Panel(
                    title="Training",
                    about="1 while a phase trains.",
                    kind="number",
                    queries=(Query(expr=f"max(appliance_training_active{{{AT}}})"),),
                ),
                Panel(
                    title="Done",
                    about="Share of the steps of the phase that trains.",
                    kind="number",
                    unit="percentunit",
                    queries=(Query(expr=f"max(appliance_training_step{{{AT}}} / appliance_training_steps{{{AT}}} {NOW})"),),
                ),
                Panel(
                    title="Time left",
                    about="If the steps to come take what the last ones took.",
                    kind="number",
                    unit="s",
                    queries=(Query(expr=f"max(appliance_training_left_seconds{{{AT}}})"),),
                ),
                Panel(
                    title="Since the last step",
                    about="Much longer than a step takes: it hangs, or the machine swaps.",
                    kind="number",
                    unit="s",
                    queries=(Query(expr=f"time() - max(appliance_training_last_step_timestamp_seconds{{{AT}}} {NOW})"),),
                ),
            ),
        ),
        Row(
            title="The run",
            panels=(
                Panel(
                    title="Loss",
                    about="Of single steps, so it is noisy; what counts is where it goes.",
                    queries=(Query(expr=f"appliance_training_loss{{{AT}}}", legend="{{phase}}"),),
                ),
                Panel(
                    title="Learning rate",
                    about="It rises for a few steps and then falls to the end.",
                    queries=(Query(expr=f"appliance_training_learning_rate{{{AT}}}", legend="{{phase}}"),),
                ),
                Panel(
                    title="Tokens",
                    about="Trained on, a second.",
                    unit="cps",
                    queries=(Query(expr=rate("appliance_training_tokens_total", "phase"), legend="{{phase}}"),),
                ),
                Panel(
                    title="Time of a step",
                    about="Of recent steps.",
                    unit="s",
                    queries=(Query(expr=f"appliance_training_step_seconds{{{AT}}}", legend="{{phase}}"),),
                ),
                Panel(
                    title="Memory",
                    about="Of the training process.",
                    unit="bytes",
                    queries=(Query(expr=f'appliance_process_memory_bytes{{{AT}, process="training"}}', legend="{{kind}}"),),
                ),
                Panel(
                    title="GPU memory",
                    about="In use by anybody.",
                    unit="bytes",
                    queries=(
                        Query(expr=f"appliance_gpu_memory_used_bytes{{{AT}}}", legend="{{name}}", may_be_empty=NO_GPU),
                    ),
                ),
            ),
        ),
    ),
)
