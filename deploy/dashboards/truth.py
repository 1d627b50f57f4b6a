"""Truth: what it says that it does not know, and what is found wrong in what it says."""

from deploy.dashboards.promql import AT, RATE, rate, share
from deploy.panels import Dashboard, Panel, Query, Row

LATER = "this version counts none of it yet"

TRUTH = Dashboard(
    uid="appliance-truth",
    title="Appliance: truth",
    about="How often it says that it does not know, and what is found wrong in what it says.",
    rows=(
        Row(
            title="Answers",
            panels=(
                Panel(
                    title="Did not know",
                    about="Share of answers in which it said so.",
                    unit="percentunit",
                    highest=1,
                    queries=(
                        Query(
                            expr=share(
                                f"sum(rate(appliance_abstentions_total{{{AT}}}[{RATE}]))",
                                f"sum(rate(appliance_requests_total{{{AT}}}[{RATE}]))",
                            ),
                            may_be_empty=LATER,
                        ),
                    ),
                ),
                Panel(
                    title="Held by its sources",
                    about="Sentences by verdict: supported, contradicted, not found.",
                    unit="cps",
                    queries=(
                        Query(
                            expr=rate("appliance_groundedness_verdicts_total", "verdict"),
                            legend="{{verdict}}",
                            may_be_empty=LATER,
                        ),
                    ),
                ),
                Panel(
                    title="Handed to a person",
                    about="Questions a minute that went to the desk, by reason.",
                    queries=(
                        Query(
                            expr=f"60 * {rate('appliance_handoffs_total', 'reason')}",
                            legend="{{reason}}",
                            may_be_empty=LATER,
                        ),
                    ),
                ),
            ),
        ),
    ),
)
