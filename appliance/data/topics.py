"""What rows are about: clusters of their TF-IDF vectors, language by language, named by their own words.

A word that only a few rows hold, or that is of somebody's name, names no topic: reports show these names.

Above `SAMPLE_ROWS` rows of a language, vocabulary and clusters come from a sample; every row then gets its nearest cluster.
"""

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from appliance.data.personal import SHARED_ROWS
from appliance.text.words import telling

SAMPLE_ROWS = 20_000
CHUNK_ROWS = 5_000
ROWS_A_TOPIC = 20
MOST_TOPICS = 12
VOCABULARY = 4_000
NAMED_BY = 5  # words
OTHER = "other"


@dataclass(frozen=True, slots=True)
class Topic:
    language: str
    words: Sequence[str]
    rows: int

    @property
    def name(self) -> str:
        return f"{self.language}: {', '.join(self.words)}"


@dataclass(frozen=True, slots=True)
class Topics:
    """`of_row` has the name of each row's topic."""

    topics: Sequence[Topic]
    of_row: Sequence[str]


def find(texts: Sequence[str], languages: Sequence[str], seed: int, private: Collection[str]) -> Topics:
    """The topics of texts whose languages are known; a language with few rows is one topic. No `private` word is shown."""
    of_row = [f"{language}: {OTHER}" for language in languages]
    topics: list[Topic] = []
    for language in sorted(set(languages)):
        rows = [number for number, each in enumerate(languages) if each == language]
        clusters, names = _cluster([texts[number] for number in rows], seed, private)
        for number, cluster in zip(rows, clusters, strict=True):
            of_row[number] = f"{language}: {', '.join(names[cluster])}"
        found = [Topic(language, words, clusters.count(each)) for each, words in enumerate(names)]
        topics += sorted((topic for topic in found if topic.rows), key=lambda topic: -topic.rows)
    return Topics(topics, of_row)


def _cluster(texts: Sequence[str], seed: int, private: Collection[str]) -> tuple[list[int], list[Sequence[str]]]:
    """The cluster of each text, and the words of each cluster."""
    count = min(MOST_TOPICS, len(texts) // ROWS_A_TOPIC)
    whole: tuple[list[int], list[Sequence[str]]] = ([0] * len(texts), [[OTHER]])
    if count < 2:
        return whole
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.feature_extraction.text import TfidfVectorizer

    sample = texts[:: -(-len(texts) // SAMPLE_ROWS)]
    vectorizer = TfidfVectorizer(analyzer=telling, min_df=2, max_df=0.5, max_features=VOCABULARY, sublinear_tf=True)
    try:
        vectors = vectorizer.fit_transform(sample)
    except ValueError:  # no word is in two rows and not in half of them
        return whole
    means = MiniBatchKMeans(n_clusters=count, random_state=seed, n_init=3).fit(vectors)
    clusters: list[int] = []
    for start in range(0, len(texts), CHUNK_ROWS):
        clusters += means.predict(vectorizer.transform(texts[start : start + CHUNK_ROWS])).tolist()
    vocabulary = vectorizer.get_feature_names_out()
    holders = (vectors > 0).sum(axis=0).A1
    may_name = [count > SHARED_ROWS and word not in private for word, count in zip(vocabulary, holders, strict=True)]
    names: list[Sequence[str]] = []
    for words in (-means.cluster_centers_).argsort(axis=1, kind="stable"):
        naming = itertools.islice((str(vocabulary[word]) for word in words if may_name[word]), NAMED_BY)
        names.append(list(naming) or [OTHER])
    return clusters, names
