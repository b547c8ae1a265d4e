"""Find near-duplicate captions with datatrove's MinHash. This requires the extra `synth`."""

from typing import ClassVar

from fusion_hf.synthesis.choices import plain
from fusion_hf.synthesis.filters.text import text_key
from fusion_hf.synthesis.synth_record import SynthRecord

try:
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
    from datatrove.utils.hashing import HashConfig
    from datatrove.utils.word_tokenizers import WordTokenizer
except ModuleNotFoundError as error:
    raise ImportError("Finding near-duplicates requires datatrove. Install the extra `synth`.") from error


class _WhitespaceTokenizer(WordTokenizer):
    """Split at white space, after datatrove has removed punctuation. datatrove's own tokenizers require spaCy."""

    def word_tokenize(self, text: str) -> list[str]:
        return text.split()

    def sent_tokenize(self, text: str) -> list[str]:
        return [text]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [(0, len(text))]


# Two texts that share a fraction s of their word pairs match in a bucket with probability
# 1 - (1 - s^hashes)^buckets: 92% at s = 0.8 and 4% at s = 0.5. The other hash of datatrove 0.10.1, xxhash, fails with
# xxhash 4, which takes bytes.
NEARLY = MinhashConfig(n_grams=2, num_buckets=14, hashes_per_bucket=8, seed=1, hash_config=HashConfig(hash_fc="sha1"))


class NearDuplicatesFilter:
    """
    Reject a record whose caption nearly repeats an earlier one, by datatrove's MinHash.

    Memory holds `buckets` hashes and an id for each caption, so the filter suits one task and a few million captions.

    Args:
        config: the settings of MinHash.
    """

    name: ClassVar[str] = "near_duplicates"

    def __init__(self, config: MinhashConfig = NEARLY):
        # only pipelines write to its folder
        self.signer = MinhashDedupSignature(".", config, language=_WhitespaceTokenizer())
        self.seen: dict[bytes, str] = {}

    def check(self, record: SynthRecord) -> str | None:
        """
        Return the reason to reject the record, or None. A kept record is remembered.

        Args:
            record: the record.
        """
        keys = self._keys(record.caption)
        found = next((self.seen[key] for key in keys if key in self.seen), None)
        if found is not None:
            return f"the caption is nearly that of {found}"
        self.seen.update(dict.fromkeys(keys, record.id))
        return None

    def _keys(self, caption: str) -> list[bytes]:
        shingles = self.signer.get_shingles(caption)
        if shingles.size == 0:  # the caption has fewer words than an n-gram
            return [text_key("short", plain(caption))]
        signature = self.signer.get_signature(shingles)
        return [text_key(str(number), *map(str, hashes)) for number, hashes in enumerate(signature)]
