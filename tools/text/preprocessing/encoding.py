"""Tokenize many documents at a time, from several threads, with the same ids as transformers.

`gigatoken` does the work; `tokenizers` (the library under transformers' fast tokenizers) is the reference. The two know
different versions of Unicode, so the reference encodes documents with characters that they treat differently.
"""

import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from megatron.remoe.files.errors import DataError
from megatron.remoe.files.gpt2_files import END_OF_TEXT, FOLDER_TOKENIZER, GPT2_TOKENIZER, read_gpt2_vocabulary

if TYPE_CHECKING:
    import tokenizers

TOKENIZER_TYPES = (GPT2_TOKENIZER, FOLDER_TOKENIZER)
CHARACTERS_BETWEEN_RESTARTS = 512 << 20  # gigatoken remembers every word, so it is loaded again after so much text
DOCUMENTS_ON_TRIAL, CHARACTERS_ON_TRIAL = 32, 1 << 10
CODE_POINTS = 0x110000
TRIAL_TEXTS = (
    *("", " ", "\n", "  two  spaces \n\n\tand tabs\r\n", "It's we'll THEY'RE 'tis", "x1 22 333 4,444.5 ½ ²"),
    *("naïve Ωmega", "漢字とかな 한국어", "مرحبا שלום", "\U0001f469\u200d\U0001f467 \U0001f1ea\U0001f1fa"),
    *("def f(x):\n    return x**2  # ok\n", "\x00\x07\x7f\ufeff\u2028\xa0\u3000."),
)


@dataclass(frozen=True)
class Encoded:
    """Concatenated tokens of documents, and the number of tokens of each.

    ids: shape [sum(lengths)]; lengths: shape [documents].
    """

    ids: npt.NDArray[np.integer]
    lengths: npt.NDArray[np.int64]

    def documents(self) -> list[npt.NDArray[np.integer]]:
        """Return the tokens of each document."""
        return np.split(self.ids, np.cumsum(self.lengths)[:-1]) if len(self.lengths) else []

    def surrounded(self, prefix: Sequence[int], suffix: Sequence[int], which: npt.NDArray[np.bool_]) -> "Encoded":
        """Return the documents with tokens added before and after those where `which` (shape [documents]) is true."""
        if not prefix and not suffix:
            return self
        ends = np.cumsum(self.lengths)
        borders = np.stack([ends - self.lengths, ends], axis=1)[which]
        places = np.repeat(borders, [len(prefix), len(suffix)], axis=1)
        ids = np.insert(self.ids, places.ravel(), np.tile([*prefix, *suffix], len(places)))
        return Encoded(ids, self.lengths + which * places.shape[1])


