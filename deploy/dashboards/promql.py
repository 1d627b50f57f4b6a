"""Expressions that panels have in common. `$instance` and `$__rate_interval` are Grafana's."""

from deploy.panels import Query

AT = 'instance=~"$instance"'
RATE = "$__rate_interval"


def rate(metric: str, *by: str) -> str:
    return f"sum by ({', '.join(by)}) (rate({metric}{{{AT}}}[{RATE}]))"


def quantiles(metric: str, *quantiles: float, what: str = "") -> tuple[Query, ...]:
    """From a histogram's buckets, for each model; `what` goes into the legend."""
    buckets = rate(f"{metric}_bucket", "model", "le")
    expressions = {each: f"histogram_quantile({each}, {buckets})" for each in quantiles}
    return tuple(
        Query(expr=expression, legend=f"{{{{model}}}} {what}p{each * 100:.0f}") for each, expression in expressions.items()
    )


def share(part: str, whole: str) -> str:
    """Nothing where there is no whole, instead of 0 / 0."""
    return f"{part} / ({whole} > 0)"
