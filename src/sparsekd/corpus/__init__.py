"""Text to token blocks. In: sources, evaluation texts, a tokenizer; out: a `Corpus` of blocks with a fingerprint."""

from sparsekd.corpus.blocks import ALL as ALL
from sparsekd.corpus.blocks import GUARD_WORDS as GUARD_WORDS
from sparsekd.corpus.blocks import GUARDED as GUARDED
from sparsekd.corpus.blocks import Corpus as Corpus
from sparsekd.corpus.blocks import Share as Share
from sparsekd.corpus.blocks import add_texts as add_texts
from sparsekd.corpus.blocks import beginning as beginning
from sparsekd.corpus.blocks import blocks_from_texts as blocks_from_texts
from sparsekd.corpus.blocks import build as build
from sparsekd.corpus.blocks import encode as encode
from sparsekd.corpus.blocks import load as load
from sparsekd.corpus.blocks import read_text as read_text
from sparsekd.corpus.blocks import save as save
from sparsekd.corpus.blocks import shuffled as shuffled
from sparsekd.corpus.blocks import task_key as task_key
from sparsekd.corpus.blocks import text_key as text_key
