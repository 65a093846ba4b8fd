"""Tiny data for the programs in examples/, written where a test wants them."""

import random
from pathlib import Path

ALPHABETS = {"Finnish": "aeiouyäö", "Greek": "αβγδεζηθ", "Polish": "śżłczwko"}


def write_names(folder: Path) -> None:
    """A file for each of three languages with letters of their own."""
    dice = random.Random(0)
    for language, letters in ALPHABETS.items():
        names = ("".join(dice.choices(letters, k=dice.randint(2, 9))) for _ in range(100))
        (folder / f"{language}.txt").write_text("\n".join(names) + "\n", encoding="utf-8")


def conllu(sentences) -> str:
    """The sentences as a file's text, with lines that are no words among theirs."""
    text = ""
    for sentence in sentences:
        text += "# sent_id = 1\n1-2\tdon't" + "\t_" * 8 + "\n"
        for number, (word, tag) in enumerate(sentence, 1):
            text += "\t".join([str(number), word, "_", tag, *"______"]) + "\n"
        text += "1.1\tleft-out" + "\t_" * 8 + "\n\n"
    return text


def write_sentences(folder: Path) -> None:
    """train.conllu and test.conllu: a tag is in the ending or, of 'it', in the word before."""
    dice = random.Random(0)

    def sentence():
        words = []
        for _ in range(dice.randint(1, 7)):
            ending, tag = dice.choice([("ö", "NOUN"), ("ing", "VERB"), ("ly", "ADV")])
            words.append(("".join(dice.choices("bdgkmpt", k=dice.randint(1, 4))) + ending, tag))
            if dice.random() < 0.3:
                words.append(("it", "PRON" if tag == "VERB" else "X"))
        return words

    for name, count in {"train": 120, "test": 40}.items():
        text = conllu(sentence() for _ in range(count))
        (folder / f"{name}.conllu").write_text(text, encoding="utf-8")


def write_pairs(folder: Path) -> None:
    """pairs.tsv: each letter of the source once, in upper case, and twice if it is a vowel."""
    dice = random.Random(0)
    sources = {"".join(dice.sample("aeiłmńpt", k=dice.randint(1, 5))) for _ in range(400)}
    lines = (
        f"{s}\t{''.join(c.upper() * (1 + (c in 'aei')) for c in s)}\n" for s in sorted(sources)
    )
    (folder / "pairs.tsv").write_text("".join(lines), encoding="utf-8")
