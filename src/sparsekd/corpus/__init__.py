"""Text to token blocks. In: sources, evaluation texts, a tokenizer; out: a `Corpus` of blocks with a fingerprint."""

from sparsekd.corpus.blocks import ALL as ALL
from sparsekd.corpus.blocks import Corpus as Corpus
from sparsekd.corpus.blocks import Share as Share
from sparsekd.corpus.blocks import shuffled as shuffled
from sparsekd.corpus.building import build as build
from sparsekd.corpus.embedded import python_functions as python_functions
from sparsekd.corpus.guard import GUARD_WORDS as GUARD_WORDS
from sparsekd.corpus.guard import GUARDED as GUARDED
from sparsekd.corpus.guard import task_key as task_key
from sparsekd.corpus.guard import text_key as text_key
from sparsekd.corpus.packing import blocks_from_texts as blocks_from_texts
from sparsekd.corpus.storing import load as load
from sparsekd.corpus.storing import save as save
from sparsekd.corpus.texts import add_texts as add_texts
from sparsekd.corpus.texts import read_text as read_text
from sparsekd.corpus.tokens import beginning as beginning
from sparsekd.corpus.tokens import encode as encode