class TextEncoder:
    """Encode documents as `tokenizer(text).input_ids` of transformers does. Safe to use from several threads.

    At the first documents, gigatoken is tried. If it does not work with the tokenizer, a warning is printed once.

    Args:
        reference: the tokenizer that defines the ids.
        vocabulary_size: its number of tokens, as Megatron counts it.
        end_of_document: id of the token that ends a document, if there is one.
    """

    def __init__(self, reference: "tokenizers.Tokenizer", vocabulary_size: int, end_of_document: int | None) -> None:
        self.vocabulary_size, self.end_of_document = vocabulary_size, end_of_document
        self._reference = reference
        self._prefix, self._suffix = _template(reference)
        self._lock = threading.Lock()
        self._since_restart = 0
        self._same = np.zeros(CODE_POINTS, dtype=np.bool_)  # characters that both libraries are known to treat alike
        self._fast: Any = None
        self._tried = False

    @property
    def engine(self) -> str:
        """Return the name of the library that encodes."""
        return "tokenizers" if self._fast is None else "gigatoken"

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Encode documents, which must not contain lone surrogates. The ids are of type uint32."""
        if not texts:
            return _encoded([])
        with self._lock:
            fast = self._choose_fast(texts)
        if fast is None:
            return self.encode_by_reference(texts)
        encoded = self._encode_fast(fast, texts)
        doubtful = [i for i, text in enumerate(texts) if self._is_doubtful(fast, text)]
        if doubtful:
            documents = encoded.documents()
            replaced = self.encode_by_reference([texts[i] for i in doubtful]).documents()
            for i, document in zip(doubtful, replaced, strict=True):
                documents[i] = document
            encoded = _encoded(documents)
        return encoded

    def encode_by_reference(self, texts: Sequence[str]) -> Encoded:
        """Encode documents with the reference, which is slow and takes 250 bytes of memory per character."""
        return _encoded([encoding.ids for encoding in self._reference.encode_batch_fast(list(texts))])

    def decode(self, ids: npt.NDArray[np.integer]) -> str:
        """Return the text of tokens (shape [tokens]), special ones included."""
        return self._reference.decode(ids.tolist(), skip_special_tokens=False)

    def _choose_fast(self, texts: Sequence[str]) -> Any:
        """Return gigatoken's tokenizer if it works, loaded again after much text; else None."""
        if not self._tried:
            self._tried = True
            try:
                self._fast = self._start_fast(texts)
            except Exception as error:  # gigatoken has no exception class
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                print(
                    f"warning: gigatoken cannot be used here ({reason[:200]}): the library tokenizers takes its place, "
                    "with the same ids, but about 30 times slower.",
                    file=sys.stderr,
                    flush=True,
                )
        self._since_restart += sum(map(len, texts))
        if self._fast is not None and self._since_restart > CHARACTERS_BETWEEN_RESTARTS:
            self._fast = self._load_fast()
            self._since_restart = 0
        return self._fast

    def _start_fast(self, texts: Sequence[str]) -> Any:
        """Load gigatoken's tokenizer and try it on strange texts, special tokens and the first documents.

        Raises:
            Exception: gigatoken cannot load the tokenizer, or gives different ids than the reference.
        """
        fast = self._load_fast()
        specials = [token.content for token in self._reference.get_added_tokens_decoder().values()][:32]
        first = [text[:CHARACTERS_ON_TRIAL] for text in texts[:DOCUMENTS_ON_TRIAL]]
        trial = [*TRIAL_TEXTS, *(f"a{token} {token}{token}\n{token}b" for token in specials)]
        trial += [text for text in first if not self._is_doubtful(fast, text)]
        for text, same in zip(trial, self._agree(fast, trial), strict=True):
            if not same:
                raise ValueError(f"it gives different ids for {text[:40]!r}")
        return fast

    def _load_fast(self) -> Any:
        import gigatoken

        return gigatoken.Tokenizer(self._reference)

    def _encode_fast(self, fast: Any, texts: Sequence[str]) -> Encoded:
        layout = fast.encode_batch(list(texts), parallel=False).layout
        offsets = np.asarray(layout.offsets.data, dtype=np.int64)
        ids = np.asarray(layout.content.data)[offsets[0] : offsets[-1]]
        return Encoded(ids, np.diff(offsets)).surrounded(self._prefix, self._suffix, np.ones(len(texts), dtype=bool))

    def _agree(self, fast: Any, texts: Sequence[str]) -> list[bool]:
        actual, expected = self._encode_fast(fast, texts).documents(), self.encode_by_reference(texts).documents()
        return [np.array_equal(document, other) for document, other in zip(actual, expected, strict=True)]

    def _is_doubtful(self, fast: Any, text: str) -> bool:
        """Return whether the text has a character that the two libraries treat differently."""
        if text.isascii():
            return False
        code_points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        same = self._same[code_points]
        if same.all():
            return False
        others = np.unique(code_points[~same])
        # These texts show whether a character counts as letter, number, space or none of them.
        self._same[others] = self._agree(fast, [f"a{c}1{c}'s {c}\n" for c in map(chr, others)])
        return not self._same[others].all()


def _encoded(documents: Sequence[Sequence[int] | npt.NDArray[np.integer]]) -> Encoded:
    arrays = [np.asarray(document, dtype=np.uint32) for document in documents]
    lengths = np.array([len(array) for array in arrays], dtype=np.int64)
    return Encoded(np.concatenate(arrays) if arrays else np.empty(0, dtype=np.uint32), lengths)


def _template(reference: "tokenizers.Tokenizer") -> tuple[list[int], list[int]]:
    """Return the special tokens that the tokenizer puts before and after every text."""
    whole, text = reference.encode("a").ids, reference.encode("a", add_special_tokens=False).ids
    start = next((i for i in range(len(whole)) if whole[i : i + len(text)] == text), 0)
    return whole[:start], whole[start + len(text) :]


def load_encoder(
    tokenizer_type: str,
    vocab_file: str | None = None,
    merge_file: str | None = None,
    tokenizer_model: str | None = None,
) -> TextEncoder:
    """Return an encoder that gives the same ids as Megatron's tokenizer of this type.

    Raises:
        DataError: a flag is missing or does not name a tokenizer.
    """
    if tokenizer_type == GPT2_TOKENIZER:
        return gpt2_encoder(vocab_file, merge_file)
    if not tokenizer_model or vocab_file or merge_file:
        raise DataError(
            f"--tokenizer-type {tokenizer_type}: needs --tokenizer-model, a folder with the tokenizer's files, and "
            "neither --vocab-file nor --merge-file.",
            "REMOE-E513",
        )
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer_model, trust_remote_code=False)
        reference = tokenizer.backend_tokenizer
    except Exception as error:  # transformers raises many types; tokenizers without a fast version have no backend
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"--tokenizer-model {tokenizer_model}: transformers cannot load a fast tokenizer from it ({reason}). "
            "Give a folder with tokenizer.json, or with vocab.json, merges.txt and tokenizer_config.json.",
            "REMOE-E513",
        ) from error
    reference.no_truncation()
    reference.no_padding()
    # As in Megatron, the separator ends documents if there is no end-of-sequence token.
    end_of_document = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    return TextEncoder(reference, len(tokenizer), end_of_document)


def gpt2_encoder(vocab_file: Path | str | None, merge_file: Path | str | None) -> TextEncoder:
    """Return the encoder for a GPT-2 vocabulary."""
    tokenizer = read_gpt2_vocabulary(vocab_file, merge_file)
    return TextEncoder(tokenizer, tokenizer.get_vocab_size(), tokenizer.token_to_id(END_OF_TEXT))
