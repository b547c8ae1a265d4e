"""Captions that are nearly alike, by datatrove's MinHash; needs the extra `synth`."""

from dataclasses import dataclass
from typing import ClassVar

from fusion_hf.synthesis.choices import plain
from fusion_hf.synthesis.filters.across import text_key
from fusion_hf.synthesis.synth_record import SynthRecord

try:
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
    from datatrove.utils.hashing import HashConfig
    from datatrove.utils.word_tokenizers import WordTokenizer
except ModuleNotFoundError as error:
    raise ImportError("near-duplicates need datatrove: pip install fusion_hf[synth]") from error


class _WhitespaceTokenizer(WordTokenizer):
    """Words between white space: datatrove takes the punctuation away before. Its own tokenizers need spaCy."""

    def word_tokenize(self, text: str) -> list[str]:
        return text.split()

    def sent_tokenize(self, text: str) -> list[str]:
        return [text]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [(0, len(text))]


@dataclass(frozen=True)
class MinHash:
    """
    How alike two captions have to be.

    Two texts that share a part s of their n-grams agree in a bucket with probability 1 - (1 - s^hashes)^buckets: with
    these, 92 % at s = 0.8 and 4 % at s = 0.5.

    Args:
        n_grams: words that are compared at a time; captions are short.
    """

    n_grams: int = 2
    buckets: int = 14
    hashes: int = 8
    seed: int = 1

    def config(self) -> MinhashConfig:
        """Write the settings as datatrove takes them."""
        # datatrove 0.10.1's other hash, xxhash, fails with xxhash 4, which takes bytes only
        return MinhashConfig(
            self.n_grams, self.buckets, self.hashes, self.seed, hash_config=HashConfig(hash_fc="sha1")
        )


class NearDuplicatesFilter:
    """
    Rejects a record whose caption is nearly one that came before, by datatrove's MinHash.

    In memory: for each caption `buckets` hashes and its id, so it is for one task and up to some million captions.
    """

    name: ClassVar[str] = "near_duplicates"

    def __init__(self, settings: MinHash | None = None):
        self.settings = settings if settings is not None else MinHash()
        # its folder is written by pipelines alone
        self.signer = MinhashDedupSignature(".", self.settings.config(), language=_WhitespaceTokenizer())
        self.seen: dict[bytes, str] = {}

    def check(self, record: SynthRecord) -> str | None:
        """Give the reason to reject the record, or None. A kept record counts from now on."""
        keys = self._keys(record.caption)
        found = next((self.seen[key] for key in keys if key in self.seen), None)
        if found is not None:
            return f"the caption is nearly that of {found}"
        self.seen.update(dict.fromkeys(keys, record.id))
        return None

    def _keys(self, caption: str) -> list[bytes]:
        shingles = self.signer.get_shingles(caption)
        if shingles.size == 0:  # fewer words than an n-gram has
            return [text_key("short", plain(caption))]
        signature = self.signer.get_signature(shingles)
        return [text_key(str(number), *map(str, hashes)) for number, hashes in enumerate(signature)]
