"""Reject unsafe and personal content by rules."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

from fusion_hf.common.yaml_config import allow
from fusion_hf.synthesis.filters.words import singular, tokens
from fusion_hf.synthesis.synth_record import SynthRecord

# Singulars and verb forms. Phrases of several words are matched literally.
TERMS: dict[str, str] = {
    "sexual content": (
        "nude,naked,topless,genital,penis,vagina,nipple,erotic,erotica,porn,porno,pornography,pornographic,orgasm,"
        "masturbate,masturbating,masturbation,intercourse,fetish,striptease,hentai,nsfw,sex,sexual,sexy,sexually,"
        "sex toy,prostitute,prostitution,upskirt"
    ),
    "violence": (
        "gore,gory,behead,beheading,beheaded,decapitate,decapitated,dismember,dismembered,disembowel,torture,tortured,"
        "torturing,massacre,mutilate,mutilated,corpse,dead body,murder,murdered,murdering,stab,stabbed,stabbing,"
        "execution,lynch,lynching,strangle,strangled,strangling,rape,raped,raping,severed head,severed hand,bloodied,"
        "pool of blood,covered in blood,shot dead,terrorist,suicide bomber"
    ),
    "self-harm": "suicide,self-harm,self harm,cut herself,cut himself,cutting herself,cutting himself,hang himself,"
    "hang herself,noose,anorexia,overdose,overdosed",
    "hate": "swastika,nazi,nazis,ku klux klan,kkk,white power,white supremacy,white supremacist,ethnic cleansing,"
    "genocide,subhuman,heil hitler",
    "drugs": "cocaine,heroin,meth,methamphetamine,crack pipe,lsd,ecstasy pill,inject drugs,injecting drugs,"
    "snort,snorting,drug dealer",
    "weapons": "pipe bomb,molotov,molotov cocktail,nail bomb,build a bomb,make a bomb,explosive vest,ghost gun",
}
_PERSONAL = {  # in the order of the search
    "an e-mail address": re.compile(r"(?<![\w.+-])[\w.+-]+@[\w-]+(?:\.[\w-]+)*\.[a-z]{2,}\b", re.IGNORECASE),
    "a social security number": re.compile(r"(?<![\d-])(?!000|666|9\d\d)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\d-])"),
    "a network address": re.compile(
        r"(?<![\d.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\d.])"
    ),
    "a street address": re.compile(
        r"\b\d{1,5}[a-z]? +(?:[NSEW]\.? +)?(?:[A-Z][\w'.-]+ +){1,3}"
        r"(?:Street|St\.?|Avenue|Ave\.?|Road|Rd\.?|Lane|Ln\.?|Drive|Dr\.?|Boulevard|Blvd\.?|Court|Ct\.?|Way|Terrace|Close)\b"
    ),
    "coordinates": re.compile(r"(?<![\d.])-?\d{1,2}\.\d{4,}\s*°?\s*[NS]?\s*,\s*-?\d{1,3}\.\d{4,}"),
    "a card number": re.compile(r"(?<![\d.-])(?:\d[ -]?){12,18}\d(?![\d-])"),
    "an account number": re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b"),
    "a telephone number": re.compile(
        r"(?<![\w.,/-])(?:\+\d{1,3}[ .-]?)?(?:\(\d{2,5}\)[ .-]?|\d{2,5}[ .-])\d{3,4}[ .-]?\d{2,4}(?:[ .-]?\d{2,4})?"
        r"(?![\w/-])"
        r"|(?<![\w.,/-])\+\d{8,14}(?!\d)|(?<![\w.,/-])\d{10,11}(?![\w.,/-]*\d)"
    ),
}
_FICTIONAL_PHONE = re.compile(r"555[ .-]?01\d\d")  # numbers reserved for fiction
_PHONE_DIGITS = range(9, 16)  # shorter numbers are dates, scores or prices
_LUHN_FROM, _IBAN_REST, _IBAN_MODULUS = 13, 1, 97


@dataclass(frozen=True)
class UnsafeFilter:
    """
    Reject words for sexual content, violence, self-harm, hate, drugs and the making of weapons in any text.

    Args:
        kinds: the kinds of content to look for. Empty means all.
        more: further words and phrases.
        allowed: words of the lists that are accepted.
    """

    name: ClassVar[str] = "unsafe"
    kinds: tuple[Annotated[str, allow(", ".join(TERMS), TERMS.__contains__)], ...] = ()
    more: tuple[str, ...] = ()
    allowed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        lists = {kind: TERMS[kind].split(",") for kind in self.kinds or TERMS}
        lists["a word of the settings"] = [term.lower() for term in self.more]
        terms = {term: kind for kind, words in lists.items() for term in words if term not in self.allowed}
        object.__setattr__(self, "_terms", {tokens(term): kind for term, kind in terms.items()})

    def check(self, record: SynthRecord) -> str | None:
        terms: dict[tuple[str, ...], str] = self.__dict__["_terms"]
        longest = max(map(len, terms), default=0)
        for place, text in _texts(record):
            parts = tokens(text)
            for start in range(len(parts)):
                for size in range(1, longest + 1):
                    words = parts[start : start + size]
                    found = words if words in terms else (*words[:-1], singular(words[-1]))
                    if found in terms:
                        return f"{place}: {terms[found]} ({' '.join(words)!r})"
        return None


@dataclass(frozen=True)
class PersonalDataFilter:
    """
    Reject e-mail, street and network addresses, coordinates, and telephone, card, account and social security
    numbers.
    """

    name: ClassVar[str] = "personal"

    def check(self, record: SynthRecord) -> str | None:
        for place, text in _texts(record):
            for what, pattern in _PERSONAL.items():
                for found in map(re.Match.group, pattern.finditer(text)):
                    if what not in _CHECKS or _CHECKS[what](found):
                        return f"{place}: {what} ({found[:4]}...)"
        return None


def _texts(record: SynthRecord) -> Iterator[tuple[str, str]]:
    yield "the caption", record.caption
    for number, text in enumerate(record.descriptions, 1):
        yield f"description {number}", text
    for number, turn in enumerate(record.turns, 1):
        yield f"the question of turn {number}", turn.question
        yield f"the answer of turn {number}", turn.answer


def _is_card(text: str) -> bool:
    """Check Luhn's checksum, which one in ten random numbers passes."""
    digits = [int(character) for character in text if character.isdigit()]
    if len(digits) < _LUHN_FROM or len(set(digits)) == 1:
        return False
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _is_iban(text: str) -> bool:
    plain = text.replace(" ", "")
    turned = plain[4:] + plain[:4]
    return int("".join(str(int(character, 36)) for character in turned)) % _IBAN_MODULUS == _IBAN_REST


def _is_phone(text: str) -> bool:
    return len(re.sub(r"\D", "", text)) in _PHONE_DIGITS and not _FICTIONAL_PHONE.search(text)


# Checks that distinguish some of them from other text of the same form.
_CHECKS = {"a card number": _is_card, "an account number": _is_iban, "a telephone number": _is_phone}
