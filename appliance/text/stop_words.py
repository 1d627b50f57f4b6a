"""Words that a language uses in every text, whatever it is about: articles, prepositions, pronouns, auxiliary verbs.

Short lists of our own, for counting what a text is about. English has a longer one in scikit-learn.
"""

from collections.abc import Iterable, Mapping

_WORDS: Mapping[str, str] = {
    "ar": """
        أن أنا أنت أو أي أيضا أين إذا إلى إن التي الذي الذين بعد بعض بين تلك ثم حتى ذلك على عن عند في قبل قد كان كانت كل
        كما كيف لا لك لكن لم لن لي ما متى مع من نحن نعم هذا هذه هل هم هنا هناك هو هي و يكون يمكن يمكنك يمكنني
    """,
    "de": """
        aber alle allem allen alles als also am an auch auf aus bei beim bin bis bist da damit dann darf das dass dein
        dem den denn der des die dies diese diesem diesen dieser dieses doch dort du durch ein eine einem einen einer
        eines er es etwas für gegen hab habe haben hat hatte hatten hier hin ich ihm ihn ihnen ihr ihre ihrem ihren im
        in ins ist ja jede jedem jeden jeder kann kein keine keinen können man mehr mein meine mich mir mit muss müssen
        nach nicht noch nun nur ob oder ohne sehr sein seine sich sie sind so um und uns unser unsere unter vom von vor
        wann war waren warum was weil wenn wer werden wie wieder will wir wird wo wurde wurden zu zum zur zwar über
    """,
    "en": """
        a about after all also am an and any are as at be because been but by can could did do does for from get go had
        has have he her here him his how i if in into is it its just many may me might more must my need no not of on
        one only or our out over please shall she should so some someone something than that the their them then there
        these they this those to too under up us very was we were what when where which who why will with would you your
    """,
    "es": """
        a al algo como con cual cuando cuándo cómo de del desde donde dónde el ella ellos en entre era es esa ese eso
        esta este esto estos está están fue ha haber han hasta hay la las le les lo los me mi mis muy más no nos
        nosotros o para pero por porque que quien qué se ser si sin sobre son su sus sí también te tiene todo tu tú un
        una uno unos y ya yo él
    """,
    "fr": """
        a au aussi aux avec avoir ce ces cet cette comme comment dans de des du elle elles en est et eu il ils je la le
        les leur leurs lui ma mais me mes moi mon ne nos notre nous on ont ou où par pas plus pour qu quand que qui sa
        sans se ses si son sont sur ta te tes tu un une vos votre vous y à était été être
    """,
    "nl": """
        aan al alle alles als ben bent bij daar dan dat de der deze die dit doe doen door dus een en er ga gaan ge geen
        graag haar had heb hebben hebt heeft heel hem het hier hij hoe hun iemand iets ik in is ja je jij jou jouw kan
        kun kunnen kunt maar mag me meer men met mij mijn moet moeten na naar niet nog nu of om omdat ons onze ook op
        over te tegen toch toe toen tot u uit uw van veel voor waar waarom wanneer want waren was wat we wel welke werd
        wie wij wil willen wilt word worden wordt zal ze zei zelf zich zij zijn zo zonder zou zullen
    """,
    "pl": """
        a aby albo ale ani az bardzo bez bo by być był była było były co czy dla do gdy gdzie go i ich ile im innych ja
        jak jako je jego jej jest jestem jeśli już każdy kiedy kto która które który lub ma mają mam masz mi mnie mogę
        może możesz można muszę my na nad nas nie nim niż no o od on ona one oni ono oraz pan pani po pod proszę przed
        przez przy się są ta tak także tam te tego tej ten też to tu tutaj twój ty tych tylko tym u w we wszystko wy z
        za ze że
    """,
}


def stop_words(languages: Iterable[str]) -> frozenset[str]:
    """Those of all these languages (ISO 639-1), in lower case; a language without a list adds none."""
    return frozenset(word for language in languages for word in _WORDS.get(language, "").split())


EVERY_STOP_WORD = stop_words(_WORDS)
