"""Low-end hardware: memory, bandwidth, heat."""

from deploy.dashboards.promql import AT, RATE, rate, share
from deploy.panels import Dashboard, Panel, Query, Row

NO_SENSOR = "this machine, or the virtual one it is, does not say"
NO_GPU = "no GPU"

HARDWARE = Dashboard(
    uid="appliance-hardware",
    title="Appliance: low-end hardware",
    about="What limits a small machine: memory first, then its bandwidth, then heat.",
    rows=(
        Row(
            title="Memory",
            panels=(
                Panel(
                    title="Memory of processes",
                    about="anonymous cannot be dropped; file is the model in the page cache, which may come and go.",
                    unit="bytes",
                    queries=(Query(expr=f"appliance_process_memory_bytes{{{AT}}}", legend="{{process}} {{kind}}"),),
                ),
                Panel(
                    title="Memory to be had",
                    about="Without swapping. Below a twentieth of the whole, everything becomes slow.",
                    unit="bytes",
                    queries=(
                        Query(expr=f"appliance_memory_available_bytes{{{AT}}}", legend="{{instance}} available"),
                        Query(expr=f"appliance_memory_total_bytes{{{AT}}}", legend="{{instance}} total"),
                    ),
                ),
                Panel(
                    title="Waiting for the disk",
                    about="Pages a second that a process waited for. More than a few: the model does not fit.",
                    unit="cps",
                    queries=(Query(expr=rate("appliance_process_major_faults_total", "process"), legend="{{process}}"),),
                ),
                Panel(
                    title="Swap",
                    about="In use, of the machine and of each process.",
                    unit="bytes",
                    queries=(
                        Query(expr=f"appliance_swap_used_bytes{{{AT}}}", legend="{{instance}}"),
                        Query(expr=f"appliance_process_swap_bytes{{{AT}}}", legend="{{process}}"),
                    ),
                ),
                Panel(
                    title="Pressure",
                    about="Share of time in which somebody (some) or everybody (full) waited for memory, disk or CPU.",
                    unit="percentunit",
                    queries=(
                        Query(
                            # The machine's figure, whichever of its processes tells it.
                            expr=f"max by (resource, share) (rate(appliance_pressure_seconds_total{{{AT}}}[{RATE}]))",
                            legend="{{resource}} {{share}}",
                            may_be_empty="a kernel without pressure stall information",
                        ),
                    ),
                ),
                Panel(
                    title="Disk",
                    about="Free where models lie.",
                    unit="bytes",
                    queries=(Query(expr=f"appliance_disk_free_bytes{{{AT}}}", legend="{{instance}} {{folder}}"),),
                ),
            ),
        ),
        Row(
            title="Computing",
            panels=(
                Panel(
                    title="Share of the memory bandwidth",
                    about="Answering reads the whole model for each token. Near 1, only a smaller quantization is faster.",
                    unit="percentunit",
                    queries=(Query(expr=f"appliance_memory_bandwidth_ratio{{{AT}}}", legend="{{model}}"),),
                ),
                Panel(
                    title="Reading against answering",
                    about="Share of time in steps: prefill reads prompts, decode answers, mixed does both.",
                    unit="percentunit",
                    queries=(Query(expr=rate("appliance_step_seconds_total", "kind"), legend="{{kind}}"),),
                ),
                Panel(
                    title="Time of a step",
                    about="decode: one token for each running answer.",
                    unit="s",
                    queries=(
                        Query(
                            expr=share(rate("appliance_step_seconds_total", "kind"), rate("appliance_steps_total", "kind")),
                            legend="{{kind}}",
                        ),
                    ),
                ),
                Panel(
                    title="Prompts found in the cache",
                    about="Share of prompt tokens that need not be read again.",
                    unit="percentunit",
                    highest=1,
                    queries=(Query(expr=f"model:appliance_prompt_tokens_cached:ratio5m{{{AT}}}", legend="{{model}}"),),
                ),
                Panel(
                    title="Memory for prompts",
                    about="KV memory in use, what the last requests left included, and that for prefixes kept for later.",
                    unit="percentunit",
                    highest=1,
                    queries=(
                        Query(expr=f"appliance_kv_use_ratio{{{AT}}}", legend="KV"),
                        Query(expr=f"appliance_kv_running_ratio{{{AT}}}", legend="KV, running"),
                        Query(expr=f"appliance_prefix_cache_use_ratio{{{AT}}}", legend="prefixes"),
                    ),
                ),
                Panel(
                    title="Guessed tokens that were right",
                    about="Of those guessed from the prompt; guessing ends by itself where it does not pay.",
                    unit="percentunit",
                    highest=1,
                    queries=(
                        Query(
                            expr=share(
                                rate("appliance_speculation_accepted_tokens_total", "model"),
                                rate("appliance_speculation_drafted_tokens_total", "model"),
                            ),
                            legend="{{model}}",
                            may_be_empty="nothing was guessed",
                        ),
                    ),
                ),
            ),
        ),
        Row(
            title="The machine",
            panels=(
                Panel(
                    title="CPU time of processes",
                    about="Cores in use.",
                    queries=(Query(expr=rate("appliance_process_cpu_seconds_total", "process"), legend="{{process}}"),),
                ),
                Panel(
                    title="Stopped by a quota",
                    about="Share of time for which the container's CPU quota stopped it.",
                    unit="percentunit",
                    queries=(
                        Query(
                            expr=rate("appliance_cgroup_cpu_throttled_seconds_total", "instance"),
                            legend="{{instance}}",
                            may_be_empty="no container with a CPU quota",
                        ),
                    ),
                ),
                Panel(
                    title="Clock",
                    about="It falls when the machine is hot, or saves power.",
                    unit="hertz",
                    queries=(
                        Query(expr=f"appliance_cpu_frequency_hertz{{{AT}}}", legend="CPU {{cpu}}", may_be_empty=NO_SENSOR),
                    ),
                ),
                Panel(
                    title="Temperature",
                    about="Above 90 °C most processors slow down.",
                    unit="celsius",
                    queries=(
                        Query(
                            expr=f"appliance_temperature_celsius{{{AT}}}", legend="{{type}} {{zone}}", may_be_empty=NO_SENSOR
                        ),
                        Query(expr=f"appliance_gpu_temperature_celsius{{{AT}}}", legend="{{name}}", may_be_empty=NO_GPU),
                    ),
                ),
                Panel(
                    title="Slowed down by heat",
                    about="Times in an hour.",
                    queries=(
                        Query(
                            expr=f"increase(appliance_cpu_thermal_throttles_total{{{AT}}}[1h])",
                            legend="CPU {{cpu}}",
                            may_be_empty=NO_SENSOR,
                        ),
                    ),
                ),
                Panel(
                    title="GPU",
                    about="Memory in use by anybody, and share of time in which it computed.",
                    unit="percentunit",
                    highest=1,
                    queries=(
                        Query(
                            expr=f"appliance_gpu_memory_used_bytes{{{AT}}} / appliance_gpu_memory_total_bytes{{{AT}}}",
                            legend="{{name}} memory",
                            may_be_empty=NO_GPU,
                        ),
                        Query(
                            expr=f"appliance_gpu_utilisation_ratio{{{AT}}}", legend="{{name}} computing", may_be_empty=NO_GPU
                        ),
                    ),
                ),
            ),
        ),
    ),
)
