"""Captions that are nearly alike, by datatrove's MinHash; needs the extra `synth`."""

from typing import ClassVar

from fusion_hf.synthesis.choices import plain
from fusion_hf.synthesis.filters.text import text_key
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


# Two texts that share a part s of their pairs of words agree in a bucket with probability 1 - (1 - s^hashes)^buckets:
# 92 % at s = 0.8 and 4 % at s = 0.5. datatrove 0.10.1's other hash, xxhash, fails with xxhash 4, which takes bytes.
NEARLY = MinhashConfig(n_grams=2, num_buckets=14, hashes_per_bucket=8, seed=1, hash_config=HashConfig(hash_fc="sha1"))


class NearDuplicatesFilter:
    """
    Rejects a record whose caption is nearly one that came before, by datatrove's MinHash.

    In memory: for each caption `buckets` hashes and its id, so it is for one task and up to some million captions.
    """

    name: ClassVar[str] = "near_duplicates"

    def __init__(self, config: MinhashConfig = NEARLY):
        # its folder is written by pipelines alone
        self.signer = MinhashDedupSignature(".", config, language=_WhitespaceTokenizer())
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
