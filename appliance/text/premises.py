"""Circumstances that a person may state about himself, by their words in Dutch, English, German, Polish and Arabic.

A few rows that share one of them teach a model to assume it of everybody; those rows may be in several languages, where
no word is the same. Words are stems: they match whatever goes on behind them, but for those that end in "$".
"""

import re

STEMS = {
    "prison": ("gevangenis gedetineerd detentie prison jail inmate gefängnis häftling więzien zakład_karn سجن السجن سجين"),
    "pregnancy": "zwanger pregnan schwanger ciąż حامل الحامل",
    "addiction": (
        "verslaafd verslaving drugsgebrui alcoholis addict alcoholic süchtig suchtkrank uzależni alkoholi مدمن إدمان الإدمان"
    ),
    "debt": "schulden schuldsaner indebted debts verschuldet zadłuż ديون الديون",
    "violence": (
        "mishandel huiselijk_geweld aangerand verkracht abused domestic_violence raped misshandel przemoc zgwałc عنف العنف"
        " اغتصاب"
    ),
    "psychiatry": ("psychiatrisch psychose schizofren psychiatric psychosis psychiatrisch psychiatrycz مصحة الذهان"),
    "illness": "hiv$ kanker tuberculos cancer krebs nowotwor gruźlic السرطان الإيدز",
    "no papers": (
        "ongedocumenteerd zonder_papieren uitgeprocedeerd undocumented without_papers papierlos bez_dokumentów بلا_أوراق"
        " بدون_أوراق"
    ),
    "war": "oorlog gevlucht refugee war_veteran bürgerkrieg geflüchtet wojn uchodźc حرب الحرب لاجئ",
    "disability": ("rolstoel gehandicapt wheelchair disabled rollstuhl behindert niepełnospraw wózku معاق إعاقة"),
    "suicide": "zelfmoord suïcid suicid selbstmord samobój انتحار الانتحار",
}


def _pattern(stems: str) -> re.Pattern[str]:
    ends = [(stem.removesuffix("$"), r"\b" if stem.endswith("$") else "") for stem in stems.split()]
    either = "|".join(re.escape(stem).replace("_", r"\s+") + end for stem, end in ends)
    return re.compile(rf"(?<!\w)({either})\w*", re.IGNORECASE)


_PATTERNS = {name: _pattern(stems) for name, stems in STEMS.items()}


def stated(text: str) -> dict[str, set[str]]:
    """The circumstances that a text names, each with the stems that name it: a whole word may be a family name."""
    found = {name: {match[1].casefold() for match in pattern.finditer(text)} for name, pattern in _PATTERNS.items()}
    return {name: named for name, named in found.items() if named}
