"""Words that a language uses in every text, whatever it is about: articles, prepositions, pronouns, auxiliary verbs.

Short lists of our own, for counting what a text is about. English has a longer one in scikit-learn.
"""

from collections.abc import Iterable

_WORDS = {
    "ar": """
        من في على إلى عن مع هذا هذه ذلك تلك التي الذي الذين هو هي هم نحن أنا أنت كان كانت يكون لا ما لم لن قد كل بعض
        أو ثم إن أن بعد قبل عند بين حتى إذا كما لكن أيضا هنا هناك
    """,
    "de": """
        aber alle allem allen alles als also am an auch auf aus bei beim bin bis bist da damit dann das dass dein
        dem den denn der des die dies diese diesem diesen dieser dieses doch dort du durch ein eine einem einen
        einer eines er es etwas für gegen hab habe haben hat hatte hatten hier hin ich ihm ihn ihnen ihr ihre ihrem
        ihren im in ins ist ja jede jedem jeden jeder kann kein keine keinen können man mein meine mich mir mit muss
        nach nicht noch nun nur ob oder ohne sehr sein seine sich sie sind so über um und uns unser unsere unter vom
        von vor war waren was weil wenn wer werden wie wieder wir wird wo wurde wurden zu zum zur zwar
    """,
    "en": """
        a about after all also am an and any are as at be because been but by can could did do does for from had has
        have he her here him his how i if in into is it its just may me more my no not of on one only or our out
        over she should so some than that the their them then there these they this those to too under up us very
        was we were what when where which who will with would you your
    """,
    "es": """
        a al algo como con cual cuando de del desde donde el ella ellos en entre era es esa ese eso esta este esto
        está están fue ha han hasta hay la las le les lo los me mi muy más no nos o para pero por porque que qué se
        ser si sin sobre son su sus sí también te tiene todo tu un una uno unos y ya yo
    """,
    "fr": """
        à au aux avec ce ces cet cette dans de des du elle elles en est et été était eu il ils je la le les leur
        leurs lui ma mais me mes moi mon ne nos notre nous on ont ou où par pas plus pour qu que qui sa sans se ses
        si son sont sur ta te tes tu un une vos votre vous y
    """,
    "nl": """
        aan al alle als ben bij daar dan dat de der deze die dit door dus een en er ge geen had heb hebben heeft hem
        het hier hij hoe hun iets ik in is ja je jij jou jouw kan kun kunt maar me meer men met mij mijn moet na
        naar niet nog nu of om omdat ons onze ook op over te tegen toch toe tot u uit uw van veel voor want waren
        was wat we wel werd wie wij wil worden wordt zal ze zei zelf zich zij zijn zo zonder zou
    """,
    "pl": """
        a aby ale albo ani az bez bo by być był była było były co czy dla do gdy gdzie go i ich ile im innych ja jak
        jako je jego jej jest jestem jeśli już każdy kiedy który która które ma mają mi mnie może można my na nad
        nas nie nim niż no o od ona one oni ono oraz po pod pan pani przed przez przy się są ta tak także tam te
        tego tej ten też to tu tutaj twój ty tych tylko tym u w we wszystko wy z za ze że
    """,
}


def stop_words(languages: Iterable[str]) -> frozenset[str]:
    """Those of all these languages (ISO 639-1), in lower case; a language without a list adds none."""
    return frozenset(word for language in languages for word in _WORDS.get(language, "").split())
