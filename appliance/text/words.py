"""Words of a text, the form in which two texts count as the same, and words that say nothing by themselves."""

import re
import unicodedata

WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
APOSTROPHE = re.compile("['’]")
PART = re.compile(r"[^\W_]+")

_COMMON = {
    "nl": (
        "de het een en of maar want dus dat die dit deze er ik je jij jou jouw u uw we wij zij ze hij hem haar hun is zijn"
        " was waren ben bent heb hebt heeft hebben had kan kun kunt kunnen mag moet moeten wil wilt willen zal zou zullen"
        " word wordt worden niet geen ook nog al wel naar van voor in op aan bij met door over om te uit tot als dan toen"
        " waar wat wie hoe waarom wanneer welke mijn me mij iemand iets hier daar heel meer veel alle alles graag gaan ga"
        " doen doe"
    ),
    "en": (
        "the a an and or but so that this these those there i you your we our they them their he him his she her it its is"
        " are was were be been am have has had do does did can could may might must will would shall should not no also to"
        " of for in on at by with from about as if then than when where what who how why which my me us someone something"
        " here more many all some any get go please need"
    ),
    "de": (
        "der die das ein eine einen einem einer und oder aber dass dies diese dieser es ich du sie er wir ihr ihre mein"
        " meine sein ist sind war waren bin haben hat habe kann können darf muss müssen will werden wird nicht kein keine"
        " auch noch zu von für in im auf an am bei mit durch über um aus bis als wenn dann wo was wer wie warum wann mir"
        " mich hier dort mehr alle"
    ),
    "pl": (
        "i oraz lub albo ale że to ten ta te tego tej tym tych jest są był była było być się nie tak czy w we z ze na do od"
        " o po za przy dla przez pod jak gdzie kiedy kto co który która które ja ty on ona my wy oni mi mnie mam ma masz"
        " może możesz można mogę muszę proszę już też tylko bardzo jego jej ich twój pan pani"
    ),
    "ar": (
        "في من على إلى عن مع هذا هذه ذلك التي الذي أن إن ما لا هل كان هو هي أنا أنت نحن هم أو و ثم قد كل بعد قبل عند لم لن"
        " كيف أين متى يمكن يمكنك يمكنني لك لي نعم إذا حتى أي"
    ),
    "fr": (
        "le la les un une des du de et ou mais que qui ce cette ces je tu il elle nous vous ils elles est sont était être"
        " avoir a ont ne pas plus aussi à au aux en dans sur pour par avec sans si comme où quand comment mon ma mes son sa"
        " ses leur y"
    ),
    "es": (
        "el la los las un una unos de del y o pero que quien este esta estos yo tú él ella nosotros ellos es son era ser"
        " haber ha han no más también a al en con por para sin si como dónde cuándo cómo mi mis su sus se lo le me te"
    ),
}
COMMON = frozenset(word for words in _COMMON.values() for word in words.split())


def words(text: str) -> list[str]:
    """The words of a text in lower case, without figures."""
    return [word.casefold() for word in WORD.findall(text)]


def telling(text: str) -> list[str]:
    """The words of a text that say what it is about."""
    return [word for word in words(text) if len(word) > 2 and word not in COMMON and APOSTROPHE.split(word)[0] not in COMMON]


def normal(text: str) -> str:
    """A text without what hardly makes it another one: case, punctuation, spacing. Never empty for a text that is not."""
    return " ".join(PART.findall(unicodedata.normalize("NFKC", text).casefold())) or text
